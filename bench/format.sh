#!/bin/sh
# bench/format.sh - the tables of docs/format.md: sizes, errors and loading times of .moe files.
#
#   make bench-format            with the models of `make models`, or those of MOE_FORMAT_MODELS
#
# MOE_FORMAT_TYPES chooses the types; a number is a size, for --bpw, in trellis-coded types.
# MOE_FORMAT_TEXT is the text; if it is empty the divergence, which takes most of the time, is left
# out. MOE_FORMAT_RUN stands in front of the command that measures loading, such as "nice -n -5".
#
# Each model is converted from the file as it is published to each type, compressed, and that to a
# raw file. The error is the receipt's, over all quantized weights; the divergence is from the
# published model on tests/data/eval_text.txt; loading is the best of five with the file in the page
# cache. For models without a tokenizer the divergence stays empty. Markdown goes to stdout.
set -eu

build=${MOE_BUILD:-build}
models=${MOE_MODELS:-$HOME/.cache/moe/models}
text=${MOE_FORMAT_TEXT-tests/data/eval_text.txt}
types=${MOE_FORMAT_TYPES:-"source BF16 F16 Q8_0 Q6_K Q5_K q4_k_m Q4_K IQ4_XS Q4_1 IQ4_NL Q4_0 \
MXFP4 Q3_K Q2_K 6 5 4.5 4 3.5 3"}
work=$(mktemp -d "${TMPDIR:-/tmp}/moe-format-XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

# The number behind "KEY": in a file of one JSON object.
number() {
    sed -n 's/.*"'"$1"'": *\([-0-9.e+]*\).*/\1/p' "$2" | head -n 1
}

# One line of the table. row MODEL TYPE
row() {
    case $2 in
    source) quant="" ;;
    [0-9]*) quant="--bpw $2" ;;
    *) quant="--quant $2" ;;
    esac
    # shellcheck disable=SC2086 # words
    "$build/moe-convert" "$1" "$work/zstd.moe" $quant --store zstd --json \
        >"$work/zstd.json" 2>&1 || {
        echo "| $2 | $(tail -n 1 "$work/zstd.json" | cut -c 1-60) | | | | | | | |"
        return
    }
    "$build/moe-convert" "$work/zstd.moe" "$work/raw.moe" --store raw --json >"$work/raw.json"
    "$build/moe" info "$work/zstd.moe" --json >"$work/info.json" 2>/dev/null
    echo '{"kl":-1}' >"$work/kl.json"
    [ ! -e "$work/base" ] ||
        "$build/moe" eval "$work/raw.moe" "$text" --kl-base "$work/base" --json -q >"$work/kl.json"
    error=$(tr '{' '\n' <"$work/info.json" | awk -F '[:,}]' '/"n_weight"/ && /"error"/ {
        for (i = 1; i < NF; i++) { if ($i == "\"n_weight\"") n = $(i + 1)
                                   if ($i == "\"error\"") e = $(i + 1) }
        sum += n * e; all += n } END { printf "%.3g", all ? sum / all : 0 }')
    # shellcheck disable=SC2086
    ${MOE_FORMAT_RUN:-} "$build/bench/loading" "$work/raw.moe" "$work/zstd.moe" >"$work/loading"
    case $2 in [0-9]*) name="\`--bpw $2\`" ;; *) name=$2 ;; esac
    # shellcheck disable=SC2046
    set -- "$name" $(awk '$1 == "raw.moe" { raw = $3 } $1 == "zstd.moe" { print raw, $3, $7 }' \
        "$work/loading")
    raw_bits=$(number bits_per_weight "$work/raw.json")
    zstd_bits=$(number bits_per_weight "$work/zstd.json")
    awk -v t="$1" -v raw="$raw_bits" -v zstd="$zstd_bits" -v e="$error" \
        -v kl="$(number kl "$work/kl.json")" -v a="$2" -v b="$3" -v rate="$4" 'BEGIN {
        printf "| %s | %.2f | %.2f | %+.1f %% | %s | %s | %.1f ms | %.0f ms | %.2f |\n", t, raw,
               zstd, 100 * (zstd / raw - 1), e, kl < 0 ? "" : sprintf("%.5f", kl), a * 1e3,
               b * 1e3, rate }'
}

for model in ${MOE_FORMAT_MODELS:-"$models/smollm2.gguf" "$models/gemma3.gguf"}; do
    [ -e "$model" ] || { echo "$model is not there: make models" >&2; continue; }
    [ -z "$text" ] ||
        "$build/moe" eval "$model" "$text" --save-logits "$work/base" -q >/dev/null 2>&1 ||
        rm -f "$work/base"
    printf '\n**%s**, %s bytes as published\n\n' "$(basename "$model" .gguf)" "$(wc -c <"$model")"
    echo "| type | bits, raw | bits, zstd | | squared error | KL | load raw | load zstd |" \
        "GB/s per core |"
    echo "|---|---|---|---|---|---|---|---|---|"
    for type in $types; do
        row "$model" "$type"
    done
    rm -f "$work/base"
done
