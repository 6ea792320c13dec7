#!/usr/bin/env python3
"""Trains a small mixture of experts, so that `make bench-format` has one whose weights are no noise.

    python3 tests/make_moe_model.py DIR         a Hugging Face checkpoint in BF16
    build/moe-convert DIR moe.gguf

OLMoE's architecture: 4 layers of width 256 with 16 experts of width 256, 2 of which each token uses,
and a vocabulary of 2048 pieces: 14 M weights. All rows are multiples of 256, so that every type fits.
The text is what each Python installation has: the modules of its standard library and its
documentation (pydoc_data). That is enough for routers, experts and embeddings to have structure; the
model writes no sense. Needs torch, transformers and tokenizers; one thread takes ten minutes;
--steps N takes more or less. Repeatable up to versions and the number of threads.
"""
import argparse
import glob
import math
import os
import time

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

N_VOCAB, N_CTX, N_BATCH = 2048, 256, 8


def read_corpus():
    library = os.path.dirname(os.__file__)
    texts = []
    for path in sorted(glob.glob(library + "/*.py") + glob.glob(library + "/*/*.py")):
        if "site-packages" not in path and "/test" not in path:
            with open(path, encoding="utf-8", errors="ignore") as f:
                texts.append(f.read())
    from pydoc_data import topics
    return texts + list(topics.topics.values()) * 3


def make_tokenizer(texts):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=N_VOCAB, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|endoftext|>")


def train(model, ids, steps):
    rng = np.random.default_rng(1)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    opt = torch.optim.AdamW([dict(params=matrices, weight_decay=0.1),
                             dict(params=vectors, weight_decay=0.0)], lr=1, betas=(0.9, 0.95))
    start, mean = time.time(), None
    for step in range(steps):
        rate = 2e-3 * min(1, (step + 1) / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in opt.param_groups:
            group["lr"] = rate
        at = rng.integers(0, len(ids) - N_CTX, N_BATCH)
        x = torch.from_numpy(np.stack([ids[i:i + N_CTX] for i in at]))
        out = model(input_ids=x, labels=x)
        opt.zero_grad(set_to_none=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        mean = out.loss.item() if mean is None else 0.98 * mean + 0.02 * out.loss.item()
        if step % 50 == 0 or step + 1 == steps:
            print("step %d of %d, loss %.3f, %.0f s" % (step, steps, mean, time.time() - start), flush=True)


def main():
    args = argparse.ArgumentParser()
    args.add_argument("dir")
    args.add_argument("--steps", type=int, default=500)
    args.add_argument("--threads", type=int, default=1)
    args = args.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(args.threads)
    texts = read_corpus()
    tok = make_tokenizer(texts)
    ids = np.array(sum((e.ids + [0] for e in tok.backend_tokenizer.encode_batch(texts)), []), np.int64)
    print("%d tokens of text" % len(ids), flush=True)
    config = OlmoeConfig(vocab_size=N_VOCAB, hidden_size=256, intermediate_size=256, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=4, num_experts=16,
                         num_experts_per_tok=2, max_position_embeddings=1024, output_router_logits=True,
                         router_aux_loss_coef=0.01, eos_token_id=0, bos_token_id=None, pad_token_id=None)
    model = OlmoeForCausalLM(config)
    train(model, ids, args.steps)
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(args.dir)
    tok.save_pretrained(args.dir)


if __name__ == "__main__":
    main()
