"""The decoder with weights in 8 bits is the decoder with the weights that these stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.ar.engine import TokenEngine, TokenPrompt
from blip3o_rt.ar.layout import EMBEDDING, HEAD, layout, quantized
from blip3o_rt.measure.bench.baseline_modules import dequantized
from blip3o_rt.measure.cases.quantized import quantized as random_matrix
from blip3o_rt.measure.validate.case import random
from blip3o_rt.ops.dtypes import E4M3
from blip3o_rt.ops.layer import Linear
from blip3o_rt.params import SamplingParams
from tests.ar.oracle import image_tokens, oracle, runtime_weights, small_config

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
# As in test_decoder: float32 sums in another order.
FLOAT32_TOLERANCE = 1e-5
# A rounded product, times a scale, rounded: two roundings to bfloat16 of at most 2^-8 each.
TWICE_ROUNDED = 2**-7


def engine(weights: dict[str, Tensor], *, tied: bool, batch: int = 1) -> TokenEngine:
    config = small_config(tie_word_embeddings=tied)
    return TokenEngine(config, image_tokens(config), weights, max_batch=batch, max_prompt_tokens=64)


def weights_in_8_bits(values: torch.dtype, *, tied: bool) -> dict[str, Tensor]:
    config = small_config(tie_word_embeddings=tied)
    return quantized(runtime_weights(config, oracle(config)).items(), values)


@pytest.mark.parametrize("values", [torch.int8, E4M3])
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_dtypes_are_those_of_the_layout(tied: bool, values: torch.dtype) -> None:
    specs = layout(small_config(tie_word_embeddings=tied), values=values)
    found = {name: (tuple(t.shape), t.dtype) for name, t in weights_in_8_bits(values, tied=tied).items()}
    assert found == {spec.name: (spec.shape, spec.dtype or torch.float32) for spec in specs}
    assert found[EMBEDDING][1] == torch.float32
    assert found[HEAD][1] == found["layers.0.mlp.down_proj.weight"][1] == values


@pytest.mark.parametrize("values", [torch.int8, E4M3])  # e4m3 by its definition: the CPU has no kernel of it
@pytest.mark.parametrize("tied", [False, True])
def test_tokens_and_states_are_those_of_the_meant_weights(tied: bool, values: torch.dtype) -> None:
    weights = weights_in_8_bits(values, tied=tied)
    untied = {**dequantized(weights), EMBEDDING: weights[EMBEDDING]}
    prompt = TokenPrompt(PROMPT, SamplingParams(top_k=1))
    with ops.recording_usage() as used:
        (found,) = engine(weights, tied=tied).generate([prompt])
    assert "row_linear_w8" in used
    assert "row_linear" not in used
    (expected,) = engine(untied, tied=False).generate([prompt])
    assert torch.equal(found.token_ids, expected.token_ids)
    error = (found.hidden_states - expected.hidden_states).norm() / expected.hidden_states.norm()
    assert error < FLOAT32_TOLERANCE


def test_an_image_does_not_depend_on_its_batch() -> None:
    prompts = [TokenPrompt(PROMPT, SamplingParams(seed=seed)) for seed in range(4)]
    weights = weights_in_8_bits(torch.int8, tied=False)
    together = engine(weights, tied=False, batch=4).generate(prompts)
    for prompt, plan in zip(prompts, together, strict=True):
        (alone,) = engine(weights, tied=False).generate([prompt])
        assert torch.equal(alone.token_ids, plan.token_ids)
        assert torch.equal(alone.hidden_states, plan.hidden_states)


@pytest.mark.parametrize("values", [torch.int8, E4M3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 37), (8, 38), (9, 37), (9, 38), (40, 38)])
def test_products_with_many_rows(rows: int, width: int, dtype: torch.dtype, values: torch.dtype) -> None:
    x, (weight, scale) = random(1, rows, width, dtype=dtype), random_matrix(2, 41, width, values)
    exact = x.double() @ (weight.double() * scale.double()[:, None]).T
    found = Linear(weight, scale=scale).prompt_linear(x)
    assert found.dtype == dtype
    size = exact.abs() + exact.square().mean().sqrt()
    bound = TWICE_ROUNDED if dtype == torch.bfloat16 else FLOAT32_TOLERANCE
    assert float(((found.double() - exact).abs() / size).max()) < bound
