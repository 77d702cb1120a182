"""The transformer with e4m3 weights: those that these stand for, on activations rounded to 8 bits.

Bound of a product: a number is rounded to 4 significant bits, so it is off by 1/16 of itself at most and by
some 2.6% of it as a root mean square; a weight and an activation together by 3.7%: 5%. Bound of a prediction:
the products of three blocks, 8%, where a wrong scale or row is off by 50% and more.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.dit.layout import layout, quantized
from blip3o_rt.dit.model import DiT
from blip3o_rt.measure.bench.baseline_modules import dequantized
from blip3o_rt.measure.cases import cases_of
from blip3o_rt.measure.validate.case import random
from blip3o_rt.ops.dtypes import E4M3
from blip3o_rt.ops.layer import Linear
from blip3o_rt.ops.quantized import scaled_mm, scaled_mm_arguments
from blip3o_rt.weights import SCALE, in_8_bits, row_scales, row_values
from tests.dit.oracle import oracle, relative_l2, runtime_weights, small_config
from tests.dit.test_model import random_latent, random_tokens, run

PRODUCT_BOUND, PREDICTION_BOUND = 0.05, 0.08


def test_the_layout_is_that_of_the_tensors() -> None:
    config = small_config()
    weights = quantized(runtime_weights(config, oracle(config).state_dict(), torch.float32).items(), E4M3)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    assert found == {
        spec.name: (spec.shape, spec.dtype or torch.float32) for spec in layout(config, values=E4M3)
    }
    assert sum(name.endswith(SCALE) for name in found) == 6 * config.num_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1,), (7,), (2, 9)])
def test_product(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = random(1, *rows, 224, dtype=dtype), random(2, 48, 224), random(3, 48, dtype=dtype)
    for of_row in (1e-3, 1.0, 30.0):  # a row's error is its own, however large the others
        x.view(-1, 224)[0] *= of_row
        tensors = {**in_8_bits("to_q.weight", weight, E4M3), "to_q.bias": bias}
        found = Linear.of(tensors, "to_q")(x)
        assert (found.shape, found.dtype) == ((*rows, 48), dtype)
        exact = x.double() @ weight.double().T
        errors = (found.double() - exact - bias.double()).norm(dim=-1) / (
            exact.norm(dim=-1) + bias.norm() / 5
        )
        assert 0 < float(errors.max()) < PRODUCT_BOUND


@pytest.mark.parametrize("counts", [(7,), (7, 3)], ids=["text", "edit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prediction(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    config = small_config(num_layers=3, attention_bias=True)
    weights = runtime_weights(config, oracle(config).state_dict(), dtype)
    fp8 = quantized(weights.items(), E4M3)
    latent, tokens = random_latent(config, 5, 6), random_tokens(config, 9, counts)
    exact = run(DiT(config, weights), latent, 600.0, tokens)
    with ops.recording_usage() as used:
        found = run(DiT(config, fp8), latent, 600.0, tokens)
    assert {"quantize_rows", "linear_fp8"} <= used.keys()
    meant = run(DiT(config, dequantized(fp8)), latent, 600.0, tokens)
    assert relative_l2(meant, exact) < PREDICTION_BOUND
    assert 0 < relative_l2(found, exact) < PREDICTION_BOUND


def _takes(*arguments: Tensor, **options: Tensor) -> str | None:
    return ops.linear_fp8.named("scaled_mm").refusal(ops.linear_fp8.bind(*arguments, **options))


def test_a_library_takes_the_product_as_it_is_asked_for() -> None:
    """The call alone, on no device: torch checks there what its CUDA kernels demand of shapes and strides."""
    for case in cases_of("linear_fp8"):
        supported = _takes(*case.arguments, **case.options) is None
        arguments = [tensor.to("meta") for tensor in case.arguments]
        out, bias = case.options["out"], case.options.get("bias")
        if supported:
            asked = scaled_mm_arguments(*arguments, None if bias is None else bias.to("meta"))
            assert torch._scaled_mm(**asked).shape == out.shape
        else:
            assert {size % 16 for size in case.arguments[2].shape} != {0}


def takes_scaled_rows() -> bool:
    """Whether torch computes such a product on the CPU too."""
    x = torch.zeros(16, 16).to(E4M3)
    scale = torch.ones(16)
    try:
        scaled_mm(x, scale, x, scale, out=torch.empty(16, 16, dtype=torch.bfloat16))
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not takes_scaled_rows(), reason="this PyTorch multiplies scaled rows on a GPU alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_librarys_product_is_the_definition(dtype: torch.dtype) -> None:
    x, weight, bias = random(1, 33, 64), random(2, 48, 64), random(3, 48, dtype=dtype)
    arguments = [f(matrix, E4M3) for matrix in (x, weight) for f in (row_values, row_scales)]
    found, exact = torch.empty(33, 48, dtype=dtype), torch.empty(33, 48, dtype=torch.float64)
    scaled_mm(*arguments, bias=bias, out=found)
    ops.linear_fp8.reference(*arguments, bias=bias, out=exact)
    assert relative_l2(found, exact) < 2**-8  # rounded to bfloat16, with a bias twice on the CPU


def test_sides_that_the_library_does_not_take_are_refused() -> None:
    x, scale, out = torch.zeros(3, 16).to(E4M3), torch.ones(3), torch.zeros(3, 32)
    reason = _takes(x, scale, torch.zeros(31, 16).to(E4M3), torch.ones(31), out=out[:, :31])
    assert "multiples of 16" in (reason or "")
