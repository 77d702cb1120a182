"""Baselines do the same work: what each returns is what ours returns, in float32.

Bound: 1e-5 relative L2, as for the pipeline against the published one; a wrong formula is off by 1e-3.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.config import EditConfig
from blip3o_rt.dit.layout import layout
from blip3o_rt.errors import ConfigError, ParameterError
from blip3o_rt.measure.baselines.measure import relative_l2
from blip3o_rt.measure.bench import baselines, lines, stages
from blip3o_rt.measure.bench.lines import Case, Settings
from blip3o_rt.measure.random_checkpoint import preset
from blip3o_rt.params import SamplingParams

CPU = torch.device("cpu")
BOUND = 1e-5
GREEDY = SamplingParams(top_k=1)


@pytest.fixture(autouse=True)
def without_gradients() -> object:
    with torch.no_grad():
        yield


def close(found: Tensor, expected: Tensor) -> bool:
    return relative_l2(found, expected) < BOUND


def test_prefill_and_second_pass(checkpoint: Checkpoint) -> None:
    stage = stages.ArStage(checkpoint, max_batch=1)
    language = baselines.LanguageBaseline(stage)
    assert close(stage.prefill(), language.prefill())
    tokens = checkpoint.config.image_tokens
    states = language.second_pass()
    assert states.shape == (tokens.tokens_per_image + 1, checkpoint.config.ar.hidden_size)
    assert close(states[:1], stage.prefill()[-1:])  # <S0>, the last of the prompt
    assert stage.engine.cache.free_pages == stage.engine.cache.num_pages


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_greedy_tokens_are_the_same_and_go_on_past_the_end(
    checkpoint: Checkpoint, batch: int, whole: bool
) -> None:
    sampling = SamplingParams(top_k=1, image_tokens_only=not whole)
    stage = stages.ArStage(checkpoint, max_batch=batch, sampling=sampling)
    ours, theirs = (
        stage.tokens(batch),
        baselines.LanguageBaseline(stage).tokens(batch, whole_vocabulary=whole),
    )
    for _ in range(stage.steps_per_run + 3):
        ours.prepare()
        theirs.prepare()
        assert torch.equal(ours(), theirs())
    ours.close()
    assert stage.engine.cache.free_pages == stage.engine.cache.num_pages


def test_a_static_cache_changes_no_token(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is transformers' own; here it is called uncompiled, over the static cache."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    stage = stages.ArStage(checkpoint, max_batch=2, sampling=GREEDY)
    ours, static = stage.tokens(2), baselines.LanguageBaseline(stage).tokens(2, compile_mode="default")
    for _ in range(stage.steps_per_run + 3):
        ours.prepare()
        static.prepare()
        assert torch.equal(ours(), static())


def test_connector(checkpoint: Checkpoint) -> None:
    stage = stages.ConnectorStage(checkpoint)
    null, conditional = baselines.ConnectorBaseline(stage).run()
    ours = stage.run()
    assert close(ours.conditional, conditional)
    assert close(ours.null.expand_as(null), null)


@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("index", [0, 7, 29])
def test_dit_step(checkpoint: Checkpoint, index: int, edit: bool) -> None:
    stage = stages.DitStage(checkpoint, edit=edit)
    for _ in range(2):  # from the noise again
        stage.prepare(index)
        ours = stage.step()
    assert close(ours, baselines.DitBaseline(stage).step(index))
    assert not close(ours, stage.noise)


def of_geometry(checkpoint: Checkpoint, edit: EditConfig, channelwise: bool = False) -> Checkpoint:
    """The transformer of another way of looking at a reference, with weights of its own."""
    config = preset("tiny", edit, channelwise_noise=channelwise)
    generator = torch.Generator().manual_seed(3)
    weights = {
        spec.name: torch.randn(spec.shape, generator=generator) / max(1, spec.shape[-1]) ** 0.5
        for spec in layout(config.dit)
    }
    return replace(checkpoint, config=config, weights={"dit": weights})


@pytest.mark.parametrize(
    ("edit", "channelwise", "tokens", "condition"),
    [
        (EditConfig(use_und_image_vae=True), False, 64, 129),
        (EditConfig(use_und_image_vae_as_noise=True), False, 128, 65),
        (EditConfig(use_und_image_vae=True, use_und_image_vae_as_noise=True), False, 128, 129),
        (EditConfig(use_und_image_vae=True), True, 64, 129),
    ],
)
def test_a_step_of_every_kind_of_edit(
    checkpoint: Checkpoint, edit: EditConfig, channelwise: bool, tokens: int, condition: int
) -> None:
    stage = stages.DitStage(of_geometry(checkpoint, edit, channelwise), edit=True)
    stage.prepare()
    assert close(stage.step(), baselines.DitBaseline(stage).step())
    assert stage.state is not None
    assert stage.state.model_input.numel() == tokens * stage.config.dit.in_channels
    assert len(stage.tokens.conditional) == condition
    assert sum(stage.tokens.null_counts) == condition


def test_transformers_that_have_no_such_step_say_so(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="those of text-to-image"):
        stages.DitStage(of_geometry(checkpoint, EditConfig()), edit=True)
    with pytest.raises(ConfigError, match="one for edits only"):
        stages.DitStage(of_geometry(checkpoint, EditConfig(), channelwise=True))


def test_autoencoder(checkpoint: Checkpoint) -> None:
    stage = stages.VaeStage(checkpoint)
    baseline = baselines.VaeBaseline(stage)
    assert close(stage.decode(), baseline.decode())
    assert close(stage.encode(), baseline.encode())


def test_image_tokenizer(checkpoint: Checkpoint) -> None:
    stage = stages.TatokStage(checkpoint)
    (features, codes), (expected, expected_codes) = stage.encode(), baselines.TatokBaseline(stage).encode()
    assert close(features, expected)
    assert torch.equal(codes, expected_codes)


def test_images_end_to_end(checkpoint: Checkpoint) -> None:
    """Both draw tokens of their own, so the images differ; ours keeps the time outside its stages."""
    stage = stages.ImageStage(checkpoint, max_batch=2, steps=2)
    assert len(stage.draw(2)) == 2
    assert [len(found) for found in stage.host.values()] == [1]
    baseline = baselines.ImageBaseline(checkpoint, stages.ArStage.prompt(checkpoint), steps=2)
    side = checkpoint.config.image_size
    pixels = baseline.draw(2)
    assert pixels.shape == (2, 3, side, side)
    assert bool(((pixels >= 0) & (pixels <= 1)).all())


def test_the_half_way_context_holds_half_an_image(checkpoint: Checkpoint) -> None:
    stage = stages.ArStage(checkpoint, max_batch=1)
    tokens = checkpoint.config.image_tokens
    assert len(stage.context) == len(stage.prompt_ids) + tokens.tokens_per_image // 2
    assert stage.steps_per_run == tokens.tokens_per_image - tokens.tokens_per_image // 2
    assert set(stage.context[len(stage.prompt_ids) :]) <= set(tokens.image_token_range)


def test_baselines_that_cannot_run_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        baselines, "compile_problem", lambda _: "torch.compile does not work here (no compiler)"
    )
    found, notes = baselines.available(("transformers", "compiled", "graphed"), CPU)
    assert found == ("transformers",)
    assert notes == [
        "compiled left out: torch.compile does not work here (no compiler)",
        "graphed left out: CUDA graphs need a GPU",
    ]
    with pytest.raises(ParameterError, match="baselines has 'vllm': accepted are transformers"):
        baselines.available(("vllm",), CPU)


def test_a_compiler_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("\n  Python 3.99 is not supported\n more")

    monkeypatch.setattr(torch, "compile", refuse)
    baselines.compile_problem.cache_clear()
    try:
        assert baselines.compile_problem(CPU) == (
            "torch.compile does not work here (RuntimeError: Python 3.99 is not supported)"
        )
    finally:
        baselines.compile_problem.cache_clear()


# Which lines there are


def all_cases(checkpoint: Checkpoint, settings: Settings) -> list[Case]:
    builders = dict.fromkeys(spec.cases for spec in lines.LINES if spec.cases is not None)
    return [case for cases in builders for case in cases(checkpoint, settings)]


def who_is_on(found: list[Case]) -> dict[tuple[str, int], list[str]]:
    return {(case.name, case.batch): [c.who for c in case.candidates] for case in found}


def test_every_line_has_its_baselines(checkpoint: Checkpoint) -> None:
    settings = Settings(lines.select(["all"]), baselines.DEFAULT_BASELINES, (1, 2))
    assert who_is_on(all_cases(checkpoint, settings)) == {
        ("ar.prefill", 1): ["ours", "transformers"],
        ("ar.token", 1): ["ours", "transformers", "published"],
        ("ar.token", 2): ["ours", "transformers", "published"],
        ("ar.second_pass", 1): ["published"],
        ("connector", 1): ["ours", "published"],
        ("tatok.encode", 1): ["ours", "transformers"],
        ("dit.tables", 1): ["ours"],
        ("dit.condition", 1): ["ours"],
        ("dit.step", 1): ["ours", "diffusers"],
        ("dit.step.edit", 1): ["ours", "diffusers"],
        ("vae.decode", 1): ["ours", "diffusers"],
        ("vae.encode", 1): ["ours", "diffusers"],
    }


def test_without_baselines_there_is_ours_alone(checkpoint: Checkpoint) -> None:
    found = all_cases(checkpoint, Settings(lines.select(["all"]), (), (1,)))
    assert {who for whos in who_is_on(found).values() for who in whos} == {"ours"}


def test_every_entry_says_what_it_must_do(checkpoint: Checkpoint) -> None:
    for case in all_cases(checkpoint, Settings(lines.select(["all"]), baselines.DEFAULT_BASELINES, (1,))):
        assert set(case.work) == {candidate.who for candidate in case.candidates}
        for work in case.work.values():
            assert work is not None
            assert work.bytes > 0
            assert work.flops > 0


def test_names_of_lines() -> None:
    assert lines.select(["ar"]) == {"ar.prefill", "ar.token", "ar.second_pass"}
    assert lines.select(["dit"]) == {"dit.tables", "dit.condition", "dit.step", "dit.step.edit"}
    assert lines.select(["dit.step", "image"]) == {"dit.step", "image", "image.host"}
    assert lines.select([]) == frozenset()
    assert lines.select(["all"]) == frozenset(lines.NAMES)
    with pytest.raises(ParameterError, match="lines has 'dti': accepted are all, tatok, vae, ar"):
        lines.select(["dti"])
