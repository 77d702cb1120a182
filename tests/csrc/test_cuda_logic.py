"""The CUDA kernels' logic on the CPU, thread by thread, against the ops' references in float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.errors import OpError
from blip3o_rt.measure.cases import cases_of
from blip3o_rt.measure.cases.attention import append_case, decode_case, paged_case, prefill_case
from blip3o_rt.measure.cases.quantized import e4m3_numbers, quantized
from blip3o_rt.measure.cases.sampling import Window, sample_case, window_case
from blip3o_rt.measure.validate.case import int32, random, run_exact
from blip3o_rt.ops import native
from blip3o_rt.ops.dtypes import E4M3, name_of
from blip3o_rt.params import MAX_BATCH
from tests.csrc.simt.build import SimtCompiler, ops_of
from tests.csrc.simt.cases import FILES, OPS, PAGED, errors, unseen_pages
from tests.ops.test_native import contract, parameters


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> SimtCompiler:
    return SimtCompiler(tmp_path_factory.mktemp("simt"))


@pytest.fixture(scope="module")
def kernels(compiler: SimtCompiler) -> dict[str, Any]:
    return {op: built for file in FILES for built in [compiler.build(file)] for op in ops_of(file)}


@pytest.mark.parametrize("op", OPS)
def test_a_binding_takes_the_arguments_of_its_op(op: str, kernels: dict[str, Any]) -> None:
    assert parameters(getattr(kernels[op], op))[1:] == contract(ops.all_ops()[op])  # but for self


def table() -> Iterator[Any]:
    for op in OPS:
        for dtype in dict.fromkeys(case.dtype for case in cases_of(op)):
            yield pytest.param(op, dtype, id=f"{op}-{name_of(dtype)}")


@pytest.mark.parametrize(("op", "dtype"), list(table()))
def test_matches_reference(
    kernels: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    dtype: torch.dtype,
    case_text: str,
) -> None:
    monkeypatch.setattr(native, "cuda", lambda: kernels[op])
    failed: list[str] = []
    for case in cases_of(op):
        if case.dtype != dtype or case_text not in case.label:
            continue
        exact = run_exact(ops.all_ops()[op], case)
        for descending in (False, True):
            kernels[op].set_descending(descending)
            failed += [f"{case.label}: {finding}" for finding in errors(op, case, exact)]
    assert not failed, "\n".join(failed)


def call(op: str, *arguments: Any, **options: Any) -> Tensor:
    implementation = ops.all_ops()[op].named("cuda")
    bound = ops.all_ops()[op].bind(*arguments, **options)
    assert implementation.refusal(bound) is None
    result: Tensor = implementation.run(bound)
    return result


def matrix(outputs: int, inputs: int, values: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """A weight and its scale; in bfloat16 without one where no values are named."""
    if values is None:
        return random(2, outputs, inputs, dtype=torch.bfloat16), None
    return quantized(2, outputs, inputs, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [72, 2056, 2200 * 3])  # one warp, all 16, several slices for each
def test_rows_of_a_product_are_independent(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, channels: int
) -> None:
    """Whatever tiles a number of rows is given, a row's bits are those of the row alone."""
    monkeypatch.setattr(native, "cuda", lambda: kernels["row_linear"])
    x, weight = random(1, 65, channels, dtype=dtype), random(2, 24, channels, dtype=dtype)
    alone = torch.cat([call("row_linear", x[i : i + 1], weight) for i in range(65)])
    for rows in (2, 8, 9, 16, 17, 33, 64, 65):
        assert torch.equal(call("row_linear", x[:rows], weight), alone[:rows])
        assert torch.equal(call("row_linear", x[-rows:], weight), alone[-rows:])


@pytest.mark.parametrize("values", [None, torch.int8, E4M3])
@pytest.mark.parametrize("channels", [72, 2064, 4400])
def test_rows_of_fused_products_are_independent(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, values: torch.dtype | None, channels: int
) -> None:
    monkeypatch.setattr(native, "cuda", lambda: kernels["row_linear"])
    dtype = torch.bfloat16
    x, norm_weight = random(1, 33, channels, dtype=dtype), random(3, channels, dtype=dtype)
    weight, scale = matrix(24, channels, values)
    residual = random(4, 33, 24, dtype=dtype)

    def added(rows: slice) -> Tensor:
        return call("row_linear_add", x[rows], weight, residual[rows].clone(), scale=scale)

    together = added(slice(33))
    for rows in (slice(1), slice(5, 13), slice(7, 16), slice(16, 33)):
        assert torch.equal(added(rows), together[rows])
    for gated in (False, True):
        call_norm = functools.partial(call, "norm_row_linear", scale=scale, gated=gated)
        together = call_norm(x[:8], norm_weight, 1e-6, weight)
        for rows in (slice(1), slice(2, 5), slice(1, 8)):
            assert torch.equal(call_norm(x[rows], norm_weight, 1e-6, weight), together[rows])


