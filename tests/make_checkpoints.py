#!/usr/bin/env python3
"""Makes tests/checkpoints: small random Hugging Face checkpoints of each family, as transformers
saves them, and the logits that transformers computes for them. tests/test_convert.c converts and
runs them.

    python3 tests/make_checkpoints.py                       the committed set, into tests/checkpoints
    python3 tests/make_checkpoints.py --seed 7 --out DIR    other weights, tokens and dimensions
    python3 tests/make_checkpoints.py --wide --out DIR      rows that can be quantized
    python3 tests/make_checkpoints.py --check MOE_CONVERT   convert each, read the result with the
                                                            gguf package and compare its tensors
                                                            with those of tests/make_fixtures.py

Models, weights, oracle and versions are those of tests/make_fixtures.py. Each folder NAME has the
checkpoint and, in NAME/expected, what make_fixtures.py writes into NAME.expected. Beside F32: one is
saved in BF16, one in several shards, one holds FP8 (E4M3) weights with a scale for each block of
128 x 128, made here as DeepSeek's are, one FP8 with one scale for each matrix, and one MXFP4 experts as
gpt-oss has them, which transformers' own reader must read as the same numbers. Four have codes of 4 and 8
bits and two FP8 in all other forms, as tests/packed.py makes them; NAME/exact has a hash of each tensor's
exact floats. One has experts in floats, which gpt-oss transposes. One has a layer for multi-token
prediction, named as in DeepSeek's checkpoints, one as in Qwen3.5's; NAME/drafts is what it says behind the
last token, float32[n_vocab].
"""
import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

import make_fixtures as mf
import packed

DEFAULT = dict(rope_type="default", rope_theta=10000.0)
CHECKPOINTS = {
    "llama": dict(mf.MODELS["llama-llama3"], tok=24),
    "llama-bf16": dict(mf.MODELS["llama-tied"], tok=20, dtype="bf16"),
    "llama-fp8": dict(family="llama", vocab=67, embd=136, head=2, kv=1, dim=24, ff=140, layer=1,
                      tied=False, tok=16, rope=DEFAULT, ctx=128, dtype="fp8"),
    "llama-fp8-tensor": dict(family="llama", vocab=61, embd=40, head=2, kv=1, dim=20, ff=44, layer=1,
                             tied=False, tok=12, rope=DEFAULT, ctx=128, dtype="fp8-tensor"),
    "llama-bias": dict(mf.MODELS["llama-linear"], tok=20),
    "mixtral-shards": dict(mf.MODELS["mixtral"], tok=20, shards="40KB"),
    "qwen2": dict(mf.MODELS["qwen2"], tok=20),
    "qwen3": dict(mf.MODELS["qwen3-yarn"], tok=24),
    "qwen3moe": dict(mf.MODELS["qwen3moe"], tok=20),
    "qwen3moe-fused": dict(mf.MODELS["qwen3moe-raw"], tok=20, stacked=True),
    "qwen2moe": dict(mf.MODELS["qwen2moe"], tok=16),
    "deepseek2-lite": dict(mf.MODELS["deepseek2-lite"], tok=16, fused=True),
    "deepseek3": dict(mf.MODELS["deepseek3"], tok=16, layer=2, expert=10, fused=True),
    "deepseek3-mtp": dict(mf.MODELS["deepseek3-mtp"], tok=12, fused=True),
    "glm4-moe-lite": dict(mf.MODELS["deepseek3-glm"], tok=16, fused=True),
    "lfm2moe": dict(mf.MODELS["lfm2moe"], tok=16, layer=3),
    "olmoe": dict(mf.MODELS["olmoe"], tok=20),
    "gpt-oss-mxfp4": dict(mf.MODELS["gpt-oss-mxfp4"], vocab=67, embd=64, head=2, dim=24, ff=32,
                          expert=4, tok=16, dtype="mxfp4"),
    "gpt-oss-bf16": dict(mf.MODELS["gpt-oss"], vocab=67, embd=52, head=2, dim=20, ff=24, expert=4,
                         tok=16, dtype="bf16"),
    "gemma3": dict(mf.MODELS["gemma3"], tok=20),
    "qwen35moe": dict(mf.MODELS["qwen35moe"], tok=16, layer=2, expert=3, used=2,
                      delta=dict(head=4, head_k=2, dim=10, dim_v=8, period=2)),
    "qwen35moe-mtp": dict(mf.MODELS["qwen35moe-mtp"], tok=12, layer=2, expert=3, used=2,
                          delta=dict(head=2, head_k=1, dim=8, period=2)),
    # 0.4 of 16 dimensions turn: 6, since transformers rounds down
    "qwen3next": dict(mf.MODELS["qwen3next"], tok=16, layer=2, expert=3, dim=16, rot=6,
                      delta=dict(head=4, head_k=2, dim=6, dim_v=9, period=2)),
    "gemma4": dict(mf.MODELS["gemma4"], tok=16, layer=2, window_period=2, expert=3),
    "qwen3moe-int4": dict(mf.MODELS["qwen3moe"], vocab=61, embd=64, head=2, kv=1, dim=32, ff=64, ff_exp=32,
                          layer=1, expert=4, used=2, tok=16, dtype="packed-int4"),
    "qwen3moe-nvfp4": dict(mf.MODELS["qwen3moe"], vocab=61, embd=64, head=2, kv=1, dim=32, ff=64,
                           ff_exp=64, layer=1, expert=4, used=2, tok=16, dtype="packed-nvfp4"),
    "llama-nvfp4": dict(family="llama", vocab=61, embd=64, head=2, kv=1, dim=32, ff=128, layer=1,
                        tied=False, tok=16, rope=DEFAULT, ctx=128, dtype="packed-modelopt"),
    "qwen35moe-int4": dict(mf.MODELS["qwen35moe"], vocab=53, embd=32, ff_exp=32, ff_shared=32, layer=1, tok=12,
                           expert=2, used=1, delta=dict(head=4, head_k=2, dim=16, dim_v=32, period=2),
                           dtype="packed-int4"),
    "qwen3moe-fp8": dict(mf.MODELS["qwen3moe"], vocab=61, embd=40, head=2, kv=1, dim=20, ff=44, ff_exp=28,
                         layer=1, expert=4, used=2, tok=16, dtype="packed-fp8"),
    "qwen35moe-fp8": dict(mf.MODELS["qwen35moe"], vocab=53, embd=44, layer=2, expert=3, used=2, tok=12,
                          delta=dict(head=4, head_k=2, dim=10, dim_v=8, period=2), stacked=True,
                          dtype="packed-fp8-stack"),
}


