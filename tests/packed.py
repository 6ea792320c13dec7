"""Quantized weights as checkpoints hold them, for tests/make_checkpoints.py: codes and scales by the
compressed-tensors package, which also reads them back; NVFP4 in ModelOpt's layout, whose sources say

    weight = E2M1 code * weight_scale * weight_scale_2, with the first of two codes in the low bits.

Each function takes a matrix and returns the tensors to store, by the ends of their names, and the exact
weights. What the package reads is rounded to the dtype of the scales, and compared to within that."""
import itertools

import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme


def scheme_of(**args):
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(symmetric=True, **args))


def compare(read, exact, ulp):
    assert read.shape == exact.shape
    assert ((read.float() - exact).abs() <= ulp * exact.abs() + 1e-12).all()


def spread(scale, w):
    """[out][groups] -> [out][in]"""
    return scale.float().repeat_interleave(w.shape[1] // scale.shape[1], dim=1)


def ints(w, bits, group, dtype=torch.bfloat16):
    """group 0: one scale for a row."""
    n = group or w.shape[1]
    peak = w.reshape(w.shape[0], -1, n).abs().amax(-1)
    scale = (peak / (2 ** (bits - 1) - 0.4)).to(dtype)
    scheme = scheme_of(num_bits=bits, type="int", strategy="group" if group else "channel",
                       group_size=group or None)
    state = PackedQuantizationCompressor.compress({"weight": w.to(dtype), "weight_scale": scale}, scheme)
    codes = unpack_from_int32(state["weight_packed"], bits, torch.Size(w.shape))
    exact = codes.float() * spread(scale, w)
    compare(PackedQuantizationCompressor.decompress(state, scheme)["weight"], exact, 2 ** -8)
    assert codes.min() <= 1 - 2 ** (bits - 1)
    return {f"weight_{k}": state[f"weight_{k}"] for k in ("packed", "scale", "shape")}, exact


def nvfp4_parts(w, factor):
    """Scales that are exact in E4M3, for weights divided by a factor."""
    scale = (w.reshape(w.shape[0], -1, 16).abs().amax(-1) / 6 / factor).clamp(2 ** -9, 448)
    return scale.to(torch.float8_e4m3fn)


def nvfp4(w):
    """compressed-tensors: weights are divided by the global scale."""
    divisor = (448 * 6 / w.abs().max()).reshape(1)
    scale = nvfp4_parts(w, 1 / divisor)
    scheme = scheme_of(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    state = {"weight": w, "weight_scale": scale.float(), "weight_global_scale": divisor}
    state = NVFP4PackedCompressor.compress(state, scheme)
    state["weight_scale"] = state["weight_scale"].to(torch.float8_e4m3fn)
    codes = unpack_fp4_from_uint8(state["weight_packed"], *w.shape).float()
    exact = codes * spread(scale, w) * (1 / divisor)
    compare(NVFP4PackedCompressor.decompress(state, scheme)["weight"], exact, 2 ** -7)
    names = ("weight_packed", "weight_scale", "weight_global_scale")
    return dict({k: state[k] for k in names}, input_global_scale=torch.tensor([300.0])), exact


def modelopt(w):
    factor = w.abs().max() / (448 * 6)
    scale = nvfp4_parts(w, factor)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    scaled = w / (spread(scale, w) * factor)
    code = (scaled.abs().unsqueeze(-1) - values[:8]).abs().argmin(-1) + 8 * (scaled < 0)
    packed = (code[:, ::2] | code[:, 1::2] << 4).to(torch.uint8)
    exact = values[code] * spread(scale, w) * factor
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": factor.clone(),
            "input_scale": torch.tensor(0.01)}, exact


def mxfp4(w):
    peak = w.reshape(w.shape[0], -1, 32).abs().amax(-1)
    exponent = torch.floor(torch.log2(peak)) - 2
    scheme = scheme_of(num_bits=4, type="float", strategy="group", group_size=32)
    state = MXFP4PackedCompressor.compress({"weight": w, "weight_scale": 2 ** exponent}, scheme)
    codes = unpack_fp4_from_uint8(state["weight_packed"], *w.shape).float()
    exact = codes * spread(2 ** exponent, w)
    assert torch.equal(state["weight_scale"].int(), exponent.int() + 127)
    return {"weight_packed": state["weight_packed"], "weight_scale": state["weight_scale"]}, exact


def blocks_of(scale, w, rows, cols):
    """[..., lines][blocks] -> [..., out][in]; the last ones may be cut off."""
    spread = scale.float().repeat_interleave(rows, dim=-2).repeat_interleave(cols, dim=-1)
    return spread[..., :w.shape[-2], :w.shape[-1]]


def fp8_scale(w, rows, cols, dtype):
    """[..., out][in] -> [..., lines][blocks]: the largest of a block becomes about 448."""
    pad = (0, -w.shape[-1] % cols, 0, -w.shape[-2] % rows)
    parts = torch.nn.functional.pad(w, pad).abs()
    parts = parts.unflatten(-1, (-1, cols)).unflatten(-3, (-1, rows))
    return (parts.amax(dim=(-3, -1)) / 448).to(dtype)


def fp8(w, strategy, rows, cols, dtype=torch.bfloat16, shape=None):
    """E4M3 and a scale for rows x cols weights; `shape`: of the scales as they are stored. What the package
    reads, the product in `dtype`, is the rounded exact one."""
    rows, cols = rows or w.shape[0], cols or w.shape[1]
    scale = fp8_scale(w, rows, cols, dtype)
    scale = scale.flatten() if strategy == "tensor" else scale
    more = dict(block=dict(block_structure=[rows, cols]), group=dict(group_size=cols)).get(strategy, {})
    scheme = scheme_of(num_bits=8, type="float", strategy=strategy, **more)
    state = FloatQuantizationCompressor.compress({"weight": w.to(dtype), "weight_scale": scale}, scheme)
    assert state["weight"].dtype == torch.float8_e4m3fn and state["weight_scale"].dtype == dtype
    exact = state["weight"].float() * blocks_of(scale.reshape(-(-w.shape[0] // rows), -1), w, rows, cols)
    read = FloatQuantizationCompressor.decompress(state, scheme)["weight"]
    assert read.dtype == dtype and torch.equal(read, exact.to(dtype))
    assert state["weight"].float().abs().max() > 400
    scale = scale if shape is None else scale.reshape(shape)
    return {"weight": state["weight"].contiguous(), "weight_scale": scale}, exact


FP8_FORMS = dict(channel=lambda w: fp8(w, "channel", 1, 0), one=lambda w: fp8(w, "tensor", 0, 0, shape=[]),
                 floats=lambda w: fp8(w, "channel", 1, 0, torch.float32, [-1]),
                 block=lambda w: fp8(w, "block", 12, 16), half=lambda w: fp8(w, "channel", 1, 0, torch.float16),
                 pair=lambda w: fp8(w, "tensor", 0, 0, torch.float16, [1, 1]),
                 group=lambda w: fp8(w, "group", 1, 2))
FP8_EXPERTS = itertools.cycle(["channel", "one", "channel", "floats", "block"])
FP8_BLOCK = (12, 20)  # of a checkpoint whose heads and halves of matrices begin within blocks


def fp8_stack(w):
    """Matrices [..., out][in], in transformers' names."""
    scale = fp8_scale(w, *FP8_BLOCK, torch.bfloat16)
    spread = blocks_of(scale, w, *FP8_BLOCK)
    codes = (w / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * spread


def group_config(kind, bits, group, targets, **more):
    weights = dict(num_bits=bits, type=kind, symmetric=True, dynamic=False, group_size=group or None,
                   strategy="group" if group else "channel", actorder=None)
    return dict(targets=targets, weights=weights, input_activations=None, output_activations=None, **more)


def packers(kind, name):
    """How the matrix of this name is packed; None: it is not."""
    if "proj" not in name or kind == "int4" and "v_proj" in name:
        return None
    if kind == "int4":
        return (lambda w: ints(w, 4, 32)) if ".experts." in name else \
               (lambda w: ints(w, 8, 64, torch.float16)) if "o_proj" in name else lambda w: ints(w, 4, 0)
    if kind == "fp8":
        form = dict(q_proj="block", k_proj="half", v_proj="pair", o_proj="group").get(name.split(".")[-2])
        return lambda w: FP8_FORMS[form or next(FP8_EXPERTS)](w)
    if kind == "nvfp4":
        return mxfp4 if "o_proj" in name else nvfp4
    return modelopt


def config(kind):
    """The quantization_config, and ModelOpt's own file."""
    compressed = dict(quant_method="compressed-tensors", quantization_status="compressed",
                      ignore=["lm_head", "re:.*mlp.gate$"], kv_cache_scheme=None)
    if kind == "int4":
        return dict(compressed, format="pack-quantized", config_groups=dict(
            group_0=group_config("int", 4, 32, ["re:.*experts.*"]),
            group_1=group_config("int", 4, 0, ["re:.*[qk]_proj"]),
            group_2=group_config("int", 8, 64, ["re:.*o_proj"]))), None
    if kind == "fp8":
        groups = dict(channel=["re:.*experts.*"], block=["re:.*q_proj"], tensor=["re:.*v_proj"],
                      group=["re:.*o_proj"])
        config = {f"group_{i}": group_config("float", 8, 2 if s == "group" else 0, t)
                  for i, (s, t) in enumerate(groups.items())}
        for s, group in zip(groups, config.values()):
            group["weights"].update(strategy=s, block_structure=[12, 16] if s == "block" else None)
            group["input_activations"] = dict(num_bits=8, type="float", strategy="token", dynamic=True)
        return dict(compressed, format="float-quantized", config_groups=config), None
    if kind == "fp8-stack":
        return dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic",
                    weight_block_size=list(FP8_BLOCK)), None
    if kind == "nvfp4":
        return dict(compressed, format="mixed-precision", config_groups=dict(
            group_0=group_config("float", 4, 16, ["Linear"], format="nvfp4-pack-quantized"),
            group_1=group_config("float", 4, 32, ["re:.*o_proj"], format="mxfp4-pack-quantized"))), None
    return dict(quant_method="modelopt", quant_algo="NVFP4", ignore=["lm_head"]), dict(
        producer=dict(name="modelopt", version="0.33.0"),
        quantization=dict(quant_algo="NVFP4", kv_cache_quant_algo="FP8", group_size=16,
                          exclude_modules=["lm_head"]))
