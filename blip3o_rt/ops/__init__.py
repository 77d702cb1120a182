"""The ops that the model is made of; a call picks the best implementation this machine has (see registry)."""

from blip3o_rt.ops.attention import (
    cross_attention,
    decode_attention,
    paged_decode_attention,
    paged_prefill_attention,
    qk_norm_rope_append,
    relu_linear_attention,
)
from blip3o_rt.ops.elementwise import gated_add, silu_mul
from blip3o_rt.ops.image import (
    add_pixel_shuffle,
    add_pixel_unshuffle,
    convolution_silu,
    depthwise_glu,
    nearest_code,
)
from blip3o_rt.ops.linear import linear, norm_row_linear, row_linear, row_linear_add
from blip3o_rt.ops.norm import channel_rms_norm, layer_norm_modulate, rms_norm
from blip3o_rt.ops.quantized import linear_fp8, linear_w8a16, quantize_rows, row_linear_w8, scale_product
from blip3o_rt.ops.registry import all_ops, choices, force, recording_usage, used
from blip3o_rt.ops.sampling import advance_rows, guided_euler_step, sample_tokens
from blip3o_rt.ops.scratch import Scratch

__all__ = [
    "Scratch",
    "add_pixel_shuffle",
    "add_pixel_unshuffle",
    "advance_rows",
    "all_ops",
    "channel_rms_norm",
    "choices",
    "convolution_silu",
    "cross_attention",
    "decode_attention",
    "depthwise_glu",
    "force",
    "gated_add",
    "guided_euler_step",
    "layer_norm_modulate",
    "linear",
    "linear_fp8",
    "linear_w8a16",
    "nearest_code",
    "norm_row_linear",
    "paged_decode_attention",
    "paged_prefill_attention",
    "qk_norm_rope_append",
    "quantize_rows",
    "recording_usage",
    "relu_linear_attention",
    "rms_norm",
    "row_linear",
    "row_linear_add",
    "row_linear_w8",
    "sample_tokens",
    "scale_product",
    "silu_mul",
    "used",
]
