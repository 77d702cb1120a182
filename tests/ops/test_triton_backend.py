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

from blip3o_rt import ops
from blip3o_rt.errors import OpError
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


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "add_pixel_shuffle": ((ones(2, 4, 6, 5), ones(2, 2, 3, 10)), {"bias": ones(5)}),
    "add_pixel_unshuffle": ((ones(2, 2, 3, 10), ones(2, 4, 6, 5)), {"bias": ones(10)}),
    "channel_rms_norm": ((ones(2, 5), ones(5), ones(5), 1e-5), {"residual": ones(2, 5), "out": ones(2, 5)}),
    "convolution_silu": ((ones(1, 2, 3, 4), ones(5, 3, 3, 4), ones(5)), {}),
    "cross_attention": (
        (ones(7, 6), ones(2, 4, 3), ones(2, 4, 3), ones(6), 1e-5),
        {"log_multiplicity": ones(4), "out": ones(7, 6)},
    ),
    "depthwise_glu": ((ones(1, 2, 3, 8), ones(8), ones(8, 1, 3, 3), ones(8)), {"out": ones(1, 2, 3, 4)}),
    "gated_add": ((ones(2, 5), ones(2, 5), ones(5)), {}),
    "guided_euler_step": ((ones(1, 2, 3, 4), ones(2, 2, 3, 4), ones(), ones()), {"out": ones(1, 2, 3, 4)}),
    "layer_norm_modulate": ((ones(2, 5), ones(5), ones(5), 1e-6), {"out": ones(2, 5)}),
    "quantize_rows": ((ones(2, 5), ones(2)), {"dtype": torch.float8_e4m3fn, "out": ones(2, 5)}),
    "relu_linear_attention": ((ones(1, 7, 18), ones(6), ones(6), 2, 1e-5), {"out": ones(1, 7, 6)}),
}


def test_every_op_with_a_triton_kernel_is_called_here() -> None:
    assert set(CALLS) == {n for n, op in ops.all_ops().items() if "triton" in op.implementation_names}


@pytest.mark.parametrize("op_name", CALLS)
def test_an_operand_of_another_shape_is_refused_by_name(op_name: str) -> None:
    """Every tensor but the first in turn: a kernel would read or write beyond it."""
    arguments, options = CALLS[op_name]
    supports = ops.all_ops()[op_name].named("triton").supports
    assert supports(*arguments, **options) is None
    tensors = [i for i, argument in enumerate(arguments) if i and isinstance(argument, Tensor)]
    wrong = [(*arguments[:i], arguments[i].unsqueeze(0), *arguments[i + 1 :]) for i in tensors]
    if op_name == "add_pixel_shuffle":  # x gives the shape that its result must have
        wrong = [(arguments[0][:, :-1], arguments[1]), (arguments[0], arguments[1][:1])]
    if op_name == "convolution_silu":  # weight gives the number of channels that bias must have
        wrong = [(arguments[0], arguments[1][..., :-1], arguments[2]), (*arguments[:2], arguments[2][:-1])]
    for changed in wrong:
        with pytest.raises(OpError, match=rf"op {op_name}: \w+ is .*; accepted is "):
            supports(*changed, **options)
    for name, tensor in options.items():
        if not isinstance(tensor, Tensor):
            continue
        with pytest.raises(OpError, match=rf"op {op_name}: {name} is .*; accepted is "):
            supports(*arguments, **{**options, name: tensor[:-1]})


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
