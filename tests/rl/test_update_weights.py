"""Weights updated in place, against a fresh load of the same weights: equal tokens, pixels and checksums."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.errors import Blip3oError, CheckpointError, ParameterError
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.rl.update import overwrite
from tests.captured_graph import CapturedGraphs

PROMPT = "a red circle on a blue background"
STEPS = 2
FILE = "model.safetensors"


def published() -> dict[str, Tensor]:
    return load_file(embedded_checkpoint() / FILE)


def moved(tensors: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """The tensors a little away from where they were: a training step of all parts."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (t.float() * (1 + 0.1 * torch.randn(t.shape, generator=generator))).to(t.dtype)
        for name, t in sorted(tensors.items())
    }


@pytest.fixture(scope="module")
def new() -> dict[str, Tensor]:
    return moved(published())


@pytest.fixture(scope="module")
def folder(new: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the new weights."""
    return written(new, tmp_path_factory.mktemp("update") / "new")


def written(tensors: dict[str, Tensor], folder: Path) -> Path:
    shutil.copytree(embedded_checkpoint(), folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    save_file(tensors, folder / FILE)
    return folder


def drawn(pipeline: Pipeline, reference: Image.Image | None = None) -> list[np.ndarray]:
    images = [*pipeline.generate(PROMPT, seed=3, steps=STEPS)]
    if reference is not None:
        images += pipeline.edit("make the circle green", reference, seed=3, steps=STEPS)
    return [np.asarray(image) for image in images]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


REFERENCE = Image.fromarray(
    (np.add.outer(np.arange(64), np.arange(64 * 3)) % 256).reshape(64, 64, 3).astype(np.uint8)
)
INT8: dict[str, Any] = {
    "dtype": "bf16",
    "tier": "fast",
    "switches": {"ar_weights": "int8", "dit_weights": "int8"},
}
KINDS = [
    pytest.param({"dtype": "fp32"}, id="fp32", marks=pytest.mark.exhaustive),
    pytest.param({"dtype": "bf16"}, id="bf16", marks=pytest.mark.exhaustive),
    pytest.param({"dtype": "mixed"}, id="mixed"),
    pytest.param(INT8, id="int8"),
]


@pytest.mark.parametrize("options", KINDS)
def test_it_is_a_fresh_load(options: dict[str, object], new: dict[str, Tensor], folder: Path) -> None:
    """Packed, hoisted and quantized forms included, and back again."""
    fresh = Pipeline.load(folder, device="cpu", **options)
    pipeline = Pipeline.load(device="cpu", **options)
    before, old = drawn(pipeline, REFERENCE), pipeline.weights_checksum()
    addresses = {t.data_ptr() for part in pipeline._weights.weights.values() for t in part.values()}

    assert pipeline.update_weights(new) == pipeline.weights_version == 1
    assert same(drawn(pipeline, REFERENCE), drawn(fresh, REFERENCE))
    assert not same(drawn(pipeline), before[:1])
    assert pipeline.weights_checksum() == fresh.weights_checksum() != old
    assert addresses == {t.data_ptr() for part in pipeline._weights.weights.values() for t in part.values()}

    assert pipeline.update_weights(published().items()) == 2
    assert same(drawn(pipeline, REFERENCE), before)
    assert pipeline.weights_checksum() == old


def test_a_folder_of_either_layout(folder: Path, tmp_path: Path) -> None:
    convert(embedded_checkpoint(), tmp_path / "old", dtype="fp32", progress=False)
    convert(folder, tmp_path / "new", dtype="fp32", progress=False)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    pipeline, fresh = (Pipeline.load(tmp_path / n, device="cpu", dtype="fp32") for n in ("old", "new"))
    expected, before = drawn(fresh), drawn(pipeline)
    pipeline.update_weights(folder)
    assert same(drawn(pipeline), expected)
    pipeline.update_weights(str(tmp_path / "old"))
    assert same(drawn(pipeline), before)
    pipeline.update_weights(tmp_path / "new")
    assert same(drawn(pipeline), expected)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}


def test_some_of_what_is_packed(new: dict[str, Tensor], tmp_path: Path) -> None:
    """The rows of q of one layer, and what stands alone; the others stay."""
    names = ("model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "model.sana.scale_shift_table")
    some = {name: new[name] for name in names}
    for options in ({"dtype": "fp32"}, INT8):
        pipeline = Pipeline.load(device="cpu", **options)
        pipeline.update_weights(some)
        path = tmp_path / str(options["dtype"])
        fresh = Pipeline.load(written({**published(), **some}, path), device="cpu", **options)
        assert pipeline.weights_checksum() == fresh.weights_checksum()
        assert same(drawn(pipeline), drawn(fresh))


def test_a_trainers_state_dict(new: dict[str, Tensor]) -> None:
    """Parameters that require grad, of another dtype and memory layout."""
    pipeline, other = (Pipeline.load(device="cpu", dtype="fp32") for _ in range(2))
    name = "model.layers.0.mlp.down_proj.weight"
    parameter = torch.nn.Parameter(new[name].double().t().contiguous().t())
    pipeline.update_weights([(name, parameter), ("model.rotary_emb.inv_freq", torch.ones(3))])
    other.update_weights({name: new[name]})
    assert pipeline.weights_checksum() == other.weights_checksum()


def test_what_is_captured_stays_valid(tmp_path: Path) -> None:
    """Replays of what was captured before the update draw with the new weights."""
    for seed, name in ((1, "old"), (2, "new")):
        write_random_checkpoint(tmp_path / name, preset("tiny"), seed=seed)
    checkpoints = [load_checkpoint(tmp_path / n, dtype=torch.float32, device="cpu") for n in ("old", "new")]
    captured = Pipeline(checkpoints[0], max_batch=2, runner=GraphRunner(CapturedGraphs()))
    captured.warm_up()
    fresh = Pipeline(checkpoints[1], max_batch=2)
    captured.update_weights(tmp_path / "new")
    assert same(drawn(captured), drawn(fresh))
    assert not captured.generate(PROMPT, steps=STEPS).report.not_captured


Q = "model.layers.0.self_attn.q_proj.weight"


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[1, 2] = torch.nan
    return tensor


@pytest.fixture(scope="module")
def unchanged() -> Pipeline:
    """A pipeline whose weights are never replaced."""
    return Pipeline.load(device="cpu", dtype="fp32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"model.layers.0.self_attn.q.weight": t[Q]}, "none of this model"),
        (lambda t: {"model.layers.99.self_attn.q_proj.weight": t[Q]}, "none of this model"),
        (lambda t: {Q: t[Q][:-1]}, "has shape"),
        (lambda t: {Q: t[Q].t().contiguous()[None]}, "has shape"),
        (lambda t: {Q: with_nan(t[Q])}, "NaN"),
        (lambda t: {Q: t[Q].float() * torch.inf}, "NaN or infinity"),
        (lambda t: {Q: t[Q].double() * 1e300}, "beyond the range"),
        (lambda t: {Q: torch.zeros_like(t[Q])}, "zero"),
        (lambda t: {Q: t[Q].to(torch.int8)}, "floating point"),
        (lambda t: {Q: t[Q].tolist()}, "published names"),
        (lambda t: {3: t[Q]}, "published names"),
        (lambda t: {Q: t[Q].to_sparse()}, "sparse"),
    ],
)
def test_what_is_wrong_is_refused_and_nothing_changes(
    change: Callable[[dict[str, Tensor]], dict],
    message: str,
    new: dict[str, Tensor],
    unchanged: Pipeline,
) -> None:
    pipeline, before = unchanged, unchanged.weights_checksum()
    with pytest.raises(Blip3oError, match=message):
        pipeline.update_weights({**new, **change(new)})
    with pytest.raises(Blip3oError, match=message):
        pipeline.update_weights({"model.norm.weight": new["model.norm.weight"], **change(new)})
    assert pipeline.weights_checksum() == before
    assert pipeline.weights_version == 0


def test_what_is_no_weights_at_all_is_refused(tmp_path: Path, new: dict[str, Tensor]) -> None:
    pipeline = Pipeline.load(device="cpu", dtype="fp32")
    before = pipeline.weights_checksum()
    for wrong in (None, 3, {}, [], "nowhere", [new[Q]]):
        with pytest.raises(Blip3oError):
            pipeline.update_weights(wrong)
    write_random_checkpoint(tmp_path / "other", preset("tiny"), seed=1)
    with pytest.raises(CheckpointError, match="another model"):
        pipeline.update_weights(tmp_path / "other")
    codebook = [name for name in new if "bottleneck.regularizer" in name]
    with pytest.raises(CheckpointError, match="together with"):
        pipeline.update_weights({codebook[0]: new[codebook[0]]})
    assert pipeline.weights_checksum() == before


def test_from_within_a_request_it_is_refused(new: dict[str, Tensor]) -> None:
    pipeline = Pipeline.load(device="cpu", dtype="fp32")
    expected, seen = drawn(pipeline), []

    def callback(progress: object) -> None:
        if not seen:
            with pytest.raises(ParameterError, match="within a request") as error:
                pipeline.update_weights(new)
            seen.append(error)

    image = pipeline.generate(PROMPT, seed=3, steps=STEPS, callback=callback)[0]
    assert seen
    assert np.array_equal(np.asarray(image), expected[0])
    assert pipeline.weights_version == 0


def test_under_load_every_image_is_of_one_version(new: dict[str, Tensor], folder: Path) -> None:
    """Threads draw while the weights change to and fro: what they get is of a fresh load of old or new."""
    pipeline, old = Pipeline.load(device="cpu", dtype="fp32"), published()
    versions = {0: pipeline.rollout(PROMPT, seed=3, steps=STEPS)[0]}
    pipeline.update_weights(new)
    versions[1] = Pipeline.load(folder, device="cpu", dtype="fp32").rollout(PROMPT, seed=3, steps=STEPS)[0]
    wrong: list[int] = []
    done = threading.Event()

    def draw() -> None:
        while not done.is_set():
            (found,) = pipeline.rollout(PROMPT, seed=3, steps=STEPS)
            expected = versions[found.weights_version % 2]
            if not (
                torch.equal(found.token_ids, expected.token_ids)
                and torch.equal(found.logprobs, expected.logprobs)
                and torch.equal(found.image, expected.image)
            ):
                wrong.append(found.weights_version)

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        pipeline.update_weights(old)
        pipeline.update_weights(new)
    done.set()
    for thread in threads:
        thread.join()
    assert pipeline.weights_version == 7
    assert not wrong
    assert not torch.equal(versions[0].logprobs, versions[1].logprobs)


def test_an_image_says_which_weights_drew_it(new: dict[str, Tensor]) -> None:
    pipeline = Pipeline.load(device="cpu", dtype="fp32")
    before = pipeline.generate(PROMPT, steps=STEPS)[0].info["checkpoint"]
    kept = dict(before)
    pipeline.update_weights(new)
    after = pipeline.generate(PROMPT, steps=STEPS)[0].info["checkpoint"]
    assert after["sha256"] != before["sha256"]
    assert before == kept


def test_an_interrupted_copy_is_finished() -> None:
    class Interrupted(torch.Tensor):
        calls = 0

        def copy_(self, *arguments: object) -> Tensor:
            Interrupted.calls += 1
            if Interrupted.calls == 1:
                raise KeyboardInterrupt
            return super().copy_(*arguments)

    targets = [torch.zeros(3), torch.zeros(3).as_subclass(Interrupted), torch.zeros(3)]
    with pytest.raises(KeyboardInterrupt):
        overwrite([(target, torch.ones(3)) for target in targets])
    assert all(bool((target == 1).all()) for target in targets)


def test_the_checksum_sees_any_change() -> None:
    pipeline = Pipeline.load(device="cpu", dtype="bf16")
    seen = {pipeline.weights_checksum()}
    weight = pipeline._weights.weights["ar"]["layers.0.mlp.down_proj.weight"].view(-1)
    for place in (0, 1, -1):
        weight[place] = weight[place] * 1.5 + 1
        seen.add(pipeline.weights_checksum())
    weight[[0, 1]] = weight[[1, 0]]
    seen.add(pipeline.weights_checksum())
    assert len(seen) == 5
