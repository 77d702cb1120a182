"""What a request gives: plans, images and a report; and a request while it runs: its time and progress."""

from __future__ import annotations

import importlib.util
import itertools
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from blip3o_rt.errors import Cancelled, GenerationError, ParameterError, first_line, shown
from blip3o_rt.isolation import OwnSettings
from blip3o_rt.metadata import save_free
from blip3o_rt.ops import bf16_products
from blip3o_rt.params import SamplingParams
from blip3o_rt.precision import IN_WORDS

# What one unit of a stage is called; one not named here has no unit. "tokens" includes reading the prompt.
BARS = ("tokens", "denoise", "decode")  # stages that callbacks and progress bars are told of
STAGE_UNITS = {"reference": "image", "tokens": "token", "denoise": "step", "decode": "image"}


@dataclass(frozen=True)
class Stage:
    """Time spent in one stage, summed over a request, and the units of work it did (0: not counted)."""

    name: str
    seconds: float
    work: int

    @property
    def rate(self) -> str:
        """Tokens per second, or milliseconds per step or image; empty where there is nothing to count."""
        unit = STAGE_UNITS.get(self.name)
        if not self.work or self.seconds <= 0.0 or unit is None:
            return ""
        if unit == "token":
            return f"{self.work / self.seconds:.1f} tokens/s"
        return f"{1000.0 * self.seconds / self.work:.1f} ms/{unit}"

    @property
    def work_text(self) -> str:
        """The units of work in words, for a table."""
        if not self.work or self.name not in STAGE_UNITS:
            return ""
        return f"{self.work} {STAGE_UNITS[self.name]}{'' if self.work == 1 else 's'}"


