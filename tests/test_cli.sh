#!/bin/sh
# tests/test_cli.sh - the program, from outside: every verb, its output, its files, its exit status.
#
# The model of tests/make_alphabet.py knows the next byte of every text, so what must be printed is
# known. Environment: MOE, the program; MOE_TEST_ROOT, this folder.
set -u
root=${MOE_TEST_ROOT:-$(cd "$(dirname "$0")" && pwd)}
moe=${MOE:-$root/../build/moe}
model=$root/data/alphabet.gguf
soft=$root/data/alphabet-soft.gguf
work=$(mktemp -d "${TMPDIR:-/tmp}/moe-cli.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
unset MOE_ISA MOE_THREADS
passed=0 failed=0

# run STATUS ARGUMENTS...: runs the program; its output goes to $work/out and $work/err.
run() {
    want=$1
    shift
    "$moe" "$@" >"$work/out" 2>"$work/err" </dev/null
    status=$?
    [ "$status" = "$want" ] ||
        wrong "moe $*: expected status $want, got $status: $(tail -n 3 "$work/err")"
    case "$status $*" in
    0*--json*) json_good || wrong "moe $*: no JSON: $(head -c 600 "$work/out")" ;;
    esac
}
# Is $work/out one JSON value? Strings become s, other scalars v; then what is inside folds up.
json_good() {
    awk '{ text = text $0 }
        END {
            gsub(/"([^"\\]|\\(["\\nt]|u[0-9a-f][0-9a-f][0-9a-f][0-9a-f]))*"/, "s", text)
            gsub(/-?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?|true|false|null/, "v", text)
            do {
                n = gsub(/s:[sv]/, "p", text)
                n += gsub(/\{\}|\{p(,p)*\}|\[\]|\[[sv](,[sv])*\]/, "v", text)
            } while (n)
            exit text != "v"
        }' "$work/out"
}
wrong() {
    good=no
    echo "  $*"
}
out_is() {
    printf '%s\n' "$1" >"$work/want"
    cmp -s "$work/want" "$work/out" || wrong "expected \"$1\", got \"$(head -c 400 "$work/out")\""
}
out_has() {
    grep -qF -e "$1" "$work/out" || wrong "no \"$1\" in \"$(head -c 600 "$work/out")\""
}
err_has() {
    grep -qF -e "$1" "$work/err" || wrong "no \"$1\" in \"$(head -c 600 "$work/err")\""
}
err_empty() {
    [ ! -s "$work/err" ] || wrong "expected silence, got \"$(head -c 400 "$work/err")\""
}
same() {
    cmp "$1" "$2" >"$work/cmp" 2>&1 || wrong "$(cat "$work/cmp")"
}
# The number after "KEY": in $work/out must be within TOLERANCE of EXPECTED.
number_is() {
    got=$(sed -n 's/.*"'"$1"'":\([-0-9.e+]*\).*/\1/p' "$work/out")
    awk -v a="${got:-nothing}" -v b="$2" -v t="$3" \
        'BEGIN { exit !(a + 0 == a && a - b <= t && b - a <= t) }' ||
        wrong "$1: expected $2, got ${got:-nothing}"
}
# Waits, at most 20 s, until a command succeeds.
wait_until() {
    n_looks=0
    until "$@" || [ $n_looks = 100 ]; do
        n_looks=$((n_looks + 1))
        sleep 0.2
    done
}
# begin NAME ... end: one test.
begin() {
    name=$1 good=yes
}
end() {
    if [ $good = yes ]; then
        passed=$((passed + 1))
        echo "ok $name"
    else
        failed=$((failed + 1))
        echo "FAIL $name"
    fi
}

begin help
run 0 --help
out_has "moe tokenize"
out_has "Exit status: 0 done"
run 0 run --help
out_has "no chat template is applied"
out_has "  -n, --n-tokens N             generate at most N tokens (default 256)"
out_has "type of the key/value cache: f16, q8_0, f32 (default f16)"
run 0 --version
out_has "moe 0."
for verb in run info tokenize logits eval bench experts imatrix verify; do
    run 0 $verb --help
    out_has "usage: moe $verb "
    out_has "examples:"
    err_empty
    run 0 help $verb
    out_has "usage: moe $verb "
done
end

begin verbose_tells_what_computes
for verb in run info logits; do
    case $verb in
    run) set -- -p abc -n 2 -q ;;
    info) set -- --ctx 16 --memory-limit 64M ;; # else it depends on the free memory
    logits) set -- --tokens 1,2 ;;
    esac
    run 0 $verb "$model" "$@" --isa c
    ! grep -qF "plain C" "$work/err" || wrong "moe $verb tells it without -v"
    cp "$work/out" "$work/quiet"
    run 0 $verb "$model" "$@" --isa c -v
    err_has "moe: $model: "
    err_has "on CPU (plain C)"
    same "$work/quiet" "$work/out"
