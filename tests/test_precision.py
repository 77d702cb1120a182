"""What "auto" stands for on each device, and a model of bfloat16 weights computed in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip3o_rt import precision
from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.errors import DeviceError
from blip3o_rt.machine import Processor
from blip3o_rt.measure.baselines.measure import relative_l2
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.precision import BF16, FP32, MIXED, resolve_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_random_checkpoint(folder, preset("tiny"), seed=1)
    return folder


def fake_processor(monkeypatch: pytest.MonkeyPatch, *isa: str) -> None:
    monkeypatch.setattr(precision, "processor", lambda: Processor("fake", "x86_64", 2, 2, 2, isa))


@pytest.mark.parametrize("name", ["", "float32", "fp16", "BF16"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(DeviceError, match="accepted are auto, fp32, bf16 and mixed"):
        resolve_precision(name, CPU)


@pytest.mark.parametrize(
    ("isa", "stored_bf16", "stored_fp32"),
    [
        (("avx2",), MIXED, FP32),
        (("avx2", "avx_vnni"), MIXED, FP32),
        (("avx2", "avx512f"), MIXED, FP32),
        (("avx512f", "avx512_bf16"), BF16, BF16),
        (("avx512f", "amx_bf16"), BF16, BF16),
        (("neon", "arm_bf16"), BF16, BF16),
        (("neon",), MIXED, FP32),
        ((), MIXED, FP32),
    ],
)
def test_auto_on_processors(
    monkeypatch: pytest.MonkeyPatch,
    isa: tuple[str, ...],
    stored_bf16: precision.Precision,
    stored_fp32: precision.Precision,
) -> None:
    fake_processor(monkeypatch, *isa)
    assert resolve_precision("auto", CPU, torch.bfloat16) == stored_bf16
    assert resolve_precision("auto", CPU, torch.float32) == stored_fp32
    assert [resolve_precision(name, CPU) for name in ("fp32", "bf16", "mixed")] == [FP32, BF16, MIXED]


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve_precision("auto", GPU) == BF16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert resolve_precision("auto", GPU) == FP32
    with pytest.raises(DeviceError, match=r"compute capability 8\.0, choose fp32"):
        resolve_precision("bf16", GPU)
    with pytest.raises(DeviceError, match="only the CPU computes in"):
        resolve_precision("mixed", GPU)


def test_mixed_is_named_and_keeps_the_weights_mapped(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "converted", progress=False)
    pipeline = Pipeline.load(tmp_path / "converted", device="cpu", dtype="mixed")
    assert (pipeline.precision, pipeline.dtype) == ("mixed", torch.float32)
    images = pipeline.generate(PROMPT, steps=2)
    assert images.report.dtype == "mixed"
    assert "mixed (bf16 weights, float32 arithmetic)" in str(images.report)
    assert images[0].info["dtype"] == "mixed"


@pytest.mark.parametrize("dtype", ["bf16", "mixed"])
def test_mixed_is_nearer_to_float32_than_bfloat16(checkpoint: Path, dtype: str) -> None:
    """Sums of float32 in another order are within 1e-5; bfloat16 rounds activations to 2^-9."""
    exact = Pipeline.load(checkpoint, device="cpu", dtype="fp32")
    plan = exact.plan(PROMPT, seed=1)
    pipeline = Pipeline.load(checkpoint, device="cpu", dtype=dtype)
    replayed = pipeline.plan(PROMPT, token_ids=plan.token_ids)
    latents = [p.render(plan, seed=2, steps=4, output="latent") for p in (pipeline, exact)]
    errors = [relative_l2(replayed.hidden_states, plan.hidden_states), relative_l2(*latents)]
    assert all(error < 1e-5 for error in errors) == (dtype == "mixed")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "mixed"])
def test_the_bits_are_the_same_on_any_number_of_threads(checkpoint: Path, dtype: str) -> None:
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            pipeline = Pipeline.load(checkpoint, device="cpu", dtype=dtype)
            plan = pipeline.plan(PROMPT, seed=1)
            found.append((plan.hidden_states, pipeline.render(plan, seed=2, steps=2, output="latent")))
    finally:
        torch.set_num_threads(threads)
    for hidden, latent in found[1:]:
        assert torch.equal(hidden, found[0][0])
        assert torch.equal(latent, found[0][1])
