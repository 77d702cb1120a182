"""Every op at the model's own shapes: inputs to time it on, and what it must move and compute there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.nn import functional as F

from blip3o_rt.config import ModelConfig
from blip3o_rt.measure.bench.op_shapes.autoencoder import autoencoder
from blip3o_rt.measure.bench.op_shapes.decoder import decoding, prompt
from blip3o_rt.measure.bench.op_shapes.shape import FP32, OpShape
from blip3o_rt.measure.bench.op_shapes.transformer import transformer
from blip3o_rt.measure.validate.case import Case, random

__all__ = ["OpShape", "op_shapes"]


def op_shapes(config: ModelConfig, batches: Sequence[int]) -> Iterator[OpShape]:
    """All ops, decoding at each batch size; what the model does not have is left out."""
    for batch in batches:
        yield from decoding(config, batch)
    yield from prompt(config.ar)
    yield from transformer(config)
    yield from autoencoder(config)
    if config.ta_tok is not None:
        tokens, width, codes = config.ta_tok.tokens, config.ta_tok.bottleneck_dim, config.ta_tok.codebook_size
        yield OpShape(
            "nearest_code",
            f"{tokens} tokens, {codes} codes of {width}",
            lambda _: Case("", (random(1, tokens, width), F.normalize(random(2, codes, width), dim=1))),
            products=tokens * codes * width,
            reads=True,
            dtypes=FP32,
            check=lambda _: Case("", (random(1, 40, width), F.normalize(random(2, 4096, width), dim=1))),
        )
