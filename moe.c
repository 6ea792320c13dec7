/* moe.c - the map of the library, which is this one translation unit.
 *
 * SPDX-License-Identifier: MIT
 *
 * The order of the includes is the flow of the data: file on disk -> records -> tensors -> tokens
 * -> layers -> kernels -> logits -> sampler -> text. Each part uses only what stands above it.
 *
 *     cc -O2 -c moe.c                 with utf8proc for text, zstd for compressed weights
 *     cc -O2 -DMOE_NO_TEXT -c moe.c   without tokenizers: token ids in, logits out
 *     cc -O2 -DMOE_NO_ZSTD -c moe.c   without compressed .moe files
 *
 * To read how a model computes, open core/model_llama.c: its layer function is the forward pass of
 * one layer. core/session.c calls it for each layer of each batch of tokens.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* mmap, sched_getaffinity */
#endif

#include "core/base.h"        /* status, checked size math, memory */
#include "core/platform.c"    /* files, maps, threads, clock: POSIX and Win32 */
#include "core/host.c"        /* small public functions: status names, option defaults */

#include "quant/quant.c"      /* the quantization formats and their kernels */

#include "core/directory.c"   /* metadata and tensors, as they are read */
#include "core/gguf.c"        /* GGUF -> directory */
#include "core/moefile.c"     /* .moe -> directory */

#ifndef MOE_NO_TEXT
#include "core/tokenizer.c"   /* text <-> tokens */
#else
#include "core/notext.c"      /* the same functions, which say that text was left out */
#endif

#include "backends/backend.h" /* what a backend can be asked for */
#include "backends/cpu.c"     /* the CPU: threads, operations */

#include "core/describe.c"    /* router and attention in words */
#include "core/model.c"       /* hyperparameters, binding of weights */
#include "core/layers.c"      /* attention, feed-forward, experts, built from operations */
#include "core/model_llama.c" /* families: llama, qwen2, qwen3, mixtral, olmoe, ... */
#include "core/model_gemma.c" /* gemma3 */
#include "core/model_gemma4.c" /* gemma4 */
#include "core/model_deepseek.c" /* deepseek2: V2, V3, R1 and kin */
#include "core/model_gpt_oss.c" /* gpt-oss */
#include "core/model_lfm2.c"  /* lfm2moe */
#include "core/model_qwen35.c" /* qwen35, qwen35moe, qwen3next */
#include "core/models.c"      /* the table of families */
#include "core/draft.c"       /* guesses of the tokens that come next */
#include "core/session.c"     /* cache, batches, logits */
#include "core/mtp.c"         /* guesses by a layer for multi-token prediction */
#include "core/sample.c"      /* logits -> token */
