"""Tensors of the TA-Tok image tokenizer that encoding needs, and the original tensors each is made from.

Original names are those under `model.vision_tower.vision_tower.`, or in a ta_tok.pth's state dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.config import TATokConfig
from blip3o_rt.weights import SourceTensor, TensorSpec, affine, direct, packed

CODEBOOK_ROWS_AT_ONCE = 8192  # bounds the projection's working memory; fixed, so that results are too


def layout(config: TATokConfig) -> list[TensorSpec]:
    """All runtime tensors: the vision tower up to the selected hidden state, the bottleneck, the codebook."""
    hidden, patch = config.hidden_size, config.patch_size
    embeddings = "encoder.embeddings."
    specs = [
        *affine(embeddings + "patch_embedding", hidden, config.image_channels, patch, patch),
        direct(embeddings + "position_embedding.weight", config.tokens, hidden),
    ]
    for index in range(config.layers_run):
        specs += _encoder_layer(config, f"encoder.encoder.layers.{index}.")
    specs += affine("encode_task_layer.0", hidden, hidden)
    specs += affine("bottleneck.in_linear", config.bottleneck_dim, hidden)
    return [*specs, _codebook(config)]


def _encoder_layer(config: TATokConfig, prefix: str) -> list[TensorSpec]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    attention = prefix + "self_attn."

    def qkv(kind: str) -> list[tuple[str, int]]:
        return [(f"{attention}{letter}_proj.{kind}", hidden) for letter in "qkv"]

    return [
        *affine(prefix + "layer_norm1", hidden),
        packed(attention + "qkv_proj.weight", qkv("weight"), hidden),
        packed(attention + "qkv_proj.bias", qkv("bias")),
        *affine(attention + "out_proj", hidden, hidden),
        *affine(prefix + "layer_norm2", hidden),
        *affine(prefix + "mlp.fc1", intermediate, hidden),
        *affine(prefix + "mlp.fc2", hidden, intermediate),
    ]


def _codebook(config: TATokConfig) -> TensorSpec:
    codes, width = config.codebook_size, config.bottleneck_dim
    regularizer = "bottleneck.regularizer."
    sources = (
        SourceTensor(regularizer + "embedding.weight", (codes, width)),
        SourceTensor(regularizer + "embedding_proj.weight", (width, width)),
        SourceTensor(regularizer + "embedding_proj.bias", (width,)),
    )
    return TensorSpec("codebook", (codes, width), sources, _normalised_projection, torch.float32)


def _normalised_projection(tensors: Sequence[Tensor]) -> Tensor:
    """Unit rows of `embedding @ weight.T + bias`, in float32; shapes [codes, D], [D, D], [D]."""
    embedding, weight, bias = tensors
    weight, bias = weight.float(), bias.float()
    codebook = torch.empty(embedding.shape, dtype=torch.float32)
    chunks = zip(embedding.split(CODEBOOK_ROWS_AT_ONCE), codebook.split(CODEBOOK_ROWS_AT_ONCE), strict=True)
    for rows, out in chunks:
        F.normalize(F.linear(rows.float(), weight, bias), dim=-1, out=out)
    return codebook
