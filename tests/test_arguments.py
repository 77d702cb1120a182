"""Every argument of every public function: right values work, any other ends in one line of ours."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.config import EditConfig
from blip3o_rt.errors import Blip3oError, GenerationError, ParameterError, one_line, shown
from blip3o_rt.images import decode_reference, load_reference
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.metadata import read_metadata
from blip3o_rt.params import DiffusionParams, SamplingParams
from blip3o_rt.pipeline import ImageRequest, Pipeline
from blip3o_rt.result import Plan, Report, Result


class Hostile:
    """An object of the caller's that fails at everything."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def fail(self, *_: object) -> Any:
        raise RuntimeError("two\nlines")

    __repr__ = __str__ = __len__ = __bool__ = __eq__ = __int__ = __float__ = __iter__ = fail  # type: ignore[assignment]
    __hash__ = object.__hash__


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)


TENSORS = [
    torch.zeros(3),
    torch.zeros(1, 3, 8, 8),
    torch.full((1, 3, 8, 8), torch.nan),
    torch.zeros(2, 3, dtype=torch.complex64),
    torch.eye(3).to_sparse(),
    torch.zeros(1, 3, 8, 8).to_sparse(),
    torch.zeros(1, 3, 8, 8, device="meta"),
    torch.zeros(4, dtype=torch.int64, device="meta"),
    torch.zeros(2, requires_grad=True),
    torch.zeros(0),
    quantized(),
]
OBJECTS: list[Any] = [
    *TENSORS,
    *(None, True, False, 0, 1, -1, 2**63, 10**400, 10**5000, -(10**400), 0.5, 1.0000001),
    *(float("nan"), float("inf"), 1e300, 1j, Decimal("0.5"), Fraction(1, 3), Fraction(10**400)),
    *("", " ", "\u200b", "\0", "a", "a\nb", "caf\udce9", "x" * 5000, "<im_start>", "cpu", "fast", "latent"),
    *(b"a", bytearray(b"a"), Path("no\nsuch"), Path("x" * 5000), "~no\nsuch"),
    *([], (), {}, set(), [None], [[]], [1, "a"], ["a", None], {"a": 1}, {"ar_weights": []}, {1: 2}),
    *({"step_cache": 10**5000}, {"guidance_interval": "nan:1"}, {"vae_tiles": np.zeros((30, 30))}),
    *(np.zeros((9, 9)), np.zeros((40, 40, 3)), np.array("a"), np.array([None]), np.float64(0.5), np.int64(3)),
    *(Image.new("RGB", (4, 4)), Image.new("F", (1, 1)), Exception("two\nlines"), object(), Hostile(), int),
    *(
        lambda: None,
        lambda *_: None,
        lambda a, b, c: None,
        print,
        range(3),
        torch.float32,
        torch.device("cpu"),
    ),
]
WRONG = st.one_of(
    st.sampled_from(OBJECTS),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=5),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=4),
    st.dictionaries(st.text(max_size=12), st.one_of(st.integers(), st.text(max_size=5)), max_size=2),
)


