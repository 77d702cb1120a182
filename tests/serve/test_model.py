"""The service on the embedded model: the bits of single calls, OpenAI's client, and AsyncPipeline."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image

from blip3o_rt.errors import InsufficientMemoryError
from blip3o_rt.machine import Memory
from blip3o_rt.metadata import save_png
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.serve import AsyncPipeline
from blip3o_rt.serve.client import Limits, RequestError
from blip3o_rt.serve.messages import EngineOptions, Finished, Partial, RawImage, Submit
from blip3o_rt.serve.scheduler import Scheduler
from blip3o_rt.serve.server import ServerOptions
from blip3o_rt.serve.stages import MEMORY_SECONDS, Drawing, Stages
from tests.serve.conftest import RunningServer

CIRCLE, SQUARE, CHANGE = "a red circle on a blue background", "a green square", "make the circle green"
STEPS = 2


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load()


@pytest.fixture(scope="module")
def real() -> Iterator[RunningServer]:
    engine = EngineOptions({"max_batch": 4})
    server = RunningServer(
        ServerOptions(engine, port=0, limits=Limits(queue=100, client_queue=100))
    ).wait_ready()
    yield server
    server.stop()


def opened(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def assert_same(found: Image.Image, expected: Image.Image) -> None:
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_requests_that_come_together_look_at_the_free_memory_once(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, free, looks = 5.0, 100, 0

    def memory() -> Memory:
        nonlocal looks
        looks += 1
        return Memory(1000, free, "machine")

    monkeypatch.setattr("blip3o_rt.serve.stages.memory", memory)
    monkeypatch.setattr("blip3o_rt.serve.stages.time.monotonic", lambda: now)
    stages, submit = Stages(pipeline, "model", memory_reserve=100), Submit("", CIRCLE)
    assert [stages.check(submit) > 0 for _ in range(3)] == [True] * 3
    assert looks == 1
    now, free = now + MEMORY_SECONDS, 99
    for _ in range(2):
        with pytest.raises(InsufficientMemoryError):
            stages.check(submit)
    assert looks == 2


def test_openai_s_client_draws_edits_and_streams_the_bits_of_single_calls(
    real: RunningServer, pipeline: Pipeline, tmp_path: Path
) -> None:
    expected = pipeline.generate(CIRCLE, n=2, seed=7, steps=STEPS)
    client = openai.OpenAI(api_key="none", base_url=real.url + "/v1", max_retries=0)
    model = client.models.list().data[0].id
    drawn = client.images.generate(model=model, prompt=CIRCLE, n=2, extra_body={"seed": 7, "steps": STEPS})
    assert drawn.data is not None
    for found, image in zip(drawn.data, expected, strict=True):
        assert_same(opened(found.b64_json), image)
        assert found.seed == image.info["seed"]  # type: ignore[attr-defined]
    save_png(expected[0], tmp_path / "file.png", expected[0].info)
    assert base64.b64decode(drawn.data[0].b64_json or "") == (tmp_path / "file.png").read_bytes()

    edited = pipeline.edit(CHANGE, expected[0], seed=7, steps=STEPS)
    with (tmp_path / "file.png").open("rb") as file:
        answer = client.images.edit(image=file, prompt=CHANGE, extra_body={"seed": 7, "steps": STEPS})
    assert answer.data is not None
    assert_same(opened(answer.data[0].b64_json), edited[0])

    stream = client.images.generate(
        prompt=CIRCLE, stream=True, partial_images=1, extra_body={"seed": 7, "steps": STEPS}
    )
    partial, completed = list(stream)
    assert isinstance(partial, openai.types.ImageGenPartialImageEvent)
    assert isinstance(completed, openai.types.ImageGenCompletedEvent)
    assert_same(opened(completed.b64_json), expected[0])
    with (tmp_path / "file.png").open("rb") as file:
        last = list(
            client.images.edit(image=file, prompt=CHANGE, stream=True, extra_body={"seed": 7, "steps": STEPS})
        )[-1]
    assert isinstance(last, openai.types.ImageEditCompletedEvent)
    assert_same(opened(last.b64_json), edited[0])

    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt=CIRCLE, size="256x256")
    assert (refused.value.param, refused.value.code) == ("size", "invalid_value")


def test_32_requests_that_share_steps_have_the_bits_of_each_alone(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other prompts, seeds, guidance and numbers of steps, text-to-image and edits."""
    shared: list[int] = []

    def counted(drawings: Sequence[Drawing]) -> None:
        shared.append(len(drawings))
        Stages.step_denoising(drawings)

    expected: dict[str, tuple[Submit, Image.Image]] = {}
    reference = pipeline.generate(CIRCLE, seed=5, steps=STEPS)[0]
    raw = RawImage(reference.width, reference.height, reference.tobytes(), {})
    for steps in range(1, 5):
        diffusion = {"steps": steps, "guidance": 1.0 + steps}
        prompts = [CIRCLE, SQUARE, "a small yellow triangle", "two blue squares on a green background"]
        prompts = [f"{prompt}{'.' * repeat}" for repeat in range(2) for prompt in prompts][: 8 - steps % 2]
        drawn = pipeline.generate(prompts, seed=steps, **diffusion)
        for index, (prompt, image) in enumerate(zip(prompts, drawn, strict=True)):
            id = f"{steps}-{index}"
            expected[id] = Submit(id, prompt, seeds=((0, steps),), diffusion=diffusion, draft_window=1), image
        if steps % 2:
            edited = pipeline.edit(CHANGE, reference, seed=steps, **diffusion)[0]
            submit = Submit(
                f"edit-{steps}", CHANGE, (raw,), ((0, steps),), diffusion=diffusion, draft_window=1
            )
            expected[submit.id] = submit, edited
    assert len(expected) == 32

    events: list[object] = []
    stages = Stages(pipeline, "embedded")
    monkeypatch.setattr(stages, "step_denoising", counted)
    monkeypatch.setattr(pipeline._renderer, "images_per_step", 8)
    monkeypatch.setattr(Stages, "joins_underway", True)
    scheduler = Scheduler(stages, events.append)
    with pipeline._isolation.turn():
        for id in sorted(expected, key=lambda id: id[::-1]):  # so that those of other numbers of steps meet
            scheduler.submit(expected[id][0])
        while scheduler.busy:
            scheduler.turn()
    found = {event.id: event.image for event in events if isinstance(event, Finished)}
    assert found.keys() == expected.keys()
    for id, (_, image) in expected.items():
        assert found[id].samples == image.tobytes(), id
    assert max(shared) >= 4
    assert sum(shared) == 8 * (1 + 2 + 3 + 4)


