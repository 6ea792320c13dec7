#!/bin/sh
# bench/format.sh - the tables of docs/format.md: size, error, divergence and loading of each type.
#
#   make bench-format            with the models of `make models`, into docs/format.md
#   bench/format.sh [MODEL.gguf ...]
#
#   MOE_FORMAT_PAGE   the page between whose markers the tables go; "-": to stdout
#   MOE_FORMAT_TYPES  the types; a number is a rate for --bpw, in trellis-coded types
#   MOE_FORMAT_TEXT   the text of the divergence, which takes most of the time; empty: none
#   MOE_FORMAT_CALIBRATION  files whose text tells the importance of columns; empty: without
#   MOE_FORMAT_WORK   a folder: rows that are in it are taken from there. Without it they are kept
#                     in the build's folder until the tables are written, so that a run that was
#                     interrupted goes on, unless the programs or what they are asked changed
#   MOE_FORMAT_RUN    in front of the command that measures loading, such as "nice -n -5"
#
# A model that is published in a quantized type is compared by way of a neutral copy
# (bench/neutral.c): it is the source of all rows but "as published", which is the file itself.
# Each row is a .moe with --store zstd, and the same weights as GGUF. The error is the receipt's,
# over all quantized weights; the divergence is from the source, on tests/data/eval_text.txt, once
# without and once with importance; loading is the best of five from the page
# cache.
set -euf

build=${MOE_BUILD:-build}
models=${MOE_MODELS:-$HOME/.cache/moe/models}
text=${MOE_FORMAT_TEXT-tests/data/eval_text.txt}
types=${MOE_FORMAT_TYPES:-"published BF16 Q8_0 Q6_K q5_k_m q4_k_m Q4_1 IQ4_NL Q4_0 MXFP4 q3_k_m \
Q2_K 6 5 4.25 3.5 2.75"}
calibration=${MOE_FORMAT_CALIBRATION-README.md docs/gguf.md docs/embedding.md \
docs/adding-a-model.md}
page=${MOE_FORMAT_PAGE:-docs/format.md}
begin='<!-- bench-format: begin -->' end='<!-- bench-format: end -->'
[ "$page" = - ] || [ "$(grep -cxF -e "$begin" -e "$end" "$page")" = 2 ] || {
    echo "format.sh: $page lacks the lines $begin, $end" >&2
    exit 1
}
dir=$(mktemp -d "${TMPDIR:-/tmp}/moe-format-XXXXXX")
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
if [ $# = 0 ]; then
    set -- "$models/smollm2.gguf" "$models/gemma3.gguf"
    [ ! -e "$models/moe.gguf" ] || set -- "$@" "$models/moe.gguf"
fi
for model in "$@"; do
    [ -e "$model" ] || {
        echo "format.sh: $model is not there: make models" >&2
        exit 1
    }
done
rows=${MOE_FORMAT_WORK:-$build/bench-format}
if [ -z "${MOE_FORMAT_WORK:-}" ]; then
    # shellcheck disable=SC2086
    { cat "$build/moe" "$build/moe-convert" "$0" ${text:+"$text"} $calibration
        ls -Ll "$@"; } | cksum >"$dir/made_of"
    cmp -s "$dir/made_of" "$rows/made_of" || rm -rf "$rows"
    mkdir -p "$rows" && mv "$dir/made_of" "$rows/made_of"
else
    mkdir -p "$rows"
fi

# The number behind the first "KEY": in a file of JSON.
number() {
    tr ',{' '\n' <"$2" | sed -n 's/^ *"'"$1"'": *\([-0-9.e+]*\).*/\1/p' | head -n 1
}

# A line that is overwritten by the next one: the step, and how much time is left.
n_steps=0 n_done=0 n_made=0 started=$(date +%s)
progress() {
    seconds=$(($(date +%s) - started)) left=""
    [ $n_made -lt 3 ] ||
        left=", $((seconds * (n_steps - n_done) / n_made / 60 + 1)) min left"
    [ ! -t 2 ] || printf '\r\033[K' >&2
    printf 'bench-format: %d of %d, %d s%s: %s' $n_done $n_steps $seconds "$left" "$*" >&2
    [ -t 2 ] || echo >&2
}

# The divergence of a file from the source, or "-".
divergence() {
    if [ -e "$dir/base" ] && "$build/moe" eval "$1" "$dir/text" --kl-base "$dir/base" --json -q \
        >"$dir/kl.json"; then
        number kl "$dir/kl.json"
    else
        echo -
    fi
}

# Prepares $dir/source, $dir/base and $dir/imatrix, as far as a row needs them. MODEL
prepare() {
    [ "$(cat "$dir/prepared" 2>/dev/null)" != "$1" ] || return 0
    rm -f "$dir/source.gguf" "$dir/base" "$dir/imatrix"
    "$build/moe" info "$1" --json >"$dir/info.json"
    if grep -q '"quantization":"B\{0,1\}F[0-9]*"' "$dir/info.json"; then
        ln -s "$(realpath "$1")" "$dir/source.gguf"
    else
        "$build/bench/neutral" "$1" "$dir/source.gguf"
    fi
    if [ -n "$text" ]; then
        cp "$text" "$dir/text"
        # A large vocabulary makes it slow.
        [ "$(number n_vocab "$dir/info.json")" -lt 100000 ] ||
            head -c 5200 "$text" >"$dir/text"
        "$build/moe" eval "$dir/source.gguf" "$dir/text" --save-logits "$dir/base" -q \
            >"$dir/out" 2>&1 || rm -f "$dir/base" # no tokenizer
    fi
    if [ -e "$dir/base" ] && [ -n "$calibration" ]; then
        # shellcheck disable=SC2086
        cat $calibration >"$dir/calibration"
        "$build/moe" imatrix "$dir/source.gguf" "$dir/calibration" -o "$dir/imatrix" \
            --windows 12 --no-output -q >"$dir/out" 2>&1
    fi
    echo "$1" >"$dir/prepared"
}

# The squared error of all quantized weights, from the receipt.
error_of() {
    "$build/moe" info "$1" --json 2>/dev/null | tr '{' '\n' |
        awk -F '[:,}]' '/"n_weight"/ && /"error"/ {
        for (i = 1; i < NF; i++) { if ($i == "\"n_weight\"") n = $(i + 1)
                                   if ($i == "\"error\"") e = $(i + 1) }
        sum += n * e; all += n } END { printf "%.3g", all ? sum / all : 0 }'
}