done
run 0 tokenize "$model" --ids -v
err_has "tokens in the vocabulary"
end

begin wrong_usage_is_status_2
run 2
run 2 frobnicate
run 2 run
err_has "moe run --help"
run 2 run "$model" --frob
err_has "unknown option --frob"
run 2 run "$model" another
run 2 run "$model" -n
err_has "needs an argument"
run 2 run "$model" -n -5
run 2 run "$model" -n 99999999999
run 2 run "$model" --temp warm
run 2 run "$model" --json=yes
run 2 run "$model" --cache q3
run 2 run "$model" --logit-bias 5
run 2 run "$model" -p a -f b
run 2 logits "$model"
run 2 logits "$model" --tokens 1 --chunk 0
run 2 bench "$model" -r 0
run 2 info "$model" --memory-limit lots
export MOE_ISA=sse1
run 2 info "$model"
unset MOE_ISA
export MOE_THREADS=many
run 2 info "$model"
unset MOE_THREADS
end

begin run_continues_a_prompt
run 0 run "$model" -p abc -q
out_is "defghijklmnopqrstuvwxyz"
err_empty
run 0 run "$model" -pabc -n3
out_is def
run 0 run "$model" --prompt=abc --n-tokens=3 --echo
out_is abcdef
run 0 run -- "$model" </dev/null
run 0 run -p abc -n 0 "$model"
out_is ""
end

begin run_reads_files_and_stdin
printf 'mno\n' >"$work/prompt"
run 0 run "$model" -n 4 -f "$work/prompt"
out_is pqrs
"$moe" run "$model" -q -n 4 <"$work/prompt" >"$work/out"
out_is pqrs
printf 'mno\n\n' | "$moe" run "$model" -q -n 1 >"$work/out" # one of two newlines stays
printf '\013\n' | cmp -s - "$work/out" || wrong "after a newline: $(od -c "$work/out")"
run 1 run "$model" -f "$work/nowhere"
end

begin run_reports
run 0 run "$model" -p abc -n 3
err_has "prompt: 4 tokens"
err_has "generated: 3 tokens"
err_has "tokens/s"
err_has "-n reached"
run 0 run "$model" -p abc --json
err_empty
out_has '"text":"defghijklmnopqrstuvwxyz"'
out_has '"finish":"end"'
out_has '"n_prompt":4'
out_has '"tokens":[100,101,'
run 0 run "$model" -p abc --json -n 2
out_has '"finish":"length"'
run 0 run "$model" -p abc --json --ctx 6
out_has '"finish":"context"'
out_has '"text":"def"'
run 1 run "$model" -p abcdefgh --ctx 6
err_has "--ctx"
end

begin drafting_changes_no_text
run 0 run "$model" -p 7012345689 -n 80 --temp 2 --seed 4 --draft off
cp "$work/out" "$work/first"
for how in auto ngram; do
    run 0 run "$model" -p 7012345689 -n 80 --temp 2 --seed 4 --draft $how
    same "$work/first" "$work/out"
done
run 0 run "$model" -p 0123456789 -n 25 --draft ngram
err_has "guessed: "
run 0 run "$model" -p 0123456789 -n 25 --draft ngram --json
out_has '"draft":{"n_evaluations":'
run 1 run "$model" -p abc --draft mtp
err_has "multi-token prediction"
run 2 run "$model" -p abc --draft perhaps
end

