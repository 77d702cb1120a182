"""What the front and the engine process say to each other; every message is plain data and pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

PRIORITIES = (-1, 0, 1)  # background, usual, urgent
# What a pause does with images that run: fails their requests, lets them end, or draws them again afterwards.
ABORT, WAIT, KEEP = PAUSES = ("abort", "wait", "keep")


@dataclass(frozen=True)
class RawImage:
    """An 8-bit RGB image: its size in pixels and its samples, row after row.

    `info` carries the fields of a generated image: prompt, seed, parameters and version.
    """

    width: int
    height: int
    samples: bytes
    info: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, image: Image.Image) -> RawImage:
        """A PIL image of mode RGB."""
        info = {str(name): value for name, value in image.info.items()}
        return cls(image.width, image.height, image.tobytes(), info)

    def pil(self) -> Image.Image:
        """It as PIL has it."""
        image = Image.frombytes("RGB", (self.width, self.height), self.samples)
        image.info.update(self.info)
        return image

    @property
    def size(self) -> str:
        """As the API names it: "64x64"."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class EngineOptions:
    """How an engine process loads its model.

    Args:
        model: The keyword arguments of Pipeline.load.
        loader: "module:function" that turns `model` into the stages to schedule.
        memory_reserve: Bytes of memory that must stay free for a request to be accepted.
        weights: The folder of weights that have replaced those of the model since.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    loader: str = "blip3o_rt.serve.stages:load"
    memory_reserve: int = 256 * 2**20
    weights: str | None = None


# To the engine


@dataclass(frozen=True)
class Submit:
    """A request: one image per seed, of a prompt and the reference images of an edit.

    Args:
        id: The request's name.
        prompt: What to draw.
        references: The reference images of an edit; none for text-to-image.
        seeds: Each image's seed with its index in the request.
        sampling: Arguments of SamplingParams but the seed.
        diffusion: Arguments of DiffusionParams.
        client: Whom the request is charged to, for fairness.
        priority: One of PRIORITIES.
        partial_images: How many estimates of every image to send while it is denoised.
        progress: Whether to send Progress.
        draft_window: Rows of an image in a pass of the decoder; None where the engine chooses.
    """

    id: str
    prompt: str
    references: tuple[RawImage, ...] = ()
    seeds: tuple[tuple[int, int], ...] = ((0, 0),)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    diffusion: Mapping[str, Any] = field(default_factory=dict)
    client: str = ""
    priority: int = 0
    partial_images: int = 0
    progress: bool = False
    draft_window: int | None = None


@dataclass(frozen=True)
class Cancel:
    """Take a request out of the queue and the batch."""

    id: str


@dataclass(frozen=True)
class Control:
    """Asks something of the engine itself, which answers with Controlled.

    Args:
        id: Names the answer.
        action: "pause", "resume", "update", "weights", "sleep" or "wake".
        value: Of "pause" one of PAUSES, of "update" a folder of weights.
    """

    id: str
    action: str
    value: str = ""


# From the engine


@dataclass(frozen=True)
class Controlled:
    """A Control was done, or failed with a kind and a line."""

    id: str
    weights_version: int = 0
    weights_checksum: str = ""
    failed: tuple[str, str] | None = None


@dataclass(frozen=True)
class ModelInfo:
    """What the loaded model is and takes.

    `tokens_per_pass` is the most tokens of an image that a pass of the decoder can give.
    """

    name: str
    width: int
    height: int
    edits: bool
    max_references: int
    tokens_per_image: int
    max_batch: int
    max_prompt_tokens: int
    device: str
    dtype: str
    tier: str

    @property
    def size(self) -> str:
        """Of its images, as the API names it."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Ready:
    """The model is loaded, warm and captured."""

    info: ModelInfo


@dataclass(frozen=True)
class LoadFailed:
    """The model cannot be loaded; the process ends."""

    message: str


@dataclass(frozen=True)
class Heartbeat:
    """Sent twice a second by a thread of its own, so that its absence means a stopped process.

    Args:
        turns: Pieces of work done since the process began.
        busy: Whether there is work.
        memory: Bytes of resident memory.
        batch_sizes: Token passes since the last heartbeat, by number of images in them.
        waiting: Images that wait for a place in the batch.
        running: Images in the batch, waiting for denoising or being denoised.
    """

    turns: int
    busy: bool
    memory: int
    batch_sizes: Mapping[int, int]
    waiting: int
    running: int


@dataclass(frozen=True)
class Accepted:
    """A request was checked and waits for its turn."""

    id: str
    prompt_tokens: int


@dataclass(frozen=True)
class Failed:
    """A request ends without its images; `kind` names the error class, `param` the field that is wrong."""

    id: str
    kind: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class Started:
    """An image of a request joined the batch."""

    id: str
    index: int


@dataclass(frozen=True)
class Progress:
    """An image is `done` of `total` units into a stage: "tokens" or "denoise"."""

    id: str
    index: int
    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Partial:
    """The estimate of an image while it is denoised; `number` counts from 0."""

    id: str
    index: int
    number: int
    image: RawImage


@dataclass(frozen=True)
class Finished:
    """An image is done; `seconds` by stage: "reference", "tokens", "denoise" and "decode"."""

    id: str
    index: int
    image: RawImage
    seconds: Mapping[str, float]
    tokens_per_pass: float


Event = Accepted | Failed | Started | Progress | Partial | Finished
