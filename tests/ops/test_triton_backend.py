"""The Triton kernels' side of a call: where they are launched, what they refuse, what they need."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_rt.ops import triton_backend


def test_kernels_run_on_the_device_of_the_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which need not be where the tensors are."""
    current: list[Tensor | None] = [None]
    launched: list[tuple[Any, ...]] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current[0] = tensor
        yield
        current[0] = None

    def gated_add(*arguments: Any) -> None:
        launched.append((current[0], *arguments))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(
        triton_backend.importlib, "import_module", lambda name: SimpleNamespace(gated_add=gated_add)
    )
    residual, x, gate = torch.zeros(2, 3), torch.ones(2, 3), torch.ones(3)
    triton_backend.kernel("gated_add")(residual, x, gate)
    ((device, *arguments),) = launched
    assert device is residual
    assert all(given is taken for given, taken in zip((residual, x, gate), arguments, strict=True))


def test_triton_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {"gcc", "my-cc"}
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in programs else None)
    monkeypatch.delenv("CC", raising=False)
    assert triton_backend._no_compiler() is None
    programs.remove("gcc")
    assert "install gcc or clang" in (triton_backend._no_compiler() or "")
    monkeypatch.setenv("CC", "my-cc")
    assert triton_backend._no_compiler() is None
    monkeypatch.setenv("CC", "nowhere")
    assert "CC is 'nowhere', no program; set it to one or unset it" in (triton_backend._no_compiler() or "")