begin run_writes_whole_characters
run 0 run "$model" -p '!'
out_is "é."
run 0 run "$model" -p '!' -n 1 # cut in the middle of the character
printf '\357\277\275\n' | cmp -s - "$work/out" || wrong "$(od -c "$work/out")"
end

# A terminal is shown control characters and does not get them; bytes that only begin like U+009B
# hide none. What is no terminal gets the bytes as they are.
begin terminals_get_no_control_characters
printf 'a\033[31m\302\233b\302[[c\177\td\n' >"$work/prompt"
run 0 run "$model" -q --echo -n 0 -f "$work/prompt"
cmp -s "$work/prompt" "$work/out" || wrong "a file gets $(od -c "$work/out")"
if command -v script >/dev/null; then
    script -qec "'$moe' run '$model' -q --echo -n 0 -f '$work/prompt'" /dev/null \
        </dev/null >"$work/out"
    printf 'a^[[31m^[b\302[[c^?\td\r\n' | cmp -s - "$work/out" ||
        wrong "a terminal gets $(od -c "$work/out")"
fi
end

begin special_tokens_only_when_asked
run 0 run "$model" -p '<|start|>' -n 1 --json
out_has '"n_prompt":10'
run 0 run "$model" -p '<|start|>' -n 1 --json --parse-special
out_has '"n_prompt":2'
out_has '"text":"a"'
end

begin sampling_options
run 0 run "$model" -p abc -n 40 --temp 3 --seed 5
cp "$work/out" "$work/first"
run 0 run "$model" -p abc -n 40 --temp 3 --seed 5
same "$work/first" "$work/out"
run 0 run "$model" -p abc -n 40 --temp 3 --seed 6
! cmp -s "$work/first" "$work/out" || wrong "another seed gave the same text"
run 0 run "$model" -p abc -n 3 --temp 3 --top-k 1 --seed 7
out_is def
run 0 run "$model" -p abc -n 3 --temp 3 --top-p 0.0001 --seed 7
out_is def
run 0 run "$model" -p abc -n 3 --temp 3 --min-p 0.99 --seed 7
out_is def
run 0 run "$model" -p abc -n 1 --logit-bias 81=1000 --logit-bias 100=-inf
out_is Q
run 0 run "$model" -p 789 -n 3 --repeat-penalty 1 # "7" again, unless it is punished
out_is 012
run 0 run "$model" -p 7012345689 -n 1 --presence-penalty 100 --json
! grep -q '"text":"0"' "$work/out" || wrong "the presence penalty did nothing"
run 0 run "$model" -p 7012345689 -n 1 --presence-penalty 100 --penalty-window 2
out_is 0
run 1 run "$model" -p abc --temp -1
run 1 run "$model" -p abc --top-p 1.5
end

begin interrupt_ends_a_generation
"$moe" run "$model" -p 123 -n 200000 --ctx 300000 >"$work/out" 2>"$work/err" &
pid=$!
wait_until grep -q 456 "$work/out"
kill -INT $pid
wait $pid
status=$?
[ $status = 130 ] || wrong "expected status 130, got $status"
[ "$(head -c 3 "$work/out")" = 456 ] || wrong "the text: $(head -c 100 "$work/out")"
[ "$(tail -c 1 "$work/out" | od -An -to1 | tr -d ' ')" = 012 ] || wrong "no newline at the end"
err_has "tokens/s"
err_has "interrupted"
end

ids=257,97,98,99,33,120,121,48,49,50,0,255,258,100
begin logits_are_the_same_bits
run 0 logits "$model" --tokens $ids --out "$work/base"
[ "$(wc -c <"$work/base")" = $((14 * 259 * 4)) ] || wrong "size: $(wc -c <"$work/base")"
[ ! -s "$work/out" ] || wrong "something on stdout"
for how in "--chunk 1" "--chunk 3 -t 2" "--chunk 13 -t 3" "-t 1" "-t 4" "--no-mmap" "--isa c" \
    "--isa avx2" "--memory-limit 1G"; do
    # shellcheck disable=SC2086 # options and their arguments
    run 0 logits "$model" --tokens $ids $how --out "$work/other"
    same "$work/base" "$work/other"
