#!/usr/bin/env python3
"""Makes tests/fixtures: small random models of each family, as GGUF files in llama.cpp's conventions,
and the logits that Hugging Face `transformers` computes for them.

    python3 tests/make_fixtures.py                          the committed set, into tests/fixtures
    python3 tests/make_fixtures.py --seed 7 --out DIR       other weights, tokens and dimensions
    python3 tests/make_fixtures.py --only gemma3 ...        the models whose name contains a word

Versions (the committed files are reproduced byte for byte with these):

    pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 numpy==2.4.6
        (--extra-index-url https://download.pytorch.org/whl/cpu for the small build of torch)

For each model NAME two files are written:

    NAME.gguf       weights and metadata; no tokenizer
    NAME.expected   little endian: char[4] "MOEX", uint32 n_tok, uint32 n_vocab, float32 rounding[3],
                    int32 token[n_tok], float32 logits[n_tok][n_vocab]

For a model with a layer for multi-token prediction also NAME.drafts: char[4] "MOED", uint32 n_tok,
uint32 n_vocab, and twice float32 logits[n_tok][n_vocab]: what that layer, from the model's outputs
before position p and the token at p, says of the token at p + 1; and then, from its own output and
the best of those tokens, of the one at p + 2. Rows of position 0 are zeros.

`rounding` says what a key/value cache of type F16, Q8_0 and F32 costs: the largest relative error of a
position's logits when transformers itself, in double precision, rounds keys and values so and, in
front of matrices in integer formats, activations to 8 bits in groups of 32; of BF16, to BF16.

The logits are computed in double precision throughout: torch.float32 is made to mean float64 while
the model runs, since the modelling code forces norms, softmax and rotary angles into float32. The same
model is also run in single precision, unchanged; the script prints the distance between the two and
stops if it is not far below the tolerance of the tests. Weights are spread widely enough for attention
and routers to be far from uniform, and tokens are chosen such that no router decision is a near tie
(0.2 between logits, more where activations are rounded and experts weigh much), so that a rounded
key/value cache cannot turn one.
"""
import argparse
import contextlib
import os
import struct
import sys

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as GT
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from transformers import (DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config,
                          DeepseekV3ForCausalLM, DynamicCache, Gemma3ForCausalLM,
                          Gemma3TextConfig, Gemma4ForCausalLM, Gemma4TextConfig,
                          Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM,
                          GptOssConfig, GptOssForCausalLM, Lfm2MoeConfig, Lfm2MoeForCausalLM,
                          LlamaConfig,
                          LlamaForCausalLM,
                          MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM,
                          Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM,
                          Qwen3MoeConfig, Qwen3MoeForCausalLM,
                          Qwen3NextConfig, Qwen3NextForCausalLM)
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.4.6"}

# ------------------------------------------------------------------------------------- models --
# Dimensions are awkward on purpose: odd numbers of heads, widths that fill no vector and no block,
# head_dim that is not n_embd / n_head. n_tok exceeds the sliding windows and the chunks of the tests.