FULL, LOCAL = "full_attention", "sliding_attention"

# What real configurations seldom have and transformers honours all the same; small.
SMALL = dict(vocab=53, embd=24, head=4, kv=2, dim=6, ff=17, tied=False, tok=14, ctx=128, rope=DEFAULT)
CHECKPOINTS.update({
    "mixtral-window": dict(SMALL, family="mixtral", layer=2, expert=3, used=2,
                           config=dict(sliding_window=5),
                           rope=dict(rope_type="llama3", rope_theta=300.0, factor=4.0,
                                     low_freq_factor=1.0, high_freq_factor=4.0,
                                     original_max_position_embeddings=32)),
    "qwen3moe-layers": dict(SMALL, family="qwen3moe", ff_exp=7, layer=4, expert=5, used=2, renorm=False,
                            config=dict(decoder_sparse_step=2, mlp_only_layers=[3], attention_bias=True,
                                        use_sliding_window=True, sliding_window=6)),
    "gpt-oss-layers": dict(SMALL, family="gpt-oss", layer=3, expert=3, used=2, window=5,
                           config=dict(layer_types=[FULL, LOCAL, FULL], swiglu_limit=4.0,
                                       swiglu_alpha=1.3),
                           rope=dict(rope_type="yarn", rope_theta=400.0, factor=4.0, truncate=True,
                                     original_max_position_embeddings=32)),
    "gemma3-layers": dict(SMALL, family="gemma3", layer=4, window=4, rope_local=100.0,
                          config=dict(layer_types=[LOCAL, FULL, FULL, LOCAL], attention_bias=True,
                                      query_pre_attn_scalar=17)),
    "deepseek3-bias": dict(mf.MODELS["deepseek3-glm"], family="deepseek3", vocab=53, tok=14, layer=2,
                           expert=4, fused=True, config=dict(attention_bias=True, rope_interleave=False),
                           rope=dict(rope_type="yarn", rope_theta=400.0, factor=4.0, mscale=1.0,
                                     mscale_all_dim=0.6, original_max_position_embeddings=32)),
    "llama-yarn": dict(SMALL, family="llama", layer=2, bias=True, config=dict(mlp_bias=True),
                       rope=dict(rope_type="yarn", rope_theta=400.0, factor=None, truncate=False,
                                 mscale=0.8, mscale_all_dim=0.3, original_max_position_embeddings=32)),
})


