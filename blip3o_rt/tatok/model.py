"""TA-Tok's encoder: a SigLIP vision tower up to one hidden state, then the nearest code of each token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.config import TATokConfig
from blip3o_rt.graphs import CapturedFunction, GraphRunner
from blip3o_rt.weights import hoisted, weight_and_bias

Weights = Mapping[str, Tensor]


class ImageTokenizer:
    """TA-Tok (arXiv 2506.18898) over its weights.

    `weights` are the runtime tensors of part "ta_tok" (tatok/layout.py), on one device and of one dtype, but
    for the float32 codebook. Encoder layers above the selected hidden state are never run. `runner` captures
    what `capture` asks for; None is that of the weights' device.
    """

    def __init__(self, config: TATokConfig, weights: Weights, runner: GraphRunner | None = None) -> None:
        self.config = config
        self.codebook = weights["codebook"]
        self.patch_weight = weights["encoder.embeddings.patch_embedding.weight"].flatten(1)
        self.patch_bias = weights["encoder.embeddings.patch_embedding.bias"]
        self.position_embedding = weights["encoder.embeddings.position_embedding.weight"]
        self.layers = [
            EncoderLayer(config, weights, f"encoder.encoder.layers.{index}.")
            for index in range(config.layers_run)
        ]
        self.task = weight_and_bias(weights, "encode_task_layer.0")
        wide = self.codebook.dtype
        self.bottleneck = (
            hoisted(weights, lambda: weights["bottleneck.in_linear.weight"].to(wide)),
            hoisted(weights, lambda: weights["bottleneck.in_linear.bias"].to(wide)),
        )
        self.dtype = self.patch_weight.dtype
        self.device = self.patch_weight.device
        runner = runner or GraphRunner.of(self.device)
        self._encode = CapturedFunction("tatok.encode", self._encode_image, runner)

    def capture(self) -> None:
        """Capture `encode`; run it once where there are no graphs."""
        size = self.config.image_size
        shape = (1, self.config.image_channels, size, size)
        self._encode.capture(torch.empty(shape, dtype=self.dtype, device=self.device))

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, N, hidden] and codes int64 [B, N] of pixels [B, C, S, S] in -1..1.

        N is config.tokens. The features are those after Linear and Tanh; the codes are rows of the codebook,
        chosen in float32 whatever the dtype of the tower. Images go through one at a time: the last bit of
        a result does not depend on a batch.
        """
        encoded = [self._encode(single) for single in pixels.to(self.device, self.dtype).split(1)]
        return torch.cat([features for features, _ in encoded]), torch.stack([codes for _, codes in encoded])

    def _encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features [1, N, hidden] and codes [N] of one image."""
        features = self._features(pixels)
        projected = ops.linear(features[0].to(self.codebook.dtype), *self.bottleneck)
        return features, ops.nearest_code(projected, self.codebook)

    def _features(self, pixels: Tensor) -> Tensor:
        x = ops.linear(patches(pixels, self.config.patch_size), self.patch_weight, self.patch_bias)
        x += self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return torch.tanh(ops.linear(x, *self.task))


def patches(pixels: Tensor, side: int) -> Tensor:
    """[B, C, H, W] -> [B, rows * columns, C * side * side]; a rest smaller than a patch is left out."""
    return pixels.unfold(2, side, side).unfold(3, side, side).movedim(1, 3).flatten(3).flatten(1, 2)


class EncoderLayer:
    """x += attention(norm(x)); x += mlp(norm(x)): full attention, GELU by its tanh approximation."""

    def __init__(self, config: TATokConfig, weights: Weights, prefix: str) -> None:
        self.num_heads = config.num_heads
        self.eps = config.layer_norm_eps

        self.norm1 = weight_and_bias(weights, prefix + "layer_norm1")
        self.qkv = weight_and_bias(weights, prefix + "self_attn.qkv_proj")
        self.attention_out = weight_and_bias(weights, prefix + "self_attn.out_proj")
        self.norm2 = weight_and_bias(weights, prefix + "layer_norm2")
        self.fc1 = weight_and_bias(weights, prefix + "mlp.fc1")
        self.fc2 = weight_and_bias(weights, prefix + "mlp.fc2")

    def __call__(self, x: Tensor) -> Tensor:
        x = x + self._attention(F.layer_norm(x, x.shape[-1:], *self.norm1, self.eps))
        hidden = ops.linear(F.layer_norm(x, x.shape[-1:], *self.norm2, self.eps), *self.fc1)
        return x + ops.linear(F.gelu(hidden, approximate="tanh"), *self.fc2)

    def _attention(self, x: Tensor) -> Tensor:
        qkv = ops.linear(x, *self.qkv).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [1, heads, N, head_dim]
        if x.device.type == "cpu":
            attended = ops.cross_attention(q[0].transpose(0, 1).flatten(1), k[0], v[0], None, 0.0)[None]
        else:
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return ops.linear(attended, *self.attention_out)
