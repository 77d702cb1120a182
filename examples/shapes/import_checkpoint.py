"""Makes a run folder of an exported checkpoint (python -m examples.shapes.import_checkpoint).

The stages train on from there. The states hold weights alone: optimizers start anew, and each stage begins
at its first step.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from .training import save_atomically

PARTS = {
    "model.sana_vae.": ("autoencoder", ""),
    "model.vision_tower.vision_tower.": ("image_tokenizer", ""),
    "model.diffusion_connector.": ("joint", "diffusion_connector."),
    "model.und_image_vae_connector.": ("joint", "und_image_vae_connector."),
    "model.sana.": ("joint", "sana."),
    "": ("joint", "language_model."),
}  # prefix of published names, the first that fits: the stage that trains them, and their prefix there


def import_checkpoint(folder: Path, run: Path) -> None:
    """Writes every stage's weights and the text tokenizer of a checkpoint folder to a run folder."""
    stages: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        prefix = next(prefix for prefix in PARTS if name.startswith(prefix))
        stage, own = PARTS[prefix]
        stages.setdefault(stage, {})[own + name.removeprefix(prefix)] = tensor.float()
    vae = json.loads((folder / "sana" / "vae" / "config.json").read_text())
    for stage, weights in stages.items():
        state = {"step": 0, "model": weights, "weights": weights}
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
