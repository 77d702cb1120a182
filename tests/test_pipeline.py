"""What a user of Pipeline can rely on: seeds, batches, checks at the door, progress, reports, failures."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_rt.config import EditConfig
from blip3o_rt.errors import (
    Cancelled,
    CheckpointError,
    DeviceError,
    GenerationError,
    ImageError,
    InsufficientMemoryError,
    ParameterError,
    PromptError,
)
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.metadata import read_metadata
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.result import Plan, Progress

BOTH = EditConfig(use_und_image_vae=True, use_und_image_vae_as_noise=True)
STEPS = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_random_checkpoint(folder, preset("tiny", BOTH), seed=1)
    return folder


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> Pipeline:
    return Pipeline.load(checkpoint, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    gradient = np.add.outer(np.arange(48), 2 * np.arange(80)) % 256
    return Image.fromarray(
        np.stack([gradient, gradient.T.reshape(48, 80), 255 - gradient], axis=2).astype(np.uint8)
    )


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def assert_same_pictures(found: list[Image.Image], expected: list[Image.Image]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(pixels(one), pixels(other))


@pytest.mark.parametrize(
    "dtype", ["fp32", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("bf16", "mixed"))]
)
def test_batches_give_the_pictures_of_single_requests(checkpoint: Path, dtype: str) -> None:
    """Mixed lengths, n > 1, more images than the batch holds, either order: the same bits as alone."""
    pipeline = Pipeline.load(checkpoint, device="cpu", dtype=dtype, max_batch=3)
    prompts = [
        "a",
        "a very long description of a red circle on a blue background, twice as long",
        "two words",
    ]
    together = pipeline.generate(prompts, n=2, seed=5, steps=STEPS)
    backwards = pipeline.generate(prompts[::-1], seed=5, steps=STEPS)
    alone = [
        picture
        for prompt in prompts
        for seed in (5, 6)
        for picture in pipeline.generate(prompt, seed=seed, steps=STEPS)
    ]
    assert_same_pictures(together, alone)
    assert_same_pictures(backwards, alone[4::-2])
    assert not np.array_equal(pixels(together[0]), pixels(together[1]))


def test_edits_in_a_batch_are_the_single_edits(pipeline: Pipeline, picture: Image.Image) -> None:
    together = pipeline.edit("make it green", picture, n=3, seed=7, steps=STEPS)
    alone = [pipeline.edit("make it green", picture, seed=seed, steps=STEPS)[0] for seed in (7, 8, 9)]
    assert_same_pictures(together, alone)


def test_plan_and_render_are_generate(pipeline: Pipeline) -> None:
    plan = pipeline.plan("a red circle", seed=3)
    assert_same_pictures(
        [pipeline.render(plan, steps=STEPS)],  # type: ignore[list-item]
        pipeline.generate("a red circle", seed=3, steps=STEPS),
    )


def test_a_plan_has_the_shapes_of_the_geometry(pipeline: Pipeline, picture: Image.Image) -> None:
    config = pipeline.config
    plan = pipeline.plan("make it green", image=picture)
    tokens = config.image_tokens.tokens_per_image
    assert plan.prompt_ids.shape[0] == 1
    assert plan.token_ids.shape == (1, tokens)
    assert plan.hidden_states.shape == (1, tokens + 1, config.ar.hidden_size)
    latent = pipeline.render(plan, steps=STEPS, output="latent")
    side = config.dit.sample_size
    assert isinstance(latent, torch.Tensor)
    assert latent.shape == (1, config.vae.latent_channels, side, side)
    assert plan.reference_latents[0].shape == latent.shape


def test_the_seed_of_the_noise_can_differ_from_the_tokens(pipeline: Pipeline) -> None:
    plan = pipeline.plan("a red circle", seed=3)
    same, other = (pipeline.render(plan, seed=seed, steps=STEPS) for seed in (3, 4))
    assert_same_pictures([same], [pipeline.render(plan, steps=STEPS)])  # type: ignore[list-item]
    assert not np.array_equal(np.asarray(same), np.asarray(other))


def test_an_edit_depends_on_its_picture(pipeline: Pipeline, picture: Image.Image) -> None:
    first = pipeline.edit("make it green", picture, steps=STEPS)
    second = pipeline.edit("make it green", picture.transpose(Image.Transpose.ROTATE_180), steps=STEPS)
    assert not np.array_equal(pixels(first[0]), pixels(second[0]))


def test_whole_vocabulary_sampling_reports_what_is_no_image_token(pipeline: Pipeline) -> None:
    plan = pipeline.plan("a", image_tokens_only=False, top_k=0, top_p=1.0, temperature=50.0)
    allowed = pipeline.config.image_tokens.image_token_range
    found = plan.token_ids[0].tolist()
    assert plan.non_image_positions == tuple(i for i, token in enumerate(found) if token not in allowed)
    assert plan.non_image_positions
    assert pipeline.plan("a", top_k=0, top_p=1.0, temperature=50.0).non_image_positions == ()


def test_progress_names_every_stage_and_ends_full(pipeline: Pipeline) -> None:
    seen: list[Progress] = []
    pipeline.generate("a", steps=STEPS, callback=seen.append)
    tokens = pipeline.config.image_tokens.tokens_per_image
    assert list(dict.fromkeys(progress.stage for progress in seen)) == ["tokens", "denoise", "decode"]
    for stage, total in (("tokens", tokens), ("denoise", STEPS), ("decode", 1)):
        counts = [progress.done for progress in seen if progress.stage == stage]
        assert counts == sorted(counts)
        assert counts[-1] == total


@pytest.mark.parametrize(("stage", "done"), [("tokens", 0), ("tokens", 5), ("denoise", 1), ("decode", 1)])
def test_a_callback_cancels_and_the_pipeline_goes_on(pipeline: Pipeline, stage: str, done: int) -> None:
    def cancel(progress: Progress) -> bool:
        return (progress.stage, progress.done) != (stage, done)

    with pytest.raises(Cancelled, match=f"{stage} {done}"):
        pipeline.generate("a", steps=STEPS, callback=cancel)
    assert len(pipeline.generate("a", steps=STEPS)) == 1


def test_a_report_says_what_ran(pipeline: Pipeline) -> None:
    report = pipeline.generate("a", n=2, steps=STEPS).report
    assert report.stage("tokens").work == 2 * pipeline.config.image_tokens.tokens_per_image
    assert report.stage("denoise").work == 2 * STEPS
    assert report.stage("decode").work == 2
    assert {"row_linear", "paged_decode_attention", "sample_tokens"} <= set(report.implementations)
    assert report.peak_memory_bytes > 0
    assert "tokens/s" in report.table()


def test_saved_pictures_say_how_they_were_made(pipeline: Pipeline, tmp_path: Path) -> None:
    prompt = "ein roter Kreis, 赤い円"
    result = pipeline.generate(prompt, n=2, seed=11, steps=STEPS, temperature=0.5)
    paths = result.save(tmp_path / "new")
    fields = read_metadata(paths[1])
    assert fields["prompt"] == prompt
    assert fields["seed"] == 12
    assert fields["parameters"]["steps"] == STEPS
    assert fields["parameters"]["temperature"] == 0.5
    again = pipeline.generate(fields["prompt"], seed=fields["seed"], steps=STEPS, temperature=0.5)
    assert_same_pictures([Image.open(paths[1])], again)


def test_metadata_says_what_the_caller_gave(pipeline: Pipeline) -> None:
    plan = pipeline.plan("a", token_ids=pipeline.plan("a").token_ids)
    noise = torch.zeros(pipeline.render(plan, steps=1, output="latent").shape)  # type: ignore[union-attr]
    image = pipeline.render(plan, steps=1, noise=noise)
    assert isinstance(image, Image.Image)
    assert image.info["parameters"]["tokens"] == "given"
    assert image.info["parameters"]["noise"] == "given"
    assert "top_k" not in image.info["parameters"]
    drawn = pipeline.generate("a", steps=1)[0].info["parameters"]
    assert drawn["top_k"] >= 1
    assert not {"tokens", "tier", "switches"} & set(drawn)


def test_pictures_are_handed_over_as_they_are_drawn(pipeline: Pipeline) -> None:
    seen: list[tuple[int, Image.Image]] = []
    with pytest.raises(Cancelled):
        pipeline.generate(
            ["a", "b"],
            steps=1,
            on_image=lambda index, image: seen.append((index, image)),
            callback=lambda progress: progress.stage != "decode" or not seen,
        )
    assert [index for index, _ in seen] == [0]
    assert_same_pictures([seen[0][1]], pipeline.generate("a", steps=1))


def test_a_tokenizer_that_splits_the_image_marks_is_refused(
    checkpoint: Path, picture: Image.Image, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "renamed")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        file = tmp_path / "renamed" / name
        if file.exists():
            file.write_text(file.read_text().replace("<|image_pad|>", "<|other_pad|>"))
    pipeline = Pipeline.load(tmp_path / "renamed", device="cpu", dtype="fp32")
    with pytest.raises(CheckpointError, match="which edits need"):
        pipeline.edit("a", picture)


def test_prompt_ids_that_the_decoder_does_not_know_are_refused(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, count = pipeline.config.ar.vocab_size, pipeline.config.image_tokens.tokens_per_image
    monkeypatch.setattr(pipeline._planner._prompts, "encode", lambda *_: ([1, size], range(0)))
    with pytest.raises(PromptError, match=f"outside the vocabulary: accepted is 0 to {size - 1}"):
        pipeline.generate("a", steps=STEPS)
    with pytest.raises(PromptError, match="outside the vocabulary"):
        pipeline.plan("a", token_ids=[0] * count)


def test_a_picture_that_fails_leaves_the_others(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    make: Callable[..., Plan] = pipeline._planner.plan

    def fail_the_second(*args: object) -> Plan:
        plan = make(*args)
        error = GenerationError("the decoder's logits are not finite") if plan.sampling.seed == 1 else None
        return dataclasses.replace(plan, error=error)

    expected = pipeline.generate("a", n=3, steps=STEPS)
    monkeypatch.setattr(pipeline._planner, "plan", fail_the_second)
    with pytest.raises(GenerationError, match="1 of 3 images failed") as caught:
        pipeline.generate("a", n=3, steps=STEPS)
    first, second, third = caught.value.images
    assert second is None
    assert_same_pictures([first, third], [expected[0], expected[2]])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is 0: accepted is a whole number from 1"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": -1}, "guidance is -1"),
        ({"top_p": 0.0}, "top_p is 0.0: accepted is a number above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 10**6}, "the vocabulary's size"),
        ({"temperature": 0}, "greedy is top_k=1"),
        ({"n": 0}, "n is 0: accepted is a whole number from 1 to 64"),
        ({"n": 65}, "n is 65"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63 - 1, "n": 2}, "the last image's"),
        ({"seed": "7"}, "seed is '7'"),
    ],
)
def test_parameters_end_at_the_door(pipeline: Pipeline, arguments: dict[str, object], message: str) -> None:
    def never(progress: Progress) -> None:
        pytest.fail(f"work began: {progress}")

    with pytest.raises(ParameterError, match=message) as caught:
        pipeline.generate("a", callback=never, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompts", [5, None, [], {"a": "b"}])
def test_what_is_no_prompt_is_refused(pipeline: Pipeline, prompts: object) -> None:
    with pytest.raises(PromptError, match="accepted is a string, or a list of at least one"):
        pipeline.generate(prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", ["", "  \n", "word " * 2000, "a <im_start> b", 7, "caf\udce9"])
def test_prompts_end_at_the_door(pipeline: Pipeline, prompt: object) -> None:
    with pytest.raises(PromptError) as caught:
        pipeline.generate(["fine", prompt])  # type: ignore[list-item]
    assert "\n" not in str(caught.value)


def test_references_end_at_the_door(pipeline: Pipeline, picture: Image.Image, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        pipeline.edit("a", tmp_path / "none.png")
    for nothing in ([], None, [None]):
        with pytest.raises(ImageError, match="at least one reference image"):
            pipeline.edit("a", nothing)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="one reference image at a time; 2 were given"):
        pipeline.edit("a", [picture, picture])


def test_a_text_to_image_checkpoint_refuses_to_edit(tmp_path: Path, picture: Image.Image) -> None:
    write_random_checkpoint(tmp_path / "drawing", preset("tiny"), tower="none")
    pipeline = Pipeline.load(tmp_path / "drawing", device="cpu", dtype="fp32")
    with pytest.raises(ImageError, match="only draws from text"):
        pipeline.edit("a", picture)
    assert len(pipeline.generate("a", steps=1)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": torch.zeros(1, 1, 2, 2)}, r"accepted is a floating-point tensor \[1,"),
        ({"noise": [0.0]}, "noise is \\[0.0\\]: accepted is a floating-point tensor"),
        ({"output": "jpeg"}, "accepted are pil, tensor, latent"),
        ({"steps": 1001}, "steps is 1001"),
        ({"seed": -5}, "seed is -5"),
    ],
)
def test_rendering_checks_its_arguments(
    pipeline: Pipeline, arguments: dict[str, object], message: str
) -> None:
    plan = pipeline.plan("a")
    with pytest.raises(ParameterError, match=message):
        pipeline.render(plan, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "token_ids", [[1, 2, 3], [0.5] * 64, [-1] * 64, [10**6] * 64, [True] * 64, "abc", [[1], [2, 3]]]
)
def test_replayed_tokens_are_checked(pipeline: Pipeline, token_ids: list[int]) -> None:
    with pytest.raises(ParameterError, match="token_ids"):
        pipeline.plan("a", token_ids=token_ids)


def test_loading_refuses_what_the_machine_cannot_do(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="there is no GPU to use"):
            Pipeline.load(checkpoint, device="cuda")
    with pytest.raises(DeviceError, match="accepted are auto, cpu, cuda and cuda:N"):
        Pipeline.load(checkpoint, device="tpu")
    with pytest.raises(DeviceError, match="accepted are auto, fp32, bf16 and mixed"):
        Pipeline.load(checkpoint, device="cpu", dtype="fp16")
    with pytest.raises(ParameterError, match="accepted is 'exact', the published mathematics, or 'fast'"):
        Pipeline.load(checkpoint, device="cpu", tier="fats")
    with pytest.raises(ParameterError, match="switch ar_weights is lossy and tier is 'exact'"):
        Pipeline.load(checkpoint, device="cpu", switches={"ar_weights": "int8"})
    for bad in ({"max_batch": 0}, {"max_batch": "4"}, {"max_prompt_tokens": -5}):
        with pytest.raises(ParameterError, match="accepted is a whole number"):
            Pipeline.load(checkpoint, device="cpu", **bad)  # type: ignore[arg-type]
    from blip3o_rt import machine

    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(2**20, 2**20, "machine"))
    with pytest.raises(InsufficientMemoryError, match=r"the model needs \d+ MiB of memory.*1 MiB free"):
        Pipeline.load(checkpoint, device="cpu")


def test_the_embedded_model_draws() -> None:
    (image,) = Pipeline.load(device="cpu").generate("a red circle", steps=1)
    assert image.mode == "RGB"