def vary_rope(rng):
    """Any way to stretch positions; original context 64 of 256."""
    original = dict(rope_theta=float(rng.choice([300.0, 10000.0, 1e6])), factor=4.0,
                    original_max_position_embeddings=64)
    yarn = dict(original, rope_type="yarn", truncate=bool(rng.integers(2)))
    return [dict(rope_type="default", rope_theta=500.0),
            dict(rope_type="linear", rope_theta=10000.0, factor=2.5),
            dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0),
            dict(original, rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0),
            yarn, dict(yarn, mscale=1.0, mscale_all_dim=float(rng.uniform(0.2, 1.2))),
            dict(yarn, attention_factor=0.8, beta_fast=20.0, beta_slow=2.0)][int(rng.integers(7))]


def vary(m, rng):
    """Other settings of the configuration for the same family, at random."""
    coin = lambda: bool(rng.integers(2))
    some = lambda *words: [str(rng.choice(words)) for _ in range(m["layer"])]
    f, set_ = m["family"], dict(m.get("config", {}))
    if f in ("llama", "mixtral", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "olmoe", "deepseek2",
             "deepseek3"):
        m["rope"], m["ctx"] = vary_rope(rng), 256
        if m["rope"]["rope_type"] == "dynamic" and m.get("rot", m["dim"]) == 2:
            m["rope"]["rope_type"] = "linear"  # transformers divides by the number of pairs - 1
    if f in ("llama", "mixtral", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "olmoe", "gpt-oss",
             "lfm2moe") and "shards" not in m and not m.get("mtp"):
        m["tied"] = coin()
    if "renorm" in m:
        m["renorm"] = coin()
    if f in ("qwen3", "qwen3moe", "olmoe", "gemma3", "deepseek2", "deepseek3", "glm4lite", "qwen35moe",
             "qwen3next") and not m.get("mtp"):
        set_["attention_bias"] = coin()
    if f == "llama" and "fp8" not in m.get("dtype", ""):
        m["bias"], set_["mlp_bias"] = coin(), coin()
    if f == "deepseek3":
        set_["rope_interleave"] = coin()
    if f == "glm4lite":
        set_["mlp_layer_types"] = some("dense", "sparse")
    if f == "mixtral" and coin():
        set_["sliding_window"] = int(rng.integers(1, 12))
    if f in ("qwen2", "qwen3", "qwen2moe", "qwen3moe"):
        set_.update(use_sliding_window=coin(), sliding_window=int(rng.integers(1, 12)))
        if f != "qwen3moe":
            set_["layer_types"] = some(LOCAL, FULL) if set_["use_sliding_window"] else None
    if f in ("qwen2moe", "qwen3moe", "qwen3next"):
        dense = [i for i in range(m["layer"]) if rng.integers(4) == 0]
        set_.update(mlp_only_layers=dense, decoder_sparse_step=int(rng.integers(1, 3)))
        m["ff"] = m["ff"] or 19
        if f == "qwen3next":
            set_["norm_topk_prob"] = coin()
    if f == "gpt-oss":
        set_.update(layer_types=some(LOCAL, FULL), swiglu_limit=float(rng.uniform(2, 9)))
        m["rope"] = dict(m["rope"], truncate=coin())
    if f == "gemma3":
        set_.update(layer_types=some(LOCAL, FULL), query_pre_attn_scalar=int(rng.integers(4, 90)))
    if f == "deepseek2" and coin():
        set_.update(topk_method="greedy", norm_topk_prob=coin())
        m["group"] = m["group_used"] = 1
    if f == "lfm2moe":
        set_.update(use_expert_bias=coin(), norm_topk_prob=coin())
    return dict(m, config=set_) if set_ else m


