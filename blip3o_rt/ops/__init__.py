"""The ops that the model is made of; a call picks the best implementation this machine has (see registry)."""

from blip3o_rt.ops.add_pixel_shuffle import add_pixel_shuffle
from blip3o_rt.ops.add_pixel_unshuffle import add_pixel_unshuffle
from blip3o_rt.ops.advance_rows import advance_rows
from blip3o_rt.ops.channel_rms_norm import channel_rms_norm
from blip3o_rt.ops.convolution_silu import convolution_silu
from blip3o_rt.ops.cross_attention import cross_attention
from blip3o_rt.ops.decode_attention import decode_attention
from blip3o_rt.ops.depthwise_glu import depthwise_glu
from blip3o_rt.ops.gated_add import gated_add
from blip3o_rt.ops.guided_euler_step import guided_euler_step
from blip3o_rt.ops.layer_norm_modulate import layer_norm_modulate
from blip3o_rt.ops.linear import linear
from blip3o_rt.ops.linear_fp8 import linear_fp8
from blip3o_rt.ops.linear_w8a16 import linear_w8a16
from blip3o_rt.ops.nearest_code import nearest_code
from blip3o_rt.ops.norm_row_linear import norm_row_linear
from blip3o_rt.ops.paged_decode_attention import paged_decode_attention
from blip3o_rt.ops.paged_prefill_attention import paged_prefill_attention
from blip3o_rt.ops.qk_norm_rope_append import qk_norm_rope_append
from blip3o_rt.ops.quantize_rows import quantize_rows
from blip3o_rt.ops.registry import all_ops, choices, force, recording_usage, used
from blip3o_rt.ops.relu_linear_attention import relu_linear_attention
from blip3o_rt.ops.rms_norm import rms_norm
from blip3o_rt.ops.row_linear import row_linear
from blip3o_rt.ops.row_linear_add import row_linear_add
from blip3o_rt.ops.row_linear_w8 import row_linear_w8
from blip3o_rt.ops.sample_tokens import sample_tokens
from blip3o_rt.ops.scale_product import scale_product
from blip3o_rt.ops.scratch import Scratch
from blip3o_rt.ops.silu_mul import silu_mul

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
