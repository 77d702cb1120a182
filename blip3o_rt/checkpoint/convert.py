"""Converting a published checkpoint into the runtime's layout, tensor by tensor and all or nothing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from tqdm import tqdm

from blip3o_rt import __version__
from blip3o_rt.ar.prompt import PromptEncoder
from blip3o_rt.checkpoint import parts
from blip3o_rt.checkpoint.lora import merge_lora
from blip3o_rt.checkpoint.manifest import MANIFEST, TOKENIZER_FOLDER, FileRecord, Manifest, is_converted
from blip3o_rt.checkpoint.published import PublishedCheckpoint, open_published
from blip3o_rt.checkpoint.source import PathName, Source, checkpoint_folder, local_path
from blip3o_rt.checkpoint.tensor_file import SafetensorsWriter, TensorHeader, aligned_order, file_sha256
from blip3o_rt.config import MAX_POSITIONS
from blip3o_rt.errors import CheckpointError, shown
from blip3o_rt.machine import told_apart
from blip3o_rt.params import check_flag
from blip3o_rt.switches import check_stored
from blip3o_rt.weights import TensorSpec

Update: TypeAlias = Callable[[int], object]


def convert(
    source: Source | PathName | PublishedCheckpoint,
    destination: PathName,
    *,
    dtype: str = "bf16",
    switches: Mapping[str, str] | None = None,
    lora: PathName | None = None,
    lora_scale: float = 1.0,
    progress: bool = True,
    force: bool = False,
) -> Manifest:
    """Convert a published checkpoint into the runtime's layout.

    Memory: tensors that are only joined or cast pass through in pieces of 16 MiB; those that are rearranged
    or computed are made whole, the largest of them TA-Tok's codebook. So beyond the package itself this takes
    a few such pieces and the largest of the autoencoder's convolutions, or, where there is a vision tower,
    the codebook in float32 and as stored (0.6 GB for the published one in bfloat16). Pages of a ta_tok.pth
    are mapped, and the system can drop them at need.

    Everything is written to a hidden folder beside the destination, synced, and renamed at the end: after an
    error, a full disk or a kill the destination is as it was, and the next run removes what was left. (A kill
    between the two renames of `force` leaves the earlier conversion beside the destination, under a hidden
    name; the next run renames it back before anything else.)

    Args:
        source: The published checkpoint, which may be opened already.
        destination: A new folder.
        dtype: "bf16" or "fp32", of the weights written.
        switches: Of the fast tier, to write the weights for: a lossy form that no other tier then loads.
        lora: The folder of a LoRA adapter that is merged into the weights, in float32.
        lora_scale: What its product is multiplied with, beside its own alpha.
        progress: Whether to show a progress bar.
        force: Whether an earlier conversion at the destination is replaced.

    Returns:
        The manifest of what was written.

    Raises:
        CheckpointError, ConfigError: What cannot be read, or a destination that is taken or out of space.
        ParameterError: A switch that is not of the weights.
    """
    if not isinstance(source, PublishedCheckpoint):
        source = Source.of(source)
    if not isinstance(dtype, str) or dtype not in parts.DTYPES:
        raise CheckpointError(f"dtype is {shown(dtype)}; accepted: {' or '.join(parts.DTYPES)}")
    check_flag("progress", progress)
    check_flag("force", force)
    chosen, extremes = check_stored(switches), parts.Extremes()
    if isinstance(source, PublishedCheckpoint):
        published = source
    elif is_converted(checkpoint_folder(source.path)):
        raise CheckpointError(f"{source.path}: already converted; accepted: a published checkpoint")
    else:
        published = open_published(source)
    if lora is not None:
        published = merge_lora(published, lora, lora_scale)
    output_bytes = sum(parts.weight_bytes(published.config, parts.DTYPES[dtype], chosen).values())
    with _disk_errors(destination, output_bytes):
        target = _target(destination)
        _restore_replaced(target)
        _check_destination(target, force)
        _check_space(target, output_bytes)
        total = output_bytes + sum(path.stat().st_size for path in published.files)
    # Raises for a tokenizer that cannot be used.
    PromptEncoder(published.path, published.config.image_tokens, MAX_POSITIONS)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="convert") if progress else None
    update = None if bar is None else bar.update  # a bar that is not shown would leave a thread
    with (
        _disk_errors(target, output_bytes),
        _partial_folder(target) as folder,
        bar or contextlib.nullcontext(),
    ):
        files = _write_parts(published, folder, parts.DTYPES[dtype], chosen, extremes, update)
        files |= _copy_tokenizer(published, folder)
        manifest = Manifest(
            package_version=__version__,
            dtype=dtype,
            source=str(published.path.resolve()),
            sources=_records(published.files, published.path, update),
            files=files,
            layout=parts.layout_fingerprint(published.config, chosen),
            config=published.config,
            warnings=published.warnings + parts.extreme_values(extremes),
            switches=chosen,
        )
        manifest.write(folder)
        _publish(folder, target, force)
    return manifest


def _target(destination: PathName) -> Path:
    """The folder to write: what a link points to, and no place that another folder cannot be renamed to."""
    target = local_path(destination, "destination")
    try:
        resolved = target.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise CheckpointError(f"{target}: {error}; accepted: a new folder") from None
    if target.is_symlink() or target.name in ("", ".."):
        target = resolved
    if os.path.ismount(target):
        raise CheckpointError(f"{target}: a mount point, which cannot be replaced; give a new folder in it")
    if resolved in (Path.cwd(), *Path.cwd().parents):
        raise CheckpointError(f"{target}: the current folder or one above it; give the name of a new one")
    return target


def _is_free(target: Path) -> bool:
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


def _restore_replaced(target: Path) -> None:
    """Rename an earlier conversion back to its free name: a kill came between the renames of `force`."""
    for replaced in target.parent.glob(f"{glob.escape(_hidden(target, 'replaced', '').name)}*"):
        with _locked(replaced) as locked:
            if locked and _is_free(target):
                _rename_back(replaced, target)


def _rename_back(replaced: Path, target: Path) -> None:
    try:
        replaced.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"{target}: the conversion that was there is now at {replaced}, rename it back ({error.strerror})"
        ) from error


def _check_destination(target: Path, force: bool) -> None:
    if _is_free(target):
        return
    if not (target.is_dir() and is_converted(target)):
        raise CheckpointError(
            f"{target}: exists and is not a converted checkpoint; accepted: a name that is not taken"
        )
    if not force:
        raise CheckpointError(
            f"{target}: already holds a converted checkpoint; accepted: another name, or --force to replace "
            "it"
        )


def _check_space(target: Path, needed: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        need, left = told_apart(needed, free)
        raise CheckpointError(f"{target}: no room, the conversion needs {need} there and {left} are free")


@contextlib.contextmanager
def _disk_errors(target: PathName, needed: int) -> Iterator[None]:
    """Turn the system's errors while writing into one line for people."""
    try:
        yield
    except (OSError, ValueError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{target}: not written, {reason}; the conversion needs {needed / 2**30:.1f} GiB there; nothing "
            "was left behind, run it again"
        ) from error


