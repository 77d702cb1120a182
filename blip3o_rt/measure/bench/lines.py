"""The table of stage lines: name, unit, color, and how a line's candidates are built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from blip3o_rt.ar.kv_cache import DEFAULT_PAGE_SIZE
from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.errors import ParameterError
from blip3o_rt.graphs import graphs_wanted
from blip3o_rt.measure.bench import baselines, work
from blip3o_rt.measure.bench.stages import (
    SEED,
    STEPS,
    ArStage,
    ConnectorStage,
    DitStage,
    TatokStage,
    VaeStage,
)
from blip3o_rt.measure.bench.timing import Candidate, nothing
from blip3o_rt.measure.bench.work import Work
from blip3o_rt.measure.records import OURS, Line
from blip3o_rt.measure.units import number_text, time_text
from blip3o_rt.params import SamplingParams
from blip3o_rt.switches import EXACT

QUEUED_TOKENS = 128  # of one sample on a GPU
QUEUED_IMAGES = 4
WHOLE_VOCABULARY = "draws from the whole vocabulary"


@dataclass(frozen=True)
class Settings:
    """What a run measures.

    Attributes:
        lines: names (empty: none).
        baselines: those that can run here.
        op_names: None for no ops.
        ablate: names of lines whose ablations are measured.
        runs: rounds of a line.
        quick: rooflines too small to mean anything, for trying out.
        steps: of a whole image.
    """

    lines: frozenset[str]
    baselines: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1,)
    tier: str = EXACT
    op_names: tuple[str, ...] | None = None
    ablate: frozenset[str] = frozenset()
    runs: int = 1
    quick: bool = False
    steps: int = STEPS

    def compiled(self) -> Iterator[tuple[str, str]]:
        """(who, torch.compile's mode) of the compiled baselines chosen."""
        for name, mode in baselines.COMPILE_MODES.items():
            if name in self.baselines:
                yield baselines.WHO[name], mode


@dataclass
class Case:
    """One line at one batch size: `per` units of work are done by a call of each candidate."""

    name: str
    what: str
    per: int = 1
    batch: int = 1
    candidates: list[Candidate] = field(default_factory=list)
    work: dict[str, Work | None] = field(default_factory=dict)  # who -> the least that its call must do
    notes: dict[str, str] = field(default_factory=dict)  # who -> remark

    def add(
        self,
        who: str,
        call: Callable[[], Any],
        work: Work | None = None,
        *,
        prepare: Callable[[], object] = nothing,
        queued: int = 1,
        note: str | None = None,
    ) -> None:
        """Another candidate; ours replays its graphs, unless there are none."""
        eager = who != OURS or not graphs_wanted()
        self.candidates.append(Candidate(who, call, prepare, queued, eager))
        self.work[who] = work
        if note is not None:
            self.notes[who] = note


# Cases of a part of the checkpoint, which is loaded once for all of them


def ar_cases(checkpoint: Checkpoint, settings: Settings) -> Iterator[Case]:
    """Prompt, tokens by batch, and the second pass that the published code needs."""
    stage = ArStage(checkpoint, max_batch=max(settings.batches))
    language = baselines.LanguageBaseline(stage) if settings.baselines else None
    prompt = len(stage.prompt_ids)
    if "ar.prefill" in settings.lines:
        case = Case("ar.prefill", f"a prompt of {prompt} tokens", per=prompt)
        case.add(OURS, stage.prefill, stage.prefill_work(weight_itemsize=stage.weight_itemsize))
        if language is not None and "transformers" in settings.baselines:
            case.add("transformers", language.prefill, stage.prefill_work())
        yield case
    if "ar.token" in settings.lines:
        for batch in settings.batches:
            yield _token_case(stage, language, settings, batch)
    transformers = {"published", "transformers"}.intersection(settings.baselines)  # it needs no other package
    if "ar.second_pass" in settings.lines and language is not None and transformers:
        length = prompt + stage.config.image_tokens.tokens_per_image
        what = "hidden states of the whole sequence again (ours keeps them)"
        case = Case("ar.second_pass", what, per=length)
        case.add("published", language.second_pass, stage.prefill_work(length))
        yield case


def _token_case(
    stage: ArStage, language: baselines.LanguageBaseline | None, settings: Settings, batch: int
) -> Case:
    head, whole = len(stage.head_rows()), stage.config.ar.vocab_size
    case = Case("ar.token", "one decoded token of each image", per=batch, batch=batch)
    queued = min(QUEUED_TOKENS, stage.steps_per_run - 1)
    ours = stage.tokens(batch, queued)
    least = stage.token_work(batch, head, stage.weight_itemsize)
    case.add(OURS, ours, least, prepare=ours.prepare, queued=queued)
    if language is None:
        return case
    kinds: list[tuple[str, bool, str | None, str]] = []
    if "transformers" in settings.baselines:
        kinds.append(("transformers", False, None, "draws from the rows of the head that ours reads"))
    if "published" in settings.baselines:
        kinds.append(("published", True, None, WHOLE_VOCABULARY))
    kinds += [(who, True, mode, f"{WHOLE_VOCABULARY}; static cache") for who, mode in settings.compiled()]
    for who, whole_vocabulary, mode, note in kinds:
        tokens = language.tokens(batch, whole_vocabulary=whole_vocabulary, compile_mode=mode)
        least = stage.token_work(batch, whole if whole_vocabulary else head)
        case.add(who, tokens, least, prepare=tokens.prepare, note=note)
    return case


def connector_cases(checkpoint: Checkpoint, settings: Settings) -> Iterator[Case]:
    """The connector: ours once per image, the published code at every step."""
    stage = ConnectorStage(checkpoint)
    case = Case("connector", "hidden states of an image to the transformer's condition")
    case.add(OURS, stage.run, stage.work())
    if "published" in settings.baselines:
        note = "both branches in full; runs at every step, ours once per image"
        case.add("published", baselines.ConnectorBaseline(stage).run, stage.published_work(), note=note)
    yield case


def tatok_cases(checkpoint: Checkpoint, settings: Settings) -> Iterator[Case]:
    """The image tokenizer."""
    stage = TatokStage(checkpoint)
    case = Case("tatok.encode", "a reference image to codes")
    case.add(OURS, stage.encode, stage.work())
    if "transformers" in settings.baselines:
        note = "the tower cut off above the layer in use, the codebook normalized ahead"
        case.add("transformers", baselines.TatokBaseline(stage).encode, stage.work(), note=note)
    yield case


def dit_cases(checkpoint: Checkpoint, settings: Settings) -> Iterator[Case]:
    """The diffusion transformer: once per schedule, once per image, at every step."""
    stage = DitStage(checkpoint)
    if "dit.tables" in settings.lines:
        case = Case("dit.tables", f"modulation of {stage.schedule.steps} steps, once per schedule")
        case.add(OURS, stage.tables, stage.tables_work())
        yield case
    if "dit.condition" in settings.lines:
        case = Case("dit.condition", "keys and values of all layers, once per image")
        case.add(OURS, stage.condition, stage.condition_work(), prepare=stage.capture_image)
        yield case
    if "dit.step" in settings.lines:
        yield _step_case("dit.step", "one denoising step with guidance", stage, settings)


def edit_cases(checkpoint: Checkpoint, settings: Settings) -> Iterator[Case]:
    """A step of an edit; what is computed once for it is as in text-to-image."""
    shape = work.step_shape(checkpoint.config, edit=True)
    what = f"one denoising step of an edit: {shape.tokens} tokens, {shape.condition} of the condition"
    yield _step_case("dit.step.edit", what, DitStage(checkpoint, edit=True), settings)


def _step_case(name: str, what: str, stage: DitStage, settings: Settings) -> Case:
    case = Case(name, what)
    steps = stage.schedule.steps
    case.add(OURS, stage.step, stage.step_work(shortened=True), prepare=stage.prepare, queued=steps)
    if "diffusers" in settings.baselines:
        case.add("diffusers", baselines.DitBaseline(stage).step, stage.step_work(shortened=False))
    for who, mode in settings.compiled() if not stage.edit else ():
        compiled = baselines.DitBaseline(stage, mode)
        case.add(who, compiled.step, stage.step_work(shortened=False), note="cold is the compilation")
    return case


def vae_cases(checkpoint: Checkpoint, settings: Settings) -> Iterator[Case]:
    """The autoencoder in both directions."""
    stage = VaeStage(checkpoint)
    diffusers = baselines.VaeBaseline(stage) if "diffusers" in settings.baselines else None
    if "vae.decode" in settings.lines:
        case = Case("vae.decode", "a latent to an image")
        case.add(OURS, stage.decode, stage.decode_work(shortened=True), queued=QUEUED_IMAGES)
        if diffusers is not None:
            case.add("diffusers", diffusers.decode, stage.decode_work(shortened=False))
        for who, mode in settings.compiled():
            compiled, least = baselines.VaeBaseline(stage, mode), stage.decode_work(shortened=False)
            case.add(who, compiled.decode, least, note="cold is the compilation")
        yield case
    if "vae.encode" in settings.lines:
        case = Case("vae.encode", "a reference image to a latent")
        case.add(OURS, stage.encode, stage.encode_work())
        if diffusers is not None:
            case.add("diffusers", diffusers.encode, stage.encode_work())
        yield case


# Ours alone, with what an ablation changes


def ar_prefill(checkpoint: Checkpoint) -> Candidate:
    return Candidate("", ArStage(checkpoint, max_batch=1).prefill)


def ar_token(
    checkpoint: Checkpoint,
    *,
    image_tokens_only: bool = True,
    page_size: int = DEFAULT_PAGE_SIZE,
    batch: int = 1,
    alone: int = 1,
) -> Candidate:
    """A decoded token of each of `batch` images, or of `alone` images one after the other."""
    sampling = SamplingParams(seed=SEED, image_tokens_only=image_tokens_only)
    stages = [
        ArStage(checkpoint, max_batch=batch, sampling=sampling, page_size=page_size) for _ in range(alone)
    ]
    queued = min(QUEUED_TOKENS, stages[0].steps_per_run - 1)
    loops = [stage.tokens(batch, queued) for stage in stages]

    def prepare() -> None:
        for loop in loops:
            loop.prepare()

    return Candidate("", lambda: [loop() for loop in loops], prepare, queued)


def dit_step(checkpoint: Checkpoint, *, edit: bool = False, every_token: bool = False) -> Candidate:
    """A denoising step; every_token: each token of the unconditional branch is a key of its own."""
    stage = DitStage(checkpoint, edit=edit)
    if every_token:
        stage.every_token()
    return Candidate("", stage.step, stage.prepare, stage.schedule.steps)


def dit_denoise(checkpoint: Checkpoint) -> Candidate:
    stage = DitStage(checkpoint)
    return Candidate("", stage.denoise, stage.prepare_denoise)


def vae_decode(checkpoint: Checkpoint) -> Candidate:
    return Candidate("", VaeStage(checkpoint).decode)


def tatok_encode(checkpoint: Checkpoint) -> Candidate:
    return Candidate("", TatokStage(checkpoint).encode)


# The table


Cases = Callable[[Checkpoint, Settings], Iterator[Case]]


@dataclass(frozen=True)
class LineSpec:
    """A line that a run may have.

    Attributes:
        unit: of its work; empty where work per second says nothing.
        color: in plots.
        part: of the checkpoint; None for all parts.
        cases: builds the cases of the line and of others of the same part; None where the run times images
            as a whole, or only ablations show the line.
        ours: builds our candidate alone, for ablations.
    """

    name: str
    unit: str = "image"
    color: str = "#555555"
    part: str | None = None
    cases: Cases | None = None
    ours: Callable[..., Candidate] | None = None


DENOISE = "dit.denoise"  # all steps: only ablations show it
LINES = (  # in the order of a request; colors of Okabe and Ito, which people with any color vision tell apart
    LineSpec("tatok.encode", "image", "#555555", "ta_tok", tatok_cases, tatok_encode),
    LineSpec("vae.encode", "image", "#555555", "vae", vae_cases),
    LineSpec("ar.prefill", "token", "#d55e00", "ar", ar_cases, ar_prefill),
    LineSpec("ar.token", "token", "#e69f00", "ar", ar_cases, ar_token),
    LineSpec("ar.second_pass", "token", "#999999", "ar", ar_cases),
    LineSpec("connector", "image", "#cc79a7", "connector", connector_cases),
    LineSpec("dit.tables", "", "#f0e442", "dit", dit_cases),
    LineSpec("dit.condition", "", "#56b4e9", "dit", dit_cases),
    LineSpec("dit.step", "step", "#0072b2", "dit", dit_cases, dit_step),
    LineSpec("dit.step.edit", "step", "#0072b2", "dit", edit_cases, partial(dit_step, edit=True)),
    LineSpec(DENOISE, "", "#0072b2", "dit", None, dit_denoise),
    LineSpec("vae.decode", "image", "#009e73", "vae", vae_cases, vae_decode),
    LineSpec("image"),
    LineSpec("image.host", ""),
)
BY_NAME: Mapping[str, LineSpec] = {spec.name: spec for spec in LINES}
ORDER = tuple(BY_NAME)
NAMES = tuple(name for name in ORDER if name != DENOISE)
STAGES = tuple(spec.name for spec in LINES if spec.cases is not None)  # all but whole images
ABLATED = tuple(spec.name for spec in LINES if spec.ours is not None)


def select(names: Sequence[str], known: tuple[str, ...] = NAMES, option: str = "lines") -> frozenset[str]:
    """Names of the lines that an option means: whole names, or what stands before the dot; "all" is all.

    Raises ParameterError for one that means none.
    """
    found: set[str] = set()
    for name in names:
        meant = [line for line in known if name in ("all", line, line.partition(".")[0])]
        if not meant:
            accepted = ", ".join(dict.fromkeys([*(line.partition(".")[0] for line in known), *known]))
            raise ParameterError(f"{option} has {name!r}: accepted are all, {accepted}")
        found.update(meant)
    return frozenset(found)


def unit(name: str) -> str:
    """What the work of a line is counted in; empty where its rate says nothing."""
    return BY_NAME[name].unit if name in BY_NAME else "image"


def rate_text(line: Line) -> str:
    """1,353 tokens/s, 0.0213 images/s, 16.9 ms/step; empty where that says nothing."""
    if not line.median or not unit(line.name):
        return ""
    if unit(line.name) == "step":
        return f"{time_text(line.median / line.per)}/step"
    return f"{number_text(line.rate)} {unit(line.name)}s/s"
