"""A row's bits do not depend on its batch, on its place in it, or on the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.measure.cases.attention import decode_case, paged_case, prefill_case
from blip3o_rt.measure.cases.quantized import quantized
from blip3o_rt.measure.cases.sampling import sample_case
from blip3o_rt.measure.validate.case import PRODUCTS, int32, random, run_exact
from blip3o_rt.measure.validate.finding import compare
from blip3o_rt.ops import native

pytestmark = pytest.mark.skipif(native.cpu_module() is None, reason=str(native.cpu_unavailable()))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
KINDS = st.sampled_from([(x, weight) for x, weight, _ in PRODUCTS])
few = settings(deadline=None, derandomize=True, max_examples=20)


@pytest.fixture(scope="module", autouse=True)
def restore() -> Iterator[None]:
    module = native.cpu()
    threads, isa = module.num_threads(), module.isa()
    yield
    module.set_num_threads(threads)
    module.set_isa(isa)


def set_up(data: st.DataObject) -> None:
    native.cpu().set_isa(data.draw(st.sampled_from(native.cpu().isas()), "isa"))
    native.cpu().set_num_threads(data.draw(st.integers(1, 8), "threads"))


@given(
    data=st.data(),
    kind=KINDS,
    rows=st.integers(1, 70),
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 400),
)
@few
def test_row_linear(
    data: st.DataObject, kind: tuple[torch.dtype, torch.dtype], rows: int, outputs: int, inputs: int
) -> None:
    set_up(data)
    x, weight = random(1, rows, inputs, dtype=kind[0]), random(2, outputs * 7, inputs, dtype=kind[1])
    together = ops.row_linear(x, weight)
    native.cpu().set_num_threads(data.draw(st.integers(1, 8), "other threads"))
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=20), "rows")
    assert torch.equal(ops.row_linear(x[chosen], weight), together[chosen])
    assert torch.equal(ops.row_linear(x[:1], weight), together[:1])


@given(
    data=st.data(),
    dtype=DTYPES,
    rows=st.integers(1, 70),
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 400),
)
@few
def test_row_linear_w8(data: st.DataObject, dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> None:
    set_up(data)
    x, (weight, scale) = random(1, rows, inputs, dtype=dtype), quantized(2, outputs * 7, inputs)
    together = ops.row_linear_w8(x, weight, scale)
    native.cpu().set_num_threads(data.draw(st.integers(1, 8), "other threads"))
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=20), "rows")
    assert torch.equal(ops.row_linear_w8(x[chosen], weight, scale), together[chosen])
    assert torch.equal(ops.row_linear_w8(x[:1], weight, scale), together[:1])


@given(
    data=st.data(),
    rows=st.integers(1, 70),
    outputs=st.integers(1, 40),
    pairs_of_inputs=st.integers(1, 600),
    dtype=DTYPES,
    int8=st.booleans(),
)
@few
def test_linear(
    data: st.DataObject, rows: int, outputs: int, pairs_of_inputs: int, dtype: torch.dtype, int8: bool
) -> None:
    """Of the kernel also where torch is chosen, because it is no faster there."""
    set_up(data)
    inputs = 2 * pairs_of_inputs
    x = random(1, rows, inputs, dtype=dtype)
    if int8:
        op: Any = ops.linear_w8a16
        weights: tuple[torch.Tensor, ...] = quantized(2, outputs * 7, inputs)
    else:
        weight = random(2, outputs * 7, inputs, dtype=torch.bfloat16)
        op, weights = ops.linear, (weight, random(3, outputs * 7, dtype=dtype))

    def run(x: Tensor) -> Tensor:
        result: Tensor = op.named("cpu").run(op.bind(x, *weights))
        return result

    together = run(x)
    native.cpu().set_num_threads(data.draw(st.integers(1, 8), "other threads"))
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=20), "rows")
    assert torch.equal(run(x[chosen]), together[chosen])
    assert torch.equal(run(x[:1]), together[:1])


@given(
    data=st.data(),
    kind=KINDS,
    rows=st.integers(1, 70),
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 400),
    int8=st.booleans(),
)
@few
def test_fused_products(
    data: st.DataObject,
    kind: tuple[torch.dtype, torch.dtype],
    rows: int,
    outputs: int,
    inputs: int,
    int8: bool,
) -> None:
    """Rows alone have the bits they have together, and those of the ops one after the other."""
    set_up(data)
    dtype, weights = kind
    x, norm_weight = random(1, rows, inputs, dtype=dtype), random(3, inputs, dtype=dtype)
    weight, scale = (
        quantized(2, 2 * outputs, inputs) if int8 else (random(2, 2 * outputs, inputs, dtype=weights), None)
    )
    residual = random(4, rows, 2 * outputs, dtype=dtype)

    def fused(chosen: list[int]) -> list[Tensor]:
        normed, gated = (
            ops.norm_row_linear(x[chosen], norm_weight, 1e-6, weight, scale=scale, gated=gated)
            for gated in (False, True)
        )
        return [normed, gated, ops.row_linear_add(x[chosen], weight, residual[chosen], scale=scale)]

    def product(x: Tensor) -> Tensor:
        return ops.row_linear(x, weight) if scale is None else ops.row_linear_w8(x, weight, scale)

    together = fused(list(range(rows)))
    native.cpu().set_num_threads(data.draw(st.integers(1, 8), "other threads"))
    one = data.draw(st.integers(0, rows - 1), "row")
    for alone, all_rows in zip(fused([one]), together, strict=True):
        assert torch.equal(alone, all_rows[one : one + 1])
    normed = product(ops.rms_norm(x, norm_weight, 1e-6))
    expected = [normed, ops.silu_mul(normed), residual + product(x)]
    assert all(torch.equal(*pair) for pair in zip(together, expected, strict=True))


@given(data=st.data(), dtype=DTYPES, lengths=st.lists(st.integers(0, 90), min_size=1, max_size=6))
@few
def test_paged_decode_attention(data: st.DataObject, dtype: torch.dtype, lengths: list[int]) -> None:
    set_up(data)
    q, k, v, page_table, context, scale = paged_case("", dtype, lengths, 6, 2, 24, 16).arguments
    together = ops.paged_decode_attention(q, k, v, page_table, context, scale)
    native.cpu().set_num_threads(data.draw(st.integers(1, 8), "other threads"))
    for b in range(len(lengths)):
        blocks = max(1, -(-lengths[b] // 16))  # a table of its own size, and the pages elsewhere
        moved = torch.arange(blocks, dtype=torch.int32)[None] + 1
        caches = []
        for cache in (k, v):
            fresh = torch.full((blocks + 1, *cache.shape[1:]), torch.nan, dtype=dtype)
            pages = page_table[b, : -(-lengths[b] // 16)].long()
            fresh[1 : 1 + len(pages)] = cache[pages]
            caches.append(fresh)
        alone = ops.paged_decode_attention(q[b : b + 1], *caches, moved, context[b : b + 1], scale)
        assert torch.equal(alone, together[b : b + 1])


@given(
    data=st.data(),
    dtype=DTYPES,
    page_size=st.sampled_from([1, 4, 16]),
    lengths=st.lists(st.sampled_from([1, 2, 15, 16, 17, 33, 63, 64, 65]), min_size=1, max_size=64),
)
@few
def test_decode_attention(
    data: st.DataObject, dtype: torch.dtype, page_size: int, lengths: list[int]
) -> None:
    """Of a ragged batch as of its sequences alone; and as of the two ops that it stands for."""
    set_up(data)
    case = decode_case("", dtype, lengths, 2, 1, 16, page_size)
    (*token, k, v), (table, context, eps, scale) = case.arguments[:8], case.arguments[8:]
    caches = k.clone(), v.clone()
    query = ops.qk_norm_rope_append(*(*token, *caches, eps))
    expected = ops.paged_decode_attention(query, *caches, table, context, scale)
    together = ops.decode_attention(*(*token, k.clone(), v.clone(), table, context, eps, scale))
    assert torch.equal(together, expected)
    b = data.draw(st.integers(0, len(lengths) - 1), "sequence")
    one = slice(b, b + 1)
    qkv, *weights, cos_sin_cache, positions, slot_mapping = token
    alone = (
        qkv[one],
        *weights,
        cos_sin_cache,
        positions[one],
        slot_mapping[one],
        k,
        v,
        table[one],
        context[one],
    )
    assert torch.equal(ops.decode_attention(*alone, eps, scale), together[one])


@given(
    data=st.data(),
    dtype=DTYPES,
    page_size=st.sampled_from([1, 4, 16]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=64),
)
@settings(few, max_examples=8)
def test_paged_prefill_attention(
    data: st.DataObject, dtype: torch.dtype, page_size: int, lengths: list[int]
) -> None:
    """Any part of each of many ragged prompts, against the definition; a prompt does not depend on others."""
    queries = [data.draw(st.integers(0, length)) for length in lengths]
    case = prefill_case("", dtype, lengths, queries, 2, 1, 16, page_size)
    found = ops.paged_prefill_attention(*case.arguments)
    exact = run_exact(ops.paged_prefill_attention, case)
    assert all(f.passed for f in compare(ops.paged_prefill_attention, case, [found], exact))
    q, k, v, table, starts, context, scale = case.arguments
    b = data.draw(st.integers(0, len(lengths) - 1), "sequence")
    first, end, one = int(starts[b]), int(starts[b + 1]), slice(b, b + 1)
    own = (q[first:end], k, v, table[one], int32([0, end - first]), context[one])
    assert torch.equal(ops.paged_prefill_attention(*own, scale), found[first:end])


@pytest.mark.parametrize("op", ["rms_norm", "silu_mul"])
@given(data=st.data(), dtype=DTYPES, rows=st.integers(1, 300), width=st.integers(1, 300))
@few
def test_rowwise_ops(op: str, data: st.DataObject, dtype: torch.dtype, rows: int, width: int) -> None:
    set_up(data)

    def call(x: Tensor) -> Tensor:
        return ops.silu_mul(x) if op == "silu_mul" else ops.rms_norm(x, weight, 1e-6)

    x, weight = random(1, rows, 2 * width, dtype=dtype), random(2, 2 * width, dtype=dtype)
    together = call(x)
    native.cpu().set_num_threads(data.draw(st.integers(1, 8), "other threads"))
    row = data.draw(st.integers(0, rows - 1), "row")
    assert torch.equal(call(x[row : row + 1].clone()), together[row : row + 1])


@given(data=st.data())
@few
def test_sample_tokens(data: st.DataObject) -> None:
    set_up(data)
    arguments = sample_case("", random(3, 9, 500, scale=2.0), 0.8, 60, 0.9).arguments
    together = ops.sample_tokens(*arguments)
    chosen = data.draw(st.permutations(range(9)), "order")[:5]
    assert torch.equal(ops.sample_tokens(*(a[chosen] for a in arguments)), together[chosen])


def test_nearest_code() -> None:
    features, codebook = random(1, 50, 40), torch.nn.functional.normalize(random(2, 3000, 40), dim=1)
    together = ops.nearest_code(features, codebook)
    for threads in (1, 3):
        native.cpu().set_num_threads(threads)
        assert torch.equal(ops.nearest_code(features[7:20], codebook), together[7:20])


@given(
    data=st.data(),
    dtype=DTYPES,
    tokens=st.integers(1, 150),
    heads=st.integers(1, 11),
    head_dim=st.sampled_from([8, 20, 32]),
)
@few
def test_relu_linear_attention(
    data: st.DataObject, dtype: torch.dtype, tokens: int, heads: int, head_dim: int
) -> None:
    set_up(data)
    width = heads * head_dim
    qkv, weight = random(1, 3, tokens, 3 * width, dtype=dtype), random(2, width, dtype=dtype)
    together = ops.relu_linear_attention(qkv, weight, weight, heads, 1e-5)
    native.cpu().set_num_threads(data.draw(st.integers(1, 8), "other threads"))
    alone = ops.relu_linear_attention(qkv[1:2], weight, weight, heads, 1e-5)
    assert torch.equal(alone, together[1:2])


@given(data=st.data(), dtype=DTYPES, queries=st.integers(1, 300), keys=st.sampled_from([1, 9, 383, 385, 800]))
@few
def test_cross_attention(data: st.DataObject, dtype: torch.dtype, queries: int, keys: int) -> None:
    set_up(data)
    query, weight = random(1, queries, 3 * 20, dtype=dtype), random(2, 60, dtype=dtype)
    key, value = random(3, 3, keys, 20, dtype=dtype), random(4, 3, keys, 20, dtype=dtype)
    together = ops.cross_attention(query, key, value, weight, 1e-5)
    native.cpu().set_num_threads(data.draw(st.integers(1, 8), "other threads"))
    chosen = data.draw(st.lists(st.integers(0, queries - 1), min_size=1, max_size=20), "queries")
    assert torch.equal(ops.cross_attention(query[chosen], key, value, weight, 1e-5), together[chosen])


@given(
    data=st.data(),
    dtype=DTYPES,
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.integers(1, 300),
)
@few
def test_depthwise_glu(
    data: st.DataObject, dtype: torch.dtype, height: int, width: int, channels: int
) -> None:
    set_up(data)
    x, bias = random(1, 3, height, width, 2 * channels, dtype=dtype), random(2, 2 * channels, dtype=dtype)
    weight = random(3, 2 * channels, 1, 3, 3, dtype=dtype)
    together = ops.depthwise_glu(x, bias, weight, bias)
    native.cpu().set_num_threads(data.draw(st.integers(1, 8), "other threads"))
    assert torch.equal(ops.depthwise_glu(x[2:], bias, weight, bias), together[2:])


@given(data=st.data(), dtype=DTYPES, rows=st.integers(1, 300), width=st.integers(1, 300))
@few
def test_modulation_ops(data: st.DataObject, dtype: torch.dtype, rows: int, width: int) -> None:
    """One row alone, and among others."""
    set_up(data)
    row = data.draw(st.integers(0, rows - 1), "row")
    x, weight = random(1, rows, width, dtype=dtype), random(2, width, dtype=dtype)
    calls: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda part: ops.layer_norm_modulate(part, weight, weight, 1e-6),
        lambda part: ops.gated_add(part.clone(), part, weight),
        lambda part: ops.channel_rms_norm(part, weight, weight, 1e-6, residual=part),
    )
    together = [call(x) for call in calls]
    native.cpu().set_num_threads(data.draw(st.integers(1, 8), "other threads"))
    for call, expected in zip(calls, together, strict=True):
        assert torch.equal(call(x[row : row + 1]), expected[row : row + 1])