MODELS = {
    "llama-llama3": dict(
        family="llama", vocab=101, embd=60, head=3, kv=1, dim=20, ff=52, layer=2, tied=False, tok=56,
        rope=dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0,
                  high_freq_factor=4.0, original_max_position_embeddings=64), ctx=512),
    "llama-tied": dict(
        family="llama", vocab=131, embd=42, head=7, kv=1, dim=12, ff=37, layer=3, tied=True, tok=61,
        rope=dict(rope_type="default", rope_theta=10000.0), ctx=128),
    "llama-yarn": dict(
        family="llama", vocab=97, embd=36, head=3, kv=3, dim=12, ff=50, layer=2, tied=False, tok=67,
        rope=dict(rope_type="yarn", rope_theta=300.0, factor=4.0,
                  original_max_position_embeddings=128), ctx=512),
    "llama-linear": dict(
        family="llama", vocab=103, embd=40, head=5, kv=1, dim=10, ff=30, layer=2, tied=False, tok=50,
        bias=True,
        rope=dict(rope_type="linear", rope_theta=1000.0, factor=3.0), ctx=256),
    "mixtral": dict(
        family="mixtral", vocab=107, embd=30, head=3, kv=1, dim=10, ff=26, layer=2, tied=False, tok=48,
        expert=5, used=2, rope=dict(rope_type="default", rope_theta=1000000.0), ctx=256),
    "mixtral-f16": dict(
        family="mixtral", vocab=109, embd=35, head=5, kv=5, dim=14, ff=27, layer=2, tied=False, tok=44,
        expert=7, used=3, rope=dict(rope_type="default", rope_theta=10000.0), ctx=256,
        types=dict(all=GT.F16)),
    "qwen2": dict(
        family="qwen2", vocab=149, embd=54, head=9, kv=3, dim=6, ff=45, layer=2, tied=True, tok=53,
        rope=dict(rope_type="default", rope_theta=1000000.0), ctx=256),
    "qwen3": dict(
        family="qwen3", vocab=113, embd=45, head=5, kv=1, dim=14, ff=40, layer=2, tied=True, tok=52,
        rope=dict(rope_type="default", rope_theta=1000000.0), ctx=256),
    "qwen3-yarn": dict(
        family="qwen3", vocab=117, embd=36, head=4, kv=2, dim=18, ff=33, layer=2, tied=False, tok=70,
        # attn_factor as in DeepSeek-R1-0528-Qwen3-8B: transformers does not know it, llama.cpp's
        # converter writes it, llama.cpp does not use it
        rope=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, beta_fast=8.0, beta_slow=0.5,
                  original_max_position_embeddings=64, attn_factor=0.8782488562869419), ctx=256),
    "qwen3moe": dict(
        family="qwen3moe", vocab=127, embd=42, head=6, kv=2, dim=12, ff=50, ff_exp=14, layer=2,
        tied=False, tok=49, expert=7, used=3, renorm=True,
        rope=dict(rope_type="default", rope_theta=1000000.0), ctx=256),
    "qwen3moe-raw": dict(
        family="qwen3moe", vocab=99, embd=35, head=5, kv=1, dim=16, ff=50, ff_exp=19, layer=2,
        tied=True, tok=46, expert=5, used=3, renorm=False,
        rope=dict(rope_type="default", rope_theta=1000000.0), ctx=256),
    "qwen3moe-q": dict(
        family="qwen3moe", vocab=160, embd=96, head=4, kv=2, dim=16, ff=64, ff_exp=32, layer=2,
        tied=False, tok=40, expert=5, used=2, renorm=True,
        rope=dict(rope_type="default", rope_theta=1000000.0), ctx=256,
        types={"token_embd": GT.Q8_0, "output.": GT.Q8_0, "attn_q.": GT.Q5_1, "attn_k.": GT.Q8_0,
               "attn_v.": GT.Q5_0, "attn_output": GT.Q4_1, "ffn_gate_exps": GT.Q4_0,
               "ffn_up_exps": GT.Q4_1, "ffn_down_exps": GT.Q5_0}),
    "olmoe": dict(
        family="olmoe", vocab=139, embd=40, head=5, kv=5, dim=8, ff=18, layer=2, tied=False, tok=47,
        expert=6, used=3, renorm=False, rope=dict(rope_type="default", rope_theta=10000.0), ctx=256),
    "olmoe-bf16": dict(
        family="olmoe", vocab=98, embd=42, head=3, kv=3, dim=14, ff=29, layer=2, tied=False, tok=45,
        expert=9, used=4, renorm=False, rope=dict(rope_type="default", rope_theta=10000.0), ctx=256,
        types=dict(all=GT.BF16)),
    "gemma3": dict(
        family="gemma3", vocab=113, embd=36, head=3, kv=1, dim=10, ff=26, layer=7, tied=True, tok=60,
        window=4, rope=dict(rope_type="default", rope_theta=1000000.0), rope_local=100.0, ctx=256),
    "gemma3-linear": dict(
        family="gemma3", vocab=119, embd=30, head=5, kv=1, dim=8, ff=41, layer=6, tied=True, tok=55,
        window=5, rope=dict(rope_type="linear", rope_theta=5000.0, factor=8.0), rope_local=200.0,
        softcap=2.5, ctx=1024),
    "qwen2moe": dict(
        family="qwen2moe", vocab=111, embd=40, head=5, kv=1, dim=8, ff=33, ff_exp=13, ff_shared=27,
        layer=2, tied=False, tok=47, expert=7, used=3, renorm=False,
        rope=dict(rope_type="default", rope_theta=1000000.0), ctx=256),
    "qwen2moe-tied": dict(
        family="qwen2moe", vocab=96, embd=42, head=7, kv=7, dim=6, ff=20, ff_exp=21, ff_shared=9,
        layer=2, tied=True, tok=43, expert=5, used=2, renorm=True,
        rope=dict(rope_type="default", rope_theta=10000.0), ctx=256),
    # DeepSeek-V2-Lite: queries without a latent, softmax, two shared experts, one dense layer
    "deepseek2-lite": dict(
        family="deepseek2", vocab=103, embd=36, head=3, kv=3, nope=10, rot=6, dim_v=14, latent=22,
        ff=31, ff_exp=11, layer=3, dense=1, tied=False, tok=66, expert=9, used=4, shared=2,
        scale=1.0, rope=dict(rope_type="yarn", rope_theta=300.0, factor=4.0, mscale=0.707,
                             mscale_all_dim=0.707, original_max_position_embeddings=64), ctx=256),
    # DeepSeek-V2: groups scored by their best expert; an older file, with the fused matrix
    "deepseek2-groups": dict(
        family="deepseek2", vocab=98, embd=30, head=5, kv=5, nope=6, rot=4, dim_v=9, latent=20,
        latent_q=17, ff=26, ff_exp=13, layer=2, dense=1, tied=False, tok=45, expert=12, used=3,
        shared=1, group=4, group_used=2, scale=2.5, fused=True,
        rope=dict(rope_type="default", rope_theta=1000.0), ctx=256),
    # DeepSeek-V3: sigmoid, a bias for the selection, groups scored by their two best
    "deepseek3": dict(
        family="deepseek3", vocab=105, embd=42, head=3, kv=3, nope=12, rot=8, dim_v=10, latent=26,
        latent_q=15, ff=29, ff_exp=12, layer=3, dense=1, tied=False, tok=61, expert=20, used=4,
        shared=1, group=5, group_used=2, scale=2.5, renorm=True,
        rope=dict(rope_type="yarn", rope_theta=500.0, factor=8.0, mscale=1.0, mscale_all_dim=1.0,
                  beta_fast=16.0, beta_slow=0.5, original_max_position_embeddings=64), ctx=512),
    # DeepSeek-V3 with its layer for multi-token prediction
    "deepseek3-mtp": dict(
        family="deepseek3", vocab=83, embd=30, head=3, kv=3, nope=8, rot=6, dim_v=7, latent=18,
        latent_q=13, ff=25, ff_exp=9, layer=2, dense=1, tied=False, tok=32, expert=8, used=3,
        shared=1, group=2, group_used=1, scale=2.5, renorm=True, mtp=True,
        rope=dict(rope_type="yarn", rope_theta=500.0, factor=8.0, mscale=1.0, mscale_all_dim=1.0,
                  beta_fast=16.0, beta_slow=0.5, original_max_position_embeddings=64), ctx=512),
    # Moonlight: the same router without groups, queries without a latent; a fused matrix whose parts
    # do not begin at multiples of 4 bytes
    "deepseek3-flat": dict(
        family="deepseek3", vocab=99, embd=39, head=3, kv=3, nope=7, rot=4, dim_v=9, latent=17,
        ff=29, ff_exp=15, layer=2, dense=1, tied=True, tok=44, expert=8, used=3, shared=2, group=1,
        group_used=1, scale=2.446, renorm=True, fused=True,
        rope=dict(rope_type="default", rope_theta=50000.0), ctx=256, types=dict(all=GT.F16)),
    # GLM-4.7-Flash: the same, in a file that does not say how scores are made
    "deepseek3-glm": dict(
        family="glm4lite", vocab=95, embd=36, head=4, kv=4, nope=9, rot=6, dim_v=13, latent=16,
        latent_q=14, ff=28, ff_exp=10, layer=2, dense=1, tied=False, tok=42, expert=7, used=2,
        shared=1, group=1, group_used=1, scale=1.8, renorm=True,
        rope=dict(rope_type="default", rope_theta=10000.0), ctx=256),
    "deepseek3-q": dict(
        family="deepseek3", vocab=160, embd=64, head=4, kv=4, nope=32, rot=16, dim_v=32, latent=64,
        latent_q=96, ff=96, ff_exp=32, layer=2, dense=1, tied=False, tok=38, expert=8, used=2,
        shared=1, group=2, group_used=1, scale=1.8, renorm=True, fused=True, margin=0.7,
        rope=dict(rope_type="default", rope_theta=10000.0), ctx=256, types=dict(all=GT.Q8_0)),
    "gpt-oss": dict(
        family="gpt-oss", vocab=117, embd=36, head=6, kv=2, dim=10, ff=21, layer=3, tied=False,
        tok=64, expert=6, used=3, window=5,
        rope=dict(rope_type="yarn", rope_theta=400.0, factor=8.0, beta_fast=16.0, beta_slow=0.5,
                  truncate=False, original_max_position_embeddings=64), ctx=512),
    "gpt-oss-mxfp4": dict(
        family="gpt-oss", vocab=128, embd=96, head=3, kv=1, dim=32, ff=64, layer=2, tied=False,
        tok=40, expert=5, used=2, window=7, margin=0.6,
        rope=dict(rope_type="yarn", rope_theta=150000.0, factor=4.0, truncate=False,
                  original_max_position_embeddings=64), ctx=256,
        types={"token_embd": GT.Q8_0, "output.": GT.Q8_0, "attn_q.": GT.Q8_0, "attn_k.": GT.Q8_0,
               "attn_v.": GT.Q8_0, "attn_output": GT.Q8_0, "_exps": GT.MXFP4}),
    "lfm2moe": dict(
        family="lfm2moe", vocab=107, embd=40, head=5, kv=1, dim=8, ff=27, ff_exp=13, layer=4, dense=1,
        tied=True, tok=58, expert=7, used=3, group=1, group_used=1, conv=3, renorm=True, scale=1.0,
        rope=dict(rope_type="default", rope_theta=1000000.0), ctx=256),
    "lfm2moe-4": dict(
        family="lfm2moe", vocab=95, embd=36, head=6, kv=3, dim=6, ff=21, ff_exp=10, layer=3, dense=0,
        tied=False, tok=44, expert=5, used=2, group=1, group_used=1, conv=4, renorm=True, scale=1.5,
        rope=dict(rope_type="default", rope_theta=1000.0), ctx=256),
    # Qwen3.5: four value heads on two keys; longer than the reference's chunks of 64
    "qwen35moe": dict(
        family="qwen35moe", vocab=93, embd=30, head=3, kv=1, dim=12, rot=6, ff=0, ff_exp=9,
        ff_shared=11, layer=4, tied=False, tok=75, expert=7, used=3, renorm=True, conv=4,
        delta=dict(head=4, head_k=2, dim=10, period=4),
        rope=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5), ctx=256),
    # one head per key; values in two blocks of columns, the last not full
    # with its layer for multi-token prediction
    "qwen35moe-mtp": dict(
        family="qwen35moe", vocab=71, embd=22, head=2, kv=1, dim=10, rot=4, ff=0, ff_exp=7,
        ff_shared=8, layer=4, tied=False, tok=26, expert=5, used=2, renorm=True, conv=4,
        delta=dict(head=2, head_k=1, dim=8, period=4), mtp=True,
        rope=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.4), ctx=256),
    "qwen35moe-wide": dict(
        family="qwen35moe", vocab=85, embd=22, head=4, kv=2, dim=10, rot=4, ff=0, ff_exp=7,
        ff_shared=8, layer=3, tied=True, tok=40, expert=5, used=2, renorm=True, conv=3,
        delta=dict(head=3, head_k=3, dim=7, dim_v=39, period=2),
        rope=dict(rope_type="default", rope_theta=1000000.0, partial_rotary_factor=0.4), ctx=256),
    "qwen35": dict(
        family="qwen35", vocab=89, embd=26, head=2, kv=2, dim=12, rot=6, ff=31, layer=3, tied=True,
        tok=50, conv=2, delta=dict(head=6, head_k=2, dim=9, period=3),
        rope=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5), ctx=256),
    # Qwen3-Next: heads in another order
    "qwen3next": dict(
        family="qwen3next", vocab=91, embd=28, head=5, kv=1, dim=10, rot=4, ff=20, ff_exp=8,
        ff_shared=13, layer=4, tied=False, tok=68, expert=5, used=2, renorm=True, conv=4,
        delta=dict(head=6, head_k=2, dim=8, period=4),
        rope=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.4), ctx=256),
    # Gemma 4: experts beside a dense feed-forward; values from keys in global layers, whose heads are
    # longer and fewer; gate and up of the experts in one tensor
    "gemma4": dict(
        family="gemma4", vocab=95, embd=28, head=4, kv=2, dim=10, ff=19, ff_exp=9, layer=4, tied=True,
        tok=60, expert=6, used=2, renorm=True, window=5, window_period=3, softcap=4.0,
        heads_global=dict(kv=1, dim=16, share=0.5), rope_local=100.0,
        rope=dict(rope_type="proportional", rope_theta=10000.0, partial_rotary_factor=0.5), ctx=256),
    # without experts, values of their own
    "gemma4-dense": dict(
        family="gemma4", vocab=91, embd=26, head=2, kv=2, dim=8, ff=23, layer=3, tied=True, tok=44,
        window=7, window_period=2, heads_global=dict(kv=2, dim=12, share=0.25, values=True),
        rope_local=200.0,
        rope=dict(rope_type="proportional", rope_theta=5000.0, partial_rotary_factor=0.25), ctx=256),
    "gemma3-27b": dict(  # 62 layers: the one size whose attention scale is n_embd / n_head
        family="gemma3", vocab=97, embd=12, head=2, kv=1, dim=4, ff=7, layer=62, tied=True, tok=41,
        window=7, rope=dict(rope_type="default", rope_theta=1000000.0), rope_local=100.0,
        post_norm=0.15, ctx=256),
}


