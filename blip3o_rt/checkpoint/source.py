"""Where a checkpoint is: what a user names, and the files on this machine that are meant by it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from blip3o_rt.errors import CheckpointError, shown

PathName = str | os.PathLike[str]

# What a file begins with that stands where another should be.
STAND_INS = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself; run `git lfs pull` there",
    b"<!doctype html": "a web page, not the file itself; download it again",
    b"<html": "a web page, not the file itself; download it again",
}
BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Configurations that checkpoints refer to by a hub repository's name, so that no network is needed.
KNOWN = Path(__file__).parent / "known"
SANA_NAME = "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"
SIGLIP_NAME = "google/siglip2-so400m-patch14-384"
KNOWN_SANA = KNOWN / SANA_NAME.split("/")[1]


@dataclass(frozen=True)
class Source:
    """A checkpoint as a user names it.

    Attributes:
        path: Its folder, published or converted, or a hub cache's `models--OWNER--NAME`.
        diffusion: A diffusers folder in place of the one that config.json names.
        ta_tok: A ta_tok.pth in place of the image tokenizer that the checkpoint has or names.
        variant: Which weights are read, as "fp16" of model.fp16.safetensors; None are the plain ones.
        allow_base_weights: Whether the diffusers folder's untrained transformer may stand in for one that
            the checkpoint does not have.
    """

    path: PathName
    diffusion: PathName | None = None
    ta_tok: PathName | None = None
    variant: str | None = None
    allow_base_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("path", "diffusion", "ta_tok"):
            if name == "path" or getattr(self, name) is not None:
                local_path(getattr(self, name), name)
        if not isinstance(self.variant, str | None) or not re.fullmatch(r"[\w-]+", self.variant or "plain"):
            raise CheckpointError(f"variant is {shown(self.variant)}; accepted: a word, as fp16")

    @classmethod
    def of(cls, source: Source | PathName) -> Source:
        """A source, of which the path alone may be given."""
        return source if isinstance(source, Source) else cls(source)


def local_path(name: PathName, what: str) -> Path:
    """A path that a user gives, `~` expanded. Raises CheckpointError for what is no path."""
    if not isinstance(name, str | os.PathLike):
        raise CheckpointError(f"{what} is {shown(name)}; accepted: the name of a folder or file")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # no such user
        raise CheckpointError(f"{what} is {os.fspath(name)!r}: {error}") from None


def is_file(path: Path) -> bool:
    """Whether a file is there; False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def refuse_stand_in(path: Path) -> None:
    """Raise CheckpointError where a file is another than its name says; OSError where it cannot be read."""
    with path.open("rb") as file:
        head = file.read(32)
    for start, kind in STAND_INS.items():
        if head.lower().startswith(start):
            raise CheckpointError(f"{path}: {kind}")
    if path.suffix == ".json" and head.startswith(BYTE_ORDER_MARKS):
        raise CheckpointError(f"{path}: begins with a byte order mark (BOM); save it as UTF-8 without one")


def known_folder(name_or_path: str, name: str) -> Path | None:
    """The folder with a published repository's configurations, where that is what a name or path means.

    A path means a repository when one of its folders has the repository's name, as a clone or the hub's
    cache (`models--owner--name`) does: "/data/models/SANA1.5_1.6B_1024px_diffusers".
    """
    owner, repository = name.split("/")
    folders = re.split(r"[/\\]", name_or_path)
    known = repository in folders or f"models--{owner}--{repository}" in folders
    return KNOWN / repository if known else None


def checkpoint_folder(name: PathName) -> Path:
    """The folder that a user names. Raises CheckpointError where there is none."""
    folder = local_path(name, "path")
    try:
        if folder.is_dir():
            return newest_snapshot(folder)
        reason = "not a folder"
    except (OSError, ValueError) as error:
        reason = f"not a folder ({getattr(error, 'strerror', None) or error})"
    hint = ""
    if HUB_NAME.fullmatch(os.fspath(name)):
        hint = f"; download it with `hf download {name} --local-dir DIR` and give DIR"
    raise CheckpointError(f"{name}: {reason}; accepted: a folder with config.json{hint}")


def newest_snapshot(folder: Path) -> Path:
    """The newest snapshot in a hub cache's folder; any other folder is returned as it is."""
    snapshots = folder / "snapshots"
    if not folder.name.startswith("models--") or not snapshots.is_dir():
        return folder
    found = sorted(filter(Path.is_dir, snapshots.iterdir()), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(f"{folder}: a hub cache without snapshots; download the checkpoint again")
    return found[-1]