done
run 0 logits "$model" --tokens $ids --out -
same "$work/base" "$work/out"
echo "257 97 98 99 33 120 121 48 49 50 0 255 258 100" | "$moe" logits "$model" --tokens - \
    --out "$work/other" || wrong "from stdin"
same "$work/base" "$work/other"
export MOE_ISA=c MOE_THREADS=2
run 0 logits "$model" --tokens $ids --out "$work/other"
unset MOE_ISA MOE_THREADS
same "$work/base" "$work/other"
run 0 logits "$soft" --tokens $ids --out "$work/other"
! cmp -s "$work/base" "$work/other" || wrong "another model has the same logits"
end

begin logits_as_json
run 0 logits "$model" --tokens 97,33
out_has '{"n_vocab":259,"positions":[{"position":0,"token":97,"top":[{"id":98,"logit":'
out_has '"piece":"b"}'
[ "$(grep -o '"id":[0-9]*' "$work/out" | head -n 10 | tr -d '"id:' | tr '\n' ' ')" = \
    "98 27 21 112 117 181 247 51 83 154 " ] || wrong "other ids are the largest"
[ "$(grep -o '"id":' "$work/out" | wc -l)" = 20 ] || wrong "expected 10 of each position"
run 1 logits "$model" --tokens 1,259
err_has '0 to 258, got "259"'
run 1 logits "$model" --tokens 1,x
run 1 logits "$model" --tokens ""
run 1 logits "$model" --tokens -1
run 1 logits "$model" --tokens 1 --out "$work/no/such/folder"
end

begin nothing_half_written
run 1 eval "$model" "$work/nowhere" --save-logits "$work/half"
run 1 logits "$model" --tokens 1 --out "$work/half" --memory-limit 1K
awk 'BEGIN { while (n++ < 100000) print n % 250 }' |
    "$moe" logits "$model" --tokens - --out "$work/half" --chunk 1 -t 1 2>"$work/err" &
pid=$!
wait_until test -s "$work/half.partial"
kill -INT $pid
wait $pid
status=$?
[ $status = 130 ] || wrong "expected status 130, got $status"
for file in "$work"/half*; do
    [ ! -e "$file" ] || wrong "left: $file"
done
if [ -e /dev/full ]; then
    "$moe" info "$model" >/dev/full 2>"$work/err" && wrong "a full disk went unnoticed"
    "$moe" logits "$model" --tokens $ids --out - >/dev/full 2>"$work/err" &&
        wrong "a full disk went unnoticed"
    "$moe" run "$model" -p abc -n 4 >/dev/full 2>"$work/err" && wrong "a full disk went unnoticed"
fi
end

begin tokenize
printf 'axy' | "$moe" tokenize "$model" --ids >"$work/out" || wrong "status $?"
out_is "257 97 256"
printf 'axy' | "$moe" tokenize "$model" --ids --no-special >"$work/out"
out_is "97 256"
printf 'a\n' | "$moe" tokenize "$model" --ids --no-special >"$work/out"
out_is "97 10"
printf '' | "$moe" tokenize "$model" --ids --no-special >"$work/out"
out_is ""
printf '<|end|>' | "$moe" tokenize "$model" --ids --no-special --parse-special >"$work/out"
out_is 258
printf '<|end|>' | "$moe" tokenize "$model" --ids --no-special >"$work/out"
out_is "60 124 101 110 100 124 62"
printf '\377' | "$moe" tokenize "$model" --ids --no-special >"$work/out"
out_is "239 191 189"
printf 'xy"' | "$moe" tokenize "$model" --no-special >"$work/out"
out_is '     256  "xy"
      34  "\""'
printf 'xy' | "$moe" tokenize "$model" --json >"$work/out"
out_is '{"n_tokens":2,"tokens":[{"id":257,"piece":"<|start|>"},{"id":256,"piece":"xy"}]}'
run 1 tokenize "$work/nowhere"
end

# The figures come from make_alphabet.py, which computes them with numpy.
text="abcdefghi 0123456789 hello world, stuvw and 456789012"
begin eval_measures
printf '%s\n' "$text" >"$work/text"
run 0 eval "$model" "$work/text" --ctx 16 --json --save-logits "$work/base.logits"
number_is nll 16.4285097 1e-4
number_is nll_error 2.67399 1e-4
number_is n_scored 21 0
number_is n_window 3 0
[ "$(wc -c <"$work/base.logits")" = $((24 + 48 * 4 + 21 * 259 * 4)) ] || wrong "size of the logits"
run 0 eval "$soft" "$work/text" --ctx 16 --json --kl-base "$work/base.logits"
number_is kl 0.00858175473 1e-6
number_is kl_error 0.000770065 1e-6
number_is kl_max 0.0215456617 1e-5
number_is same_top 1 0
run 0 eval "$model" "$work/text" --ctx 16 --kl-base "$work/base.logits"
out_has "KL divergence   0 +/- 0"
out_has "same top token  100.00 %"
out_has "perplexity "
"$moe" eval "$model" - --ctx 16 <"$work/text" >"$work/out" 2>"$work/err" || wrong "from stdin"
out_has "scored          21 tokens"
end

begin eval_refuses_what_it_cannot_compare
printf '%s\n' "$text" | tr i j >"$work/other"
run 1 eval "$model" "$work/other" --ctx 16 --kl-base "$work/base.logits"
err_has "token 9: expected 106, got 105"
run 1 eval "$model" "$work/text" --ctx 12 --kl-base "$work/base.logits"
err_has "use the same text"
head -c 5000 "$work/base.logits" >"$work/short.logits"
run 1 eval "$model" "$work/text" --ctx 16 --kl-base "$work/short.logits"
err_has "ends too early"
run 1 eval "$model" "$work/text" --ctx 16 --kl-base "$model"
run 1 eval "$model" "$work/text" --kl-base "$work/nowhere"
printf ab >"$work/other"
run 1 eval "$model" "$work/other"
err_has "at least 4 tokens"
run 2 eval "$model" "$work/text" --ctx 3
end

begin run_says_how_long_the_prompt_is
run 1 run "$model" -p abcdefgh --ctx 6
err_has "the prompt has 9 tokens, but the context holds 6: shorten it"
end

begin standard_streams_that_are_closed
# Descriptor 0 to 2 would be the model's file: read as the prompt, or written to.
"$moe" run "$model" -n 2 <&- >"$work/out" 2>"$work/err" && wrong "a prompt from nowhere"
err_has "standard input"
"$moe" run "$model" -p abc -n 2 >&- 2>"$work/err" && wrong "text to nowhere"
err_has "standard output"
"$moe" logits "$model" --tokens 97 --out "$work/closed" 2>&- >"$work/out" || wrong "without stderr"
"$moe" logits "$model" --tokens 97 --out - >"$work/out" 2>"$work/err" || wrong "status $?"
same "$work/closed" "$work/out"
end

begin output_to_devices_and_pipes
mkfifo "$work/pipe"
cat "$work/pipe" >"$work/other" &
run 0 logits "$model" --tokens 97 --out "$work/pipe"
if [ -p "$work/pipe" ]; then
    wait $!
else
    kill $!
    wrong "the pipe was replaced by a file" # as a device would be, if root asked for it
fi
run 0 logits "$model" --tokens 97 --out -
same "$work/other" "$work/out"
run 1 logits "$model" --tokens 97 --out "$work"
err_has "cannot be written"
[ ! -e "$work.partial" ] || wrong "left: $work.partial"
end

begin info
run 0 info "$model" --ctx 1000
out_has "llama"
out_has "context of 1000 tokens"
out_has "F16"
out_has "yes"
run 0 info "$model" --json --tensors --metadata --ctx 64 --cache q8_0
out_has '"n_embd":48'
out_has '"n_vocab":259'
out_has '"runs":true'
out_has '"name":"blk.0.attn_q.weight","type":"F16","dims":[48,48]'
out_has '"tokenizer.ggml.model":"gpt2"'
out_has '"fits":true'
run 0 info "$model" --ctx 1000000 --memory-limit 10M --json
out_has '"fits":false'
run 1 run "$model" -p a --ctx 1000000 --memory-limit 10M
err_has "moe info MODEL --ctx N"
end

begin info_of_a_model_that_cannot_run
LC_ALL=C sed 's/\(general.architecture.\{12\}\)llama/\1lllll/' "$model" >"$work/strange.gguf"
run 1 run "$work/strange.gguf" -p a
err_has lllll
run 0 info "$work/strange.gguf"
out_has "cannot run"
out_has lllll
printf a | "$moe" tokenize "$work/strange.gguf" --ids --no-special >"$work/out"
out_is 97
end

begin bench
run 0 bench "$model" -p 16 -n 4 -r 2 -d 3 -t 1 --json
out_has '"prefill_tokens_per_s":{"n_tokens":16,"median":'
out_has '"decode_tokens_per_s":{"n_tokens":4,"median":'
out_has '"weight_bytes_per_token":'
out_has '"peak_rss_bytes":'
out_has '"load_s":'
run 0 bench "$model" -p 8 -n 2 -r 1
out_has "tokens/s"
out_has "GB/s"
end

begin threads_and_instruction_sets
run 0 run "$model" -q -p abc -n 2 -t 1
cp "$work/out" "$work/one"
for n in 0 3 1000; do
    run 0 run "$model" -q -p abc -n 2 -t $n
    same "$work/one" "$work/out"
done
run 0 run "$model" -p abc -n 1 -t 1000
err_has "1000 threads are more than can be used: 256"
run 0 run "$model" -q -p abc -n 2 --isa c
same "$work/one" "$work/out"
run 0 info "$model" --isa c
out_has "CPU (plain C)"
out_has "many times slower"
end

begin wrong_files
run 1 run "$work/nowhere" -p a
err_has "nowhere"
run 1 info "$root"
run 1 info /dev/null
: >"$work/empty"
run 1 info "$work/empty"
err_has "$work/empty: "
run 2 "$model"
err_has "moe run $model"
run 1 info "$0"
mkfifo "$work/fifo" && run 1 info "$work/fifo"
end

# The file was made by `moe-convert alphabet.gguf alphabet.moe`: it stays readable. Four records:
# small tensors of the model, and of the layer; before and behind them, the compressed matrices of
# 24,864 bytes.
begin moe_files
packed=$root/data/alphabet.moe
run 0 logits "$model" --tokens $ids --out "$work/base"
for how in "" "--no-mmap"; do
    # shellcheck disable=SC2086 # no option, or one
    run 0 logits "$packed" --tokens $ids $how --out "$work/other"
    same "$work/base" "$work/other"
done
run 0 info "$packed"
out_has "weights, mapped          28.22 kB"
out_has "weights, decoded         49.73 kB"
out_has "source.files             [1] alphabet.gguf"
run 0 info "$packed" --tensors --metadata
out_has "  blk.0.ffn_down.weight                    F16      32 x 48                   "
out_has "  token_embd.weight                        F16      48 x 259                  "
out_has "       24864         1606         0"
out_has "  general.name = alphabet"
out_has "  tokenizer.ggml.tokens = [259] "
out_has " ..."
run 0 info "$packed" --json --tensors --metadata
out_has '"general.name":"alphabet"'
out_has '"name":"alphabet"'
run 0 info "$packed" --no-mmap
out_has "weights, allocated       77.95 kB"
run 0 info "$packed" --json
out_has '"weight_bytes":77952'
out_has '"weight_bytes_decoded":49728'
end

begin verify
run 0 verify "$packed"
out_has "good, 46.66 kB in 4 records, root a2020deb5267261f"
err_empty
run 0 verify -q "$packed"
out_has "good, 46.66 kB in 4 records"
run 0 verify "$packed" --json
out_is "{\"file\":\"$packed\",\"good\":true,\"bytes\":46662,\"n_records\":4,\
\"root\":\"a2020deb5267261f\",\"damaged\":[]}"
# damage AT NAME: another byte at AT is a damaged NAME.
damage() {
    { head -c "$1" "$packed"; printf '\252'; tail -c +$(($1 + 2)) "$packed"; } >"$work/changed.moe"
    run 1 verify "$work/changed.moe"
    out_has "damaged: $2"
    err_has "$2"
    run 1 verify "$work/changed.moe" --json
    out_has '"good":false'
    out_has "\"damaged\":[{\"record\":\"$2\","
}
damage 6300 padding
damage 8192 "token_embd.weight (record 0)"
damage 12000 "token_embd.weight (record 0)" # the zeros behind it
damage 12300 "blk.0.attn_norm.weight and 8 more (record 1)"
damage 46661 "output.weight (record 3)"
for at in 0 8 130 6000; do
    { head -c $at "$packed"; printf '\252'; tail -c +$((at + 2)) "$packed"; } >"$work/changed.moe"
    run 1 verify "$work/changed.moe"
    [ -s "$work/err" ] || wrong "byte $at changed: no message"
done
err_has "directory: expected the checksum"
for bytes in 0 1 127 4000 46661; do
    head -c $bytes "$packed" >"$work/cut.moe"
    run 1 verify "$work/cut.moe"
    [ -s "$work/err" ] || wrong "cut at $bytes: no message"
    run 1 verify "$work/cut.moe" --json
    out_has '"good":false,"reason":"'
done
run 1 verify "$model"
err_has "another kind"
run 1 verify "$work/nowhere"
run 2 verify
end

# Four tokens of one layer: 0 1, 1 2, 1 2, then a new sequence: 3 0. The figures are made by hand.
begin experts_figures
trace="$work/hand.trace"
{
    printf 'moetrace\1\0\0\0\1\0\0\0\4\0\0\0\2\0\0\0\3\0\0\0'
    printf '\0\0\0\0\0\0\1\0' && printf '\1\0\0\0\1\0\2\0'
    printf '\2\0\0\0\1\0\2\0' && printf '\0\0\0\0\3\0\0\0'
} >"$trace"
run 0 experts "$trace" --json --cache 1,2,4
out_has '"n_tokens":4,"n_pairs":2,"n_expert":4,"n_used":2'
out_has '"layer":3,"entropy":1.90563906,"idle":0,"overlap":0.75,"overlap_by_chance":0.5625'
out_has '{"experts":1,"hit_rate":0.125},{"experts":2,"hit_rate":0.375},{"experts":4,"hit_rate":0.5}'
out_has '"load":[2,3,2,1]'
run 0 experts "$trace"
out_has "4 tokens, 1 layers of 4 experts, 2 for each token"
run 2 experts "$trace" --cache 0
run 2 experts "$trace" --cache 1,x
run 2 experts "$trace" --cache 65537
run 2 experts "$trace" --cache 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17
err_has "up to 16 numbers"
end

# header VERSION LAYERS EXPERTS USED: the 32-bit numbers of a trace's header.
header() {
    printf moetrace
    for number in "$@"; do
        # shellcheck disable=SC2059 # the format is made of octal escapes
        printf "$(printf '\\%o\\%o\\%o\\0' $((number & 255)) $((number >> 8 & 255)) \
            $((number >> 16)))"
    done
}
begin experts_refuses_headers
while read -r numbers says; do
    # shellcheck disable=SC2046 # a list of numbers
    header $(echo "$numbers" | tr , ' ') >"$work/bad.trace"
    run 1 experts "$work/bad.trace"
    err_has "$says"
done <<'EOF'
2,1,4,2 expected version 1, got 2
1,0,4,2 1 to 4096 layers, got 0
1,4097,4,2 1 to 4096 layers, got 4097
1,1,0,0 1 to 65536 experts, got 0
1,1,65537,2 1 to 65536 experts, got 65537
1,4096,1025,2 at most 4194304 experts in all layers, got 4096 times 1025
1,1,4,0 1 to 4 experts for each token, got 0
1,1,4,5 1 to 4 experts for each token, got 5
1,2,4,2 the file ends inside of its header
EOF
head -c 40 "$trace" >"$work/bad.trace"
run 1 experts "$work/bad.trace"
head -c 20 "$trace" >"$work/bad.trace"
run 1 experts "$work/bad.trace"
err_has "which begins with"
end

begin damaged_traces
size=$(wc -c <"$trace")
at=0
while [ $at -lt "$size" ]; do
    head -c $at "$trace" >"$work/cut"
    # what ends with a token is whole
    want=1
    if [ $at -gt 28 ] && [ $((at % 8)) = 4 ]; then want=0; fi
    run $want experts "$work/cut"
    { head -c $at "$trace"; printf '\377'; tail -c +$((at + 2)) "$trace"; } >"$work/changed"
    want=1
    case $at in 16 | 17 | 24 | 25 | 26 | 27) want=0 ;; esac   # more experts; another layer
    [ $at -ge 28 ] && [ $(((at - 28) % 8)) -lt 4 ] && want=0 # another position
    run $want experts "$work/changed"
    at=$((at + 1))
