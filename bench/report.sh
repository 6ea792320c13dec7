#!/bin/sh
# bench/report.sh - how throughput scales with threads, prompt length and model width, as a fraction
# of what the hardware can do: tables and a plot for docs/performance.md. `make bench-report` calls
# it.
#
#   bench/report.sh [options] MODEL...
#
#     --repeat N      repetitions of each measurement, default 3
#     --quick         short prompts, one repetition: to see that the report works
#     --seconds N     leave out a prompt that would take longer than this, default 120
#     --roofline F    the output of `build/bench/roofline --json`; default: it is run
#     --run COMMAND   in front of every measurement, such as "nice -n -5"
#     --docs FOLDER   default docs: performance.md, between its markers, and scaling.svg
#
# Environment: MOE and ROOFLINE, the programs; default build/moe and build/bench/roofline.
#
# "of limit" is the fraction of the fastest products of bytes (of float32 numbers for float weights)
# in prefill, and of the fastest reading of memory in decode, that the same number of threads
# reaches in bench/roofline.c. More threads than cores have the limit of all cores.
set -uf

usage() {
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
fail() {
    echo "report.sh: $*" >&2
    exit 1
}

moe=${MOE:-build/moe} roofline=${ROOFLINE:-build/bench/roofline}
repeat=3 quick=0 seconds=120 limits="" run="" docs=docs
while [ $# -gt 0 ]; do
    case $1 in
    --quick) quick=1 ;;
    --repeat | --seconds | --roofline | --run | --docs)
        [ $# -gt 1 ] || usage
        case $1 in
        --repeat) repeat=$2 ;;
        --seconds) seconds=$2 ;;
        --roofline) limits=$2 ;;
        --run) run=$2 ;;
        --docs) docs=$2 ;;
        esac
        shift
        ;;
    --*) usage ;;
    *) break ;;
    esac
    shift
done
[ $# -gt 0 ] || usage
page=$docs/performance.md begin='<!-- bench-report: begin -->' end='<!-- bench-report: end -->'
[ "$(grep -cxF -e "$begin" -e "$end" "$page")" = 2 ] || fail "$page lacks the lines $begin, $end"

dir=$(mktemp -d "${TMPDIR:-/tmp}/moe-report.XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM

cores=$("$moe" bench "$1" -p 1 -n 0 -r 1 --json | sed -n 's/.*"threads":\([0-9]*\).*/\1/p')
[ -n "$cores" ] || fail "cannot run $1"
if [ $quick = 1 ]; then
    repeat=1 lengths="32 128 512" prompt=128 generate=8 rf="--quick"
else
    lengths="32 128 512 2048 8192" prompt=512 generate=64 rf=""
fi
if [ -z "$limits" ]; then
    limits=$dir/limits
    # shellcheck disable=SC2086 # lists of words
    $run "$roofline" --json --threads "$cores" $rf >"$limits" || fail "$roofline failed"
fi
# The best of a kind: `limit read one`, `limit int8 all`.
limit() {
    awk -v kind="\"kind\": \"$1\"" -v column="\"$2\": " 'index($0, kind) {
        v = substr($0, index($0, column) + length(column)) + 0
        if (v > best) best = v
    } END { print best + 0 }' "$limits"
}
value() { # KEY, of the last measurement
    sed -n -e "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p" -e "s/.*\"$1\":\([^,\"}][^,\"}]*\).*/\1/p" \
        "$dir/json"
}
median() {
    sed -n "s/.*\"$1\":{[^}]*\"median\":\([0-9.e+-]*\).*/\1/p" "$dir/json"
}

# measure TABLE MODEL THREADS PROMPT GENERATE: a line of $dir/rows, fields separated by tabs:
# table, model, type, width, threads, prompt, prefill tokens/s, Gop/s, of limit, decode tokens/s,
# GB/s, of limit; then prefill and decode as fractions of the limits of all cores.
measure() {
    if [ "$3" = 1 ]; then column=one; else column=all; fi
    echo "$2: $3 threads, prompt $4, generate $5" >&2
    # shellcheck disable=SC2086 # lists of words
    $run "$moe" bench "$2" -t "$3" -p "$4" -n "$5" -r "$repeat" --json >"$dir/json" ||
        fail "$moe bench $2 failed"
    type=$(value quantization)
    case $type in
    F32 | F16 | BF16) kind=f32 ;;
    *) kind=int8 ;;
    esac
    awk -v OFS='\t' -v table="$1" -v model="$(basename "$2")" -v type="$type" \
        -v width="$(value n_embd)" -v threads="$3" -v prompt="$4" \
        -v pp="$(median prefill_tokens_per_s)" -v ops="$(value prefill_ops_per_s)" \
        -v tg="$(median decode_tokens_per_s)" -v bytes="$(value decode_bytes_per_s)" \
        -v op_limit="$(limit $kind $column)" -v op_all="$(limit $kind all)" \
        -v read_limit="$(limit read $column)" -v read_all="$(limit read all)" 'BEGIN {
        sub(/\.(gguf|moe)$/, "", model)
        print table, model, type, width, threads, prompt, pp, ops * 1e-9, ops * 1e-9 / op_limit,
              tg, bytes * 1e-9, bytes * 1e-9 / read_limit, ops * 1e-9 / op_all,
              bytes * 1e-9 / read_all }' >>"$dir/rows"
    rate=$(median prefill_tokens_per_s)
}

