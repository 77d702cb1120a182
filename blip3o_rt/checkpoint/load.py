"""Bringing a checkpoint into memory in two steps, whichever of the two layouts it is in: open, then load."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.manifest import FORMAT_VERSION, MANIFEST, TOKENIZER_FOLDER, Manifest, check_files
from blip3o_rt.checkpoint.parts import (
    DTYPES,
    QUANTIZERS,
    Extremes,
    assemble,
    extreme_values,
    layout_fingerprint,
    layouts,
    may_be_zero,
)
from blip3o_rt.checkpoint.published import PublishedCheckpoint, open_published
from blip3o_rt.checkpoint.source import PathName, Source, checkpoint_folder, is_file, local_path
from blip3o_rt.config import ModelConfig
from blip3o_rt.errors import Blip3oWarning, CheckpointError
from blip3o_rt.precision import Precision, precision_of
from blip3o_rt.switches import check_device, check_switches, weight_switches
from blip3o_rt.weights import TensorSpec


@dataclass(frozen=True)
class Checkpoint:
    """A model in memory: configuration, weights by part and runtime name, and the folder of its tokenizer.

    `precision` and `device` are those of the weights (a few are float32 in every checkpoint); `source` is the
    folder read; `switches` are those of the fast tier, some of which the weights were made for.
    """

    config: ModelConfig
    weights: dict[str, dict[str, Tensor]]
    tokenizer_dir: Path
    precision: Precision
    device: torch.device
    source: Path
    switches: Mapping[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """That of activations."""
        return self.precision.arithmetic


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose configuration is known and checked, and none of whose weights are read yet.

    Attributes:
        path: Its folder.
        config: The model's configuration.
        stored_dtype: The dtype that its weights are kept in where no other is asked for.
    """

    path: Path
    config: ModelConfig
    stored_dtype: torch.dtype
    _layout: PublishedCheckpoint | Manifest

    def load(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | Precision | None = None,
        *,
        parts: Collection[str] | None = None,
        switches: Mapping[str, str] | None = None,
        cache_dir: PathName | None = None,
        verify: bool = False,
    ) -> Checkpoint:
        """Read the weights.

        A converted checkpoint is mapped: on the CPU and in its own dtype nothing is read until it is used,
        the pages are shared with every other process that maps the file, and the system can drop them at
        need. (The mapping is private: a write to a tensor would copy the page, never change the file.)
        A published checkpoint is packed in memory, one tensor at a time.

        Args:
            device: Where the weights go.
            dtype: float32, bfloat16 or a precision; None is the stored dtype.
            parts: The parts to read; None is all of them.
            switches: Of the fast tier. They make the weights lossy, here or where they were converted.
            cache_dir: Where a published checkpoint is converted once and mapped from then on.
            verify: Whether a converted checkpoint's SHA-256 sums are compared; sizes always are.

        Raises:
            CheckpointError: Damaged files, or a conversion with a switch that is not asked for.
            ParameterError: A switch that is unknown, or gains nothing on the device.

        Warns:
            UserWarning: Of what is left out, as the conversion did.
        """
        device, chosen = torch.device(device), check_switches(switches)
        check_device(chosen, device.type)
        if not isinstance(dtype, Precision) and dtype not in (None, *DTYPES.values()):
            raise CheckpointError(f"weights cannot be held as {dtype}; accepted: {' or '.join(DTYPES)}")
        root, layout, precision = self.path, self._layout, precision_of(dtype or self.stored_dtype)
        if isinstance(layout, PublishedCheckpoint) and cache_dir is not None:
            root = _cached(cache_dir, layout, precision_of(precision.weights).name, chosen)
            layout = Manifest.read(root)
        found = Checkpoint(self.config, {}, root, precision, device, root, chosen)
        if isinstance(layout, Manifest):
            return _load_converted(found, layout, parts, verify)
        return _load_published(found, layout, parts)


def open_checkpoint(source: Source | PathName) -> OpenedCheckpoint:
    """Open a checkpoint of either layout: its configuration is checked, and no weight is read.

    Raises:
        CheckpointError: Files or tensors that are missing or damaged.
        ConfigError: A configuration that this runtime does not compute.
    """
    source = Source.of(source)
    root = checkpoint_folder(source.path)
    if not is_file(root / MANIFEST):
        published = open_published(source)
        return OpenedCheckpoint(root, published.config, published.stored_dtype, published)
    if source.diffusion is not None or source.ta_tok is not None:
        raise CheckpointError(f"{root}: already converted, so it takes no diffusion folder or ta_tok file")
    manifest = Manifest.read(root)
    return OpenedCheckpoint(root, manifest.config, DTYPES[manifest.dtype], manifest)


