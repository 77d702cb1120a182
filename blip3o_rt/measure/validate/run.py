"""A validation from options to record: which groups run on which model, and what becomes of their lines."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from blip3o_rt import ops
from blip3o_rt.errors import CheckpointError, DeviceError
from blip3o_rt.machine import resolve_device
from blip3o_rt.measure import EMBEDDED_MODEL
from blip3o_rt.measure.cases import ops_with_cases
from blip3o_rt.measure.records import describe
from blip3o_rt.measure.validate.checkpoint import model_checkpoint
from blip3o_rt.measure.validate.line import GROUPS, Line, at_most
from blip3o_rt.measure.validate.record import FILE, ValidateRecord
from blip3o_rt.measure.validate.sweep import check_op_names, sweep
from blip3o_rt.measure.validate.table import HEADER, row, summary
from blip3o_rt.ops.user_kernels import UserKernel, load_kernels

DTYPES = ("fp32", "bf16")
STAGES = tuple(group for group in GROUPS if group not in ("ops", "golden"))
PAGE = "validate.html"
REFERENCE_PACKAGES = ("diffusers", "skimage")

Show = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to validate.

    only: groups, None for what fits the other options. diffusion and ta_tok: of the model's folder, as
    in `load_checkpoint`. tokens, latent and steps: how much of the model to run, None for what fits its size.
    work: folder that random checkpoints are kept in.
    """

    model: str = EMBEDDED_MODEL
    diffusion: Path | None = None
    ta_tok: Path | None = None
    against: Path | None = None
    only: tuple[str, ...] | None = None
    op_names: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = DTYPES
    kernels: tuple[Path, ...] = ()
    device: str = "auto"
    work: Path | None = None
    tokens: int | None = None
    latent: int | None = None
    steps: int | None = None
    command: Sequence[str] = field(default_factory=list)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups to run, in order."""
        if self.only is not None:
            return tuple(group for group in GROUPS if group in self.only)
        if self.op_names or self.kernels:
            return ("ops",)
        return tuple(group for group in GROUPS if group != "golden" or self.against is not None)

    @property
    def model_name(self) -> str:
        """The name or the folder that the record names."""
        return self.model if self.against is None else str(self.against)


def validate(options: Options, out: Path, show: Show = print) -> list[Line]:
    """Run the groups, write validate.json, its page and the images into `out`, and return every line.

    Lines are shown and saved as they come; after an interruption the record is there with "complete" false.
    Raises Blip3oError for what cannot be begun: an unknown op, a kernel file that does not run, a checkpoint
    that is none, a package that is missing.
    """
    groups = options.groups
    if set(groups) - {"ops"}:
        require_packages()
    op_names = check_op_names(options.op_names or (set(ops.all_ops()) & ops_with_cases()))
    device = resolve_device(options.device)
    with ExitStack() as stack:
        kernels = stack.enter_context(load_kernels(options.kernels)) if options.kernels else []
        folder = stack.enter_context(_model_folder(options, show)) if set(groups) - {"ops"} else None
        run = _Run(options, out, device, op_names, kernels, folder, show)
        try:
            for group in groups:
                run.group(group)
            run.record.finish()
        finally:
            run.close()
    return run.lines


def require_packages() -> None:
    """Raise DeviceError with the remedy where what the published model runs on is not installed."""
    missing = [name for name in REFERENCE_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DeviceError(
            f"the stages are compared with the published model, which needs {' and '.join(missing)}: "
            "pip install 'blip3o_rt[bench]' (--only ops does without)"
        )


class _Run:
    """The state of a validation: the model, and the lines so far on the terminal and in the record."""

    def __init__(
        self,
        options: Options,
        out: Path,
        device: torch.device,
        op_names: list[str],
        kernels: list[UserKernel],
        folder: Path | None,
        show: Show,
    ) -> None:
        self.lines: list[Line] = []
        self._options, self._device, self._op_names, self._kernels = options, device, op_names, kernels
        self._show, self._headed = show, False
        self._compared: Any = None
        self._subject: Any = None
        images: list[dict[str, Any]] = []
        if folder is not None:
            from blip3o_rt.measure.validate.images import ImageFiles
            from blip3o_rt.measure.validate.subject import Subject

            self._subject = Subject(
                folder,
                device,
                tokens=options.tokens,
                latent=options.latent,
                steps=options.steps,
                diffusion=options.diffusion,
                ta_tok=options.ta_tok,
            )
            self._compared = ImageFiles(out)
            images = self._compared.entries
        model = {
            "size": options.model_name,
            "dtypes": list(options.dtypes),
            "tier": "exact",
            "device": str(device),
            "threads": torch.get_num_threads(),
            "kernels": [f"{kernel.op}={kernel.implementation}" for kernel in kernels],
        }
        self._path = out / FILE
        self.record = ValidateRecord.begin(self._path, options.command, model)
        self.record.images = images
        if self._subject is not None and set(options.groups) & set(STAGES):
            self._add(self._subject.scope.note(self._subject.whole_config))

    def group(self, name: str) -> None:
        """Run one group; an error in it is a line that failed, and the next group runs all the same."""
        if name != "ops" and self._subject is not None and self._subject.scope.large:
            self._show(f"comparing {name}: minutes on a processor")
        try:
            with ops.recording_usage() as used:
                for item in self._items(name):
                    self._add(item)
        except Exception as error:
            detail = describe(error)
            none = float("nan")
            self._add(
                at_most(name, "ended by an error", "", "lines", none, 0.0, why="it must run", detail=detail)
            )
        if name != "ops":
            for kernel in self._kernels:
                names = ", ".join(sorted(used.get(kernel.op, ()))) or "nothing"
                self._add(f"{name}: {kernel.op} ran on {names}")
        gc.collect()  # of a large model: the next one needs the room

    def _items(self, group: str) -> Iterator[Line | str]:
        dtypes = self._options.dtypes
        if group == "ops":
            only = {(kernel.op, kernel.implementation) for kernel in self._kernels} or None
            names = self._op_names
            if only is not None and not self._options.op_names:
                names = sorted({op_name for op_name, _ in only})
            yield from sweep(names, dtypes, self._device.type, only)
        elif group == "golden":
            from blip3o_rt.measure.validate.golden import Recording, golden_lines

            if self._options.against is None:
                raise CheckpointError("golden files are named with --against DIR")
            yield from golden_lines(Recording(self._options.against), self._device, self._compared)
        else:
            yield from self._stage_items(group)

    def _stage_items(self, group: str) -> Iterator[Line | str]:
        from blip3o_rt.measure.validate.ar import ar_lines
        from blip3o_rt.measure.validate.determinism import determinism_lines
        from blip3o_rt.measure.validate.dit import dit_lines
        from blip3o_rt.measure.validate.tatok import tatok_lines
        from blip3o_rt.measure.validate.vae import vae_lines
        from blip3o_rt.measure.validate.whole import pipeline_lines

        subject, dtypes = self._subject, self._options.dtypes
        if group in ("vae", "pipeline"):
            with_images = {"vae": vae_lines, "pipeline": pipeline_lines}[group]
            yield from with_images(subject, dtypes, self._compared)
        else:
            plain: dict[str, Callable[..., Iterator[Line | str]]] = {
                "ar": ar_lines,
                "dit": dit_lines,
                "tatok": tatok_lines,
                "determinism": determinism_lines,
            }
            yield from plain[group](subject, dtypes)

    def _add(self, item: Line | str) -> None:
        if isinstance(item, Line):
            if not self._headed:
                self._show(HEADER)
                self._headed = True
            self._show(row(item, self.lines[-1] if self.lines else None))
            self.lines.append(item)
        else:
            self._show(f"note: {item}")
        self.record.add(item)

    def close(self) -> None:
        """Write the page, where pages can be written, and say how it went."""
        self.record.save()
        self._show(summary(self.lines))
        self._show(str(self._path))
        with contextlib.suppress(ImportError):
            from blip3o_rt.measure.reports import validate_html

            page = self._path.with_name(PAGE)
            validate_html(self.record.to_json(), page)
            self._show(str(page))


@contextlib.contextmanager
def _model_folder(options: Options, show: Show) -> Iterator[Path]:
    """Where the model's checkpoint lies."""
    if options.against is not None:
        from blip3o_rt.measure.validate.golden import Recording

        yield Recording(options.against).checkpoint
    else:
        with model_checkpoint(options.model, options.work, show) as folder:
            yield folder
