#!/bin/sh
# bench/peers.sh - `moe bench` beside other runtimes on the same machine, file and threads.
#
#   bench/peers.sh --model FILE [options] [NAME=]LLAMA_BENCH...
#
#     --threads N    default 2             --prompt N     tokens of prefill, default 512; 0: none
#     --repeat N     rounds, default 5     --generate N   tokens of decode, default 64; 0: none
#     --depth N      decode behind a context of N tokens, default 0
#     --cache TYPE   of the key/value cache: f16 (default), q8_0
#     --moe COMMAND  ours, default "build/moe"; may have options of `moe bench` behind it
#     --run COMMAND  in front of every measured command, such as "taskset -c 0,1"
#     --slice S      decode only: all are loaded, and run in turn for S seconds each
#     --load S       with --slice: seconds that each gets to load, default 10
#     --json         one JSON object instead of a table
#
# LLAMA_BENCH is a `llama-bench` of llama.cpp or ik_llama.cpp, with more options for it if need be:
#
#   bench/peers.sh --model m.gguf llama.cpp=llama/llama-bench "ik=ik/llama-bench -rtr 1 -fmoe 1"
#
# A round runs ours and each of theirs once, one after the other (A B C A B C ...), so that what
# changes in the machine changes for all. Each run is a process of its own, warms up and measures
# once. The figures are medians over the rounds, with the slowest and the fastest; ratios are of
# medians, ours over theirs. A runtime that cannot run the model is reported and left out.
#
# Where the speed of the machine changes faster than a run takes, as on a shared one, --slice S lets
# each of them decode --repeat times, all of them loaded but only one running, the others stopped:
# medians do not count what a stop fell into, if a repetition (--generate) takes a small part of S.
# Who needs longest runs his last repetitions alone. Memory has to hold them all, and --prompt has
# to be 0.
set -uf

usage() {
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
is_number() {
    case $1 in '' | *[!0-9]*) return 1 ;; esac
}

model="" threads=2 repeat=5 prompt=512 generate=64 depth=0 cache=f16 moe=build/moe run="" json=0
slice=0 load=10
while [ $# -gt 0 ]; do
    case $1 in
    --json)
        json=1
        shift
        continue
        ;;
    --*) [ $# -gt 1 ] || usage ;;
    *) break ;;
    esac
    case $1 in
    --threads | --repeat | --prompt | --generate | --depth | --load) is_number "$2" || usage ;;
    esac
    case $1 in
    --model) model=$2 ;;
    --threads) threads=$2 ;;
    --repeat) repeat=$2 ;;
    --prompt) prompt=$2 ;;
    --generate) generate=$2 ;;
    --depth) depth=$2 ;;
    --cache) cache=$2 ;;
    --moe) moe=$2 ;;
    --run) run=$2 ;;
    --slice) slice=$2 ;;
    --load) load=$2 ;;
    *) usage ;;
    esac
    shift 2
done
if [ -z "$model" ] || [ "$repeat" = 0 ] || [ $((prompt + generate)) = 0 ]; then
    usage
fi
if [ "$slice" != 0 ]; then
    [ "$prompt" = 0 ] || usage
    sleep "$slice" || usage # it knows what seconds are
fi
[ -r "$model" ] || {
    echo "peers.sh: cannot read $model" >&2
    exit 1
}

dir=$(mktemp -d "${TMPDIR:-/tmp}/moe-peers.XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM

# Runner i is described by $dir/i.name and $dir/i.command; its figures go to $dir/i.pp and i.tg.
n=0 runners=0
echo "moe.c" >"$dir/0.name"
# "NAME=command", or a command whose name is that of the folder above build/, bin/ and the like.
for peer in "$@"; do
    n=$((n + 1))
    runners="$runners $n"
    command=$peer
    first=${peer%% *}
    case $first in
    *=*)
        echo "${first%%=*}" >"$dir/$n.name"
        command=${peer#*=}
        ;;
    *)
        d=$(dirname "$first")
        while :; do
            case $(basename "$d") in
            bin | build | src) d=$(dirname "$d") ;;
            *) break ;;
            esac
        done
        basename "$d" >"$dir/$n.name"
        ;;
    esac
    echo "$command" >"$dir/$n.command"
    [ -x "${command%% *}" ] || {
        echo "peers.sh: ${command%% *} is not a program" >&2
        exit 1
    }
