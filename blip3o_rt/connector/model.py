"""The connector network: Linear, GELU, Linear, RMSNorm."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from blip3o_rt import ops, trace
from blip3o_rt.weights import weight_and_bias

NORM_EPS = 1e-5


class Connector:
    """RMSNorm(Linear(gelu_tanh(Linear(features)))).

    `weights` are the runtime tensors of part "connector"; `name` is the one to use: "diffusion_connector"
    (decoder states to DiT condition), "und_image_vae_connector" (latents to DiT condition) or
    "tar_siglip_features_connector" (TA-Tok features to decoder embeddings).
    """

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        self.weight_in, self.bias_in = weight_and_bias(weights, f"{name}.0")
        self.weight_out, self.bias_out = weight_and_bias(weights, f"{name}.2")
        self.norm_weight = weights[f"{name}.3.weight"]

    @trace.spanned("connector")
    def __call__(self, features: Tensor) -> Tensor:
        """[..., features] of any float dtype -> [..., features out] in the dtype of the biases."""
        hidden = ops.linear(features.to(self.bias_in.dtype), self.weight_in, self.bias_in)
        hidden = ops.linear(F.gelu(hidden, approximate="tanh"), self.weight_out, self.bias_out)
        return ops.rms_norm(hidden, self.norm_weight, NORM_EPS)
