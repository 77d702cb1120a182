"""Bringing a checkpoint into memory, whichever of the two layouts it is in."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip3o_rt.ar.layout import quantized as quantized_ar
from blip3o_rt.checkpoint.assemble import assemble, check_tensors
from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER_FOLDER,
    Manifest,
    check_files,
)
from blip3o_rt.checkpoint.original import OriginalCheckpoint, PathName, read_original
from blip3o_rt.checkpoint.parts import DTYPES, dtype_name, layout_fingerprint, layouts
from blip3o_rt.config import ModelConfig
from blip3o_rt.dit.layout import quantized as quantized_dit
from blip3o_rt.errors import CheckpointError
from blip3o_rt.quantization import E4M3
from blip3o_rt.switches import (
    AR_WEIGHTS,
    DIT_WEIGHTS,
    FP8,
    INT8,
    NO_SWITCHES,
    check_device,
    check_switches,
    weight_switches,
)
from blip3o_rt.weights import TensorSpec

Admission = Callable[[ModelConfig, torch.dtype], None]
Quantizer = Callable[[Iterable[tuple[str, Tensor]]], dict[str, Tensor]]

# What makes the tensors of a part for a setting of a switch from those without it.
QUANTIZERS: dict[tuple[str, str], tuple[str, Quantizer]] = {
    (AR_WEIGHTS, INT8): ("ar", quantized_ar),
    (AR_WEIGHTS, FP8): ("ar", partial(quantized_ar, values=E4M3)),
    (DIT_WEIGHTS, INT8): ("dit", quantized_dit),
    (DIT_WEIGHTS, FP8): ("dit", partial(quantized_dit, values=E4M3)),
}


@dataclass(frozen=True)
class Checkpoint:
    """A model in memory: geometry, weights by part and runtime name, and the folder of its tokenizer.

    `dtype` and `device` are those of the weights (a few are float32 in every checkpoint); `source` is the
    folder read; `switches` are those of the fast tier, some of which the weights were made for.
    """

    config: ModelConfig
    weights: dict[str, dict[str, Tensor]]
    tokenizer_dir: Path
    dtype: torch.dtype
    device: torch.device
    source: Path
    switches: Mapping[str, str] = field(default_factory=dict)


def load_checkpoint(
    path: PathName,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    diffusion: PathName | None = None,
    ta_tok: PathName | None = None,
    cache_dir: PathName | None = None,
    verify: bool = False,
    admit: Admission | None = None,
    parts: Collection[str] | None = None,
    switches: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Load a checkpoint of either layout; `dtype` None keeps the stored one, `parts` None loads all of them.

    `admit` is called with geometry and dtype before any weight is read; it raises to refuse the model.

    A converted checkpoint is mapped: on the CPU and in its own dtype nothing is read until it is used, the
    pages are shared with every other process that maps the file, and the system can drop them at need. (The
    mapping is private: a write to a tensor would copy the page, never change the file.) File sizes are always
    compared with the manifest, SHA-256 sums with `verify`.

    A published checkpoint is packed in memory, one tensor at a time; with `cache_dir` it is converted there
    once and mapped from then on. `diffusion` and `ta_tok` are as in `read_original`, and are refused with a
    converted checkpoint.

    `switches` of the fast tier make the weights lossy, here or where they were converted; a checkpoint that
    was converted with a switch is refused without it, and a switch on a device that it gains nothing on.

    Raises CheckpointError, ConfigError and ParameterError, and warns (UserWarning) of every tensor or setting
    that is left out, as the conversion did.
    """
    root, device = Path(path), torch.device(device)
    chosen = check_switches(switches)
    check_device(chosen, device.type)
    if dtype not in (None, *DTYPES.values()):
        raise CheckpointError(f"weights cannot be held as {dtype}; accepted: {' or '.join(DTYPES)}")
    if (root / MANIFEST).is_file():
        if diffusion is not None or ta_tok is not None:
            raise CheckpointError(
                f"{root}: already converted, so it takes no diffusion folder or ta_tok file"
            )
        return _load_converted(root, dtype, device, parts, verify, chosen, admit)
    original = read_original(root, diffusion=diffusion, ta_tok=ta_tok)
    dtype = dtype or original.stored_dtype
    if admit is not None:
        admit(original.config, dtype)
    if cache_dir is not None:
        cached = _convert_into(Path(cache_dir), original, dtype, diffusion, ta_tok, chosen)
        return _load_converted(cached, dtype, device, parts, verify, chosen)
    return _load_original(original, root, dtype, device, parts, chosen)