def load_checkpoint(source: Source | PathName, **options: Any) -> Checkpoint:
    """Open and load in one; the options are those of OpenedCheckpoint.load."""
    return open_checkpoint(source).load(**options)


def _load_published(
    found: Checkpoint, published: PublishedCheckpoint, parts: Collection[str] | None
) -> Checkpoint:
    """The checkpoint with the weights of a published one."""
    extremes = Extremes()

    def made(part: str, spec: TensorSpec) -> Tensor:
        dtype = spec.model_dtype(found.precision)
        return assemble(published.sources[part], spec, dtype, extremes).to(found.device)

    weights = {
        part: {spec.name: made(part, spec) for spec in specs}
        for part, specs in layouts(found.config, found.switches).items()
        if parts is None or part in parts
    }
    _warn(published.warnings + extreme_values(extremes))
    return replace(found, weights=weights)


def _load_converted(
    found: Checkpoint, manifest: Manifest, parts: Collection[str] | None, verify: bool
) -> Checkpoint:
    """The checkpoint with the weights of a converted one."""
    root = found.source
    _check_stored(root, manifest.switches, found.switches)
    check_files(root, manifest, checksums=verify)
    _warn(manifest.warnings)
    quantizers = dict(
        QUANTIZERS[name, text]
        for name, text in weight_switches(found.switches).items()
        if name not in manifest.switches
    )
    weights = {
        part: quantizers.get(part, dict)(_mapped(part, specs, DTYPES[manifest.dtype], found))
        for part, specs in layouts(found.config, manifest.switches).items()
        if parts is None or part in parts
    }
    return replace(found, weights=weights, tokenizer_dir=root / TOKENIZER_FOLDER)


def _check_stored(root: Path, stored: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raise CheckpointError where the files hold a lossy form that was not asked for."""
    for name, setting in stored.items():
        if wanted.get(name) != setting:
            raise CheckpointError(
                f"{root}: converted with the switch {name}={setting}, so its weights are not the published "
                f"ones; accepted: tier 'fast' with that switch, or a conversion without it"
            )


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        warnings.warn(message, Blip3oWarning, stacklevel=5)  # where load_checkpoint was called


def _mapped(
    part: str, specs: list[TensorSpec], stored: torch.dtype, found: Checkpoint
) -> Iterator[tuple[str, Tensor]]:
    """A part's tensors by name: mapped where device and dtype are the file's, copied where they are not."""
    path = found.source / f"{part}.safetensors"
    try:
        with safe_open(path, framework="pt", device=str(found.device)) as file:
            for spec in specs:
                tensor = file.get_tensor(spec.name)
                dtype = spec.dtype or stored
                if (tensor.dtype, tuple(tensor.shape)) != (dtype, spec.shape):
                    raise CheckpointError(
                        f"{path}: tensor {spec.name!r} has shape {list(tensor.shape)}, {tensor.dtype}; "
                        f"accepted: {list(spec.shape)}, {dtype}; convert the checkpoint again"
                    )
                if not may_be_zero(spec.name) and _is_zero(tensor):
                    raise CheckpointError(f"{path}: tensor {spec.name!r} is zero throughout; copy it again")
                yield spec.name, tensor.to(spec.dtype or spec.model_dtype(found.precision))
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(f"{path}: {error}; convert the checkpoint again") from None


def _is_zero(tensor: Tensor) -> bool:
    """Whether a tensor is zero; all of it is read only where a few elements of the middle and the end are."""
    flat = tensor.reshape(-1)
    places = (slice(flat.numel() // 2, flat.numel() // 2 + 16), slice(-16, None), slice(None))
    return not any(flat[place].view(torch.uint8).any() for place in places)


def _cached(
    cache_dir: PathName, published: PublishedCheckpoint, dtype: str, switches: Mapping[str, str]
) -> Path:
    """The cached conversion of a checkpoint, made if it is not there; a changed source file makes another."""
    switches = weight_switches(switches)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in published.files]
    layout = layout_fingerprint(published.config, switches)
    key = json.dumps([FORMAT_VERSION, layout, dtype, stats])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    cache = local_path(cache_dir, "cache_dir")
    destination = cache / f"{published.path.resolve().name}-{dtype}-{digest}"
    if not is_file(destination / MANIFEST):
        try:
            convert(published, destination, dtype=dtype, switches=switches, progress=False)
        except CheckpointError:
            if not is_file(destination / MANIFEST):  # another process may have been faster
                raise
    return destination
