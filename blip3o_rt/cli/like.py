"""--like FILE.png: drawing an image again from what its file says."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip3o_rt.errors import ParameterError
from blip3o_rt.params import DIFFUSION_NAMES, SAMPLING_NAMES, named

EMBEDDED = "embedded"
ORIGINS = ("checkpoint", "references", "dtype", "device")


def like_defaults(path: Path, task: str) -> dict[str, Any]:
    """Values of a command's options, by destination, that make the image of a file again.

    Args:
        path: A PNG that blip3o_rt wrote.
        task: What the command makes: "text-to-image" or "edit".

    Raises:
        ParameterError: The file does not say how to make it again, or another command makes it.
        ImageError: The file is missing or is no PNG.
    """
    from blip3o_rt.metadata import read_metadata  # PyTorch takes seconds to import: not for --help

    fields = read_metadata(path)
    drawn = fields.get("parameters")
    if "version" not in fields or not isinstance(drawn, dict) or "steps" not in drawn:
        raise ParameterError(f"--like is {path}, which does not say how to draw it: give a PNG of blip3o-rt")
    made = fields.get("task", task)  # not in files of the first release
    if made != task:
        command = f"edit --like {path} IMAGE" if made == "edit" else f"generate --like {path}"
        raise ParameterError(f"--like is {path}, made by another command: blip3o-rt {command}")
    for given in ("tokens", "noise"):
        if drawn.get(given) == "given":
            raise ParameterError(
                f"--like is {path}, whose {given} came from a program: that alone can draw it again"
            )
    if drawn.get("token_seed", fields["seed"]) != fields["seed"]:
        raise ParameterError(
            f"--like is {path}, whose tokens and noise have two seeds: draw it with Pipeline.plan and render"
        )
    return {
        "liked": fields,
        "seed": fields["seed"],
        "tier": drawn.get("tier", "exact"),
        "switch": [f"{name}={setting}" for name, setting in drawn.get("switches", {}).items()] or None,
        "dtype": fields.get("dtype", "auto"),
        **named(drawn, (*DIFFUSION_NAMES, *SAMPLING_NAMES)),
    }


def check_model(arguments: argparse.Namespace) -> None:
    """Raise ParameterError where --like needs a checkpoint that is not embedded, and none is given."""
    name = arguments.liked.get("checkpoint", {}).get("name", EMBEDDED)
    if name != EMBEDDED and arguments.model is None:
        raise ParameterError(
            f"--like is {arguments.like}, drawn with checkpoint {name}: give its folder with --model"
        )


def differences(liked: dict[str, Any], fields: Mapping[Any, Any]) -> list[str]:
    """What an image was made of that is not what the file says, where the file says it."""
    return [name for name in ORIGINS if name in liked and liked[name] != fields.get(name)]
