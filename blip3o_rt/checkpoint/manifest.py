"""The manifest of a converted checkpoint: what it was made from, what its files must be, its geometry."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from blip3o_rt.checkpoint.parts import DTYPES, layout_fingerprint
from blip3o_rt.checkpoint.tensor_file import WEIGHT_DTYPES, file_sha256, read_safetensors
from blip3o_rt.config import ModelConfig
from blip3o_rt.errors import CheckpointError, ConfigError
from blip3o_rt.switches import check_stored

MANIFEST = "manifest.json"
FORMAT = "blip3o_rt checkpoint"
FORMAT_VERSION = 1
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json. `files` and `sources` are by path relative to their folder, with "/"."""

    package_version: str
    dtype: str  # "bf16" or "fp32"
    source: str  # the folder converted
    sources: dict[str, FileRecord]
    files: dict[str, FileRecord]
    layout: str  # layout_fingerprint of the code that wrote the files
    config: ModelConfig
    warnings: list[str]
    switches: dict[str, str] = field(default_factory=dict)  # that the files were written for

    def write(self, folder: Path) -> None:
        """Write manifest.json into a folder."""
        text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}, indent=2)
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest. Raises CheckpointError when it is not one this package reads."""
        path = folder / MANIFEST
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: not found; accepted: a folder written by blip3o-rt convert"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not readable ({error}); convert the checkpoint again") from None
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise CheckpointError(f"{path}: not a manifest of a converted checkpoint")
        version = data.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {version!r:.80}; accepted: {FORMAT_VERSION}; convert the "
                "checkpoint again"
            )
        try:
            manifest = cls(**{**data, **_parsed(data)})
            current = manifest.layout == layout_fingerprint(manifest.config, manifest.switches)
        except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, ConfigError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); convert the checkpoint again") from None
        if not current:
            raise CheckpointError(
                f"{path}: written by version {manifest.package_version}, which arranged tensors "
                "in another way; convert the checkpoint again"
            )
        return manifest


def _parsed(data: dict[str, Any]) -> dict[str, Any]:
    if data["dtype"] not in DTYPES:
        raise ValueError(f"dtype {data['dtype']!r}")
    check_stored(data.get("switches"))
    if not all(isinstance(warning, str) for warning in data["warnings"]):
        raise ValueError("warnings that are not text")
    for name in data["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"file name {name!r}")
    return {
        "sources": {name: FileRecord(**record) for name, record in data["sources"].items()},
        "files": {name: FileRecord(**record) for name, record in data["files"].items()},
        "config": ModelConfig.from_dict(data["config"]),
    }


def is_converted(folder: Path) -> bool:
    """Whether a folder holds a converted checkpoint (of whatever version)."""
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


def check_files(folder: Path, manifest: Manifest, *, checksums: bool) -> None:
    """Compare a converted checkpoint's files with its manifest.

    Sizes are compared; with `checksums` also SHA-256, and every number has to be finite.

    Raises CheckpointError for a file that is missing, of another size, or of other content.
    """
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; convert the checkpoint again")
        if path.stat().st_size != record.size:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes, the manifest says {record.size}; convert the "
                "checkpoint again"
            )
    if checksums:
        for name, record in manifest.files.items():
            if file_sha256(folder / name) != record.sha256:
                raise CheckpointError(
                    f"{folder / name}: checksum mismatch, its content has changed since it was written; "
                    "convert the checkpoint again"
                )
            if name.endswith(".safetensors"):
                _check_finite(folder / name)


def _check_finite(path: Path) -> None:
    for name, tensor in read_safetensors(path).items():
        if tensor.dtype in WEIGHT_DTYPES:
            for piece in tensor.chunks():
                if not torch.stack(torch.aminmax(piece)).isfinite().all():
                    raise CheckpointError(
                        f"{path}: tensor {name!r} contains NaN or infinity; convert it again"
                    )