# row MODEL TYPE: name, bits in memory, bits stored, error, KL, seconds to load, GB/s per core, the
# same as GGUF: seconds; then with importance: bits stored, KL.
row() {
    from=$dir/source.gguf weighted=""
    case $2 in
    published) quant="" from=$1 ;;
    [0-9]*) quant="--bpw $2" weighted=1 ;;
    *16 | *32 | *Q8_0) quant="--quant $2" ;;
    *) quant="--quant $2" weighted=1 ;;
    esac
    # shellcheck disable=SC2086 # words
    "$build/moe-convert" "$from" "$dir/a.moe" $quant --store zstd --json --quiet \
        >"$dir/a.json" || return 1
    gguf=$dir/a.gguf memory=$(awk -F '"bytes": ' '{ for (i = 3; i <= NF; i++) n += $i; print n }' \
        "$dir/a.json")
    "$build/moe-convert" "$dir/a.moe" "$gguf" --quiet 2>"$dir/out" || gguf=""
    kl=-
    [ "$2" = published ] || kl=$(divergence "$dir/a.moe")
    # shellcheck disable=SC2086
    ${MOE_FORMAT_RUN:-} "$build/bench/loading" "$dir/a.moe" $gguf >"$dir/loading"
    plain="$2 $memory $(number n_weights "$dir/a.json") $(number bits_per_weight "$dir/a.json") \
$(error_of "$dir/a.moe") $kl $(awk '$1 == "a.moe" { print $3, $7 }' "$dir/loading") \
$(awk '$1 == "a.gguf" { s = $3 } END { print s ? s : "-" }' "$dir/loading")"
    stored=- kl=-
    if [ -n "$weighted" ] && [ -e "$dir/imatrix" ]; then
        # shellcheck disable=SC2086
        "$build/moe-convert" "$from" "$dir/a.moe" $quant --store zstd --imatrix "$dir/imatrix" \
            --json --quiet >"$dir/a.json" || return 1
        stored=$(number bits_per_weight "$dir/a.json") kl=$(divergence "$dir/a.moe")
    fi
    echo "$plain $stored $kl"
    rm -f "$dir"/a.*
}

