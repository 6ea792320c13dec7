#!/bin/sh
# Runs test programs and sums what they report. `make test` calls it with the list.
#
#   tests/run.sh PROGRAM...      RUN="qemu-aarch64 ..." goes in front of programs, not of scripts
#
# A program's last line is "N passed, N failed, N skipped". One that ends in another way (a signal,
# a sanitizer's report, no such line) counts as one more failure. The last line here is the sum.
set -u
here=$(cd "$(dirname "$0")" && pwd)
export MOE_TEST_ROOT="$here"
if [ -z "${MOE_TEST_SHARED:-}" ] && [ -d "$here/../../shared/data" ]; then
    MOE_TEST_SHARED=$(cd "$here/../../shared" && pwd)
    export MOE_TEST_SHARED
fi
# The folder of real models: set only if they are there, so that tests can say that they skip.
if [ -z "${MOE_TEST_MODELS:-}" ] && [ -n "${MOE_MODELS:-}" ] &&
    [ -e "$MOE_MODELS/smollm2.gguf" ]; then
    export MOE_TEST_MODELS="$MOE_MODELS"
fi

passed=0 failed=0 skipped=0 wrong=""
log=$(mktemp "${TMPDIR:-/tmp}/moe-test.XXXXXX") || exit 1
trap 'rm -f "$log"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for program in "$@"; do
    name=$(basename "$program")
    case $program in
    *.sh) set -- sh "$program" ;;
    *) # shellcheck disable=SC2086 # RUN is a command with arguments
        set -- ${RUN:-} "$program" ;;
    esac
    echo "== $name"
    start=$(date +%s)
    { "$@" 2>&1; echo "exit $?"; } | tee "$log" | sed '/^exit [0-9]*$/d'
    status=$(sed -n 's/^exit \([0-9]*\)$/\1/p' "$log" | tail -n 1)
    sum=$(grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "$log" | tail -n 1)
    # shellcheck disable=SC2086 # split into words
    set -- ${sum:-0 passed, 0 failed, 0 skipped}
    n_failed=$3
    if [ -z "$sum" ] || { [ "$status" != 0 ] && [ "$n_failed" = 0 ]; }; then
        echo "FAIL $name: ended with status $status${sum:+ after its tests had passed}"
        n_failed=$((n_failed + 1))
    fi
    passed=$((passed + $1)) failed=$((failed + n_failed)) skipped=$((skipped + $5))
    [ "$n_failed" = 0 ] || wrong="$wrong $name"
    echo "   $(($(date +%s) - start)) s"
done

echo
[ -z "$wrong" ] || echo "failed in:$wrong"
[ "$skipped" = 0 ] || echo "$skipped skipped: each says above what it would need"
if [ "$passed" = 0 ] && [ "$failed" = 0 ]; then
    echo "no test ran"
    failed=1
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
