"""The drift of a decoder from itself is nothing, and that of damaged weights is seen."""

from __future__ import annotations

import pytest

from blip3o_rt.ar.engine import TokenEngine, TokenPrompt
from blip3o_rt.ar.layout import quantized
from blip3o_rt.measure.validate.drift import token_drift
from blip3o_rt.params import SamplingParams
from tests.ar.oracle import image_tokens, oracle, runtime_weights, small_config

PROMPTS = [TokenPrompt([3, 1, 4, 1, 5], SamplingParams(seed=seed)) for seed in (1, 2)]


def test_int8_drifts_little_and_damage_much() -> None:
    config = small_config()
    weights = runtime_weights(config, oracle(config))
    damaged = dict(weights)
    damaged["layers.0.mlp.down_proj.weight"] = -weights["layers.0.mlp.down_proj.weight"]
    exact, same, int8, wrong = (
        TokenEngine(config, image_tokens(config), tensors, max_batch=2, max_prompt_tokens=16)
        for tensors in (weights, weights, quantized(weights.items()), damaged)
    )
    none = token_drift(exact, same, PROMPTS)
    assert none.tokens == 24
    assert (none.divergence, none.agreement) == (0.0, 1.0)
    assert none.lossy == none.exact
    little, much = token_drift(exact, int8, PROMPTS), token_drift(exact, wrong, PROMPTS)
    assert 0 < little.divergence < 0.02 < much.divergence
    assert little.lossy == pytest.approx(little.exact, abs=0.1)
