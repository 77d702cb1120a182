"""Makes a run folder of an exported checkpoint (python -m examples.shapes.import_checkpoint).

The stages train on from there. The states hold weights alone: optimizers start anew, and each stage begins
at its first step. Where `model_config` names more layers than the checkpoint has, the new ones change nothing
until they are trained.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .image_tokenizer import ImageTokenizer
from .model_config import VISION_SELECT_LAYER, VISION_TOWER
from .train_autoencoder import build_autoencoder
from .training import save_atomically

PARTS = {
    "model.sana_vae.": ("autoencoder", ""),
    "model.vision_tower.vision_tower.": ("image_tokenizer", ""),
    "model.diffusion_connector.": ("joint", "diffusion_connector."),
    "model.und_image_vae_connector.": ("joint", "und_image_vae_connector."),
    "model.sana.": ("joint", "sana."),
    "": ("joint", "language_model."),
}  # prefix of published names, the first that fits: the stage that trains them, and their prefix there
# What a new layer adds to its input is the output of these, which are zero at first.
LAST_OF_A_BRANCH = tuple(
    f"{layer}.{kind}" for layer in ("norm", "norm_out", "out_proj", "fc2") for kind in ("weight", "bias")
)


def grown(module: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a module that may have more layers, and computes the same."""
    new = {name: tensor.detach() for name, tensor in module.state_dict().items() if name not in weights}
    closed = {name: torch.zeros_like(new[name]) for name in new if name.endswith(LAST_OF_A_BRANCH)}
    return weights | new | closed


def tower_to_grow(weights: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """An image tokenizer's weights; where its tower gets more layers, without those that nobody read."""
    if layers == VISION_TOWER["num_hidden_layers"]:
        return weights
    unread = [f".layers.{layer}." for layer in range(layers + VISION_SELECT_LAYER + 1, layers)]
    return {name: tensor for name, tensor in weights.items() if not any(layer in name for layer in unread)}


def import_checkpoint(folder: Path, run: Path) -> None:
    """Writes every stage's weights and the text tokenizer of a checkpoint folder to a run folder."""
    stages: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        prefix = next(prefix for prefix in PARTS if name.startswith(prefix))
        stage, own = PARTS[prefix]
        stages.setdefault(stage, {})[own + name.removeprefix(prefix)] = tensor.float()
    vae = json.loads((folder / "sana" / "vae" / "config.json").read_text())
    tower = json.loads((folder / "siglip2" / "config.json").read_text())["vision_config"]
    read = tower_to_grow(stages["image_tokenizer"], tower["num_hidden_layers"])
    stages["image_tokenizer"] = grown(ImageTokenizer(), read)
    stages["autoencoder"] = grown(build_autoencoder(), stages["autoencoder"])
    for stage, weights in stages.items():
        state = {"step": 0, "model": weights, "weights": weights, "finished": True}
        if stage == "autoencoder":
            state |= {"encoder_final": True, "scaling_factor": vae["scaling_factor"]}
        save_atomically(state, run / f"{stage}.pt")
    (run / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(folder / name, run / "tokenizer" / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that export wrote")
    parser.add_argument("--run", type=Path, required=True, help="run folder to write")
    arguments = parser.parse_args()
    import_checkpoint(arguments.checkpoint, arguments.run)


if __name__ == "__main__":
    main()