# The tables of one model, from its rows: what each type is, then, for those of GGUF, the size of
# trellis-coded types at the same divergence, by lines through the logarithms of their neighbours.
table() {
    awk '
    function cell(x, format) { return x == "-" ? "" : sprintf(format, x) }
    function at(kl, weighted,    i, a, b) { # bits of the trellis-coded types
        if (kl == "-")
            return 0
        for (i = 2; i <= n; i++) {
            a = KL[i, weighted]; b = KL[i - 1, weighted]
            if (a >= kl && kl >= b && b > 0)
                break
        }
        if (i > n)
            return 0
        b = log(a / kl) / log(a / b) # the part of the way
        return stored[i, weighted] + b * (stored[i - 1, weighted] - stored[i, weighted])
    }
    function versus(bits, other) {
        return bits ? sprintf("%+.0f %%", 100 * (bits / other - 1)) : ""
    }
    {
        name = $1 == "published" ? "as published" : $1 ~ /^[0-9]/ ? "`--bpw " $1 "`" : $1
        bits = 8 * $2 / $3
        printf "| %s | %.2f | %.2f | %+.1f %% | %s | %s | %s | %s | %.0f ms | %.2f |\n", name,
               bits, $4, 100 * ($4 / bits - 1), $5, cell($6, "%.3g"), cell($11, "%.3g"),
               cell($9 == "-" ? "-" : 1e3 * $9, "%.1f ms"), 1e3 * $7, $8
        if ($1 ~ /^[0-9]/) {
            stored[++n, 0] = $4; stored[n, 1] = $10; KL[n, 0] = $6; KL[n, 1] = $11
        } else if ($6 != "-") {
            gguf[++m] = $1; raw[m] = bits; moe[m, 0] = $4; moe[m, 1] = $10; kl[m, 0] = $6
            kl[m, 1] = $11
        }
    }
    END {
        if (!n || !m)
            exit
        print "\n| at the KL of | bits | stored | trellis-coded | | | with importance | | |"
        print "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
        for (i = 1; i <= m; i++) {
            a = at(kl[i, 0], 0)
            b = at(kl[i, 1], 1)
            if (!a && !b)
                continue
            printf "| %s | %.2f | %.2f | %s | %s | %s | %s | %s | %s |\n", gguf[i], raw[i],
                   moe[i, 0], a ? sprintf("%.2f", a) : "", versus(a, raw[i]),
                   versus(a, moe[i, 0]), b ? sprintf("%.2f", b) : "", versus(b, raw[i]),
                   versus(b, moe[i, 1])
        }
    }' "$1"
}

# shellcheck disable=SC2086
n_steps=$(($# * $(set -- $types && echo $#)))
for model in "$@"; do
    for type in $types; do
        file=$rows/$(basename "$model" .gguf).$type
        if [ ! -e "$file" ]; then
            progress "$(basename "$model" .gguf), $type"
            prepare "$model"
            row "$model" "$type" >"$dir/row" || : >"$dir/row" # a type that does not fit
            mv "$dir/row" "$file"
            n_made=$((n_made + 1))
        fi
        n_done=$((n_done + 1))
    done
done
[ ! -t 2 ] || printf '\r\033[K' >&2

{
    echo "$begin"
    for model in "$@"; do
        base=$(basename "$model" .gguf)
        printf '\n%s, %s bytes as published:\n\n' "$base" "$(wc -c <"$model")"
        echo "| type | bits in memory | stored | | error | KL | KL, importance | opening, GGUF |" \
            "loading, .moe | GB/s per core |"
        echo "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
        for type in $types; do
            cat "$rows/$base.$type"
        done >"$dir/table"
        table "$dir/table"
    done
    echo
    echo "$end"
} >"$dir/section"
if [ "$page" = - ]; then
    sed '1d;$d' "$dir/section"
else
    awk -v begin="$begin" -v end="$end" -v section="$dir/section" '
    $0 == begin { while ((getline line < section) > 0) print line; inside = 1 }
    !inside     { print }
    $0 == end   { inside = 0 }' "$page" >"$dir/page" && cat "$dir/page" >"$page"
fi
[ -n "${MOE_FORMAT_WORK:-}" ] || rm -rf "$rows"
