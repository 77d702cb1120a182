"""Seeded mutations of a checkpoint: each ends in success, or in one line of ours."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_rt.ar.prompt import PromptEncoder
from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.errors import Blip3oError
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint

from .conftest import ALL_FLAGS

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 17, 2**31, 10**12, 10**400, 0.0, -0.5, 1e-300, 1e300, 1e30,
    float("inf"), float("nan"), "", "x", "1024", "a" * 5000, "../..", "/", "\0", "x\ny", [], [[]], [1], ["x"],
    {}, {"x": {}}, {"rope_type": "yarn"}, [{}], [None] * 4, [10**12] * 4, [[5]] * 4,
]  # fmt: skip
DTYPES = [
    torch.float32,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.complex64,
]
NAMES = [
    "model.new.weight",
    "optimizer.state",
    "model.layers.7.mlp.up_proj.weight",
    "x",
    "",
    "model.norm.bias",
]
NAMES += ["model.layers.0.self_attn.q_proj.lora_A.weight", "ema.model.norm.weight", "a" * 3000, "line\nbreak"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A checkpoint in one file, one of shards with its image tokenizer apart, and a conversion."""
    root = tmp_path_factory.mktemp("bases")
    write_random_checkpoint(root / "whole", preset("tiny", ALL_FLAGS), seed=3)
    write_random_checkpoint(root / "sharded", preset("tiny", ALL_FLAGS), seed=3, shards=2, tower="file")
    convert(root / "whole", root / "converted", progress=False)
    return [root / "whole", root / "sharded", root / "converted"]


def pick(chance: random.Random, folder: Path, pattern: str) -> Path:
    return chance.choice(sorted(path for path in folder.rglob(pattern) if path.is_file()))


def change_value(chance: random.Random, folder: Path) -> None:
    """Change, remove or add a value somewhere in a JSON file."""
    path = pick(chance, folder, "*.json")
    data = json.loads(path.read_text())
    place: Any = data
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = chance.choice(keys)
        if not isinstance(place[key], dict | list) or chance.random() < 0.3:
            break
        place = place[key]
    if chance.random() < 0.15:
        del place[key]
    else:
        place[key] = chance.choice(VALUES)
    path.write_text(json.dumps(data))


def change_tensor(chance: random.Random, folder: Path) -> None:
    """Drop, rename, reshape, cast, fill or add a tensor."""
    path = pick(chance, folder, "*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]

    def fill(value: float) -> Callable[[], Tensor]:
        return lambda: torch.full_like(tensor, value)

    kinds: list[Callable[[], Tensor]] = [
        fill(0), fill(float("nan")), fill(1e36), lambda: tensor[:-1].clone(), lambda: tensor[None].clone(),
        lambda: tensor.flatten(), lambda: tensor.mT.contiguous() if tensor.dim() > 1 else tensor.repeat(2),
        lambda: tensor.float().to(chance.choice(DTYPES)),
    ]  # fmt: skip
    choice = chance.randrange(4)
    if choice == 0:
        del tensors[name]
    elif choice == 1:
        tensors[chance.choice(NAMES)] = tensors.pop(name) if chance.random() < 0.5 else torch.ones(3)
    elif choice == 2:
        prefix = chance.choice(["module.", "_orig_mod.", "model.", "x."])
        tensors = {prefix + key if chance.random() < 0.98 else key: value for key, value in tensors.items()}
    else:
        tensors[name] = chance.choice(kinds)()
    save_file(tensors, path)


def change_bytes(chance: random.Random, folder: Path) -> None:
    """Flip, cut, zero, insert or replace bytes of a file, more often at its beginning."""
    path = pick(chance, folder, "*")
    data = bytearray(path.read_bytes())
    end = min(len(data), 3000) if chance.random() < 0.5 else len(data)
    start = chance.randrange(end) if end else 0
    choice = chance.randrange(6)
    if choice == 0 and data:
        data[start] ^= 1 << chance.randrange(8)
    elif choice == 1:
        del data[start:]
    elif choice == 2:
        data[start:] = bytes(len(data) - start)
    elif choice == 3:
        data[start:start] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 20)))
    elif choice == 4:
        data[start : start + 8] = bytes(chance.randrange(256) for _ in range(8))
    else:
        data = bytearray(
            chance.choice([b"", b"version https://git-lfs", b"\xef\xbb\xbf{}", b"[" * 99_999, b"\xff" * 40])
        )
    path.write_bytes(data)


def change_files(chance: random.Random, folder: Path) -> None:
    """Remove, rename, copy or exchange files, or put a folder or a broken link in the place of one."""
    path, other = pick(chance, folder, "*"), pick(chance, folder, "*")
    choice = chance.randrange(6)
    if choice == 0:
        path.unlink()
    elif choice == 1:
        path.rename(
            path.with_name(chance.choice(["model.fp16.safetensors", "adapter_config.json", f"x{path.name}"]))
        )
    elif choice == 2:
        shutil.copyfile(
            path, path.with_name(chance.choice(["model-00001-of-00003.safetensors", "ta_tok.pth"]))
        )
    elif choice == 3 and path != other:
        shutil.copyfile(path, other)
    else:
        path.unlink()
        path.mkdir() if choice == 4 else path.symlink_to(path.name)


CHANGES = [change_value, change_value, change_tensor, change_bytes, change_files]


def outcome(seed: int, bases: list[Path], folder: Path) -> str | None:
    """What went wrong in a mutation's handling: None for success, and for an error of ours in one line."""
    chance = random.Random(seed)
    shutil.copytree(chance.choice(bases), folder)
    change = chance.choice(CHANGES)
    try:
        for _ in range(chance.choice([1, 1, 1, 2])):
            change(chance, folder)
    except (OSError, ValueError, RuntimeError, RecursionError):
        pass  # the second change may meet what the first left
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = load_checkpoint(folder)
            PromptEncoder(checkpoint.tokenizer_dir, checkpoint.config.image_tokens, 1000)
    except Blip3oError as error:
        return f"seed {seed}: {error!r}" if "\n" in str(error) or len(str(error)) > 4000 else None
    except Exception as error:
        return f"seed {seed}, {change.__name__}: {type(error).__name__}: {str(error)[:200]}"
    finally:
        shutil.rmtree(folder)
    return None


def failures(seeds: range, bases: list[Path], tmp_path: Path) -> list[str]:
    found = (outcome(seed, bases, tmp_path / "mutated") for seed in seeds)
    return [text for text in found if text is not None]


def test_mutated_checkpoints_end_in_success_or_one_line(bases: list[Path], tmp_path: Path) -> None:
    assert failures(range(60), bases, tmp_path) == []


@pytest.mark.exhaustive
def test_a_thousand_mutated_checkpoints(bases: list[Path], tmp_path: Path) -> None:
    assert failures(range(60, 1060), bases, tmp_path) == []
