"""The parts a model is made of, the tensors of each, and where a published checkpoint keeps them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import partial

import torch

from blip3o_rt.ar.layout import layout as ar_layout
from blip3o_rt.config import ModelConfig
from blip3o_rt.connector.layout import layout as connector_layout
from blip3o_rt.dit.layout import layout as dit_layout
from blip3o_rt.quantization import E4M3
from blip3o_rt.switches import AR_WEIGHTS, DIT_WEIGHTS, FP8, INT8, NO_SWITCHES
from blip3o_rt.tatok.layout import layout as ta_tok_layout
from blip3o_rt.vae.layout import layout as vae_layout
from blip3o_rt.weights import TensorSpec

PREFIXES = {
    "ar": "model.",
    "connector": "model.",
    "dit": "model.sana.",
    "vae": "model.sana_vae.",
    "ta_tok": "model.vision_tower.vision_tower.",
}
HEAD = "lm_head.weight"  # the one tensor of the decoder that stands outside `model.`

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VALUES = {INT8: torch.int8, FP8: E4M3}  # of matrices that a switch keeps in 8 bits


def layouts(config: ModelConfig, switches: Mapping[str, str] = NO_SWITCHES) -> dict[str, list[TensorSpec]]:
    """Part name -> all its runtime tensors, of the fast tier with the given switches.

    "ta_tok" is absent where the model has no vision tower.
    """
    parts = {
        "ar": ar_layout(config.ar, values=VALUES.get(switches.get(AR_WEIGHTS, ""))),
        "connector": connector_layout(config),
        "dit": dit_layout(config.dit, values=VALUES.get(switches.get(DIT_WEIGHTS, ""))),
        "vae": vae_layout(config.vae),
    }
    if config.ta_tok is not None:
        parts["ta_tok"] = ta_tok_layout(config.ta_tok)
    return parts


def weight_bytes(
    config: ModelConfig, dtype: torch.dtype, switches: Mapping[str, str] = NO_SWITCHES
) -> dict[str, int]:
    """Part name -> bytes its runtime tensors take in `dtype`."""
    return {
        part: sum(math.prod(spec.shape) * (spec.dtype or dtype).itemsize for spec in specs)
        for part, specs in layouts(config, switches).items()
    }


def layout_fingerprint(config: ModelConfig, switches: Mapping[str, str] = NO_SWITCHES) -> str:
    """A hash of how every runtime tensor is made: it changes when a tensor is stored in another arrangement,
    even under the same name and shape."""
    recipes = [
        (
            part,
            spec.name,
            spec.shape,
            str(spec.dtype),
            [(s.name, s.shape) for s in spec.sources],
            _name(spec.combine),
            *([_name(spec.rows)] if spec.rows is not None else []),
        )
        for part, specs in layouts(config, switches).items()
        for spec in specs
    ]
    return hashlib.sha256(json.dumps(recipes).encode()).hexdigest()


def _name(function: Callable[..., object]) -> str:
    if isinstance(function, partial):
        return f"{_name(function.func)} {function.args} {sorted(function.keywords.items())}"
    return f"{function.__module__}.{function.__qualname__}"


def published_name(part: str, source: str) -> str:
    """Name of a part's original tensor in a published model.safetensors."""
    return HEAD if source == HEAD and part == "ar" else PREFIXES[part] + source


def dtype_name(dtype: torch.dtype) -> str:
    """ "bf16" or "fp32"."""
    return next(name for name, value in DTYPES.items() if value == dtype)
