#!/bin/sh
# `make demo`: packages, build, model, and a first look at text from it. Each step is skipped if its
# result is there, so that a second run starts at once and needs neither network nor rights.
set -eu
models=${MOE_MODELS:-${XDG_CACHE_HOME:-$HOME/.cache}/moe/models}

echo "1/4 packages"
if [ -f "$models/smollm2.gguf" ]; then
    cli/deps.sh install
else
    cli/deps.sh install fetch
fi
echo "2/4 build"
${MAKE:-make} -s "$MOE"
echo "3/4 model: SmolLM2-135M-Instruct, 98 MB"
cli/fetch.sh smollm2
echo "4/4 a prompt"

question="Explain what a CPU does, in three sentences."
echo
echo "> $question"
echo
# The chat format of this model, written out: --parse-special makes its marks special tokens.
prompt="<|im_start|>user
$question<|im_end|>
<|im_start|>assistant
"
exec "$MOE" run "$models/smollm2.gguf" --parse-special -p "$prompt" -n 200