done

# Runs a command; its output goes to $dir/out. A failure marks runner $1 and shows why.
attempt() {
    i=$1
    shift
    # shellcheck disable=SC2086 # $run is a command with arguments
    if ! $run "$@" >"$dir/out" 2>"$dir/err"; then
        echo "peers.sh: $(cat "$dir/$i.name") failed: $(tail -n 1 "$dir/err")" >&2
        : >"$dir/$i.failed"
        return 1
    fi
}

# The "median", "min" or "max" ($1) out of "KEY":{...,"median":X,...}.
ours_value() {
    sed -n "s/.*\"$2\":{[^}]*\"$1\":\([0-9.e+-]*\).*/\1/p" "$dir/out"
}
# What $1 does with a runner's number and its command, for ours: `moe bench` with these options, and
# behind them those of --moe.
ours() {
    how=$1
    shift
    # shellcheck disable=SC2086 # options
    "$how" 0 "${moe%% *}" bench "$model" -t "$threads" --cache "$cache" --json "$@" \
        ${moe#"${moe%% *}"}
}
decode_ours() {
    ours "$1" -p 0 -n "$generate" -d "$depth" -r "$2" # times
}
run_ours() {
    if [ "$prompt" -gt 0 ]; then
        ours attempt -p "$prompt" -n 0 -r 1 || return
        ours_value median prefill_tokens_per_s >>"$dir/0.pp"
    fi
    if [ "$generate" -gt 0 ]; then
        decode_ours attempt 1 || return
        ours_value median decode_tokens_per_s >>"$dir/0.tg"
    fi
}

# Tokens per second of each test of llama-bench's JSON: prefill if it generated nothing.
peer_values() {
    awk -v pp="$dir/$1.pp" -v tg="$dir/$1.tg" '
        /"n_gen":/  { gsub(/[^0-9]/, "", $2); n_gen = $2 }
        /"avg_ts":/ { gsub(/,/, "", $2); print $2 >>(n_gen + 0 ? tg : pp) }' "$dir/out"
}
# The same for runner $2, a peer.
peer() {
    how=$1 i=$2
    shift 2
    # shellcheck disable=SC2046 # a command with options
    "$how" "$i" $(cat "$dir/$i.command") -m "$model" -t "$threads" -ctk "$cache" -ctv "$cache" \
        -o json "$@"
}
decode_peer() {
    command=$(cat "$dir/$2.command")
    if [ "$depth" = 0 ]; then
        peer "$1" "$2" -r "$3" -p 0 -n "$generate"
    elif "${command%% *}" --help 2>&1 | grep -q -e '-gp <pp,tg>'; then # ik_llama.cpp
        peer "$1" "$2" -r "$3" -p 0 -n 0 -gp "$depth,$generate"
    else
        peer "$1" "$2" -r "$3" -p 0 -n "$generate" -d "$depth"
    fi
}
run_peer() {
    if [ "$prompt" -gt 0 ]; then
        peer attempt "$1" -r 1 -p "$prompt" -n 0 || return
        peer_values "$1"
    fi
    if [ "$generate" -gt 0 ]; then
        decode_peer attempt "$1" 1 || return
        peer_values "$1"
    fi
}

# -- all at once, one of them running --

# Starts runner $1, a process group of its own, lets it load, and stops it.
launch() {
    i=$1
    shift
    # shellcheck disable=SC2016,SC2086 # $run is a command with arguments, the quoted text a script
    setsid sh -c 'status=$0; "$@"; echo $? >"$status"' "$dir/$i.status" $run "$@" \
        >"$dir/$i.out" 2>"$dir/$i.err" &
    echo $! >"$dir/$i.group"
    sleep "$load"
    signal STOP "$i"
}

signal() {
    kill -s "$1" -- "-$(cat "$dir/$2.group")" 2>/dev/null
}

# Takes the figures of runner $1, which has ended.
take() {
    mv "$dir/$1.out" "$dir/out"
    if [ "$(cat "$dir/$1.status")" != 0 ]; then
        echo "peers.sh: $(cat "$dir/$1.name") failed: $(tail -n 1 "$dir/$1.err")" >&2
        : >"$dir/$1.failed"
    elif [ "$1" = 0 ]; then
        for what in median min max; do
            ours_value $what decode_tokens_per_s
        done >"$dir/0.tg"
    else
        awk '/"samples_ts":/ { gsub(/[^0-9.e+,-]/, ""); sub(/^[^0-9]*/, ""); gsub(/,+/, "\n")
                               print }' "$dir/out" | sed '/^$/d' >"$dir/$1.tg"
    fi
}

