#!/usr/bin/env python3
"""Writes tests/data/quant_vectors.bin: random blocks of every tensor type and what the public gguf
package makes of them. Q1_0 and Q2_0, which it does not compute, are dequantized here, and so are TCQ4,
TCQ5 and TCQ8, one row, as quant/tcq.h says.
Needs: pip install gguf numpy.

    file    "MQV1", u32 number of types, then for each type:
            u32 id, u32 block_len, u32 block_bytes, u32 n_blocks, the blocks, float32 for each weight

All numbers are little-endian. Two thirds of the blocks are random bytes, so that scales are sometimes
subnormal, infinite or NaN; the others are all ones, all zeros, or repeat one byte. The first bytes of
the first blocks are 0, 1, 2, 253, 254, 255, the ends of an 8-bit exponent."""
import os
import re
import struct
import warnings

import gguf
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))


def types():
    with open(os.path.join(HERE, "..", "quant", "types.def"), encoding="utf-8") as f:
        return [int(i) for i in re.findall(r"^X\(\w+, \w+, (\d+)\)", f.read(), re.M)]


def blocks_of(block_bytes, n, rng):
    rows = rng.integers(0, 256, (n, block_bytes), dtype=np.uint8)
    for i in range(2, n, 3):
        rows[i] = rng.choice(np.array([0, 255, 0x0F, 0xF0, 0x55, 0x80, 0x7B], dtype=np.uint8))
        rows[i, rng.integers(0, block_bytes)] = rng.integers(0, 256)
    rows[:6, 0] = [0, 1, 2, 253, 254, 255]
    return rows


# Own types: bytes of a block of 64; values of a weight, where parities have to be walked.
TCQ = {4099: (34, 32), 4100: (42, 64), 4101: (66, 0)}


# Bytes of a block of Q1_0 and Q2_0, and bits of a weight.
FEW_BITS = {41: (18, 1), 42: (18, 2)}


def few_bits_dequantize(id, rows):
    bits = FEW_BITS[id][1]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (rows[:, 2:, None] >> shifts & (1 << bits) - 1).reshape(len(rows), -1).astype("<f4")
    d = rows[:, :2].copy().view("<f2").astype("<f4")
    return (d * (2 * codes - 1 if bits == 1 else codes - 1)).reshape(-1)


def tcq_codes(id, block):
    """The codes of 64 weights."""
    codes = []
    for h in range(2):
        half = block[2 + 16 * h:18 + 16 * h]
        nibbles = [int(b) & 15 for b in half] + [int(b) >> 4 for b in half]
        low = [int(block[34 + k % 8]) >> (k // 8 * 2 + h) & 1 for k in range(32)] if id == 4100 else []
        codes += [2 * q + bit for q, bit in zip(nibbles, low)] if low else nibbles
    return codes


def tcq_dequantize(id, rows):
    steps, out = [], []  # codes and parities of 32 paths each
    for block in rows:
        d = block[:2].view("<f2").astype("<f4")[0]
        if id == 4101:
            out += [d * np.float32(q) for q in block[2:].view(np.int8)]
            continue
        codes = tcq_codes(id, block)
        for half in (codes[:32], codes[32:]):
            t, before = len(steps), lambda i, k, what: steps[i][k][what] if i >= 0 else 0
            step = [(c, before(t - 2, k, 0) % 2 ^ before(t - 5, k, 1) ^ before(t - 6, k, 1))
                    for k, c in enumerate(half)]
            out += [d * np.float32(2 * c + p - TCQ[id][1] // 2) for c, p in step]
            steps.append(step)
    return np.array(out, dtype="<f4")


def main():
    rng = np.random.default_rng(20250101)
    out = [b"MQV1", struct.pack("<I", len(types()))]
    for id in types():
        if id in TCQ:
            block_len, block_bytes = 64, TCQ[id][0]
        elif id in FEW_BITS:
            block_bytes, bits = FEW_BITS[id]
            block_len = (block_bytes - 2) * 8 // bits
        else:
            quant = gguf.GGMLQuantizationType(id)
            block_len, block_bytes = gguf.GGML_QUANT_SIZES[quant]
        n = 2048 // block_len if block_len > 1 else 512
        n = max(n, 16)
        rows = blocks_of(block_bytes, n, rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if id in TCQ:
                floats = tcq_dequantize(id, rows)
            elif id in FEW_BITS:
                floats = few_bits_dequantize(id, rows)
            else:
                floats = gguf.quants.dequantize(rows, quant).astype("<f4").reshape(-1)
        assert floats.size == n * block_len
        out += [struct.pack("<4I", id, block_len, block_bytes, n), rows.tobytes(), floats.tobytes()]
    with open(os.path.join(HERE, "data", "quant_vectors.bin"), "wb") as f:
        f.write(b"".join(out))


if __name__ == "__main__":
    main()
