"""Blocks of the DC-AE autoencoder: what each computes, and how far it looks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.ops.dtypes import compute_dtype
from blip3o_rt.weights import hoisted, weight_and_bias

NORM_EPS = 1e-5

Weights = Mapping[str, Tensor]


def channels_first(x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W], the same memory: a tensor in torch's channels_last format."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W, C] contiguous; no copy of what already is in torch's channels_last format."""
    return x.permute(0, 2, 3, 1).contiguous()


class Block:
    """A call from activations [B, H, W, C], contiguous, to the next.

    reach: how far a pixel of the result looks, in pixels of the finer of the two sides; None: everywhere.
    """

    reach: int | None = 1
    doubles = halves = False  # the sides of an image

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Convolution(Block):
    """k x k convolution (k odd) that keeps the size, or halves it with stride 2.

    bias: False where whatever follows adds it.
    """

    def __init__(self, weights: Weights, name: str, stride: int = 1, *, bias: bool = True) -> None:
        self.weight = channels_first(weights[name + ".weight"])
        self.bias = weights.get(name + ".bias") if bias else None
        self.stride = stride

    def __call__(self, x: Tensor) -> Tensor:
        x = channels_first(x)
        padding = self.weight.shape[-1] // 2
        return channels_last(F.conv2d(x, self.weight, self.bias, self.stride, padding))


class ChannelNorm(Block):
    """RMSNorm over the channels with weight and bias, in place, plus a residual, then ReLU where asked."""

    reach = 0

    def __init__(self, weights: Weights, name: str, *, relu: bool = False) -> None:
        self.weight, self.bias = weight_and_bias(weights, name)
        self.relu = relu

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.channel_rms_norm(
            x, self.weight, self.bias, NORM_EPS, residual=residual, relu=self.relu, out=x
        )


class ResidualBlock(Block):
    """x + norm(conv(silu(conv(x))))."""

    reach = 2

    def __init__(self, weights: Weights, prefix: str) -> None:
        self.conv1 = weight_and_bias(weights, prefix + "conv1")
        self.conv2 = Convolution(weights, prefix + "conv2")
        self.norm = ChannelNorm(weights, prefix + "norm")

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(ops.convolution_silu(x, *self.conv1)), residual=x)


class EfficientViTBlock(Block):
    """Multiscale linear attention, then a gated convolution, each with its residual (arXiv 2205.14756)."""

    reach = None

    def __init__(self, weights: Weights, prefix: str, head_dim: int, scales: int) -> None:
        self.attention = MultiscaleAttention(weights, prefix + "attn.", head_dim, scales)
        self.gated_convolution = GatedConvolution(weights, prefix + "conv_out.")

    def __call__(self, x: Tensor) -> Tensor:
        return self.gated_convolution(self.attention(x))


class MultiscaleAttention:
    """x + norm(attention of every scale's q|k|v, concatenated and projected).

    The published code changes to the quadratic order of the same products where there are no more tokens than
    head_dim; the linear order with its float32 state serves both.
    """

    def __init__(self, weights: Weights, prefix: str, head_dim: int, scales: int) -> None:
        self.to_qkv = weights[prefix + "to_qkv.weight"]
        self.num_heads = self.to_qkv.shape[0] // (3 * head_dim)
        self.scales = [
            tuple(weights[f"{prefix}to_qkv_multiscale.{i}.proj_{end}.weight"] for end in ("in", "out"))
            for i in range(scales)
        ]
        self.to_out = weights[prefix + "to_out.weight"]
        self.norm = ChannelNorm(weights, prefix + "norm_out")

    def __call__(self, x: Tensor) -> Tensor:
        qkv = ops.linear(x, self.to_qkv)
        scales = [qkv, *(ops.separable_convolution(qkv, depth, point) for depth, point in self.scales)]
        attended = x.new_empty(*x.shape[:-1], self.to_out.shape[1])
        for scale, out in zip(scales, attended.flatten(1, 2).chunk(len(scales), dim=-1), strict=True):
            ops.relu_linear_attention(scale.flatten(1, 2), None, None, self.num_heads, 0.0, out=out)
        return self.norm(ops.linear(attended, self.to_out), residual=x)


