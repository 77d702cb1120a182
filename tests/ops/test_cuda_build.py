"""Whether a build of _cuda has code for the GPUs of a machine, told from their compute capabilities."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from blip3o_rt.ops import native

DEFAULT = "80-real 89-real 90a-real 90-virtual"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    native.cuda_unavailable.cache_clear()
    yield
    native.cuda_unavailable.cache_clear()


def reason(monkeypatch: pytest.MonkeyPatch, architectures: str, *capabilities: tuple[int, int]) -> str | None:
    devices = [{"name": "GPU", "compute_capability": capability} for capability in capabilities]
    info = {"devices": devices, "reason": "CUDA finds none"}
    module = SimpleNamespace(device_info=lambda: info, architectures=architectures)
    monkeypatch.setattr(native, "cuda_module", lambda: module)
    return native.cuda_unavailable()


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (DEFAULT, (7, 5), False),
        (DEFAULT, (8, 0), True),
        (DEFAULT, (8, 6), True),
        (DEFAULT, (8, 9), True),
        (DEFAULT, (9, 0), True),
        (DEFAULT, (12, 0), True),
        ("80-real", (9, 0), False),
        ("86", (8, 0), False),
        ("86", (9, 0), True),
        ("90a-real", (9, 0), True),
        ("90a", (10, 0), False),
        ("100f", (10, 3), True),
        ("native", (7, 5), True),
    ],
)
def test_code_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, architectures: str, capability: tuple[int, int], runs: bool
) -> None:
    assert (reason(monkeypatch, architectures, capability) is None) == runs


def test_reason_names_gpu_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason(monkeypatch, "80-real", (8, 0), (7, 5)) == (
        "no code for GPU (compute capability 7.5) in this build, which is for 80-real; run pip install again "
        "with BLIP3O_CUDA_ARCHS='75;80', or hide that GPU with CUDA_VISIBLE_DEVICES"
    )


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason(monkeypatch, DEFAULT) == (
        "no usable GPU (CUDA finds none); needs an NVIDIA GPU and its driver"
    )