@pytest.mark.parametrize("values", [None, torch.int8, E4M3])
@pytest.mark.parametrize("channels", [37, 72, 264, 2064, 4400])  # rows in 8 bits need 16 of them for a pack
@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_fused_products_have_the_bits_of_their_parts(
    kernels: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    values: torch.dtype | None,
    channels: int,
    multiprocessors: int,
) -> None:
    every = SimpleNamespace(**{op: getattr(k, op) for op, k in kernels.items()})
    monkeypatch.setattr(native, "cuda", lambda: every)
    kernels["row_linear"].set_multiprocessors(multiprocessors)
    dtype = torch.bfloat16
    weight, scale = matrix(70, channels, values)
    norm_weight = random(3, channels, dtype=dtype)

    def product(x: Tensor) -> Tensor:
        return call("row_linear", x, weight) if scale is None else call("row_linear_w8", x, weight, scale)

    for rows in (1, 3, 8):
        x, residual = random(1, rows, channels, dtype=dtype), random(4, rows, 70, dtype=dtype)
        normed = product(call("rms_norm", x, norm_weight, 1e-6))
        fused = functools.partial(call, "norm_row_linear", x, norm_weight, 1e-6, weight, scale=scale)
        assert torch.equal(fused(), normed)
        assert torch.equal(fused(gated=True), call("silu_mul", normed))
        expected = residual + product(x)
        assert torch.equal(call("row_linear_add", x, weight, residual, scale=scale), expected)
    kernels["row_linear"].set_multiprocessors(3)


@pytest.mark.parametrize("values", [None, torch.int8, E4M3])
@pytest.mark.parametrize("channels", [72, 2064, 6400])  # one slice, one for each warp, several
def test_weights_through_a_ring_or_through_registers_give_the_same_bits(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, values: torch.dtype | None, channels: int
) -> None:
    """Where a block has no room for the ring, and with more tiles than blocks."""
    monkeypatch.setattr(native, "cuda", lambda: kernels["row_linear"])
    dtype = torch.bfloat16
    weight, scale = matrix(150, channels, values)
    norm_weight = random(3, channels, dtype=dtype)

    def products() -> list[Tensor]:
        found = []
        for rows in (3, 12, 20):
            x, residual = random(1, rows, channels, dtype=dtype), random(4, rows, 150, dtype=dtype)
            found.append(call("row_linear_add", x, weight, residual, scale=scale))
        x = random(1, 2, channels, dtype=dtype)
        for gated in (False, True):
            found.append(call("norm_row_linear", x, norm_weight, 1e-6, weight, scale=scale, gated=gated))
        return found

    through_a_ring = products()
    kernels["row_linear"].set_shared_memory(99 * 1024)  # of compute capability 8.9
    through_registers = products()
    kernels["row_linear"].set_shared_memory(227 * 1024)
    assert all(map(torch.equal, through_a_ring, through_registers))
    assert all(found.isfinite().all() for found in through_a_ring)