for model in "$@"; do
    for threads in 1 "$cores" $((2 * cores)) $((4 * cores)); do
        [ "$threads" = 1 ] && [ "$cores" = 1 ] && continue
        measure threads "$model" "$threads" "$prompt" "$generate"
        [ "$threads" = "$cores" ] && fast=$rate
    done
    for length in $lengths; do
        if awk "BEGIN { exit !($length / $fast > $seconds) }"; then
            echo "$model: a prompt of $length would take too long: left out" >&2
        else
            measure length "$model" "$cores" "$length" 0
        fi
    done
done

# The machine, in words. A processor without a name has at least an architecture.
processor=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1)
{
    echo "$begin"
    echo
    echo "${processor:-$(uname -m)}, $cores cores, $(value device), median of $repeat. The" \
        "machine at most:"
    echo "reading $(limit read one) GB/s with one thread, $(limit read all) with all; products" \
        "of bytes $(limit int8 one) and $(limit int8 all) Gop/s;"
    echo "float32 $(limit f32 one) and $(limit f32 all) Gop/s."
    echo
    echo "![Fractions of the hardware's limit against threads, prompt length and" \
        "width](scaling.svg)"
    awk -F '\t' -v prompt="$prompt" -v generate="$generate" '
    function head(text, width_first) {
        print "\n" text "\n"
        print "| model | type | width | threads | prompt | prefill tokens/s | Gop/s | of limit |" \
              " decode tokens/s | GB/s | of limit |"
        print "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    }
    function row(decode) {
        printf("| %s | %s | %d | %d | %d | %.1f | %.1f | %.0f %% |", $2, $3, $4, $5, $6, $7, $8,
               100 * $9)
        if (decode)
            printf(" %.2f | %.2f | %.0f %% |\n", $10, $11, 100 * $12)
        else
            print " | | |"
    }
    $1 == "threads" {
        if (!threads++)
            head("Against threads, prompt " prompt ", " generate " tokens of decode; the models" \
                 " differ in width:")
        row(1)
    }
    $1 == "length" { lengths[++n] = $0 }
    END {
        head("Against prompt length:")
        for (i = 1; i <= n; i++) { $0 = lengths[i]; row(0) }
    }' "$dir/rows"
    echo
    echo "$end"
} >"$dir/section"

# ---------------------------------------------------------------------------------------- plot --

# Three panels beside each other: y is the fraction of the limit of all cores, x a power of two.
awk -F '\t' -v cores="$cores" '
function x_of(panel, v) {
    return left[panel] + 10 + (log(v) - low[panel]) / (high[panel] - low[panel]) * 200
}
function y_of(v) { return 250 - v / top * 200 }
function text(x, y, anchor, s) {
    printf("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n", x, y, anchor, s)
}
function note(panel, line, x, y) {
    if (!((panel, x) in tick)) { tick[panel, x] = 1; ticks[panel] = ticks[panel] " " x }
    if (!(panel in low) || log(x) < low[panel]) low[panel] = log(x)
    if (!(panel in high) || log(x) > high[panel]) high[panel] = log(x)
    if (!((panel, line) in points)) lines[panel, ++n_lines[panel]] = line
    points[panel, line] = points[panel, line] " " x " " y
    if (y > top) top = y
}
function safe(s) { gsub(/&/, "\\&amp;", s); gsub(/</, "\\&lt;", s); return s }
{
    if (!($2 in number)) { number[$2] = ++n_models; name[n_models] = $2 }
    m = number[$2]
}
$1 == "threads" { note(1, m " 0", $5, $13); note(1, m " 1", $5, $14) }
$1 == "threads" && $5 == cores { note(3, "0 0", $4, $13); note(3, "0 1", $4, $14) }
$1 == "length" { note(2, m " 0", $6, $13) }
END {
    split("#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000 #999933", colour, " ")
    split("threads|prompt length (prefill)|width (all cores)", title, "|")
    top = top > 1 ? top : 1
    height = 290 + 18 * (n_models + 1)
    printf("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"820\" height=\"%d\" " \
           "font-family=\"sans-serif\" font-size=\"12\">\n" \
           "<rect width=\"820\" height=\"%d\" fill=\"white\"/>\n", height, height)
    text(410, 18, "middle", "Fraction of what the hardware can do at most, all cores")
    for (p = 1; p <= 3; p++) {
        left[p] = 50 + (p - 1) * 260
        if (high[p] == low[p]) high[p] = low[p] + 1
        text(left[p] + 110, 38, "middle", "by " title[p])
        for (i = 0; i <= 4; i++) {
            y = y_of(top * i / 4)
            printf("<path d=\"M%d %.1fh220\" stroke=\"#ddd\"/>\n", left[p], y)
            text(left[p] - 4, y + 4, "end", sprintf("%.0f %%", 100 * top * i / 4))
        }
        n = split(ticks[p], v, " ")
        for (i = 1; i <= n; i++)
            text(x_of(p, v[i]), 268, "middle", v[i])
        for (l = 1; l <= n_lines[p]; l++) {
            split(lines[p, l], key, " ") # model or 0, decode or not
            n = split(points[p, lines[p, l]], v, " ")
            c = key[1] ? colour[(key[1] - 1) % 8 + 1] : "#444"
            d = ""
            for (i = 1; i < n; i += 2) {
                d = d (i > 1 ? "L" : "M") sprintf("%.1f %.1f", x_of(p, v[i]), y_of(v[i + 1]))
                printf("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", x_of(p, v[i]),
                       y_of(v[i + 1]), key[2] ? "white\" stroke=\"" c : c)
            }
            if (key[1]) # widths are those of different models: no line
                printf("<path d=\"%s\" fill=\"none\" stroke=\"%s\"%s/>\n", d, c,
                       key[2] ? " stroke-dasharray=\"4 3\"" : "")
        }
    }
    text(50, 290, "start",
         "filled, solid: prefill, of operations; hollow, dashed: decode, of bytes read")
    for (m = 1; m <= n_models; m++) {
        printf("<rect x=\"50\" y=\"%d\" width=\"12\" height=\"12\" fill=\"%s\"/>\n", 280 + 18 * m,
               colour[(m - 1) % 8 + 1])
        text(68, 290 + 18 * m, "start", safe(name[m]))
    }
    print "</svg>"
}' "$dir/rows" >"$docs/scaling.svg" || fail "the plot failed"

awk -v begin="$begin" -v end="$end" -v section="$dir/section" '
$0 == begin { while ((getline line < section) > 0) print line; inside = 1 }
!inside     { print }
$0 == end   { inside = 0 }' "$page" >"$dir/page" && cat "$dir/page" >"$page"
