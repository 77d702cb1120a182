"""Which convolutions go to oneDNN, which has those of bfloat16 on some processors alone."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from blip3o_rt import ops

MODULE = importlib.import_module("blip3o_rt.ops.image")
needs_onednn = pytest.mark.skipif(
    MODULE.onednn_unavailable() is not None, reason="needs a PyTorch with oneDNN"
)


@pytest.fixture
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor without AVX-512BW."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    MODULE._no_bfloat16_of_onednn.cache_clear()
    ops.convolution_silu.choose_again()
    yield
    MODULE._no_bfloat16_of_onednn.cache_clear()
    ops.convolution_silu.choose_again()


@needs_onednn
@pytest.mark.usefixtures("no_bfloat16")
@pytest.mark.parametrize(("dtype", "implementation"), [(torch.float32, "onednn"), (torch.bfloat16, "torch")])
def test_without_a_bfloat16_convolution_of_onednn_pytorch_chooses(
    dtype: torch.dtype, implementation: str
) -> None:
    x, weight, bias = torch.ones(1, 3, 4, 2), torch.ones(5, 3, 3, 2), torch.ones(5)
    with ops.recording_usage() as used:
        found = ops.convolution_silu(x.to(dtype), weight.to(dtype), bias.to(dtype))
    assert used == {"convolution_silu": {implementation}}
    listed = {c.op: c.implementation for c in ops.choices("cpu", dtype) if c.chosen}
    assert listed["convolution_silu"] == implementation
    expected = ops.convolution_silu.reference(x.double(), weight.double(), bias.double())
    assert torch.allclose(found.double(), expected, rtol=2**-7)  # a rounding before the SiLU and one after
