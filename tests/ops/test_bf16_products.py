"""What is chosen on processors of every kind, all of them faked: by the registry, doctor and a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from blip3o_rt import machine, ops, precision
from blip3o_rt.cli import doctor
from blip3o_rt.machine import Processor, describe
from blip3o_rt.ops import bf16_products, image, native, quantized

pytestmark = pytest.mark.skipif(native.cpu_module() is None, reason=str(native.cpu_unavailable()))
Fake = Callable[..., None]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """Fakes the processor, and of what seconds the products of ours and of torch's take."""

    def choose_again() -> None:
        for cached in (
            bf16_products._onednn_faster,
            image._no_bfloat16_of_onednn,
            quantized._no_int_mm,
        ):
            cached.cache_clear()
        bf16_products._measured.clear()
        for op in ops.all_ops().values():
            op.choose_again()

    def set_up(
        *isa: str, model: str = "Intel", kernels: str = "avx512", times: tuple[float, float] = (1e-3, 1e-3)
    ) -> None:
        processor = Processor(model, "any", 2, 2, 2, isa)
        has = kernels == "avx512" and "avx512_bf16" in isa
        module = SimpleNamespace(
            has_bf16_products=lambda: has,
            isa=lambda: kernels,
            isas=lambda: [kernels],
            num_threads=lambda: 2,
            linear=lambda x, weight, *_, out: out.copy_(x.float() @ weight.float().T),
        )
        for room in (bf16_products, precision, quantized):
            monkeypatch.setattr(room, "processor", lambda: processor)
        monkeypatch.setattr(machine, "describe", lambda: dataclasses.replace(describe(), processor=processor))
        monkeypatch.setattr(native, "cpu", lambda: module)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: "avx512f" in isa)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda: "amx_bf16" in isa)
        monkeypatch.setattr(bf16_products, "_times", lambda: times)
        choose_again()

    yield set_up
    monkeypatch.undo()
    choose_again()


def chosen(weight: torch.dtype = torch.bfloat16, activations: torch.dtype = torch.bfloat16) -> str:
    return next(
        c.implementation for c in ops.choices("cpu", activations, weight) if c.op == "linear" and c.chosen
    )


PROCESSORS = pytest.mark.parametrize(
    ("isa", "model", "kernels", "implementation", "auto"),
    [
        (("avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"), "Intel", "avx512", "torch", "bf16"),
        (("avx512f", "avx512_vnni", "avx512_bf16"), "AMD EPYC", "avx512", "cpu", "bf16"),
        (("avx512f", "avx512_vnni"), "Intel", "avx512", "torch", "mixed"),
        (("avx2", "avx_vnni"), "Intel", "avx2", "torch", "mixed"),
        (("avx2",), "AMD EPYC", "avx2", "torch", "mixed"),
        (("neon", "arm_bf16"), "Neoverse", "portable", "torch", "bf16"),
        (("neon",), "Cortex", "portable", "torch", "mixed"),
        ((), "unknown", "portable", "torch", "mixed"),
    ],
)


@PROCESSORS
def test_the_processor_decides(
    fake: Fake, isa: tuple[str, ...], model: str, kernels: str, implementation: str, auto: str
) -> None:
    fake(*isa, model=model, kernels=kernels)
    assert chosen() == implementation
    assert chosen(activations=torch.float32) == "cpu"  # a bfloat16 weight, widened, on every processor
    assert bf16_products.measured() == {}


@PROCESSORS
def test_doctor_and_a_report_say_the_choice(
    fake: Fake, isa: tuple[str, ...], model: str, kernels: str, implementation: str, auto: str
) -> None:
    fake(*isa, model=model, kernels=kernels)
    found = doctor.examine()
    says = {(choice.op, choice.dtype): choice for choice in found.ops}
    assert found.auto_dtype == auto
    assert says["linear", "bf16"].chosen == implementation
    assert says["linear", "mixed"].chosen == "cpu"
    convolution, integers = says["convolution_silu", "bf16"], says["integer_product", "bf16"]
    assert (convolution.chosen == "onednn") == ("avx512f" in isa)
    assert ("no VNNI" in integers.passed_over.get("int_mm", "")) == all("vnni" not in name for name in isa)
    text = doctor.as_text(found)
    assert model in text
    assert f"{kernels} (of {kernels}), 2 threads" in text
    with ops.recording_usage() as used:
        ops.linear(torch.ones(3, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16))
    assert used == {"linear": {implementation}}


def test_amx_that_the_system_denies_is_none(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("avx512_bf16", "amx_bf16", model="AMD")
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    assert chosen() == "cpu"


@pytest.mark.parametrize(
    ("times", "implementation"),
    [((1e-3, 2e-3), "cpu"), ((1.1e-3, 1e-3), "cpu"), ((2e-3, 1e-3), "torch")],
)
def test_an_unknown_processor_is_measured(
    fake: Fake, times: tuple[float, float], implementation: str
) -> None:
    fake("avx512_bf16", times=times)
    assert chosen() == implementation
    assert list(bf16_products.measured()) == ["linear bf16"]
    reasons = {c.implementation: c.reason for c in ops.choices("cpu", torch.bfloat16) if c.op == "linear"}
    assert ("measured: cpu 2.00 ms, torch 1.00 ms" in str(reasons["cpu"])) == (implementation == "torch")


def test_measuring_can_be_turned_off(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("avx512_bf16", times=(2e-3, 1e-3))
    monkeypatch.setenv("BLIP3O_MEASURE", "off")
    assert chosen() == "cpu"
    assert bf16_products.measured() == {}


@pytest.mark.parametrize("seconds", [0.001, 0.015, 1.0])
def test_a_measurement_begins_nothing_after_40_ms(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Each product takes so many seconds of a faked clock; each is timed once at least."""
    now, begun = [0.0], []

    def product(*_: object, **__: object) -> None:
        begun.append(now[0])
        now[0] += seconds

    monkeypatch.setattr(bf16_products.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(native, "cpu", lambda: SimpleNamespace(linear=product))
    monkeypatch.setattr(bf16_products.F, "linear", product)
    assert bf16_products._times() == pytest.approx((seconds, seconds))
    assert 2 <= len(begun) <= 2 * bf16_products.MOST_RUNS
    assert all(start <= bf16_products.SECONDS for start in begun[2:])