def _load_original(
    original: OriginalCheckpoint,
    root: Path,
    dtype: torch.dtype,
    device: torch.device,
    parts: Collection[str] | None,
    switches: Mapping[str, str],
) -> Checkpoint:
    _warn(original.warnings + check_tensors(original))
    weights = {
        part: {spec.name: assemble(original.sources[part], spec, dtype).to(device) for spec in specs}
        for part, specs in layouts(original.config, switches).items()
        if parts is None or part in parts
    }
    return Checkpoint(original.config, weights, root, dtype, device, root, switches)


def _load_converted(
    root: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    parts: Collection[str] | None,
    verify: bool,
    switches: Mapping[str, str],
    admit: Admission | None = None,
) -> Checkpoint:
    manifest = Manifest.read(root)
    _check_stored(root, manifest.switches, switches)
    check_files(root, manifest, checksums=verify)
    dtype = dtype or manifest.torch_dtype
    if admit is not None:
        admit(manifest.config, dtype)
    _warn(manifest.warnings)
    quantizers = dict(
        QUANTIZERS[name, text]
        for name, text in weight_switches(switches).items()
        if name not in manifest.switches
    )
    weights = {}
    for part, specs in layouts(manifest.config, manifest.switches).items():
        if parts is None or part in parts:
            tensors = _mapped(root / f"{part}.safetensors", specs, dtype, device)
            weights[part] = quantizers.get(part, dict)(tensors)
    return Checkpoint(manifest.config, weights, root / TOKENIZER_FOLDER, dtype, device, root, switches)


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
        warnings.warn(message, stacklevel=4)  # where load_checkpoint was called


def _mapped(
    path: Path, specs: list[TensorSpec], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """A part's tensors by name: mapped where device and dtype are the file's, copied where they are not."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for spec in specs:
                tensor = file.get_tensor(spec.name)
                if tuple(tensor.shape) != spec.shape:
                    raise CheckpointError(
                        f"{path}: tensor {spec.name!r} has shape {list(tensor.shape)}; accepted: "
                        f"{list(spec.shape)}"
                    )
                yield spec.name, tensor.to(spec.dtype or dtype)
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(f"{path}: {error}; convert the checkpoint again") from None


def _convert_into(
    cache: Path,
    original: OriginalCheckpoint,
    dtype: torch.dtype,
    diffusion: PathName | None,
    ta_tok: PathName | None,
    switches: Mapping[str, str] = NO_SWITCHES,
) -> Path:
    """The cached conversion of a checkpoint, made if it is not there; a changed source file makes another."""
    switches = weight_switches(switches)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in original.files]
    layout = layout_fingerprint(original.config, switches)
    key = json.dumps([FORMAT_VERSION, layout, dtype_name(dtype), stats, str(diffusion), str(ta_tok)])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    destination = cache / f"{original.path.resolve().name}-{dtype_name(dtype)}-{digest}"
    if not (destination / MANIFEST).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            convert(
                original.path,
                destination,
                diffusion=diffusion,
                ta_tok=ta_tok,
                dtype=dtype_name(dtype),
                switches=switches,
                progress=False,
            )
        except CheckpointError:
            if not (destination / MANIFEST).is_file():  # another process may have been faster
                raise
    return destination