NO_HEAD_DIM = ("qwen2", "qwen2moe", "olmoe", "lfm2moe")  # heads are as long as n_embd / n_head


def randomize(m, rng):
    """Other dimensions for the same family."""
    m = dict(m)
    m["kv"] = int(rng.integers(1, 4))
    group = 1 if m["family"] == "olmoe" else int(rng.integers(1, 5))
    m["head"] = m["kv"] * group
    if "types" in m and "all" not in m["types"]:
        m["dim"] = 32 * int(rng.integers(1, 3))
        m["embd"] = 32 * m["head"]
        m["ff_exp"] = 32 * int(rng.integers(1, 4))
    else:
        m["dim"] = 2 * int(rng.integers(2, 40))
        m["embd"] = m["head"] * int(rng.integers(max(1, 24 // m["head"]), 200 // m["head"]))
        m["ff"] = int(rng.integers(9, 300))
        m["ff_exp"] = int(rng.integers(5, 90))
    if m["family"] in NO_HEAD_DIM:
        m["embd"] = m["head"] * m["dim"]
    if m["family"] == "gpt-oss":
        m["window"] = int(rng.integers(1, 20))
        if "types" in m:
            m["ff"] = m["ff_exp"]
    if m["family"] == "qwen2moe":
        m["ff_shared"] = int(rng.integers(5, 120))
    if m["family"] == "gemma3":
        m["window"] = int(rng.integers(1, 20))
        if m["layer"] != 62:
            m["layer"] = int(rng.integers(6, 14))
    else:
        m["layer"] = int(rng.integers(1, 5))
    if m["family"] == "gemma4":
        m["window"] = int(rng.integers(1, 20))
        m["window_period"] = int(rng.integers(2, 5))
        m["layer"] = int(rng.integers(2, 7))
        m["heads_global"] = dict(m["heads_global"], dim=2 * int(rng.integers(2, 40)),
                                 kv=int(rng.choice([d for d in (1, m["kv"], m["head"])])),
                                 share=float(rng.uniform(0.1, 1)))
        if m["heads_global"].get("values"):  # transformers does not take another number then
            m["heads_global"]["kv"] = m["kv"]
    m["vocab"] = int(rng.integers(60, 400))
    m["tok"] = int(rng.integers(30, 90))
    if m["family"] == "lfm2moe":
        m["layer"] = int(rng.integers(2, 7))
        m["dense"] = int(rng.integers(0, m["layer"]))
        m["conv"] = int(rng.integers(2, 7))
    if "delta" in m:
        m["layer"] = int(rng.integers(2, 8))
        m["conv"] = int(rng.integers(1, 7))
        m["rot"] = 2 * int(rng.integers(1, m["dim"] // 2 + 1))
        m["rope"] = dict(m["rope"], partial_rotary_factor=(m["rot"] + 0.5) / m["dim"])
        head_k = int(rng.integers(1, 4))
        step = 32 if "types" in m else 1
        m["delta"] = dict(head_k=head_k, head=head_k * int(rng.integers(1, 4)),
                          dim=step * int(rng.integers(1, 3 if step > 1 else 80)),
                          period=int(rng.integers(2, 5)))
        m["ff_shared"] = step * int(rng.integers(1, 3 if step > 1 else 100))
        if m["family"] != "qwen3next" and step == 1:
            m["delta"]["dim_v"] = int(rng.integers(1, 100))
    if "expert" in m and "latent" not in m:
        m["expert"] = int(rng.integers(3, 20))
        m["used"] = int(rng.integers(1, min(6, m["expert"])))
    if "latent" in m:
        randomize_latent(m, rng, 32 if m.get("types", {}).get("all") == GT.Q8_0 else 1)
    return m


def randomize_latent(m, rng, step):
    """Latent attention; lengths of rows are multiples of `step`."""
    m["kv"] = m["head"]
    m["embd"] = m["head"] * step * int(rng.integers(1, 4) if step > 1 else rng.integers(8, 40))
    low, high = (1, 4) if step > 1 else (5, 60)
    for key in ("nope", "dim_v", "latent", "latent_q", "ff", "ff_exp"):
        if key in m:
            m[key] = step * int(rng.integers(low, high))
    if m["family"] == "deepseek2":  # its code views pairs as complex numbers
        m["nope"], m["latent"] = 2 * m["nope"], 2 * m["latent"]
    m["rot"] = 2 * int(rng.integers(1, 17))
    m["layer"] = int(rng.integers(2, 5))
    m["dense"] = int(rng.integers(0, m["layer"]))
    m["shared"] = int(rng.integers(1, 4))
    if "group" in m:
        m["group"] = int(rng.integers(1, 6))
        size = int(rng.integers(2, 6))
        m["expert"] = m["group"] * size
        m["group_used"] = int(rng.integers(1, m["group"] + 1))
        m["used"] = int(rng.integers(1, min(6, m["group_used"] * size)))
    else:
        m["expert"] = int(rng.integers(3, 20))
        m["used"] = int(rng.integers(1, min(6, m["expert"])))


def lfm2_kinds(m):
    return ["full_attention" if i % 3 == 1 else "conv" for i in range(m["layer"])]


def gemma4_kinds(m):
    """The last layer is always global."""
    return ["full_attention" if (i + 1) % m["window_period"] == 0 or i + 1 == m["layer"]
            else "sliding_attention" for i in range(m["layer"])]


def delta_kinds(m):
    return ["full_attention" if (i + 1) % m["delta"]["period"] == 0 else "linear_attention"
            for i in range(m["layer"])]


def build(m):
    """The configuration and the class of a model, and its GGUF architecture. m["config"] has fields of
    the configuration that are set over the usual ones."""
    config, cls, arch = build_usual(m)
    if "config" in m:
        config = type(config)(**dict(config.to_dict(), **m["config"]))
    return config, cls, arch


def build_usual(m):
    c = dict(vocab_size=m["vocab"], hidden_size=m["embd"], intermediate_size=m["ff"],
             num_hidden_layers=m["layer"], num_attention_heads=m["head"],
             num_key_value_heads=m["kv"], max_position_embeddings=m["ctx"],
             tie_word_embeddings=m["tied"], rms_norm_eps=1e-5, rope_parameters=dict(m["rope"]),
             bos_token_id=1, eos_token_id=2, pad_token_id=None, attention_dropout=0.0)
    f = m["family"]
    if f == "llama":
        return (LlamaConfig(head_dim=m["dim"], attention_bias=m.get("bias", False), **c),
                LlamaForCausalLM, "llama")
    if f == "mixtral":
        return (MixtralConfig(head_dim=m["dim"], num_local_experts=m["expert"],
                              num_experts_per_tok=m["used"], **c), MixtralForCausalLM, "llama")
    if f == "qwen2":
        assert m["embd"] % m["head"] == 0
        return Qwen2Config(**c), Qwen2ForCausalLM, "qwen2"
    if f == "qwen3":
        return Qwen3Config(head_dim=m["dim"], **c), Qwen3ForCausalLM, "qwen3"
    if f == "qwen3moe":
        return (Qwen3MoeConfig(head_dim=m["dim"], num_experts=m["expert"], norm_topk_prob=m["renorm"],
                               num_experts_per_tok=m["used"], moe_intermediate_size=m["ff_exp"], **c),
                Qwen3MoeForCausalLM, "qwen3moe")
    if f == "olmoe":
        return (OlmoeConfig(num_experts=m["expert"], num_experts_per_tok=m["used"],
                            norm_topk_prob=m["renorm"], **c), OlmoeForCausalLM, "olmoe")
    if f == "qwen2moe":
        assert m["embd"] % m["head"] == 0
        return (Qwen2MoeConfig(num_experts=m["expert"], norm_topk_prob=m["renorm"],
                               num_experts_per_tok=m["used"], moe_intermediate_size=m["ff_exp"],
                               shared_expert_intermediate_size=m["ff_shared"], **c),
                Qwen2MoeForCausalLM, "qwen2moe")
    if "delta" in m:
        d = m["delta"]
        c.update(head_dim=m["dim"], layer_types=delta_kinds(m), linear_conv_kernel_dim=m["conv"],
                 linear_key_head_dim=d["dim"], linear_value_head_dim=d.get("dim_v", d["dim"]),
                 linear_num_key_heads=d["head_k"], linear_num_value_heads=d["head"])
        if "expert" in m:
            c.update(num_experts=m["expert"], num_experts_per_tok=m["used"],
                     moe_intermediate_size=m["ff_exp"],
                     shared_expert_intermediate_size=m["ff_shared"])
    if f == "qwen35moe":
        del c["intermediate_size"]
        return (Qwen3_5MoeTextConfig(**c), modeling_qwen3_5_moe.Qwen3_5MoeForCausalLM,
                "qwen35moe")
    if f == "qwen35":
        return Qwen3_5TextConfig(**c), modeling_qwen3_5.Qwen3_5ForCausalLM, "qwen35"
    if f == "qwen3next":
        return (Qwen3NextConfig(norm_topk_prob=True, **c), Qwen3NextForCausalLM, "qwen3next")
    if f in ("deepseek2", "deepseek3", "glm4lite"):
        c.update(kv_lora_rank=m["latent"], q_lora_rank=m.get("latent_q"), v_head_dim=m["dim_v"],
                 qk_nope_head_dim=m["nope"], qk_rope_head_dim=m["rot"],
                 n_routed_experts=m["expert"], num_experts_per_tok=m["used"],
                 moe_intermediate_size=m["ff_exp"], n_shared_experts=m["shared"],
                 first_k_dense_replace=m["dense"], routed_scaling_factor=m["scale"],
                 n_group=m.get("group"), topk_group=m.get("group_used"))
    if f == "deepseek2":
        method = "group_limited_greedy" if "group" in m else "greedy"
        return (DeepseekV2Config(topk_method=method, norm_topk_prob=False, **c),
                DeepseekV2ForCausalLM, "deepseek2")
    if f == "deepseek3":
        return (DeepseekV3Config(norm_topk_prob=m["renorm"], num_mtp_layers=int(m.get("mtp", False)),
                                 **c),
                DeepseekV3ForCausalLM, "deepseek2")
    if f == "lfm2moe":
        c["norm_eps"] = c.pop("rms_norm_eps")
        return (Lfm2MoeConfig(layer_types=lfm2_kinds(m), conv_L_cache=m["conv"],
                              num_dense_layers=m["dense"], num_experts=m["expert"],
                              num_experts_per_tok=m["used"], moe_intermediate_size=m["ff_exp"],
                              routed_scaling_factor=m["scale"], **c), Lfm2MoeForCausalLM, "lfm2moe")
    if f == "glm4lite":
        kinds = ["dense"] * c.pop("first_k_dense_replace")
        kinds += ["sparse"] * (m["layer"] - len(kinds))
        return (Glm4MoeLiteConfig(norm_topk_prob=m["renorm"], mlp_layer_types=kinds, **c),
                Glm4MoeLiteForCausalLM, "deepseek2")
    if f == "gpt-oss":
        return (GptOssConfig(head_dim=m["dim"], num_local_experts=m["expert"],
                             num_experts_per_tok=m["used"], sliding_window=m["window"], **c),
                GptOssForCausalLM, "gpt-oss")
    if f == "gemma4":
        g, kinds = m["heads_global"], gemma4_kinds(m)
        c["rope_parameters"] = {"full_attention": dict(m["rope"], partial_rotary_factor=g["share"]),
                                "sliding_attention": dict(rope_type="default",
                                                          rope_theta=m["rope_local"])}
        if "expert" in m:
            c.update(enable_moe_block=True, num_experts=m["expert"], top_k_experts=m["used"],
                     moe_intermediate_size=m["ff_exp"])
        return (Gemma4TextConfig(head_dim=m["dim"], global_head_dim=g["dim"], layer_types=kinds,
                                 num_global_key_value_heads=g["kv"],
                                 attention_k_eq_v=not g.get("values"), sliding_window=m["window"],
                                 hidden_size_per_layer_input=0,
                                 final_logit_softcapping=m.get("softcap"), **c),
                Gemma4ForCausalLM, "gemma4")
    c["rope_parameters"] = {"full_attention": dict(m["rope"]),
                            "sliding_attention": dict(rope_type="default",
                                                      rope_theta=m["rope_local"])}
    scale = m["embd"] // m["head"] if m["layer"] == 62 else m["dim"]
    return (Gemma3TextConfig(head_dim=m["dim"], query_pre_attn_scalar=scale,
                             final_logit_softcapping=m.get("softcap"),
                             sliding_window=m["window"], **c), Gemma3ForCausalLM, "gemma3")


# Standard deviations, in units of 1 / sqrt(length of a row).
GAIN = {"q_proj": 1.7, "k_proj": 1.7, "v_proj": 1.0, "o_proj": 1.0, "gate_proj": 1.4, "up_proj": 1.2,
        "gate_up_proj": 1.3, "down_proj": 1.3, "gate": 2.0, "lm_head": 2.0, "shared_expert_gate": 2.0,
        "q_a_proj": 1.0, "q_b_proj": 1.7, "kv_a_proj_with_mqa": 1.7, "kv_b_proj": 1.2, "router": 2.0,
        "w1": 1.4, "w2": 1.3, "w3": 1.2, "in_proj": 1.3, "out_proj": 1.0, "conv": 1.5,
        "in_proj_qkv": 1.3, "in_proj_z": 1.5, "in_proj_a": 1.0, "in_proj_b": 1.5, "conv1d": 3.0,
        "proj": 2.0, "in_proj_qkvz": 1.3, "in_proj_ba": 1.2, "eh_proj": 1.5}
CLAMPED_GAIN = 5.0  # of gpt-oss' gates: enough of them must reach the limit of 7


def random_weights(model, m, rng):
    """name -> float32 array, in transformers' names. Sums like 1 + w are exact: norm weights are
    multiples of 2^-12."""
    out = {}
    for name, p in model.state_dict().items():
        shape = tuple(p.shape)
        part = [s for s in name.split(".") if s not in ("weight", "bias")][-1]
        if name.endswith((".bias", "_proj_bias")):
            w = rng.normal(0, 0.6, shape)
        elif part in ("e_score_correction_bias", "expert_bias"):
            w = rng.normal(0, 0.2, shape)
        elif part in ("scale", "per_expert_scale", "layer_scalar"):
            w = np.round(rng.uniform(0.6, 1.4, shape) * 4096) / 4096
            if part == "scale":  # of the router, whose input has unit length
                w *= 4
        elif part == "A_log":
            w = np.log(rng.uniform(0.01, 0.5, shape))
        elif part == "dt_bias":
            w = rng.normal(-0.5, 0.7, shape)
        elif part == "sinks":
            w = rng.normal(0, 1.5, shape)
        elif m["family"] == "gpt-oss" and ".experts." in name:  # transposed: [expert][in][out]
            gain = CLAMPED_GAIN if part == "gate_up_proj" else 0.4
            w = rng.normal(0, gain / np.sqrt(shape[-2]), shape)
        elif "norm" in part:
            w = np.round(rng.uniform(0.4, 1.7, shape) * 4096) / 4096
            if part in ("q_norm", "k_norm"):
                w *= 0.5 if m["family"] == "gemma4" else 1.25  # q . k is not scaled
                w = np.round(w * 4096) / 4096
            if part.startswith("post_") and "post_norm" in m:  # keeps a deep model well conditioned
                w = np.round(w * m["post_norm"] * 4096) / 4096
            if m["family"] == "gemma3" or ("delta" in m and ".linear_attn." not in name):
                w = w - 1
        elif part == "embed_tokens":
            w = rng.normal(0, 1 / np.sqrt(shape[-1]) if "gemma" in m["family"] else 0.8, shape)
        else:
            w = rng.normal(0, GAIN[part] / np.sqrt(shape[-1]), shape)
        out[name] = w.astype(np.float32)
    if m["tied"]:
        out["lm_head.weight"] = out["model.embed_tokens.weight"]
    return out


# ---------------------------------------------------------------------------------------- GGUF --

DRAFT_NAMES = {"eh_proj": "nextn.eh_proj", "enorm": "nextn.enorm", "hnorm": "nextn.hnorm",
               "shared_head.norm": "nextn.shared_head_norm"}


def interleave(w, n_head):
    """Reorders rows within heads: from half-split rotary pairs (i, i + d/2) to adjacent ones
    (2i, 2i + 1), which is what architecture "llama" has in GGUF."""
    d = w.shape[0] // n_head
    order = np.arange(d).reshape(2, d // 2).T.reshape(-1)
    return w.reshape(n_head, d, *w.shape[1:])[:, order].reshape(w.shape)


LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.router": "ffn_gate_inp", "self_attn.q_a_proj": "attn_q_a", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm", "self_attn.kv_b_proj": "attn_kv_b"}
for _kind in ("gate", "up", "down"):
    for _shared in ("shared_expert", "shared_experts"):
        LAYER_NAMES[f"mlp.{_shared}.{_kind}_proj"] = f"ffn_{_kind}_shexp"
GEMMA_NAMES = {"post_attention_layernorm": "post_attention_norm",
               "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}
GEMMA4_NAMES = dict(GEMMA_NAMES, **{
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2", "router.proj": "ffn_gate_inp"})
GEMMA4_TENSORS = {"router.scale": "ffn_gate_inp.scale",
                  "router.per_expert_scale": "ffn_down_exps.scale",
                  "layer_scalar": "layer_output_scale.weight",
                  "experts.gate_up_proj": "ffn_gate_up_exps.weight",
                  "experts.down_proj": "ffn_down_exps.weight"}
FAMILY_NAMES = {"gemma3": GEMMA_NAMES, "gemma4": GEMMA4_NAMES,
                **{f: {"post_attention_layernorm": "post_attention_norm"}
                   for f in ("qwen35", "qwen35moe", "qwen3next")},
                "gpt-oss": {"post_attention_layernorm": "post_attention_norm"},
                "lfm2moe": {"operator_norm": "attn_norm", "ffn_norm": "ffn_norm",
                            "self_attn.out_proj": "attn_output",
                            "self_attn.q_layernorm": "attn_q_norm",
                            "self_attn.k_layernorm": "attn_k_norm", "conv.conv": "shortconv.conv",
                            "conv.in_proj": "shortconv.in_proj",
                            "conv.out_proj": "shortconv.out_proj", "feed_forward.w1": "ffn_gate",
                            "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
                            "feed_forward.gate": "ffn_gate_inp"}}
GPT_OSS_NAMES = {"mlp.experts.gate_up_proj": None, "mlp.experts.gate_up_proj_bias": None,
                 "mlp.experts.down_proj": "ffn_down_exps.weight",
                 "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
                 "self_attn.sinks": "attn_sinks.weight"}


def tile_heads(w, m, dim):
    """Rows of value heads, `dim` each: from those of one key head together to turns of key heads."""
    d = m["delta"]
    return (w.reshape(d["head_k"], d["head"] // d["head_k"], dim, *w.shape[1:]).swapaxes(0, 1)
            .reshape(w.shape))


DELTA_NAMES = {"in_proj_qkv.weight": "attn_qkv.weight", "in_proj_z.weight": "attn_gate.weight",
               "in_proj_a.weight": "ssm_alpha.weight", "in_proj_b.weight": "ssm_beta.weight",
               "conv1d.weight": "ssm_conv1d.weight", "A_log": "ssm_a", "dt_bias": "ssm_dt.bias",
               "norm.weight": "ssm_norm.weight", "out_proj.weight": "ssm_out.weight",
               "in_proj_ba.weight": "ssm_ba.weight"}


def delta_tensors(name, w, m):
    """A tensor of linear_attn as those of a GGUF file."""
    d = m["delta"]
    dim_v, tiled = d.get("dim_v", d["dim"]), m["family"] != "qwen3next"
    keys = 2 * d["head_k"] * d["dim"]
    if name == "in_proj_qkvz.weight":  # for each key head: q, k, values, z
        each = d["head"] // d["head_k"] * dim_v
        heads = w.reshape(d["head_k"], -1, w.shape[1])
        parts = np.split(heads, [d["dim"], 2 * d["dim"], 2 * d["dim"] + each], axis=1)
        flat = [p.reshape(-1, w.shape[1]) for p in parts]
        return [("attn_qkv.weight", np.concatenate(flat[:3])), ("attn_gate.weight", flat[3])]
    if name == "A_log":
        w = -np.exp(w)
    if name == "conv1d.weight":
        w = w[:, 0]
    if tiled and name in ("in_proj_qkv.weight", "conv1d.weight"):
        w = np.concatenate([w[:keys], tile_heads(w[keys:], m, dim_v)])
    elif tiled and name == "in_proj_z.weight":
        w = tile_heads(w, m, dim_v)
    elif tiled and name == "out_proj.weight":
        w = tile_heads(w.T, m, dim_v).T
    elif tiled and name != "norm.weight":
        w = tile_heads(w, m, 1)
    return [(DELTA_NAMES[name], w)]


def gguf_tensors(weights, m, arch):
    """[(GGUF name, float32 array)], in llama.cpp's names, orders and conventions."""
    out = []
    for name, w in weights.items():
        if name == "lm_head.weight":
            if not m["tied"]:
                out.append(("output.weight", w))
            continue
        if (arch == "gemma3" or "delta" in m) and "norm" in name and ".linear_attn." not in name:
            w = w + np.float32(1)
        if name == "model.embedding_norm.weight":
            out.append(("token_embd_norm.weight", w))
            continue
        if name in ("model.embed_tokens.weight", "model.norm.weight"):
            out.append(("token_embd.weight" if "embed" in name else "output_norm.weight", w))
            continue
        _, _, layer, rest = name.split(".", 3)
        blk = f"blk.{layer}."
        rest = rest.replace("feed_forward.experts", "mlp.experts")
        if arch == "gemma4" and rest == "experts.gate_up_proj" and m.get("apart"):
            rest = "mlp.experts.gate_up_proj"
        if arch == "gemma4" and rest in GEMMA4_TENSORS:
            out.append((blk + GEMMA4_TENSORS[rest], w))
            continue
        if rest.startswith("linear_attn."):
            out += [(blk + n, t) for n, t in delta_tensors(rest[len("linear_attn."):], w, m)]
            continue
        if "conv.conv" in rest:
            w = w[:, 0]
        if arch == "gpt-oss" and rest in GPT_OSS_NAMES:
            if w.ndim == 3:
                w = w.transpose(0, 2, 1)
            if "gate_up" in rest:
                kind = rest.rpartition("_")[2].replace("proj", "weight")
                out += [(f"{blk}ffn_gate_exps.{kind}", w[:, ::2]),
                        (f"{blk}ffn_up_exps.{kind}", w[:, 1::2])]
            else:
                out.append((blk + GPT_OSS_NAMES[rest], w))
            continue
        if rest in ("mlp.gate.e_score_correction_bias", "feed_forward.expert_bias"):
            out.append((blk + "exp_probs_b.bias", w))
            continue
        if rest == "self_attn.kv_b_proj.weight" and not m.get("fused"):
            heads = w.reshape(m["head"], m["nope"] + m["dim_v"], m["latent"])
            out += [(blk + "attn_k_b.weight", heads[:, :m["nope"]].transpose(0, 2, 1)),
                    (blk + "attn_v_b.weight", heads[:, m["nope"]:])]
            continue
        if rest == "mlp.shared_expert_gate.weight":
            w = w[0]
        if rest == "mlp.experts.gate_up_proj":
            n = w.shape[1] // 2
            out += [(blk + "ffn_gate_exps.weight", w[:, :n]), (blk + "ffn_up_exps.weight", w[:, n:])]
            continue
        if rest == "mlp.experts.down_proj":
            out.append((blk + "ffn_down_exps.weight", w))
            continue
        rest, kind = rest.rsplit(".", 1)
        if arch == "llama" and rest == "self_attn.q_proj":  # weight and bias
            w = interleave(w, m["head"])
        if arch == "llama" and rest == "self_attn.k_proj":
            w = interleave(w, m["kv"])
        names = dict(LAYER_NAMES, **FAMILY_NAMES.get(arch, {}), **DRAFT_NAMES)
        out.append((f"{blk}{names[rest]}.{kind}", w))
    if m["rope"]["rope_type"] == "proportional":  # pairs that are not rotated
        half = m["heads_global"]["dim"] // 2
        turned = int(m["heads_global"]["share"] * m["heads_global"]["dim"] // 2)
        out.append(("rope_freqs.weight",
                    np.array([1] * turned + [1e30] * (half - turned), np.float32)))
    if m["rope"]["rope_type"] == "llama3":
        out.append(("rope_freqs.weight", llama3_factors(m)))
    return [(n, np.ascontiguousarray(w)) for n, w in out]


def llama3_factors(m):
    """What each rotary frequency is divided by in Llama 3.1's scheme."""
    r, n_ctx = m["rope"], m["rope"]["original_max_position_embeddings"]
    n_rot = m.get("rot", m["dim"])
    freq = r["rope_theta"] ** -(np.arange(0, n_rot, 2) / n_rot)
    turns = n_ctx * freq / (2 * np.pi)
    smooth = (turns - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"])
    smooth = np.clip(smooth, 0, 1)
    return (1 / ((1 - smooth) / r["factor"] + smooth)).astype(np.float32)


def write_latent_keys(w, m):
    """Newer files describe the heads as the cache sees them, older ones as the model does."""
    key, value = m["nope"] + m["rot"], m["dim_v"]
    if m.get("fused"):
        w.add_key_length(key)
        w.add_value_length(value)
    else:
        w.add_key_length(m["latent"] + m["rot"])
        w.add_value_length(m["latent"])
        w.add_key_length_mla(key)
        w.add_value_length_mla(value)
    w.add_kv_lora_rank(m["latent"])
    if "latent_q" in m:
        w.add_q_lora_rank(m["latent_q"])
    w.add_rope_dimension_count(m["rot"])
    w.add_leading_dense_block_count(m["dense"])
    w.add_expert_feed_forward_length(m["ff_exp"])
    w.add_expert_shared_count(m["shared"])
    w.add_expert_weights_scale(m["scale"])
    if m.get("renorm"):
        w.add_expert_weights_norm(True)
    if "group" in m:
        w.add_expert_group_count(m["group"])
        w.add_expert_group_used_count(m["group_used"])
    if m["family"] == "deepseek3":
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if "mscale_all_dim" in m["rope"]:
        w.add_rope_scaling_yarn_log_mul(0.1 * m["rope"]["mscale_all_dim"])


def write_gemma4_keys(w, m):
    w.add_key_length(m["heads_global"]["dim"])
    w.add_value_length(m["heads_global"]["dim"])
    w.add_key_length_swa(m["dim"])
    w.add_value_length_swa(m["dim"])
    w.add_rope_dimension_count(m["heads_global"]["dim"])
    w.add_rope_dimension_count_swa(m["dim"])
    w.add_rope_freq_base_swa(m["rope_local"])
    w.add_sliding_window(m["window"])
    w.add_sliding_window_pattern([kind == "sliding_attention" for kind in gemma4_kinds(m)])
    w.add_shared_kv_layers(0)
    w.add_embedding_length_per_layer_input(0)
    if "expert" in m:
        w.add_expert_feed_forward_length(m["ff_exp"])
    if "softcap" in m:
        w.add_final_logit_softcapping(m["softcap"])


def write_gguf(path, tensors, types, m, arch, name, no_vocab):
    w = gguf.GGUFWriter(path, arch)
    w.add_name(name)
    w.add_vocab_size(m["vocab"])
    w.add_block_count(m["layer"] + int(m.get("mtp", False)))
    if m.get("mtp"):
        w.add_nextn_predict_layers(1)
    w.add_context_length(m["ctx"])
    w.add_embedding_length(m["embd"])
    w.add_feed_forward_length(m["ff"])
    w.add_head_count(m["head"])
    latent = "latent" in m
    if m["family"] == "lfm2moe":
        w.add_head_count_kv([0 if kind == "conv" else m["kv"] for kind in lfm2_kinds(m)])
    elif m["family"] == "gemma4":
        w.add_head_count_kv([m["kv"] if kind == "sliding_attention" else m["heads_global"]["kv"]
                             for kind in gemma4_kinds(m)])
    else:
        w.add_head_count_kv(1 if latent and not m.get("fused") else m["kv"])
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(m["rope"]["rope_theta"])
    if latent:
        write_latent_keys(w, m)
    elif m["family"] == "gemma4":
        write_gemma4_keys(w, m)
    elif m["family"] not in NO_HEAD_DIM:
        w.add_key_length(m["dim"])
        w.add_value_length(m["dim"])
    if arch == "llama":
        w.add_rope_dimension_count(m["dim"])
    if m["family"] == "gemma3":
        w.add_sliding_window(m["window"])
        w.add_rope_freq_base_swa(m["rope_local"])
        if "softcap" in m:
            w.add_final_logit_softcapping(m["softcap"])
    if "expert" in m:
        w.add_expert_count(m["expert"])
        w.add_expert_used_count(m["used"])
    if m["family"] == "lfm2moe":
        w.add_shortconv_l_cache(m["conv"])
        w.add_leading_dense_block_count(m["dense"])
        w.add_expert_feed_forward_length(m["ff_exp"])
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        if m["scale"] != 1:
            w.add_expert_weights_scale(m["scale"])
    if "delta" in m:
        d = m["delta"]
        w.add_rope_dimension_count(m["rot"])
        w.add_ssm_conv_kernel(m["conv"])
        w.add_ssm_state_size(d["dim"])
        w.add_ssm_group_count(d["head_k"])
        w.add_ssm_time_step_rank(d["head"])
        w.add_ssm_inner_size(d["head"] * d.get("dim_v", d["dim"]))
        w.add_full_attention_interval(d["period"])
        if "expert" in m:
            w.add_expert_feed_forward_length(m["ff_exp"])
            w.add_expert_shared_feed_forward_length(m["ff_shared"])
        if arch != "qwen3next":
            w.add_rope_dimension_sections([11, 11, 10, 0])
    if m["family"] == "gpt-oss":
        w.add_sliding_window(m["window"])
        w.add_expert_feed_forward_length(m["ff"])
    if m["family"] == "qwen2moe":
        w.add_expert_feed_forward_length(m["ff_exp"])
        w.add_expert_shared_feed_forward_length(m["ff_shared"])
        if m["renorm"]:  # as for qwen3moe below
            w.add_expert_weights_norm(True)
    if m["family"] == "qwen3moe":
        w.add_expert_feed_forward_length(m["ff_exp"])
        if not m["renorm"]:  # no published model has this; llama.cpp ignores the key here
            w.add_expert_weights_norm(False)
    rope = m["rope"]
    if rope["rope_type"] == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(rope["factor"])
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "attn_factor" in rope:
            w.add_rope_scaling_yarn_attn_factor(rope["attn_factor"])
        if "beta_fast" in rope:
            w.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            w.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if no_vocab:
        w.add_tokenizer_model("none")
    for tensor, data in tensors:
        kind = types.get(tensor, GT.F32)
        packed = data if kind == GT.F32 else gguf.quants.quantize(data, kind)
        w.add_tensor(tensor, packed, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def choose_types(tensors, m):
    """GGUF name -> type, for matrices; all others are F32."""
    rules, out = m.get("types", {}), {}
    for name, data in tensors:
        if data.ndim < 2 or "ffn_gate_inp" in name or name.endswith(".bias"):
            continue
        for part, kind in rules.items():
            if part == "all" or part in name:
                out[name] = kind
    return out


def round_weights(weights, m, arch):
    """The weights as the file will hold them: rounded to the types of `choose_types`. Rounding works
    on rows, and the conversion only moves whole rows, so it can be done on either side."""
    if "types" not in m:
        return weights
    probe = gguf_tensors(weights, m, arch)
    types = choose_types(probe, m)
    out = {}
    for name, w in weights.items():
        if m["tied"] and name == "lm_head.weight":
            continue
        halves = []
        for tensor, _ in gguf_tensors({name: w}, dict(m, rope=dict(rope_type="default")), arch):
            halves.append(types.get(tensor, GT.F32))
        if "kv_b_proj" in name and not m.get("fused"):
            halves = [GT.F32]
        turned = m["family"] == "gpt-oss" and ".experts." in name and w.ndim == 3
        if turned:  # rows of both halves alike
            w, halves = w.transpose(0, 2, 1), halves[:1]
        if w.ndim < 2:
            halves = [GT.F32]
        parts = np.split(w, len(halves), axis=1) if len(halves) == 2 else [w]
        parts = [p if k == GT.F32 else gguf.quants.dequantize(gguf.quants.quantize(
            np.ascontiguousarray(p), k), k).astype(np.float32) for p, k in zip(parts, halves)]
        out[name] = np.concatenate(parts, axis=1) if len(parts) == 2 else parts[0]
        if turned:
            out[name] = out[name].transpose(0, 2, 1)
    if m["tied"]:
        out["lm_head.weight"] = out["model.embed_tokens.weight"]
    return out


# -------------------------------------------------------------------------------------- oracle --

@contextlib.contextmanager
def double_precision():
    """While this lasts, torch.float32 means float64, also inside the modelling code."""
    saved = torch.float32, torch.float, torch.Tensor.float, torch.get_default_dtype()
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved[:3]
        torch.set_default_dtype(saved[3])


def round_groups(x, scale_of):
    """Rounds to 8 bits in groups of 32 along the last dimension; the last group may be shorter."""
    n = x.shape[-1]
    groups = torch.nn.functional.pad(x, (0, -n % 32)).reshape(*x.shape[:-1], -1, 32)
    largest = groups.abs().amax(-1, keepdim=True)
    q = torch.round(groups / largest.clamp(min=1e-30) * 127)
    return (q * scale_of(largest / 127)).reshape(*x.shape[:-1], -1)[..., :n]


def round_f16(x):
    return x.to(torch.float16).to(x.dtype)


def round_bf16(x):
    return x.to(torch.bfloat16).to(x.dtype)


def activation_rounding(m):
    """What the matrices of a model make of their activations; None if all take them as they are."""
    types = set(m.get("types", {}).values()) - {GT.F16}
    if not types:
        return None
    return round_bf16 if types == {GT.BF16} else lambda x: round_groups(x, lambda scale: scale)


class RoundingCache(DynamicCache):
    """Holds nothing; rounds what a cache would have stored."""

    def __init__(self, rounding):
        super().__init__()
        self.rounding = rounding

    def update(self, key_states, value_states, *_args, **_kwargs):
        if key_states.shape[1] == 1 and key_states.shape[-1] != value_states.shape[-1]:
            row = self.rounding(torch.cat([key_states, value_states], -1))  # latent attention
            return row.split([key_states.shape[-1], value_states.shape[-1]], -1)
        return self.rounding(key_states), self.rounding(value_states)

    def get_conv_state(self, *_args, **_kwargs):
        return None

    def update_conv_state(self, states, *_args, **_kwargs):
        return states

    def get_recurrent_state(self, *_args, **_kwargs):
        return None

    def update_recurrent_state(self, *_args, **_kwargs):
        pass


CACHES = {"F16": round_f16, "Q8_0": lambda x: round_groups(x, round_f16), "F32": lambda x: x}


@contextlib.contextmanager
def rounded_activations(rounding, but_for):
    """Inputs of matrix multiplications are rounded, except for the matrices `but_for`."""
    linear, matmul = torch.nn.functional.linear, torch.Tensor.__matmul__

    def rounding_linear(x, weight, bias=None):
        if not any(weight is w for w in but_for):
            x = rounding(x)
        return linear(x, weight, bias)

    torch.nn.functional.linear = rounding_linear
    torch.Tensor.__matmul__ = lambda x, w: matmul(rounding(x), w)  # gpt-oss
    try:
        yield
    finally:
        torch.nn.functional.linear, torch.Tensor.__matmul__ = linear, matmul


def choose(m, logits, bias):
    """The experts that DeepSeek's routers choose."""
    score = logits if m["family"] == "deepseek2" else 1 / (1 + np.exp(-logits)) + bias
    groups = score.reshape(m["group"], -1)
    best = groups.max(1) if m["family"] == "deepseek2" else np.sort(groups, 1)[:, -2:].sum(1)
    out = np.full(groups.shape, -np.inf)
    for g in np.argsort(-best, kind="stable")[:m["group_used"]]:
        out[g] = groups[g]
    return set(np.argsort(-out.reshape(-1), kind="stable")[:m["used"]])


class Oracle:
    """A model of transformers with given weights, in single or double precision."""

    def __init__(self, m, weights, double):
        config, cls, _ = build(m)
        self.m = m
        self.context = double_precision if double else contextlib.nullcontext
        with self.context():
            config._attn_implementation = "eager"
            config._experts_implementation = "eager"
            self.model = cls(config).eval()
            self.model.to(torch.float64 if double else torch.float32)
            state = {k: torch.tensor(v, dtype=torch.float64 if double else torch.float32)
                     for k, v in weights.items()}
            self.model.load_state_dict(state, strict=True)
        self.router_logits = []
        self.routers, self.biases, expert_bias = [], [], None
        for module in self.model.modules():
            expert_bias = getattr(module, "expert_bias", expert_bias)
            if type(module).__name__ == "Gemma4TextRouter":
                self.routers.append(module.proj.weight)
                self.biases.append(None)
                module.proj.register_forward_hook(
                    lambda _m, _i, o: self.router_logits.append(o.detach()))
            if type(module).__name__.lower().endswith("topkrouter"):
                self.routers.append(module.weight)
                self.biases.append(getattr(module, "e_score_correction_bias", expert_bias))
                module.register_forward_hook(
                    lambda _m, _i, o: self.router_logits.append(o[0].detach()))

    def logits(self, tokens):
        self.router_logits.clear()
        with self.context(), torch.no_grad():
            return self.model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()

    def rounded_logits(self, tokens, cache, activations):
        rounding = (rounded_activations(activations, self.routers) if activations
                    else contextlib.nullcontext())
        with self.context(), torch.no_grad(), rounding:
            return self.model(torch.tensor([tokens]), use_cache=True,
                              past_key_values=RoundingCache(CACHES[cache])).logits[0].numpy()

    def clear_groups(self, need):
        """Whether shifts of the last token's logits by up to half of `need` leave the choice alone."""
        rng = np.random.default_rng(1)
        for logits, bias in zip(self.router_logits, self.biases):
            l = logits[-1].numpy()
            b = 0 if bias is None else bias.numpy()
            first = choose(self.m, l, b)
            for _ in range(40):
                if choose(self.m, l + rng.choice([-need / 2, need / 2], l.shape), b) != first:
                    return False
        return True

    def router_margin(self, used, need):
        """How far the last token's choice of experts is from another one, in logits."""
        margin = np.inf
        if "group" in self.m:
            return need * 1.01 if self.clear_groups(need) else 0
        for l in self.router_logits:
            best = np.sort(l[-1].numpy())[::-1]
            if used < len(best):
                margin = min(margin, best[used - 1] - best[used])
        return margin


class DraftOracle:
    """The layer for multi-token prediction behind an Oracle's model, with random weights."""

    def __init__(self, oracle, m, rng):
        self.oracle = oracle
        config = oracle.model.config
        if not hasattr(config, "num_mtp_layers"):  # those that transformers has no name for
            config.num_mtp_layers, config.mtp_layer_types = 1, ["full_attention"]
        with oracle.context():
            self.layer = MtpModel(oracle.model, 1).eval().to(torch.float64)
        own = {k: v for k, v in self.layer.state_dict().items() if k.startswith("layers.")}
        named = type("Named", (), {"state_dict": lambda _: own})()
        weights = random_weights(named, dict(m, tied=False), rng)
        state = {k: torch.tensor(w, dtype=torch.float64) for k, w in weights.items()}
        self.layer.load_state_dict(state, strict=False)
        start = f"model.layers.{m['layer']}."
        self.weights = {start + k.removeprefix("layers.0.").removeprefix("mtp_block.")
                        .replace("post_norm", "shared_head.norm"): w for k, w in weights.items()}

    def run(self, hidden, tokens):
        """The layer's outputs, and its logits, for tokens at positions 1, 2, ..."""
        model = self.oracle.model
        positions = torch.arange(1, len(tokens) + 1)[None]
        out = self.layer.forward_layer(0, hidden, positions,
                                       MtpCache(config=model.config.get_mtp_config()),
                                       input_ids=torch.tensor([tokens]))
        return out, model.lm_head(out)[0]

    def logits(self, tokens):
        """Of one step and of two: [2][n_tok][n_vocab]."""
        with self.oracle.context(), torch.no_grad():
            model = self.oracle.model
            hidden = model(torch.tensor([tokens]), output_hidden_states=True,
                           use_cache=False).hidden_states[-1]
            out, first = self.run(hidden[:, :-1], tokens[1:])
            both = np.zeros((2, len(tokens), first.shape[-1]))
            both[0, 1:] = first.numpy()
            for p in range(1, len(tokens)):
                chained = torch.cat([hidden[:, :p], out[:, p - 1:p]], 1)
                guess = int(first[p - 1].argmax())
                both[1, p] = self.run(chained, tokens[1:p + 1] + [guess])[1][-1].numpy()
            return both


def pick_tokens(oracle, m, rng, need):
    tokens, worst = [1], np.inf
    while len(tokens) < m["tok"] + 1:
        if "expert" not in m:
            tokens.append(int(rng.integers(0, m["vocab"])))
            continue
        margin = 0
        for _ in range(400):
            candidate = int(rng.integers(0, m["vocab"]))
            oracle.logits(tokens[1:] + [candidate])
            margin = oracle.router_margin(m["used"], need)
            if margin > need:
                break
        else:
            return None, 0
        worst = min(worst, margin)
        tokens.append(candidate)
    return tokens[1:], worst


def distance(a, b):
    return float(np.max(np.max(np.abs(a - b), axis=1) / np.max(np.abs(b), axis=1)))


def make(name, m, seed, out, no_vocab):
    rng = np.random.default_rng([seed, sum(name.encode())])
    if seed:
        m = randomize(m, rng)
    if m["family"] in NO_HEAD_DIM:
        m["embd"] = m["head"] * m["dim"]  # these have no head_dim of their own
    config, cls, arch = build(m)
    activations = activation_rounding(m)
    with torch.device("meta"):
        skeleton = cls(config)
    for _ in range(20):
        weights = round_weights(random_weights(skeleton, m, rng), m, arch)
        oracle = Oracle(m, weights, True)
        tokens, margin = pick_tokens(oracle, m, rng, m.get("margin", 0.2))
        if tokens:
            break
    else:
        sys.exit(f"{name}: no tokens without a near tie of experts found")
    exact = oracle.logits(tokens)
    single = Oracle(m, weights, False).logits(tokens)
    assert exact.dtype == np.float64 and single.dtype == np.float32
    gap = distance(single.astype(np.float64), exact)
    rounding = [distance(oracle.rounded_logits(tokens, cache, activations), exact)
                for cache in CACHES]
    assert activations or rounding[2] == 0
    if gap > 2e-5:
        sys.exit(f"{name}: single precision is {gap:.1e} from double: the model is too sensitive")

    if m.get("mtp"):
        drafts = DraftOracle(oracle, m, rng)
        weights = dict(weights, **drafts.weights)
        with open(os.path.join(out, name + ".drafts"), "wb") as f:
            f.write(b"MOED" + struct.pack("<2I", len(tokens), m["vocab"]))
            f.write(drafts.logits(tokens).astype("<f4").tobytes())
    tensors = gguf_tensors(weights, m, arch)
    path = os.path.join(out, name + ".gguf")
    write_gguf(path, tensors, choose_types(tensors, m), m, arch, name, no_vocab)
    with open(os.path.join(out, name + ".expected"), "wb") as f:
        f.write(b"MOEX" + struct.pack("<2I3f", len(tokens), m["vocab"], *rounding))
        f.write(np.asarray(tokens, "<i4").tobytes())
        f.write(exact.astype("<f4").tobytes())
    size = os.path.getsize(path) + os.path.getsize(path[:-5] + ".expected")
    print(f"{name:14} {size / 1000:6.0f} KB  logits {exact.std():5.2f} max {np.abs(exact).max():6.2f}"
          f"  router margin {margin:.1e}  single precision {gap:.1e}  rounding: "
          + ", ".join(f"{c} {r:.1e}" for c, r in zip(CACHES, rounding)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default=os.path.join(os.path.dirname(__file__), "fixtures"))
    parser.add_argument("--seed", type=int, default=0, help="0: the committed set")
    parser.add_argument("--only", default="")
    parser.add_argument("--no-vocab", action="store_true",
                        help="write tokenizer.ggml.model = none, without which llama.cpp refuses")
    args = parser.parse_args()
    found = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__,
             "numpy": np.__version__}
    if found != VERSIONS:
        print(f"note: made with {VERSIONS}, this is {found}", file=sys.stderr)
    torch.set_num_threads(1)
    os.makedirs(args.out, exist_ok=True)
    for name, m in MODELS.items():
        if args.only in name:
            make(name, dict(m), args.seed, args.out, args.no_vocab)


if __name__ == "__main__":
    main()