def test_every_int8_is_widened_exactly(kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cuda", lambda: kernels["row_linear"])
    values = torch.arange(-128, 128, dtype=torch.int8).reshape(16, 16)
    x, scale = torch.eye(16, dtype=torch.bfloat16), torch.ones(16)
    assert torch.equal(call("row_linear_w8", x, values, scale).T, values.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_e4m3_is_widened_exactly(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Zeros and subnormal numbers too; and what is no number leaves none in its row, and other rows alone."""
    monkeypatch.setattr(native, "cuda", lambda: kernels["row_linear"])
    bits = torch.arange(256).reshape(16, 16)
    x, scale = torch.eye(16, dtype=dtype), torch.ones(16)
    values = e4m3_numbers(bits)
    assert torch.equal(call("row_linear_w8", x, values, scale).T, values.to(dtype))
    found = call("row_linear_w8", x, bits.to(torch.uint8).view(E4M3), scale).T
    assert found[[7, 15]].isnan().all()
    others = [row for row in range(16) if row not in (7, 15)]
    assert torch.equal(found[others], values.to(dtype)[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_takes_the_largest_batch(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(native, "cuda", lambda: kernels["row_linear"])
    x, weight = random(1, MAX_BATCH, 72, dtype=dtype), random(2, 24, 72, dtype=dtype)
    together = call("row_linear", x, weight)
    for first in range(0, MAX_BATCH, 37):
        rows = slice(first, first + 37)
        assert torch.equal(call("row_linear", x[rows], weight), together[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_ragged_sequences_are_independent(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int
) -> None:
    """Alone, a sequence has another table width, and so other splits of the workspace."""
    monkeypatch.setattr(native, "cuda", lambda: kernels["paged_decode_attention"])
    lengths = [1 + 37 * i % 150 for i in range(64)]
    case = paged_case("", dtype, lengths, 4, 2, head_dim, 16)
    assert errors("paged_decode_attention", case, run_exact(ops.paged_decode_attention, case)) == []
    q, k, v, table, context, scale = case.arguments
    together = call("paged_decode_attention", q, k, v, table, context, scale)
    for b in range(0, 64, 3):
        blocks = -(-lengths[b] // 16)
        own = table[b : b + 1, :blocks].contiguous()
        alone = call("paged_decode_attention", q[b : b + 1], k, v, own, context[b : b + 1], scale)
        assert torch.equal(alone, together[b : b + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_tokens_attention_has_the_bits_of_its_two_ops(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int
) -> None:
    """In a ragged batch, of one launch and of the next with the same scratch memory; and alone."""
    both = [kernels[op] for op in ("qk_norm_rope_append", "paged_decode_attention")]
    functions = {
        name: f for module in (*both, kernels["decode_attention"]) for name, f in vars(module).items()
    }
    monkeypatch.setattr(native, "cuda", lambda: SimpleNamespace(**functions))
    case = decode_case("", dtype, [1, 64, 65, 130, 200, 16, 17], 4, 2, head_dim, 16)
    (*token, k_cache, v_cache), (table, context, eps, scale) = case.arguments[:8], case.arguments[8:]
    caches = k_cache.clone(), v_cache.clone()
    query = call("qk_norm_rope_append", *token, *caches, eps)
    expected = call("paged_decode_attention", query, *caches, table, context, scale)
    scratch = ops.Scratch()
    for descending in (False, True):
        kernels["decode_attention"].set_descending(descending)
        written = k_cache.clone(), v_cache.clone()
        for _ in range(2):
            found = call("decode_attention", *token, *written, table, context, eps, scale, scratch=scratch)
            assert torch.equal(found, expected)
            assert not scratch.counters(1, found.device).any()
        for cache, other in zip(written, caches, strict=True):
            assert torch.equal(cache.nan_to_num(7), other.nan_to_num(7))
    qkv, *weights, cos_sin_cache, positions, slot_mapping = token
    for one in (slice(b, b + 1) for b in range(len(expected))):
        own = (
            qkv[one],
            *weights,
            cos_sin_cache,
            positions[one],
            slot_mapping[one],
            k_cache.clone(),
            v_cache.clone(),
        )
        alone = call("decode_attention", *own, table[one], context[one], eps, scale)
        assert torch.equal(alone, expected[one])


def test_a_token_without_a_place_is_not_a_number_and_written_nowhere(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "cuda", lambda: kernels["decode_attention"])
    case = decode_case("", torch.bfloat16, [9, 70, 5, 30, 20, 40], 2, 1, 64, 16)
    *_, positions, slot_mapping, k_cache, v_cache, table, context, _, _ = case.arguments
    before = k_cache.clone(), v_cache.clone()
    positions[0], slot_mapping[1], slot_mapping[2], context[3] = 1000, 2**30, slot_mapping[2] - 1, 10**6
    table[4, 1], slot_mapping[4] = len(k_cache), len(k_cache) * 16 + 3
    found = call("decode_attention", *case.arguments)
    assert found[:5].isnan().all()
    assert not found[5].isnan().any()
    written = slot_mapping[5] // 16
    for cache, other in zip((k_cache, v_cache), before, strict=True):
        cache[written] = other[written]
        assert torch.equal(cache.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_attention_may_be_written_over_its_queries(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int
) -> None:
    monkeypatch.setattr(native, "cuda", lambda: kernels["paged_decode_attention"])
    case = paged_case("", dtype, [130, 1, 0, 65], 4, 2, head_dim, 16)
    expected, query = call("paged_decode_attention", *case.arguments), case.arguments[0]
    assert call("paged_decode_attention", *case.arguments, out=query) is query
    assert torch.equal(query, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_a_query_of_a_prompt_has_the_bits_it_has_in_any_piece_of_it(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int
) -> None:
    """Whole prompts together, and each alone in pieces of every kind of size."""
    monkeypatch.setattr(native, "cuda", lambda: kernels["paged_prefill_attention"])
    lengths = [140, 65, 1, 30]
    case = prefill_case("", dtype, lengths, lengths, 4, 2, head_dim, 16)
    q, k, v, table, starts, _, scale = case.arguments
    together = call("paged_prefill_attention", *case.arguments)
    for b, length in enumerate(lengths):
        own, first = together[starts[b] : starts[b + 1]], 0
        for piece in (1, 2, 29, 33, 75):
            end = min(first + piece, length)
            part = q[starts[b] + first : starts[b] + end]
            blocks = table[b : b + 1, : -(-length // 16)].contiguous()
            places = int32([0, end - first]), int32([end])
            found = call("paged_prefill_attention", part, k, v, blocks, *places, scale)
            assert torch.equal(found, own[first:end])
            first = end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_of_a_wrong_length_are_not_numbers(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(native, "cuda", lambda: kernels["paged_prefill_attention"])
    case = prefill_case("", dtype, [40, 20, 33], [10, 20, 33], 2, 1, 64, 16)
    *_, context, _ = case.arguments
    context[0], context[1] = 1000, 19
    found = call("paged_prefill_attention", *case.arguments)
    assert found[:30].isnan().all()
    assert not found[30:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("place", "start", "unwritten"),
    [(0, -3, slice(10)), (1, -5, slice(30)), (2, 70, slice(10, 63)), (3, 70, slice(30, 63))],
)
def test_queries_that_are_not_there_are_not_written(
    kernels: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    place: int,
    start: int,
    unwritten: slice,
) -> None:
    """Nor is the memory before and after the results."""
    monkeypatch.setattr(native, "cuda", lambda: kernels["paged_prefill_attention"])
    case = prefill_case("", dtype, [40, 20, 33], [10, 20, 33], 2, 1, 64, 16)
    q, *_, starts, _, _ = case.arguments
    whole = torch.full((63 + 16, 2, 64), 7, dtype=dtype)
    expected = whole.clone()
    expected[8:-8] = call("paged_prefill_attention", *case.arguments)
    expected[8:-8][unwritten] = 7
    starts[place] = start
    q = torch.cat([whole[:8], q, whole[:8]])[8:-8]
    call("paged_prefill_attention", q, *case.arguments[1:], out=whole[8:-8])
    assert torch.equal(whole, expected)


def test_a_window_without_a_slot_stays_as_it_is(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slot is on the device, where a wrong one cannot be reported."""
    monkeypatch.setattr(native, "cuda", lambda: kernels["advance_windows"])
    windows = [Window(3, kept, 2, 2) for kept in (1, 2, 3, 4)]
    arguments = list(window_case("", windows).arguments)
    counts, output_ids, (positions, slot_mapping) = arguments[7:10], arguments[10], arguments[11:]
    output_slots = counts[2]
    output_slots[0], output_slots[4] = -1, len(output_ids)
    before = [count.clone() for count in counts]
    whole = torch.cat([torch.full((1,), -7), output_ids, torch.full((1,), -7)])
    was = whole.clone()
    call("advance_windows", *arguments[:10], whole[1:-1], positions, slot_mapping)
    moved = torch.tensor([False, False, True, True, False, False, True, True])
    for count, old in zip(counts, before, strict=True):
        assert torch.equal(count[~moved], old[~moved])
        assert not torch.equal(count[moved], old[moved])
    assert slot_mapping[~moved].tolist() == [-1] * 4
    assert (slot_mapping[moved] >= 0).all()
    assert whole[[0, -1]].tolist() == [-7, -7]
    changed = (whole != was).nonzero().flatten() - 1
    assert ((changed // 25 == 1) | (changed // 25 == 3)).all()  # of the images of 24 tokens and one slot more


def test_a_row_without_a_slot_is_not_kept(kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And a norm that keeps its rows has the bits of the norm."""
    every = SimpleNamespace(**{op: getattr(k, op) for op, k in kernels.items()})
    monkeypatch.setattr(native, "cuda", lambda: every)
    x, weight = random(1, 4, 40), random(2, 40)
    whole = torch.full((7, 40), -7.0)
    found = call("rms_norm_keep", x, weight, 1e-6, torch.tensor([4, -1, 5, 0]), whole[1:-1])
    assert torch.equal(found, call("rms_norm", x, weight, 1e-6))
    assert torch.equal(whole[[1, 5]], found[[3, 0]])
    assert (whole[[0, 2, 3, 4, 6]] == -7).all()


def test_heads_that_no_kernel_holds_are_refused(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the compiled function too, for a caller who does not ask what it takes."""
    monkeypatch.setattr(native, "cuda", lambda: kernels["decode_attention"])
    many = decode_case("", torch.float32, [9], 17, 1, 64, 16)
    with pytest.raises(OpError, match="at most 16 query heads for each KV head"):
        ops.decode_attention.named("cuda").run(ops.decode_attention.bind(*many.arguments))
    monkeypatch.setattr(native, "cuda", lambda: kernels["paged_prefill_attention"])
    wide = prefill_case("", torch.float32, [9], [9], 2, 1, 257, 16)
    with pytest.raises(OpError, match="D must be at most 256"):
        ops.paged_prefill_attention.named("cuda").run(ops.paged_prefill_attention.bind(*wide.arguments))


def test_a_tokens_attention_tells_what_it_takes() -> None:
    refusal = ops.decode_attention.named("cuda").refusal
    case = decode_case("", torch.bfloat16, [9, 3], 4, 2, 64, 16)
    bound = ops.decode_attention.bind(*case.arguments)
    assert refusal(bound) is None
    for moved in ("qkv", "k_cache", "cos_sin_cache"):
        tensor = getattr(bound, moved)
        shifted = tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape)
        assert refusal(bound._replace(**{moved: shifted})) == "takes rows that begin at multiples of 16 bytes"
    apart = torch.nn.functional.pad(bound.qkv, (0, 4))[:, :-4]
    assert refusal(bound._replace(qkv=apart)) == "takes rows that begin at multiples of 16 bytes"


@pytest.mark.parametrize("op", PAGED)
def test_pages_that_do_not_exist_are_not_numbers(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    monkeypatch.setattr(native, "cuda", lambda: kernels[op])
    for descending in (False, True):
        kernels[op].set_descending(descending)
        assert unseen_pages(op) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_tokens_are_independent(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(
        native, "cuda", lambda: SimpleNamespace(**{op: getattr(k, op) for op, k in kernels.items()})
    )
    x, weight = random(1, 9, 130, dtype=dtype), random(2, 130, dtype=dtype)
    case = append_case("", dtype, 4, 2, 64, 4, list(range(3, 12)))
    qkv, *weights, cos_sin_cache, positions, slot_mapping, k_cache, v_cache, eps = case.arguments
    q = call(
        "qk_norm_rope_append", qkv, *weights, cos_sin_cache, positions, slot_mapping, k_cache, v_cache, eps
    )
    silu, norm = call("silu_mul", x), call("rms_norm", x, weight, 1e-6)
    for i in range(9):
        one = slice(i, i + 1)
        assert torch.equal(call("silu_mul", x[one].clone()), silu[one])
        assert torch.equal(call("rms_norm", x[one].clone(), weight, 1e-6), norm[one])
        caches = k_cache.clone(), v_cache.clone()
        own = call(
            "qk_norm_rope_append",
            qkv[one],
            *weights,
            cos_sin_cache,
            positions[one],
            slot_mapping[one],
            *caches,
            eps,
        )
        assert torch.equal(own, q[one])
        assert torch.equal(caches[0], k_cache)  # written again with the same bits
        assert torch.equal(caches[1], v_cache)


def test_draws_are_independent(kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cuda", lambda: kernels["sample_tokens"])
    arguments = sample_case("", random(3, 9, 500, scale=2.0), 0.8, 60, 0.9).arguments
    together = call("sample_tokens", *arguments)
    for chosen in ([4], [8, 0, 3], [1, 1, 7]):
        assert torch.equal(call("sample_tokens", *(a[chosen] for a in arguments)), together[chosen])


def test_every_kernel_file_is_tested() -> None:
    registered = {name for name, op in ops.all_ops().items() if "cuda" in op.implementation_names}
    assert set(OPS) == registered
