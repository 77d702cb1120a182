"""The diffusion stage against what the published code computed, starting from its hidden states.

Bound in float32: 1e-5 relative L2 (the published code's own float32 is within 1e-6 of exact arithmetic here).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from blip3o_rt.config import DiTConfig, SchedulerConfig
from blip3o_rt.connector.model import Connector
from blip3o_rt.dit.conditioning import ConditionTokens, condition_tokens
from blip3o_rt.dit.model import DiT, ScheduleTables, StepInput
from blip3o_rt.dit.schedule import flow_schedule
from tests.dit.loop import denoise
from tests.dit.oracle import predict, relative_l2, runtime_weights

BOUND = 1e-5
PREFIX = "model.sana."


class Golden(NamedTuple):
    """One reference checkpoint: its DiT, its condition, and the published results."""

    config: DiTConfig
    folder: Path
    weights: dict[str, Tensor]
    tokens: ConditionTokens
    expected: dict[str, Tensor]

    def dit(self, dtype: torch.dtype) -> DiT:
        return DiT(self.config, runtime_weights(self.config, self.weights, dtype, PREFIX))

    def tables(self, dit: DiT) -> ScheduleTables:
        return dit.schedule_tables(flow_schedule(SchedulerConfig(), 30))


@pytest.fixture(scope="module", params=["t2i", "edit"])
def golden(reference_dir: Path, request: pytest.FixtureRequest) -> Golden:
    folder = reference_dir / request.param
    published = json.loads((folder / "checkpoint/sana/transformer/config.json").read_text())
    config = DiTConfig(
        num_heads=published["num_attention_heads"],
        head_dim=published["attention_head_dim"],
        num_cross_heads=published["num_cross_attention_heads"],
        cross_head_dim=published["cross_attention_head_dim"],
        qk_norm=published["qk_norm"] is not None,
        **{
            name: published[name]
            for name in DiTConfig.__dataclass_fields__
            if name in published and name != "qk_norm"
        },
    )
    weights = load_file(folder / "checkpoint/model.safetensors")
    expected = load_file(folder / "golden.safetensors")
    connectors = {n.removeprefix("model."): t.float() for n, t in weights.items() if "_connector." in n}
    reference = expected.get("ref_latents")
    tokens = condition_tokens(
        expected["hidden"][0],
        Connector(connectors, "diffusion_connector"),
        reference,
        None if reference is None else Connector(connectors, "und_image_vae_connector"),
    )
    return Golden(config, folder, weights, tokens, expected)


def test_first_prediction(golden: Golden) -> None:
    dit = golden.dit(torch.float32)
    first_in, first = golden.expected["first_in"], golden.expected["first_noise_pred"]
    assert torch.equal(first_in[0], first_in[1])
    found = dit.predict(first_in[:1], golden.tables(dit).step(0), dit.condition(golden.tokens))
    assert relative_l2(found, first) < BOUND


def test_latent_and_last_prediction(golden: Golden) -> None:
    dit = golden.dit(torch.float32)
    predictions: list[Tensor] = []
    predict_each = dit.predict_each

    def remember(inputs: Sequence[StepInput]) -> list[Tensor]:
        predictions.extend(found := predict_each(inputs))
        return found

    dit.predict_each = remember  # type: ignore[method-assign]
    latent = denoise(
        dit,
        golden.expected["noise"],
        golden.tables(dit),
        dit.condition(golden.tokens),
        2.0,
        reference_latent=golden.expected.get("ref_latents"),
    )
    assert len(predictions) == 30
    assert relative_l2(predictions[-1], golden.expected["last_noise_pred"]) < BOUND
    assert relative_l2(latent, golden.expected["latents"]) < BOUND


def test_bfloat16_is_no_worse_than_diffusers(golden: Golden) -> None:
    """At most diffusers' own error in bfloat16, for the same condition rounded to bfloat16."""
    config = SanaTransformer2DModel.load_config(golden.folder / "checkpoint/sana/transformer")
    model = SanaTransformer2DModel.from_config(config).eval().requires_grad_(False)
    names = model.state_dict()
    model.load_state_dict({name: golden.weights[PREFIX + name] for name in names})
    conditional, null, counts = golden.tokens.conditional, golden.tokens.null, golden.tokens.null_counts
    rounded = ConditionTokens(conditional.bfloat16(), null.bfloat16(), counts)
    exact_tokens = ConditionTokens(rounded.conditional.float(), rounded.null.float(), counts)
    latent = golden.expected["first_in"][:1]
    exact = predict(model, latent, 1000.0, exact_tokens)
    dit = golden.dit(torch.bfloat16)
    found = dit.predict(latent, golden.tables(dit).step(0), dit.condition(rounded))
    theirs = predict(model.to(torch.bfloat16), latent.bfloat16(), 1000.0, rounded)
    assert relative_l2(found, exact) <= relative_l2(theirs, exact)