@contextlib.contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """A locked hidden folder beside the target, removed at the end unless it was renamed to the target.

    The lock tells a folder in use from one whose process has died; the latter are removed here. A replaced
    conversion is never one of them.
    """
    for stale in target.parent.glob(f"{glob.escape(_hidden(target, 'partial', '').name)}*"):
        with _locked(stale) as locked:
            if locked:
                shutil.rmtree(stale, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        ours = False
        while not ours:  # another run may take it for abandoned before it is locked
            folder = _hidden(target, "partial", os.urandom(6).hex())
            folder.mkdir()
            ours = stack.enter_context(_locked(folder))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _hidden(target: Path, kind: str, name: str) -> Path:
    """A folder beside the target: "partial" while it is written, or an earlier one that is "replaced"."""
    return target.parent / f".{target.name}.{kind}-{name}"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether the folder is there and no other process holds it; it is held meanwhile, whatever its name."""
    with contextlib.ExitStack() as stack:
        held = False
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            descriptor = stack.enter_context(_opened(folder))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = folder.exists()
        yield held


def _write_parts(
    published: PublishedCheckpoint,
    folder: Path,
    dtype: torch.dtype,
    switches: Mapping[str, str],
    extremes: parts.Extremes,
    progress: Update | None,
) -> dict[str, FileRecord]:
    records = {}
    for part, specs in parts.layouts(published.config, switches).items():
        path = folder / f"{part}.safetensors"
        by_name: dict[str, TensorSpec] = {spec.name: spec for spec in specs}
        headers = aligned_order([TensorHeader(s.name, s.shape, s.dtype or dtype) for s in specs])
        with SafetensorsWriter(path, headers, progress) as writer:
            for header in headers:
                for piece in parts.pieces(published.sources[part], by_name[header.name], dtype, extremes):
                    writer.write(piece)
        records[path.name] = FileRecord(writer.written, writer.sha256)
    return records


def _copy_tokenizer(published: PublishedCheckpoint, folder: Path) -> dict[str, FileRecord]:
    (folder / TOKENIZER_FOLDER).mkdir()
    copies = [folder / TOKENIZER_FOLDER / path.name for path in published.tokenizer_files]
    for path, copy in zip(published.tokenizer_files, copies, strict=True):
        shutil.copyfile(path, copy)
    return _records(copies, folder)


def _records(paths: Sequence[Path], folder: Path, progress: Update | None = None) -> dict[str, FileRecord]:
    """Files by their paths from a folder."""
    return {
        Path(os.path.relpath(path, folder)).as_posix(): FileRecord(
            path.stat().st_size, file_sha256(path, progress)
        )
        for path in paths
    }


def _publish(folder: Path, target: Path, force: bool) -> None:
    """Rename the finished folder to the target, with `force` moving an earlier conversion out of the way."""
    _sync_folder(folder)
    if force and (target / MANIFEST).exists():
        _replace(folder, target)
    else:
        folder.rename(target)
    _sync_folder(target.parent)


def _replace(folder: Path, target: Path) -> None:
    """Put the folder in the target's place and remove the old one, which an error puts back."""
    name = os.urandom(6).hex()
    replaced, abandoned = _hidden(target, "replaced", name), _hidden(target, "partial", name)
    with _locked(target) as locked:
        if not locked:
            raise CheckpointError(f"{target}: another conversion is replacing it; run it again")
        try:
            target.rename(replaced)
            folder.rename(target)
        except BaseException:
            if replaced.exists() and not target.exists():
                _rename_back(replaced, target)
            raise
        replaced.rename(abandoned)  # from here on the next run may remove it
        shutil.rmtree(abandoned, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    with _opened(folder) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