done
{ head -c 28 "$trace"; printf '\0\0\0\0\2\0\2\0'; } >"$work/twice"
run 1 experts "$work/twice"
err_has "token 0, layer 3: expected 2 different experts below 4"
{ printf 'moetrace\1\0\0\0\0\20\0\0\0\0\1\0\1\0\0\0'; head -c 50000 /dev/zero; } >"$work/large"
run 1 experts "$work/large" # a header that asks for 5 GB
err_has "experts in all layers"
end

begin trace_experts
mixture="$root/fixtures/qwen3moe.gguf"
run 0 logits "$mixture" --tokens 1,2,3,4,5,6,7 --trace-experts "$work/a.trace" -t 1
run 0 logits "$mixture" --tokens 1,2,3,4,5,6,7 --trace-experts "$work/b.trace" -t 3 --chunk 2
cmp -s "$work/a.trace" "$work/b.trace" || wrong "another trace in parts"
run 0 experts "$work/a.trace"
out_has "7 tokens, 2 layers of 7 experts, 3 for each token"
run 1 run "$model" -p a -n 1 --trace-experts "$work/none.trace"
err_has "no experts"
[ ! -e "$work/none.trace" ] || wrong "a trace of nothing"
end

begin imatrix
printf 'abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz' >"$work/text"
run 0 imatrix "$model" "$work/text" -o "$work/a.imatrix" --ctx 16 -t 1
err_has "windows of 16 tokens"
run 0 imatrix "$model" "$work/text" -o "$work/b.imatrix" --ctx 16 -t 3 -q
cmp -s "$work/a.imatrix" "$work/b.imatrix" || wrong "another file with other threads"
head -c 4 "$work/a.imatrix" | grep -q GGUF || wrong "not a GGUF file"
run 1 info "$work/a.imatrix"
err_has "general.architecture: expected a string" # it is no model, but it can be read
run 2 imatrix "$model" "$work/text"
err_has "-o FILE"
run 1 imatrix "$work/text" "$work/text" -o "$work/c.imatrix"
[ ! -e "$work/c.imatrix" ] || wrong "a file without a model"
end

# Whatever is cut off or changed: an error or a success, never a signal.
begin damaged_files
size=$(wc -c <"$model")
at=1
while [ $at -lt "$size" ]; do
    head -c $at "$model" >"$work/cut"
    run 1 logits "$work/cut" --tokens 1
    [ -s "$work/err" ] || wrong "cut at $at: no message"
    at=$((at * 3 / 2 + 1))
done
at=0
while [ $at -lt 20000 ]; do
    { head -c $at "$model"; printf '\377'; tail -c +$((at + 2)) "$model"; } >"$work/changed"
    "$moe" logits "$work/changed" --tokens 1,2 >"$work/out" 2>"$work/err"
    status=$?
    [ $status -le 1 ] || wrong "byte $at changed: status $status: $(tail -n 2 "$work/err")"
    at=$((at + 1 + at / 8))
done
end

echo "$passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