def test_the_async_pipeline_draws_the_same_whatever_else_runs(pipeline: Pipeline) -> None:
    expected = pipeline.generate([CIRCLE, SQUARE], n=3, seed=3, steps=STEPS)
    change = pipeline.edit(CHANGE, expected[0], seed=1, steps=STEPS)

    async def main() -> None:
        async with await AsyncPipeline.load(max_batch=3) as served:
            singles = [
                served.generate(prompt, seed=3 + number, steps=STEPS)
                for prompt in (CIRCLE, SQUARE)
                for number in range(3)
            ]
            edit = served.edit(CHANGE, expected[0], seed=1, steps=STEPS)
            gone = asyncio.ensure_future(served.generate(SQUARE, n=4, steps=90))
            *found, edited = await asyncio.gather(*singles, edit)
            gone.cancel()
            for images, image in zip(found, expected, strict=True):
                assert_same(images[0], image)
                assert images[0].info == image.info
            assert_same(edited[0], change[0])
            events = [event async for event in served.stream(CIRCLE, seed=3, steps=STEPS, partial_images=1)]
            assert sum(isinstance(event, Partial) for event in events) == 1
            assert isinstance(events[-1], Finished)
            with pytest.raises(RequestError) as refused:
                await served.generate("<S0>")
            assert refused.value.kind == "PromptError"

    asyncio.run(main())
