"""Which lines a run has: each stage's work, and ours and the peers' ways of doing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.measure.bench import peers, work
from blip3o_rt.measure.bench.compose import OURS
from blip3o_rt.measure.bench.stages import (
    ArStage,
    ConnectorStage,
    DitStage,
    TatokStage,
    VaeStage,
)
from blip3o_rt.measure.bench.timing import Contender, nothing
from blip3o_rt.measure.bench.work import Work

MORE_RUNS = {"ar.token": 4}  # a line of short calls takes more of them
WEIGHTS = {  # share of the time budget, relative to each other
    "ar.prefill": 1.0,
    "ar.token": 1.5,
    "ar.second_pass": 0.5,
    "connector": 0.2,
    "tatok.encode": 1.0,
    "dit.tables": 0.2,
    "dit.condition": 0.3,
    "dit.step": 4.0,
    "dit.step.edit": 6.0,  # of twice as many tokens
    "vae.decode": 5.0,
    "vae.encode": 3.0,
    "image": 4.0,
}
NAMES = (*WEIGHTS, "image.host")


@dataclass
class Entry:
    """One contender of a line, and what its way of doing the work reads and computes at least."""

    contender: Contender
    work: Work | None = None
    note: str | None = None


@dataclass
class Line:
    """One line: `per` units of work are done by a call, for `batch` pictures at a time."""

    name: str
    what: str
    per: int
    batch: int = 1
    entries: list[Entry] = field(default_factory=list)

    def add(
        self,
        who: str,
        call: Callable[[], Any],
        work: Work | None = None,
        *,
        prepare: Callable[[], object] = nothing,
        note: str | None = None,
    ) -> None:
        self.entries.append(Entry(Contender(who, call, prepare), work, note))


@dataclass(frozen=True)
class Group:
    """Lines that share the parts of a checkpoint they need in memory."""

    names: tuple[str, ...]
    parts: tuple[str, ...]
    lines: Callable[[Checkpoint, Choice], Iterator[Line]]


@dataclass(frozen=True)
class Choice:
    """What of everything a run measures: names of lines, peers, and batch sizes."""

    names: frozenset[str]
    peers: tuple[str, ...]
    batches: tuple[int, ...]

    def compiled(self) -> Iterator[tuple[str, str]]:
        """(who, torch.compile's mode) of the compiled peers chosen."""
        for name, mode in peers.COMPILE_MODES.items():
            if name in self.peers:
                yield peers.WHO[name], mode


def select(stages: Sequence[str], known: tuple[str, ...] = NAMES, option: str = "stages") -> frozenset[str]:
    """Names of the lines that an option means: whole names, or what stands before the dot; "all" is all.

    Raises ParameterError for one that means none.
    """
    from blip3o_rt.errors import ParameterError

    found: set[str] = set()
    for stage in stages:
        names = [name for name in known if stage in ("all", name, name.partition(".")[0])]
        if not names:
            accepted = ", ".join(dict.fromkeys([*(name.partition(".")[0] for name in known), *known]))
            raise ParameterError(f"{option} has {stage!r}: accepted are all, {accepted}")
        found.update(names)
    return frozenset(found)


def ar_lines(checkpoint: Checkpoint, choice: Choice) -> Iterator[Line]:
    """Prompt, tokens by batch, and the second pass that the published way needs."""
    stage = ArStage(checkpoint, max_batch=max(choice.batches))
    language = peers.LanguagePeer(stage) if choice.peers else None
    prompt = len(stage.prompt_ids)
    if "ar.prefill" in choice.names:
        line = Line("ar.prefill", f"a prompt of {prompt} tokens", per=prompt)
        line.add(OURS, stage.prefill, stage.prefill_work(weight_itemsize=stage.weight_itemsize))
        if language is not None and "transformers" in choice.peers:
            line.add("transformers", language.prefill, stage.prefill_work())
        yield line
    if "ar.token" in choice.names:
        for batch in choice.batches:
            yield _token_line(stage, language, choice, batch)
    if "ar.second_pass" in choice.names and language is not None and "published" in choice.peers:
        length = prompt + stage.config.image_tokens.tokens_per_image
        line = Line(
            "ar.second_pass", "hidden states of the whole sequence again (ours keeps them)", per=length
        )
        line.add("published", language.second_pass, stage.prefill_work(length))
        yield line


def _token_line(stage: ArStage, language: peers.LanguagePeer | None, choice: Choice, batch: int) -> Line:
    head, whole = len(stage.head_rows()), stage.config.ar.vocab_size
    line = Line("ar.token", "one decoded token of each picture", per=batch, batch=batch)
    ours = stage.tokens(batch)
    line.add(OURS, ours, stage.token_work(batch, head, stage.weight_itemsize), prepare=ours.prepare)
    if language is None:
        return line
    if "transformers" in choice.peers:
        tokens = language.tokens(batch)
        note = "draws from the rows of the head that ours reads"
        line.add("transformers", tokens, stage.token_work(batch, head), prepare=tokens.prepare, note=note)
    if "published" in choice.peers:
        tokens = language.tokens(batch, whole_vocabulary=True)
        note = "draws from the whole vocabulary"
        line.add("published", tokens, stage.token_work(batch, whole), prepare=tokens.prepare, note=note)
    for who, mode in choice.compiled():
        tokens = language.tokens(batch, whole_vocabulary=True, compile_mode=mode)
        note = "draws from the whole vocabulary; static cache"
        line.add(who, tokens, stage.token_work(batch, whole), prepare=tokens.prepare, note=note)
    return line


def connector_lines(checkpoint: Checkpoint, choice: Choice) -> Iterator[Line]:
    """The connector: ours once per picture, the published way at every step."""
    stage = ConnectorStage(checkpoint)
    line = Line("connector", "hidden states of a picture to the transformer's condition", per=1)
    line.add(OURS, stage.run, stage.work())
    if "published" in choice.peers:
        note = "both halves in full; runs at every step, ours once per picture"
        line.add("published", peers.ConnectorPeer(stage).run, stage.published_work(), note=note)
    yield line


def tatok_lines(checkpoint: Checkpoint, choice: Choice) -> Iterator[Line]:
    """The image tokenizer."""
    stage = TatokStage(checkpoint)
    line = Line("tatok.encode", "a reference picture to codes", per=1)
    line.add(OURS, stage.encode, stage.work())
    if "transformers" in choice.peers:
        note = "the tower cut off above the layer in use, the codebook normalised ahead"
        line.add("transformers", peers.TatokPeer(stage).encode, stage.work(), note=note)
    yield line


def dit_lines(checkpoint: Checkpoint, choice: Choice) -> Iterator[Line]:
    """The diffusion transformer: once per schedule, once per picture, at every step."""
    stage = DitStage(checkpoint)
    if "dit.tables" in choice.names:
        line = Line("dit.tables", f"modulation of {stage.schedule.steps} steps, once per schedule", per=1)
        line.add(OURS, stage.tables, stage.tables_work())
        yield line
    if "dit.condition" in choice.names:
        line = Line("dit.condition", "keys and values of all layers, once per picture", per=1)
        line.add(OURS, stage.condition, stage.condition_work(), prepare=stage.prepare_picture)
        yield line
    if "dit.step" in choice.names:
        line = Line("dit.step", "one denoising step with guidance", per=1)
        line.add(OURS, stage.step, stage.step_work(shortened=True), prepare=stage.prepare)
        if "diffusers" in choice.peers:
            line.add("diffusers", peers.DitPeer(stage).step, stage.step_work(shortened=False))
        for who, mode in choice.compiled():
            compiled, note = peers.DitPeer(stage, mode), "cold is the compilation"
            line.add(who, compiled.step, stage.step_work(shortened=False), note=note)
        yield line


def edit_lines(checkpoint: Checkpoint, choice: Choice) -> Iterator[Line]:
    """A step of an edit; what is computed once for it is as in a picture from words."""
    stage = DitStage(checkpoint, edit=True)
    shape = work.step_shape(checkpoint.config, edit=True)
    what = f"one denoising step of an edit: {shape.tokens} tokens, {shape.condition} of the condition"
    line = Line("dit.step.edit", what, per=1)
    line.add(OURS, stage.step, stage.step_work(shortened=True), prepare=stage.prepare)
    if "diffusers" in choice.peers:
        line.add("diffusers", peers.DitPeer(stage).step, stage.step_work(shortened=False))
    yield line


def vae_lines(checkpoint: Checkpoint, choice: Choice) -> Iterator[Line]:
    """The autoencoder, both ways."""
    stage = VaeStage(checkpoint)
    diffusers = peers.VaePeer(stage) if "diffusers" in choice.peers else None
    if "vae.decode" in choice.names:
        line = Line("vae.decode", "a latent to a picture", per=1)
        line.add(OURS, stage.decode, stage.decode_work(shortened=True))
        if diffusers is not None:
            line.add("diffusers", diffusers.decode, stage.decode_work(shortened=False))
        for who, mode in choice.compiled():
            compiled, note = peers.VaePeer(stage, mode), "cold is the compilation"
            line.add(who, compiled.decode, stage.decode_work(shortened=False), note=note)
        yield line
    if "vae.encode" in choice.names:
        line = Line("vae.encode", "a reference picture to a latent", per=1)
        line.add(OURS, stage.encode, stage.encode_work())
        if diffusers is not None:
            line.add("diffusers", diffusers.encode, stage.encode_work())
        yield line


GROUPS = (
    Group(("ar.prefill", "ar.token", "ar.second_pass"), ArStage.parts, ar_lines),
    Group(("connector",), ConnectorStage.parts, connector_lines),
    Group(("tatok.encode",), TatokStage.parts, tatok_lines),
    Group(("dit.tables", "dit.condition", "dit.step"), DitStage.parts, dit_lines),
    Group(("dit.step.edit",), DitStage.parts, edit_lines),
    Group(("vae.decode", "vae.encode"), VaeStage.parts, vae_lines),
)
