"""Quantized weights as checkpoints hold them, for tests/make_checkpoints.py: codes and scales by the
compressed-tensors package, which also reads them back; NVFP4 in ModelOpt's layout, whose sources say

    weight = E2M1 code * weight_scale * weight_scale_2, with the first of two codes in the low bits.

Each function takes a matrix and returns the tensors to store, by the ends of their names, and the exact
weights. What the package reads is rounded to the dtype of the scales, and compared to within that."""
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
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
    if kind == "nvfp4":
        return dict(compressed, format="mixed-precision", config_groups=dict(
            group_0=group_config("float", 4, 16, ["Linear"], format="nvfp4-pack-quantized"),
            group_1=group_config("float", 4, 32, ["re:.*o_proj"], format="mxfp4-pack-quantized"))), None
    return dict(quant_method="modelopt", quant_algo="NVFP4", ignore=["lm_head"]), dict(
        producer=dict(name="modelopt", version="0.33.0"),
        quantization=dict(quant_algo="NVFP4", kv_cache_quant_algo="FP8", group_size=16,
                          exclude_modules=["lm_head"]))
