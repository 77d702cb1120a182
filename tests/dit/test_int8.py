"""The transformer with int8 weights: the weights that these stand for, on activations rounded to 8 bits.

Bound of a product: a weight and an activation are each off by half a step of their row at most, which for
normal numbers, whose largest is 2.5 to 4 of their standard deviations, makes 0.3 to 0.9% each: 1.5%. Bound of
a prediction: the products of three blocks, 2%, where a wrong scale or row is off by 50% and more.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blip3o_rt import ops
from blip3o_rt.dit.layout import layout, quantized
from blip3o_rt.dit.model import DiT
from blip3o_rt.measure.bench.baseline_modules import dequantized
from blip3o_rt.measure.validate.case import random
from blip3o_rt.ops import layer, native
from blip3o_rt.ops import quantized as quantized_ops
from blip3o_rt.ops.layer import Linear
from blip3o_rt.weights import SCALE, in_8_bits
from tests.dit.oracle import oracle, relative_l2, runtime_weights, small_config
from tests.dit.test_model import random_latent, random_tokens, run

PRODUCT_BOUND, PREDICTION_BOUND = 0.015, 0.02


def test_the_layout_is_that_of_the_tensors() -> None:
    config = small_config()
    weights = quantized(runtime_weights(config, oracle(config).state_dict(), torch.float32).items())
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    assert found == {
        spec.name: (spec.shape, spec.dtype or torch.float32) for spec in layout(config, values=torch.int8)
    }
    assert sum(name.endswith(SCALE) for name in found) == 6 * config.num_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1,), (7,), (2, 9)])
def test_product(rows: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "BLOCK_ROWS", 16)  # several blocks, the last one smaller
    x, weight, bias = random(1, *rows, 224, dtype=dtype), random(2, 41, 224), random(3, 41, dtype=dtype)
    for of_row in (1e-3, 1.0, 30.0):  # a row's error is its own, however large the others
        x.view(-1, 224)[0] *= of_row
        tensors = {**in_8_bits("to_q.weight", weight), "to_q.bias": bias}
        found = Linear.of(tensors, "to_q")(x)
        assert (found.shape, found.dtype) == ((*rows, 41), dtype)
        exact = x.double() @ weight.double().T
        errors = (found.double() - exact - bias.double()).norm(dim=-1) / (
            exact.norm(dim=-1) + bias.norm() / 5
        )
        assert float(errors.max()) < PRODUCT_BOUND


def test_products_of_the_largest_values() -> None:
    """Pairs of them exceed 16 bits, in which processors without VNNI add."""
    x = torch.where(torch.arange(64)[:, None] % 3 == 0, -2.0, 2.0).repeat(1, 256)
    weight = torch.where(torch.arange(48)[:, None] % 2 == 0, -1.0, 1.0).repeat(1, 256)
    found = Linear.of(in_8_bits("to_q.weight", weight), "to_q")(x)
    torch.testing.assert_close(found, x @ weight.T, rtol=1e-6, atol=0)


def test_no_bias_is_taken_where_none_is_wanted() -> None:
    x, weight = random(1, 3, 8), random(2, 5, 8)
    tensors = {"a.weight": weight, "a.bias": random(3, 5)}
    assert torch.equal(Linear.of(tensors, "a", bias=False)(x), x @ weight.T)


@pytest.mark.parametrize("counts", [(7,), (7, 3)], ids=["text", "edit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prediction(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    config = small_config(num_layers=3, attention_bias=True)
    weights = runtime_weights(config, oracle(config).state_dict(), dtype)
    int8 = quantized(weights.items())
    latent, tokens = random_latent(config, 5, 6), random_tokens(config, 9, counts)
    exact = run(DiT(config, weights), latent, 600.0, tokens)
    with ops.recording_usage() as used:
        found = run(DiT(config, int8), latent, 600.0, tokens)
    assert {"quantize_rows", "integer_product", "scale_product"} <= used.keys()
    meant = run(DiT(config, dequantized(int8)), latent, 600.0, tokens)
    assert relative_l2(meant, exact) < PREDICTION_BOUND
    assert relative_l2(found, exact) < PREDICTION_BOUND
    assert relative_l2(found, exact) > 0


@pytest.mark.skipif(native.cpu_module() is None, reason=str(native.cpu_unavailable()))
@pytest.mark.parametrize(
    ("isa", "refused"), [("avx512_vnni", False), ("avx_vnni", False), ("amx_int8", False), ("avx2", True)]
)
def test_integers_are_multiplied_by_torch_where_the_processor_does(
    isa: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = replace(quantized_ops.processor(), isa=(isa,))
    monkeypatch.setattr(quantized_ops, "processor", lambda: fake)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.double() @ b.double()).to(torch.int32))
    quantized_ops._no_int_mm.cache_clear()
    found = {c.implementation: c for c in ops.choices("cpu", torch.int8) if c.op == "integer_product"}
    quantized_ops._no_int_mm.cache_clear()
    assert found["int_mm"].chosen != refused
    assert found["cpu"].chosen == refused