def block_scale(w, block=128):
    """E4M3 codes and one scale for each block, such that the largest of a block becomes 448."""
    rows, cols = -(-w.shape[0] // block), -(-w.shape[1] // block)
    codes, scales = torch.zeros(w.shape, dtype=torch.float8_e4m3fn), torch.zeros(rows, cols)
    exact = torch.zeros_like(w)
    for i in range(rows):
        for j in range(cols):
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = w[part].abs().max() / 448
            codes[part] = (w[part] / scales[i, j]).to(torch.float8_e4m3fn)
            exact[part] = codes[part].to(torch.float32) * scales[i, j]
    return codes, scales, exact


def packed_mxfp4(w):
    """[expert][in][out] -> blocks [expert][out][in / 32][16], scales [expert][out][in / 32], and the
    exact weights. Byte i of a block has the codes 2i and 2i + 1."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    rows = np.ascontiguousarray(w.transpose(0, 2, 1))
    q = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.MXFP4)
    exact = gguf.quants.dequantize(q, gguf.GGMLQuantizationType.MXFP4).transpose(0, 2, 1)
    q = q.reshape(*rows.shape[:2], -1, 17)
    codes = np.concatenate([q[..., 1:] & 15, q[..., 1:] >> 4], axis=-1)
    blocks = torch.tensor(codes[..., 0::2] | codes[..., 1::2] << 4)
    scales = torch.tensor(np.ascontiguousarray(q[..., 0]))
    read = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert np.array_equal(read.numpy(), exact)
    return blocks, scales, exact.astype(np.float32)


def pack_weights(weights, kind):
    """Packs what packed.py names, of stacked experts each matrix by itself, and makes the weights
    exact."""
    stored = {}
    for name, w in weights.items():
        pack = packed.packers(kind, name) if w.ndim > 1 else None
        for e in range(len(w) if pack and w.ndim == 3 else bool(pack)):
            t = torch.tensor(w[e] if w.ndim == 3 else w)
            halves = t.chunk(2) if "gate_up_proj" in name else [t]
            names = ["gate_proj", "up_proj"] if len(halves) == 2 else ["down_proj"]
            exact = []
            for half, part in zip(halves, names):
                start = name.rpartition(".")[0]
                tensors, values = pack(half.contiguous())
                start = f"{start}.{e}.{part}" if w.ndim == 3 else start
                stored.update({f"{start}.{k}": v for k, v in tensors.items()})
                exact.append(values)
            (w[e] if w.ndim == 3 else w)[...] = torch.cat(exact).numpy()
    if kind == "modelopt":
        stored["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(0.25)
    return stored


def pack_stacks(weights):
    """The same in FP8 with scales for blocks, stacks in one tensor."""
    stored = {}
    for name, w in weights.items():
        if "proj" in name and w.ndim > 1:
            stored[name], stored[name + "_scale_inv"], exact = packed.fp8_stack(torch.tensor(w))
            w[...] = exact.numpy()
            if name.endswith("experts.down_proj") or "out_proj" in name:  # as if they were static
                n = len(w) if w.ndim == 3 else 1
                stored[name.replace(".weight", ".activation_scale") if n == 1 else
                       name + "_activation_scale"] = torch.full((n,), 0.5)
    return stored


def round_weights(weights, m):
    """The weights as the checkpoint will hold them, and for FP8 the tensors to store instead."""
    stored = {}
    if m.get("dtype") == "packed-fp8-stack":
        return pack_stacks(weights)
    if m.get("dtype", "").startswith("packed-"):
        return pack_weights(weights, m["dtype"][7:])
    for name, w in list(weights.items()):
        t = torch.tensor(w)
        if m.get("dtype") == "bf16":
            weights[name] = t.to(torch.bfloat16).to(torch.float32).numpy()
        elif m.get("dtype") == "fp8" and "proj" in name:
            codes, scales, exact = block_scale(t)
            stored[name], stored[name + "_scale_inv"] = codes, scales
            weights[name] = exact.numpy()
        elif m.get("dtype") == "fp8-tensor" and "proj" in name:
            scale = t.abs().max() / 448
            codes = (t / scale).to(torch.float8_e4m3fn)
            stored[name], stored[name + "_scale"] = codes, scale
            stored[name.replace(".weight", ".input_scale")] = torch.tensor(0.5)
            weights[name] = (codes.to(torch.float32) * scale).numpy()
        elif m.get("dtype") == "mxfp4" and ".experts." in name and w.ndim == 3:
            blocks, scales, weights[name] = packed_mxfp4(w)
            stored[name + "_blocks"], stored[name + "_scales"] = blocks, scales
    return stored


def save(config, cls, weights, stored, m, folder):
    model = cls(config)
    dtype = torch.bfloat16 if m.get("dtype") == "bf16" else torch.float32
    state = {k: torch.tensor(v).to(dtype) for k, v in weights.items()}
    model.to(dtype).load_state_dict(state, strict=True)
    model.save_pretrained(folder, max_shard_size=m.get("shards", "5GB"))
    path = os.path.join(folder, "model.safetensors")
    if stored:
        tensors = dict(load_file(path), **stored)
        for name in list(tensors):
            if name + "_blocks" in tensors or name + "_packed" in tensors:
                del tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})
        edit_config(folder, quantization_config={
            "fp8": dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic",
                        weight_block_size=[128, 128]),
            "fp8-tensor": dict(quant_method="fp8", activation_scheme="static"),
            "mxfp4": dict(quant_method="mxfp4")}.get(m["dtype"], packed.config(m["dtype"][7:])[0]))
        own = packed.config(m["dtype"][7:])[1]
        if own and "packed" in m["dtype"]:
            with open(os.path.join(folder, "hf_quant_config.json"), "w") as f:
                json.dump(own, f)
    if m.get("stacked"):  # as the modules of transformers 5 hold experts: stacked, gate and up in one
        tied = {"lm_head.weight"} if m["tied"] else set()
        state = dict({k: v.contiguous() for k, v in state.items() if k not in tied}, **stored)
        save_file(state, path, metadata={"format": "pt"})


def add_draft_layer(folder, weights, m):
    """The layer's tensors as DeepSeek-V3 names them, with its copies of what it shares."""
    path = os.path.join(folder, "model.safetensors")
    tensors = load_file(path)
    start = f"model.layers.{m['layer']}."
    if m["family"].startswith("qwen"):  # which names them otherwise, and tells of them in the config
        own = {"eh_proj": "fc", "enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden",
               "shared_head.norm": "norm"}
        for name, w in weights.items():
            part = name.removeprefix(start)
            part = f"{own[part[:-7]]}.weight" if part[:-7] in own else "layers.0." + part
            tensors["mtp." + part] = torch.tensor(w)
        save_file(tensors, path, metadata={"format": "pt"})
        edit_config(folder, mtp_num_hidden_layers=1)
        return
    for name, w in weights.items():
        t = torch.tensor(w)
        experts = start + "mlp.experts."
        if name == experts + "gate_up_proj":
            half = t.shape[1] // 2
            for e in range(t.shape[0]):
                tensors[f"{experts}{e}.gate_proj.weight"] = t[e, :half].clone()
                tensors[f"{experts}{e}.up_proj.weight"] = t[e, half:].clone()
        elif name == experts + "down_proj":
            for e in range(t.shape[0]):
                tensors[f"{experts}{e}.down_proj.weight"] = t[e].clone()
        else:
            tensors[name] = t
    tensors[start + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[start + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **changes):
    path = os.path.join(folder, "config.json")
    with open(path) as f:
        config = json.load(f)
    config.update(changes)
    with open(path, "w") as f:
        json.dump(config, f, indent=2)


def widen(m, n=32):
    """Rows that fill blocks of n, so that every matrix can be quantized."""
    lengths = ("ff", "ff_exp", "ff_shared", "dim", "dim_v", "latent", "latent_q", "nope")
    m.update({k: -(-m[k] // n) * n for k in lengths if m.get(k)})
    if "embd" in m:  # some classes want a multiple of the number of heads
        m["embd"] = math.lcm(n, m["head"]) * -(-m["embd"] // math.lcm(n, m["head"]))
    for part in ("delta", "heads_global"):
        if part in m:
            m[part] = widen(dict(m[part]), n)
    return m


def fnv(w):
    """FNV-1a of the floats; 0 has no sign."""
    h = 0xcbf29ce484222325
    for b in (np.ascontiguousarray(w, "<f4") + np.float32(0)).tobytes():
        h = (h ^ b) * 0x100000001b3 & 0xffffffffffffffff
    return f"{h:016x}"


def make(name, m, seed, wide, out):
    rng = np.random.default_rng([seed, sum(name.encode()), 77])
    if seed:
        extra = {k: m[k] for k in ("dtype", "shards", "stacked") if k in m}
        m = {k: v for k, v in m.items() if k != "config"}  # made for other dimensions
        m = vary(dict(mf.randomize(m, rng), **extra), rng)
    packs = "packed" in m.get("dtype", "") and "fp8" not in m["dtype"]
    if wide or (seed and packs):
        m = widen(m, 64 if packs else 32)
        if "delta" in m:
            m["rot"] = int(m["dim"] * m["rope"].get("partial_rotary_factor", 1))
    if m.get("dtype") == "mxfp4":
        m["embd"], m["ff"] = -(-m["embd"] // 32) * 32, -(-m["ff"] // 32) * 32
    if m["family"] in mf.NO_HEAD_DIM:
        m["embd"] = m["head"] * m["dim"]
    m.pop("types", None)
    config, cls, arch = mf.build(m)
    with torch.device("meta"):
        skeleton = cls(config)
    for _ in range(20):
        weights = mf.random_weights(skeleton, m, rng)
        stored = round_weights(weights, m)
        oracle = mf.Oracle(m, weights, True)
        tokens, _ = mf.pick_tokens(oracle, m, rng, 0.05)
        if tokens:
            break
    else:
        sys.exit(f"{name}: no tokens without a near tie of experts found")
    exact = oracle.logits(tokens)
    rounding = [mf.distance(oracle.rounded_logits(tokens, c, False), exact) for c in mf.CACHES]
    folder = os.path.join(out, name)
    shutil.rmtree(folder, ignore_errors=True)
    save(mf.build(m)[0], cls, weights, stored, m, folder)
    if m.get("mtp"):
        drafts = mf.DraftOracle(oracle, m, rng)
        add_draft_layer(folder, drafts.weights, m)
        weights = dict(weights, **drafts.weights)
        with open(os.path.join(folder, "drafts"), "wb") as f:
            f.write(drafts.logits(tokens)[0, -1].astype("<f4").tobytes())
    with open(os.path.join(folder, "expected"), "wb") as f:
        f.write(b"MOEX" + struct.pack("<2I3f", len(tokens), m["vocab"], *rounding))
        f.write(np.asarray(tokens, "<i4").tobytes())
        f.write(exact.astype("<f4").tobytes())
    if "packed" in m.get("dtype", ""):
        with open(os.path.join(folder, "exact"), "w") as f:
            f.writelines(f"{name} {fnv(w)}\n" for name, w in mf.gguf_tensors(weights, dict(m, apart=True), arch)
                         if not name.endswith("ssm_a"))  # exp() differs between machines
    size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
    print(f"{name:16} {size / 1000:5.0f} KB  {len(os.listdir(folder))} files", flush=True)
    return weights, m, arch


def check(convert, folder, weights, m, arch):
    """The converted file as the gguf package reads it, against the conventions of make_fixtures.py:
    the same tensors, names, shapes and values."""
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "out.gguf")
        subprocess.run([convert, folder, path, "--quiet", "--quant", "f32"], check=True,
                       stderr=subprocess.DEVNULL)
        reader = gguf.GGUFReader(path)
        got = {t.name: t for t in reader.tensors}
        want = dict(mf.gguf_tensors(weights, dict(m, apart=True), arch))
        factors = {n: got.pop(n).data for n in list(got) if n.endswith(".scale") and n not in want}
        assert set(got) == set(want), set(got) ^ set(want)
        for name, w in want.items():
            data = got[name].data
            if name.replace(".weight", ".scale") in factors:
                factor = factors[name.replace(".weight", ".scale")]
                data = data * factor.reshape(-1, 1, 1) if data.ndim == 3 else data * factor
            same = np.array_equal(data, w) or (name.endswith("ssm_a") and np.allclose(data, w, 1e-6))
            assert data.shape == w.shape and same, name
        fixture = os.path.join(tmp, "fixture.gguf")
        mf.write_gguf(fixture, list(want.items()), {}, m, arch, "x", False)
        ours = {f.name: f.contents() for f in reader.fields.values() if f.name.startswith(arch)}
        absent = ("key_length", "dimension_count", "full_attention_interval", "sections",
                  "qwen35moe.feed_forward_length")  # of no tensor
        latent = "latent" in m  # its keys depend on how the up-projection is stored
        for field in [] if latent else gguf.GGUFReader(fixture).fields.values():
            if field.name.startswith(arch) and "yarn_attn" not in field.name:
                value = ours.get(field.name)
                if value is None and (any(word in field.name for word in absent) or
                                      not field.contents()):
                    continue
                assert value is not None, field.name
                assert np.allclose(value, field.contents()) if not isinstance(value, str) \
                    else value == field.contents(), (field.name, value, field.contents())
    print(f"{os.path.basename(folder):16} {len(got)} tensors and the keys are as expected")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default=os.path.join(os.path.dirname(__file__), "checkpoints"))
    parser.add_argument("--seed", type=int, default=0, help="0: the committed set")
    parser.add_argument("--wide", action="store_true", help="rows are multiples of 32")
    parser.add_argument("--only", default="")
    parser.add_argument("--check", metavar="MOE_CONVERT")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.makedirs(args.out, exist_ok=True)
    for name, m in CHECKPOINTS.items():
        if args.only in name:
            made = make(name, dict(m), args.seed, args.wide, args.out)
            if args.check:
                check(args.check, os.path.join(args.out, name), *made)


if __name__ == "__main__":
    main()