class GatedConvolution:
    """x + norm(pointwise(value * silu(gate))), value|gate = depthwise(silu(pointwise(x)))."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self.inverted, self.inverted_bias = weight_and_bias(weights, prefix + "conv_inverted")
        self.depth = weight_and_bias(weights, prefix + "conv_depth")
        self.point = weights[prefix + "conv_point.weight"]
        self.norm = ChannelNorm(weights, prefix + "norm")

    def __call__(self, x: Tensor) -> Tensor:
        hidden = ops.depthwise_glu(ops.linear(x, self.inverted), self.inverted_bias, *self.depth)
        return self.norm(ops.linear(hidden, self.point), residual=x)


class NearestUpsampling(Block):
    """conv3x3 of the image doubled by nearest neighbors, plus the pixel-shuffled shortcut.

    Four of the nine taps of a doubled image meet the same source pixel, so the two steps are one transposed
    convolution of stride 2 with 4 x 4 summed taps: 4/9 of the products, and the doubled image never exists.
    """

    doubles = True

    def __init__(self, weights: Weights, name: str, shortcut: bool) -> None:
        self.weight = hoisted(weights, lambda: fold_nearest_taps(channels_first(weights[name + ".weight"])))
        self.bias = weights[name + ".bias"]
        self.shortcut = shortcut

    def __call__(self, x: Tensor) -> Tensor:
        bias = None if self.shortcut else self.bias
        doubled = F.conv_transpose2d(channels_first(x), self.weight, bias, stride=2, padding=1)
        result = channels_last(doubled)
        return ops.add_pixel_shuffle(result, x, bias=self.bias) if self.shortcut else result


def fold_nearest_taps(weight: Tensor) -> Tensor:
    """conv3x3 weight [out, in, 3, 3] -> transposed weight [in, out, 4, 4] that doubles the image first."""
    wide = compute_dtype(weight)
    taps = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=wide, device=weight.device)
    folded = torch.einsum("yk,oikl,xl->ioyx", taps, weight.to(wide), taps).to(weight.dtype)
    return folded.contiguous(memory_format=torch.channels_last)


class WithShortcut(Block):
    """A convolution, and whether a shortcut is added to its result."""

    def __init__(self, weights: Weights, name: str, shortcut: bool) -> None:
        self.convolution = Convolution(weights, name)
        self.shortcut = shortcut


class ShuffleUpsampling(WithShortcut):
    """Pixel shuffle of conv3x3, plus the pixel-shuffled shortcut."""

    reach = 2
    doubles = True

    def __call__(self, x: Tensor) -> Tensor:
        result = channels_last(F.pixel_shuffle(channels_first(self.convolution(x)), 2))
        return ops.add_pixel_shuffle(result, x) if self.shortcut else result


class Downsampling(Block):
    """conv3x3 of stride 2, or the pixel unshuffle of conv3x3, plus the averages of unshuffled groups."""

    halves = True

    def __init__(self, weights: Weights, name: str, unshuffle: bool, shortcut: bool) -> None:
        bias_last = shortcut and not unshuffle  # in the shortcut's pass; a library may take one of its own
        self.convolution = Convolution(weights, name, stride=1 if unshuffle else 2, bias=not bias_last)
        self.bias = weights[name + ".bias"] if bias_last else None
        self.unshuffle = unshuffle
        self.shortcut = shortcut

    def __call__(self, x: Tensor) -> Tensor:
        result = self.convolution(x)
        if self.unshuffle:
            result = channels_last(F.pixel_unshuffle(channels_first(result), 2))
        return ops.add_pixel_unshuffle(result, x, bias=self.bias) if self.shortcut else result


class LatentIn(WithShortcut):
    """The decoder's first convolution, plus the latent with every channel repeated."""

    def __call__(self, x: Tensor) -> Tensor:
        result = self.convolution(x)
        if self.shortcut:
            result += x.repeat_interleave(result.shape[-1] // x.shape[-1], dim=-1)
        return result


class LatentOut(WithShortcut):
    """The encoder's last convolution, plus the averages of its input's groups of channels."""

    def __call__(self, x: Tensor) -> Tensor:
        result = self.convolution(x)
        if self.shortcut:
            result += x.unflatten(-1, (result.shape[-1], -1)).mean(-1)
        return result
