"""The bodies of requests and responses: OpenAI's fields of images, and ours beside them."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from blip3o_rt.params import (
    DIFFUSION_NAMES,
    MAX_DRAFT_WINDOW,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_SEED,
    MAX_STEPS,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    SAMPLING_NAMES,
    DiffusionParams,
    SamplingParams,
    check_draft_window,
    image_seeds,
    named,
)
from blip3o_rt.serve.messages import RawImage, Submit

RANDOM_SEED_BITS = 53  # so that every JSON reader holds a drawn seed exactly
MAX_PROMPT = 32_000


def _whole(value: Any) -> Any:
    """A number without a fraction, as JSON has it: 4.0 is 4."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)  # stands last: what stands before it is in the JSON schema
Count = Annotated[int, Field(ge=1, le=MAX_IMAGES), WHOLE]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), WHOLE]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS), WHOLE]
TopK = Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE]
Compression = Annotated[int, Field(ge=0, le=100), WHOLE]
Window = Annotated[int, Field(ge=1, le=MAX_DRAFT_WINDOW), WHOLE]
Priority = Annotated[int, Field(ge=-1, le=1), WHOLE]
Partials = Annotated[int, Field(ge=0, le=3), WHOLE]

_diffusion, _sampling = DiffusionParams(), SamplingParams()

VISIBLE = r"[^\s\x00-\x1f\x7f-\x9f]"  # the pipeline refuses marks and format characters alone too
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT, pattern=VISIBLE)]


class ImageRequest(BaseModel):
    """What generations, edits and jobs have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """A null is a field left out, as in OpenAI's API."""
        if not isinstance(data, dict):
            return data
        return {
            name: value for name, value in data.items() if value is not None or name not in cls.model_fields
        }

    prompt: Prompt = Field(
        description="What to draw, or what to change.", examples=["a red circle on a blue background"]
    )
    model: str | None = Field(
        None, max_length=256, description="The name that /v1/models gives; may be left out."
    )
    n: Count = Field(1, description="Images; image i uses seed + i.")
    size: str = Field(
        "auto", max_length=64, description="`auto` or the model's own, as `1024x1024`.", examples=["auto"]
    )
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="The image itself, or a link."
    )
    output_format: Literal["png", "jpeg", "webp"] = Field("png", description="The file's format.")
    output_compression: Compression | None = Field(
        None, description="Quality of JPEG and WebP; 100 where it is left out."
    )
    user: str | None = Field(None, max_length=256, description="Your user, for fairness between users.")
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = Field(
        None, description="Accepted and ignored: `steps` says how much work an image is."
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="Images are opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Accepted and ignored.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Accepted and ignored.")

    seed: Seed | None = Field(None, description="Same seed, same image; below 2^63. Drawn where left out.")
    steps: Steps = Field(_diffusion.steps, description="Denoising steps.")
    guidance: float = Field(
        _diffusion.guidance, ge=0, le=MAX_GUIDANCE, description="How closely to follow the plan; 1 is off."
    )
    temperature: float = Field(
        _sampling.temperature, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE, description="Of the tokens."
    )
    top_k: TopK | None = Field(None, description="Likeliest tokens to draw from; 0 is all, 1 is greedy.")
    top_p: float = Field(_sampling.top_p, gt=0, le=1, description="Probability mass to draw from.")
    draft_window: Window | Literal["auto"] = Field(
        "auto", description="Rows of an image in a pass of the decoder; 1 is off. The image is the same."
    )
    priority: Priority = Field(0, description="-1 is background work, 1 is urgent.")
    timeout: float | None = Field(
        None, ge=1, le=7 * 86_400, description="Seconds after which the request is given up."
    )

    def submit(self, references: tuple[RawImage, ...], client: str, **options: Any) -> Submit:
        """The engine's request, its seed drawn here where none was given. Raises ParameterError."""
        seed = self.seed if self.seed is not None else secrets.randbits(RANDOM_SEED_BITS)
        return Submit(
            "",
            self.prompt,
            references,
            tuple(enumerate(image_seeds(seed, self.n))),
            named(vars(self), SAMPLING_NAMES),
            named(vars(self), DIFFUSION_NAMES),
            client,
            self.priority,
            draft_window=check_draft_window(self.draft_window),
            **options,
        )


class StreamedRequest(ImageRequest):
    """A request whose response may be a stream of events."""

    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: Partials = Field(0, description="Previews of every image in a stream.")
    progress: bool = Field(False, description="Events of progress and queue position in a stream too.")


class GenerationRequest(StreamedRequest):
    """Body of POST /v1/images/generations."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "a red circle on a blue background", "seed": 7},
                {"prompt": "a green square", "n": 2, "stream": True, "partial_images": 2, "steps": 20},
            ]
        },
    )


class EditRequest(StreamedRequest):
    """The fields of POST /v1/images/edits beside its files."""

    input_fidelity: Literal["high", "low"] | None = Field(None, description="Accepted and ignored.")


class JobRequest(ImageRequest):
    """Body of POST /v1/jobs."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "a red circle on a blue background", "seed": 7, "n": 4}]},
    )

    images: list[Annotated[str, StringConstraints(min_length=1)]] = Field(
        default_factory=list,
        max_length=16,
        description="Reference images of an edit: files in base64, or data URLs.",
    )


class InputTokensDetails(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens that were read and drawn."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    total_tokens: int


class ImageData(BaseModel):
    """One image: OpenAI's fields, its seed, and how long each stage took."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int
    seconds: dict[str, float] = Field(description="By stage: queue, reference, tokens, denoise, decode.")
    tokens_per_pass: float


class ImagesResponse(BaseModel):
    """Body of the answer to generations and edits."""

    created: int
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    data: list[ImageData]
    usage: Usage


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Every error, in OpenAI's shape."""

    error: ErrorBody


class ModelCard(BaseModel):
    """A model, and what it takes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "blip3o_rt"
    size: str
    edits: bool
    max_references: int
    max_prompt_tokens: int
    tokens_per_image: int
    device: str
    dtype: str
    tier: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class JobImage(BaseModel):
    index: int
    seed: int
    url: str
    seconds: dict[str, float] = Field(description="By stage: reference, tokens, denoise, decode.")
    tokens_per_pass: float


class Job(BaseModel):
    """A job: `status` ends as completed, failed, cancelled or expired, once."""

    id: str
    object: Literal["image.job"] = "image.job"
    status: Literal["queued", "running", "completed", "failed", "cancelled", "expired"]
    created_at: int
    finished_at: int | None = None
    queue_position: int | None = Field(None, description="Images in front of it, while it is queued.")
    prompt: str
    seed: int
    n: int
    size: str | None = None
    data: list[JobImage]
    error: ErrorBody | None = None


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Job]


class Health(BaseModel):
    """What the engine process does: its liveness and its last progress."""

    status: Literal["ok", "loading", "restarting", "stopped", "stalled", "failing", "draining"]
    ready: bool
    engine_pid: int | None
    seconds_since_heartbeat: float | None
    seconds_since_progress: float | None
    engine_restarts: int
    engine_memory_bytes: int | None
    running: int
    waiting: int
    message: str | None = None