@pytest.fixture(scope="module", autouse=True)
def _in_a_folder_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Texts are names of cache folders too."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("here"))
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_random_checkpoint(folder, preset("tiny", EditConfig(use_und_image_vae=True)), seed=1)
    return folder


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> Pipeline:
    return Pipeline.load(checkpoint, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def plan(pipeline: Pipeline) -> Plan:
    return pipeline.plan("a")


def works_or_says_why(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(**arguments)
        except Blip3oError as error:
            text = str(error)
            assert text
            assert "\n" not in text
            assert len(text) < 1000
            text.encode("utf-8")


# A keyword of each call that is not wrong is a quick right one.
CALLS: dict[
    str, tuple[Callable[[Pipeline, Plan, Path], Callable[..., Any]], dict[str, Any], tuple[str, ...]]
] = {
    "load": (
        lambda pipeline, plan, checkpoint: Pipeline.load,
        {"path": None, "device": "cpu", "dtype": "fp32", "max_batch": 1, "max_prompt_tokens": 64},
        (
            *("path", "device", "dtype", "tier", "switches", "diffusion", "ta_tok", "variant", "cache_dir"),
            *("allow_base_weights", "max_batch", "max_prompt_tokens"),
        ),
    ),
    "plan": (
        lambda pipeline, plan, checkpoint: pipeline.plan,
        {"prompt": "a"},
        (
            *(
                "prompt",
                "image",
                "seed",
                "temperature",
                "top_k",
                "top_p",
                "image_tokens_only",
                "draft_window",
                "token_ids",
            ),
            *("progress", "callback"),
        ),
    ),
    "render": (
        lambda pipeline, plan, checkpoint: pipeline.render,
        {"steps": 1},
        ("plan", "seed", "steps", "guidance", "noise", "output", "progress", "callback"),
    ),
    "generate": (
        lambda pipeline, plan, checkpoint: pipeline.generate,
        {"prompt": "a", "steps": 1},
        (
            *("prompt", "n", "seed", "steps", "guidance", "temperature", "top_k", "top_p"),
            *("image_tokens_only", "progress", "callback", "on_image"),
        ),
    ),
    "edit": (
        lambda pipeline, plan, checkpoint: pipeline.edit,
        {"prompt": "a", "reference": Image.new("RGB", (8, 8)), "steps": 1},
        ("prompt", "reference", "n", "seed", "steps", "progress", "callback", "on_image"),
    ),
    "generate_each": (
        lambda pipeline, plan, checkpoint: pipeline.generate_each,
        {"requests": [ImageRequest("a")], "steps": 1},
        ("requests", "steps", "guidance", "temperature", "top_k", "image_tokens_only", "on_result"),
    ),
    "a request": (
        lambda pipeline, plan, checkpoint: (
            lambda **fields: pipeline.generate_each([ImageRequest(**fields)], steps=1)
        ),
        {"prompt": "a"},
        ("prompt", "seed", "reference"),
    ),
    "rollout": (
        lambda pipeline, plan, checkpoint: pipeline.rollout,
        {"prompts": "a", "steps": 1},
        (
            *("prompts", "n", "seed", "references", "steps", "guidance", "top_p", "images"),
            *("hidden_states", "progress", "callback"),
        ),
    ),
    "update_weights": (
        lambda pipeline, plan, checkpoint: pipeline.update_weights,
        {},
        ("weights",),
    ),
    "convert": (
        lambda pipeline, plan, checkpoint: (
            lambda **arguments: convert(**{"source": checkpoint, "destination": "new", **arguments})
        ),
        {"progress": False, "force": True},
        ("source", "destination", "dtype", "switches", "lora", "lora_scale", "progress", "force"),
    ),
    "a plan": (
        lambda pipeline, plan, checkpoint: (
            lambda **fields: pipeline.render(dataclasses.replace(plan, **fields), steps=1)
        ),
        {},
        tuple(field.name for field in dataclasses.fields(Plan)),
    ),
    "sampling": (
        lambda pipeline, plan, checkpoint: SamplingParams,
        {},
        tuple(field.name for field in dataclasses.fields(SamplingParams)),
    ),
    "diffusion": (lambda pipeline, plan, checkpoint: DiffusionParams, {}, ("steps", "guidance")),
    "stage": (
        lambda pipeline, plan, checkpoint: Report((), {}, 0, "cpu", "fp32", "exact").stage,
        {},
        ("name",),
    ),
    "decode_reference": (
        lambda pipeline, plan, checkpoint: decode_reference,
        {"data": b"", "name": "x"},
        ("data", "name", "max_pixels"),
    ),
    "save": (
        lambda pipeline, plan, checkpoint: Result([], [], cast(Any, None)).save,
        {},
        ("directory",),
    ),
    "load_reference": (lambda pipeline, plan, checkpoint: load_reference, {}, ("image",)),
    "read_metadata": (lambda pipeline, plan, checkpoint: read_metadata, {}, ("path",)),
}


def few(name: str, value: Any) -> Any:
    """A value that is right for a count may make no more than a little work."""
    counts = name in ("steps", "n") and isinstance(value, int | np.integer) and not isinstance(value, bool)
    return min(value, 3) if counts and 0 < value < 1001 else value


@pytest.mark.exhaustive
@pytest.mark.parametrize("call", CALLS)
def test_every_object_in_the_place_of_every_argument(
    pipeline: Pipeline, plan: Plan, checkpoint: Path, call: str
) -> None:
    bind, right, names = CALLS[call]
    if call in ("load", "render"):
        right = {**right, **({"path": checkpoint} if call == "load" else {"plan": plan})}
    for name in names:
        for value in OBJECTS:
            works_or_says_why(bind(pipeline, plan, checkpoint), {**right, name: few(name, value)})


@pytest.mark.parametrize("examples", [20, pytest.param(100, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("call", CALLS)
def test_any_wrong_value_ends_in_one_line(
    pipeline: Pipeline, plan: Plan, checkpoint: Path, call: str, examples: int
) -> None:
    bind, right, names = CALLS[call]
    if call == "load":
        right = {**right, "path": checkpoint}
    if call == "render":
        right = {**right, "plan": plan}

    @seed(0)
    @settings(
        max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
    )
    @given(name=st.sampled_from(names), value=WRONG)
    def check(name: str, value: Any) -> None:
        works_or_says_why(bind(pipeline, plan, checkpoint), {**right, name: few(name, value)})

    check()


def test_what_is_wrong_is_refused_before_any_work(pipeline: Pipeline, plan: Plan) -> None:
    def never(*_: object) -> None:
        pytest.fail("work began")

    for arguments, message in (
        ({"callback": 5}, r"callback is 5: accepted is a function of \(progress\), or None"),
        ({"callback": lambda: None}, r"callback cannot be called \(too many positional arguments\)"),
        ({"on_image": print, "callback": never, "progress": 1}, "progress is 1: accepted is True or False"),
        ({"on_image": lambda image: None, "callback": never}, "on_image cannot be called"),
        ({"top_p": 1.0000001, "callback": never}, "top_p is 1.0000001: accepted"),
        ({"seed": 10**5000, "callback": never}, "seed is a int: accepted"),
    ):
        with pytest.raises(ParameterError, match=message):
            pipeline.generate("a", **arguments)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="prompt 2 of 2: the prompt is empty"):
        pipeline.generate(["a", "\u200b\0"], callback=never)
    for noise in (torch.zeros(pipeline._renderer.latent_shape, device="meta"), torch.eye(3).to_sparse()):
        with pytest.raises(
            ParameterError, match=r"noise is a (meta|sparse_coo) tensor: accepted is a dense one"
        ):
            pipeline.render(plan, noise=noise, callback=never)
    with pytest.raises(ParameterError, match="not finite in float32"):
        pipeline.render(plan, noise=torch.full(pipeline._renderer.latent_shape, 1e300, dtype=torch.float64))
    with pytest.raises(ParameterError, match=r"plan is 'a plan': accepted is what Pipeline\.plan returns"):
        pipeline.render("a plan")  # type: ignore[arg-type]


def test_noise_that_requires_grad_is_noise(pipeline: Pipeline, plan: Plan) -> None:
    noise = torch.randn(pipeline._renderer.latent_shape, generator=torch.Generator().manual_seed(0))
    wanted = pipeline.render(plan, noise=noise, steps=2, output="tensor")
    found = pipeline.render(plan, noise=torch.nn.Parameter(noise), steps=2, output="tensor")
    assert torch.equal(found, wanted)  # type: ignore[arg-type]
    assert not found.requires_grad  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "line"), [("a\nb", "a\\nb"), ("caf\udce9", "caf\\udce9"), ("Grüße, 世界", "Grüße, 世界")]
)
def test_messages_are_one_line_that_can_be_printed(text: str, line: str) -> None:
    assert one_line(text) == line
    assert str(Blip3oError(text)) == line


def test_values_are_shown_shortly() -> None:
    assert shown(np.zeros((30, 30))) == "a ndarray of shape [30, 30]"
    assert shown(torch.zeros(30, 30)) == "a Tensor of shape [30, 30]"
    assert shown("x" * 500).startswith("'xxx")
    assert len(shown("x" * 500)) < 100
    assert shown(10**5000) == "a int"
    assert shown(Hostile()) == "a Hostile"
    assert shown(5) == "5"


@pytest.mark.parametrize("where", ["dit", "vae"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_image_that_is_not_finite_fails_and_no_other(
    checkpoint: Path, where: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three images meets a number that overflowed, in the transformer or the decoder's end."""
    pipeline = Pipeline.load(checkpoint, device="cpu", dtype="fp32")
    wanted = pipeline.generate("a", n=3, steps=2)
    stage = pipeline._renderer._dit if where == "dit" else pipeline._renderer._vae
    name = "_prediction" if where == "dit" else "_run"
    right, calls = getattr(stage, name), []

    def damaged(*arguments: Any) -> Any:
        result = right(*arguments)
        calls.append(result)
        if len(calls) == (3 if where == "dit" else 2):  # two steps, or one decoding, for each image
            result[..., 0, 0] = value
        return result

    monkeypatch.setattr(stage, name, damaged)
    what = "diffusion transformer's latent" if where == "dit" else "autoencoder's image"
    with pytest.raises(GenerationError, match=f"1 of 3 images failed: the {what} is not finite") as caught:
        pipeline.generate("a", n=3, steps=2)
    first, second, third = caught.value.images
    assert second is None
    for found, image in ((first, wanted[0]), (third, wanted[2])):
        assert found is not None
        assert found.tobytes() == image.tobytes()
