"""A checkpoint whose config.json names hub repositories needs none of them: they are known by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import SiglipVisionConfig

from blip3o_rt.checkpoint.source import KNOWN
from blip3o_rt.measure.baselines.published import AutoencoderDC, PublishedModel, SanaTransformer2DModel


def test_names_stand_for_the_published_configurations(tmp_path: Path) -> None:
    shutil.copy(KNOWN / "BLIP3o-NEXT-3B" / "config.json", tmp_path)
    model = PublishedModel(tmp_path)
    assert (model.latent_size, model.latent_channels, model.tokens_per_image) == (32, 32, 729)
    assert model.scheduler.config.num_train_timesteps == 1000
    assert SiglipVisionConfig(**model.tower_config).num_hidden_layers == 27
    with torch.device("meta"):
        transformer = SanaTransformer2DModel.from_config(model._diffusion_configs["transformer"])
        vae = AutoencoderDC.from_config(model._diffusion_configs["vae"])
    assert (transformer.config.num_layers, vae.config.scaling_factor) == (20, 0.41407)


def test_a_name_that_is_not_known_is_refused(tmp_path: Path) -> None:
    config = json.loads((KNOWN / "BLIP3o-NEXT-3B" / "config.json").read_text())
    config["diffusion_name_or_path"] = "somebody/something"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="somebody/something is not known by name"):
        PublishedModel(tmp_path)