@dataclass(frozen=True)
class Report:
    """What one request took on this machine.

    implementations: op name -> names of the implementations its calls ran on.
    peak_memory_bytes: on a GPU the most allocated during the request; on the CPU the most the process has
    held resident since it started. not_captured: what ran without a graph on a device that has graphs.
    measured: what was timed at load to choose between implementations, in words.
    passes: how often the images were run through the decoder, which draws a token or more of each.
    """

    stages: tuple[Stage, ...]
    implementations: Mapping[str, tuple[str, ...]]
    peak_memory_bytes: int
    device: str
    dtype: str
    tier: str
    switches: Mapping[str, str] = field(default_factory=dict)
    not_captured: tuple[str, ...] = ()
    measured: Mapping[str, str] = field(default_factory=dict)
    passes: int = 0

    @property
    def not_recorded(self) -> tuple[str, ...]:
        """Deprecated: `not_captured`."""
        warnings.warn("report.not_recorded is deprecated: use not_captured", DeprecationWarning, stacklevel=2)
        return self.not_captured

    @property
    def total_seconds(self) -> float:
        """Seconds of all stages together."""
        return sum(stage.seconds for stage in self.stages)

    def stage(self, name: str) -> Stage:
        """One stage by name; a stage that did not run took 0 seconds. Raises ParameterError."""
        if not isinstance(name, str):
            raise ParameterError(f"name is {shown(name)}: accepted is the name of a stage")
        return next((stage for stage in self.stages if stage.name == name), Stage(name, 0.0, 0))

    @property
    def tokens_per_second(self) -> float:
        """Image tokens drawn per second of the token stage, which includes the prompt; 0 where none were."""
        tokens = self.stage("tokens")
        return tokens.work / tokens.seconds if tokens.seconds > 0.0 else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens of an image that a pass of the decoder drew, on average; 0 where none ran."""
        return self.stage("tokens").work / self.passes if self.passes else 0.0

    @property
    def milliseconds_per_step(self) -> float:
        """Milliseconds per denoising step; 0 where none ran."""
        denoise = self.stage("denoise")
        return 1000.0 * denoise.seconds / denoise.work if denoise.work else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary: seconds per stage, rates, implementations, bytes."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "tier": self.tier,
            "switches": dict(self.switches),
            "stages": {stage.name: {"seconds": stage.seconds, "work": stage.work} for stage in self.stages},
            "total_seconds": self.total_seconds,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_pass": self.tokens_per_pass,
            "milliseconds_per_step": self.milliseconds_per_step,
            "peak_memory_bytes": self.peak_memory_bytes,
            "implementations": {op: list(names) for op, names in self.implementations.items()},
            "measured": dict(self.measured),
            "not_captured": list(self.not_captured),
            "not_recorded": list(self.not_captured),  # deprecated name
        }

    def table(self) -> str:
        """The timing table a person reads."""
        rows = [[stage.name, f"{stage.seconds:.3f}", stage.work_text, stage.rate] for stage in self.stages]
        if self.passes:
            rows[[stage.name for stage in self.stages].index("tokens")][-1] += (
                f", {self.tokens_per_pass:.1f} a pass"
            )
        rows.append(["total", f"{self.total_seconds:.3f}", "", ""])
        headers = ["stage", "seconds", "work", "rate"]
        body = tabulate(rows, headers, disable_numparse=True, colalign=("left", "right", "right", "right"))
        memory = f"{self.peak_memory_bytes / 2**20:.0f} MiB"
        switches = ", ".join(f"{name}={setting}" for name, setting in self.switches.items())
        tier = f"tier {self.tier}" + (f" ({switches})" if switches else "")
        dtype = IN_WORDS.get(self.dtype, self.dtype)
        machine = f"{self.device}, {dtype}, {tier}; peak memory {memory}"
        eager = [f"without a graph: {', '.join(self.not_captured)}"] if self.not_captured else []
        timed = [f"measured for {what}: {times}" for what, times in self.measured.items()]
        ran: dict[str, list[str]] = {}
        for op, name in sorted((op, name) for op, used in self.implementations.items() for name in used):
            ran.setdefault(name, []).append(op)
        ops_of = [f"on {name}: {', '.join(of_it)}" for name, of_it in sorted(ran.items())]
        return "\n".join([body, machine, *ops_of, *timed, *eager])

    def __str__(self) -> str:
        return self.table()


@dataclass(frozen=True)
class Plan:
    """The autoregressive stage's result for one image.

    prompt_ids [1, P] and token_ids [1, T] are vocabulary ids (int64); hidden_states [1, T + 1, hidden] are
    the decoder's final states from `<S0>` to the last image token. reference_latents are the scaled VAE
    latents [1, C, h, w] of an edit's images, reference_sha256 the hashes of their pixels.
    non_image_positions lists the tokens that are not image tokens, which only whole-vocabulary sampling and
    replayed tokens can contain. replayed: the tokens were given, not drawn. switches are those of the fast
    tier that it was made with, whatever renders it. error says why a plan cannot be rendered.
    """

    prompt: str
    prompt_ids: Tensor
    token_ids: Tensor
    hidden_states: Tensor
    sampling: SamplingParams
    reference_latents: tuple[Tensor, ...] = ()
    reference_sha256: tuple[str, ...] = ()
    non_image_positions: tuple[int, ...] = ()
    replayed: bool = False
    switches: Mapping[str, str] = field(default_factory=dict)
    error: GenerationError | None = None


class Result(list[Image.Image]):
    """Images in order, the `plans` they came from, and a `report` of time, implementations and memory."""

    def __init__(self, images: Sequence[Image.Image], plans: Sequence[Plan], report: Report) -> None:
        super().__init__(images)
        self.plans = list(plans)
        self.report = report

    def save(self, directory: str | Path) -> list[Path]:
        """Write the images as 000.png, 001.png, ... with their metadata.

        A file that is there is replaced by the image of the same request alone. Another takes the next
        number.

        Args:
            directory: A folder, made if missing.

        Returns:
            The files, in the order of the images.

        Raises:
            ParameterError: What is no folder and cannot be made one.
            OSError: A file cannot be written; it names the file.
        """
        try:
            folder = Path(directory).expanduser()
            folder.mkdir(parents=True, exist_ok=True)
        except Exception as error:  # a caller's object raises anything
            given = f"directory is {shown(directory)} ({first_line(error)})"
            raise ParameterError(f"{given}: accepted is the name of a folder") from error
        numbered = (folder / f"{number:03d}.png" for number in itertools.count())
        return [save_free(image, numbered, image.info) for image in self]


@dataclass(frozen=True)
class Progress:
    """What a callback is told: done of total units of "tokens" (with the prompt), "denoise" or "decode"."""

    stage: str
    done: int
    total: int


ProgressCallback = Callable[[Progress], "bool | None"]
ImageCallback = Callable[[int, Any], None]  # an image's index in the result, and the image (or its error)


class Run:
    """One request while it runs: the time of its stages, its progress, and the implementations it uses.

    used: the implementations of ops that run. not_captured: what runs without a graph where there are graphs.
    Both fill while it runs. Callbacks run under the caller's settings of torch.
    `callback` may return False, which ends the request with Cancelled between two tokens or two steps. `show`
    draws progress bars on standard error where that is a terminal, and in a notebook.
    """

    def __init__(
        self,
        device: torch.device,
        used: Mapping[str, set[str]],
        not_captured: set[str],
        settings: OwnSettings,
        callback: ProgressCallback | None = None,
        on_image: ImageCallback | None = None,
        *,
        show: bool = False,
    ) -> None:
        self._device, self._show = device, show
        self._used, self._not_captured = used, not_captured
        self._callback = callback and settings.outside(callback)
        self._on_image = on_image and settings.outside(on_image)
        self._seconds: dict[str, float] = {}
        self._work: dict[str, int] = {}
        self.passes = 0  # of images over the decoder
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A stage of `total` units of work; the block is given a function to call with the units done so far.

        On a GPU the clock is read once the queued work has finished. A block that raises did no units.
        """
        done, begin = 0, self._now()
        try:
            bar = _bar(name, total) if self._show and name in BARS else None
            with nullcontext() if bar is None else bar:

                def update(units: int) -> None:
                    if bar is not None:
                        bar.update(units - bar.n)
                    if self._callback is not None and _refuses(self._callback(Progress(name, units, total))):
                        raise Cancelled(f"cancelled by the callback at {name} {units} of {total}")

                yield update
                done = total
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - begin
            self._work[name] = self._work.get(name, 0) + done

    def drawn(self, index: int, image: Image.Image | Exception) -> None:
        """Tell the caller of an image that is done, or of its error."""
        if self._on_image is not None:
            self._on_image(index, image)

    def report(self, *, dtype: str, tier: str, switches: Mapping[str, str]) -> Report:
        """The report of everything so far."""
        return Report(
            tuple(Stage(name, seconds, self._work[name]) for name, seconds in self._seconds.items()),
            {op: tuple(sorted(names)) for op, names in sorted(self._used.items())},
            peak_memory_bytes(self._device),
            device=str(self._device),
            dtype=dtype,
            tier=tier,
            switches=dict(switches),
            not_captured=tuple(sorted(self._not_captured)),
            measured=bf16_products.measured() if self._device.type == "cpu" else {},
            passes=self.passes,
        )

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _refuses(answer: object) -> bool:
    """Whether a callback's answer is False, Python's, numpy's or torch's."""
    if isinstance(answer, np.ndarray | Tensor) and answer.ndim == 0:
        answer = answer.item()
    return isinstance(answer, bool | np.bool_) and not answer


def _bar(name: str, total: int) -> Any:
    """A progress bar: a widget or text in a notebook, text on a terminal, None elsewhere."""
    notebook = "ipykernel.zmqshell" in sys.modules
    if notebook and importlib.util.find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm as widget

        return widget(total=total, desc=name, leave=False)
    try:
        watched = notebook or sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        watched = False
    return tqdm(total=total, desc=name, leave=False) if watched else None


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """The most memory held: on a GPU since the last request began, on the CPU since the process began."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