end_all() {
    for i in $runners; do
        [ -e "$dir/$i.group" ] && [ ! -e "$dir/$i.status" ] && signal KILL "$i"
    done
    rm -rf "$dir"
}

run_sliced() {
    trap end_all EXIT
    for i in $runners; do
        if [ "$i" = 0 ]; then
            decode_ours launch "$repeat"
        else
            decode_peer launch "$i" "$repeat"
        fi
    done
    left=1
    while [ $left = 1 ]; do
        left=0
        for i in $runners; do
            [ -e "$dir/$i.status" ] && continue
            left=1
            signal CONT "$i"
            sleep "$slice"
            signal STOP "$i"
        done
    done
    for i in $runners; do
        take "$i"
    done
}

# -- one after the other --

run_rounds() {
    round=0
    while [ $round -lt "$repeat" ]; do
        round=$((round + 1))
        for i in $runners; do
            echo "round $round of $repeat: $(cat "$dir/$i.name")" >&2
            if [ -e "$dir/$i.failed" ]; then
                :
            elif [ "$i" = 0 ]; then
                run_ours
            else
                run_peer "$i"
            fi
        done
    done
}

if [ "$slice" = 0 ]; then
    run_rounds
else
    run_sliced
fi

# "median min max" of a file of numbers; nothing if there is none.
summary() {
    [ -s "$1" ] && sort -g "$1" | awk '{ v[NR] = $1 } END {
        m = NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2
        print m, v[1], v[NR] }'
}
# One line per runner: name, tab, median min max of prefill, tab, the same of decode.
for i in $runners; do
    printf '%s\t%s\t%s\n' "$(cat "$dir/$i.name")" "$(summary "$dir/$i.pp")" \
        "$(summary "$dir/$i.tg")"
done >"$dir/table"

awk -F '\t' -v json=$json -v model="$model" -v threads="$threads" -v repeat="$repeat" \
    -v pp="$prompt" -v tg="$generate" -v depth="$depth" -v cache="$cache" '
function object(name, text, ours,    v) {
    if (split(text, v, " ") < 3)
        return ", \"" name "\": null"
    return sprintf(", \"%s\": {\"median\": %.2f, \"min\": %.2f, \"max\": %.2f, \"ratio\": %s}",
                   name, v[1], v[2], v[3], ours ? sprintf("%.3f", ours / v[1]) : "null")
}
function cell(text, ours,    v) {
    if (split(text, v, " ") < 3)
        return sprintf("  %10s %19s %7s", "-", "", "")
    return sprintf("  %10.2f %19s %7s", v[1], sprintf("(%.2f..%.2f)", v[2], v[3]),
                   ours && NR > 1 ? sprintf("%.2f x", ours / v[1]) : "")
}
function quote(s) { gsub(/["\\]/, "\\\\&", s); return "\"" s "\"" }
NR == 1 {
    split($2, p, " "); split($3, t, " ")
    what = "tg" tg (depth + 0 ? " @ " depth : "")
    if (json)
        printf "{\"model\": %s, \"threads\": %d, \"rounds\": %d, \"prompt\": %d, " \
               "\"generate\": %d, \"depth\": %d, \"cache\": \"%s\", \"runtimes\": [",
               quote(model), threads, repeat, pp, tg, depth, cache
    else
        printf "%s, %d threads, cache %s, medians of %d rounds, tokens/s\n" \
               "%-14s  %10s %27s  %10s %27s\n",
               model, threads, cache, repeat, "", "pp" pp, "ours over it", what, "ours over it"
}
json  { printf("%s\n  {\"name\": %s%s%s}", NR > 1 ? "," : "", quote($1),
               object("prefill", $2, p[1]), object("decode", $3, t[1])) }
!json { printf "%-14s%s%s\n", $1, cell($2, p[1]), cell($3, t[1]) }
END   { if (json) print "\n]}" }' "$dir/table"

[ ! -e "$dir/0.failed" ]
