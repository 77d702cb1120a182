"""The ops of a prompt and of decoded tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from blip3o_rt.ar.kv_cache import DEFAULT_PAGE_SIZE
from blip3o_rt.config import ARConfig, ModelConfig
from blip3o_rt.measure.bench.op_shapes.shape import FP32, Make, OpShape, linear
from blip3o_rt.measure.cases.attention import append_case, decode_case, paged_case, prefill_case
from blip3o_rt.measure.cases.linear import add_case, norm_case, product_case
from blip3o_rt.measure.cases.norm import residual_case
from blip3o_rt.measure.cases.quantized import quantized
from blip3o_rt.measure.cases.sampling import sample_case
from blip3o_rt.measure.validate.case import Case, int32, random
from blip3o_rt.params import SamplingParams

PREFILL = 64  # tokens of a prompt
ADDED = ("attention out", "down")  # products that are added to the residual


def decoding(config: ModelConfig, batch: int) -> Iterator[OpShape]:
    """A token of each of `batch` images."""
    ar = config.ar
    yield from _ar_rows(ar, batch, f"decode x{batch}")
    logits = {"head, image rows": (config.image_tokens.num_image_tokens, ar.hidden_size)}
    for name, (rows, columns) in {**_ar_matrices(ar), **logits}.items():
        is_head = name in logits
        yield OpShape(
            "row_linear",
            f"decode x{batch}: {name} {rows} x {columns}",
            _row_linear(batch, rows, columns, is_head),
            products=batch * rows * columns,
            reads=True,
            check=_row_linear(batch, min(rows, 4096), columns, is_head),
        )
        yield OpShape(
            "row_linear_w8",
            f"decode x{batch}: {name} {rows} x {columns}",
            _row_linear_w8(batch, rows, columns, is_head),
            products=batch * rows * columns,
            reads=True,
            check=_row_linear_w8(batch, min(rows, 4096), columns, is_head),
        )
    for name, (rows, columns) in _ar_matrices(ar).items():
        yield OpShape(
            "row_linear_add" if name in ADDED else "norm_row_linear",
            f"decode x{batch}: {name} {rows} x {columns}",
            _fused(batch, name, rows, columns),
            products=batch * rows * columns,
            reads=True,
        )
    context = config.image_tokens.tokens_per_image // 2 + PREFILL
    heads = ar.num_heads, ar.num_kv_heads, ar.head_dim, DEFAULT_PAGE_SIZE
    yield OpShape(
        "paged_decode_attention",
        f"decode x{batch}: {context} positions",
        lambda dtype: paged_case("", dtype, [context] * batch, *heads),
        products=2 * batch * context * ar.query_size,
        moved=2 * batch * (context * ar.kv_size + ar.query_size),
        reads=True,
    )
    yield OpShape(
        "decode_attention",
        f"decode x{batch}: {context} positions",
        lambda dtype: decode_case("", dtype, [context] * batch, *heads),
        products=2 * batch * context * ar.query_size,
        moved=2 * batch * (context * ar.kv_size + ar.query_size + ar.kv_size),
        reads=True,
    )
    codes = config.image_tokens.num_image_tokens
    yield OpShape(
        "sample_tokens",
        f"decode x{batch}: {codes} logits",
        lambda _: _sampling(config, batch),
        reads=True,
        dtypes=FP32,
    )
    yield OpShape(
        "advance_windows",
        f"decode x{batch}: {context} positions",
        lambda _: _windows(batch, context, config.image_tokens.tokens_per_image),
        dtypes=FP32,
    )


def prompt(ar: ARConfig) -> Iterator[OpShape]:
    """Reading a prompt."""
    heads = ar.num_heads, ar.num_kv_heads, ar.head_dim, DEFAULT_PAGE_SIZE
    yield from _ar_rows(ar, PREFILL, f"prompt of {PREFILL}")
    for name, (rows, columns) in _ar_matrices(ar).items():
        yield OpShape(
            "linear",
            f"prompt of {PREFILL}: {name} {rows} x {columns}",
            linear(PREFILL, rows, columns),
            products=PREFILL * rows * columns,
            check=linear(PREFILL, min(rows, 1200), columns),
        )
        yield OpShape(
            "linear_w8a16",
            f"prompt of {PREFILL}: {name} {rows} x {columns}",
            _row_linear_w8(PREFILL, rows, columns, False),
            products=PREFILL * rows * columns,
            check=_row_linear_w8(PREFILL, min(rows, 1200), columns, False),
        )
    yield OpShape(
        "paged_prefill_attention",
        f"prompt of {PREFILL}: {ar.num_heads} heads on {ar.num_kv_heads}",
        lambda dtype: prefill_case("", dtype, [PREFILL], [PREFILL], *heads),
        products=PREFILL * (PREFILL + 1) * ar.query_size,  # half of what attends to every position
        moved=2 * PREFILL * (ar.query_size + ar.kv_size),
    )


def _ar_rows(ar: ARConfig, rows: int, label: str) -> Iterator[OpShape]:
    """The ops that treat each token alone."""
    hidden, packed = ar.hidden_size, ar.query_size + 2 * ar.kv_size
    heads = ar.num_heads, ar.num_kv_heads, ar.head_dim, DEFAULT_PAGE_SIZE
    yield OpShape(
        "rms_norm",
        f"{label}: {hidden} wide, residual",
        lambda dtype: residual_case("", dtype, rows, hidden),
        moved=4 * rows * hidden + hidden,
    )
    yield OpShape(
        "qk_norm_rope_append",
        f"{label}: {ar.num_heads}+2x{ar.num_kv_heads} heads of {ar.head_dim}",
        lambda dtype: append_case("", dtype, *heads, list(range(rows)), -(-rows // DEFAULT_PAGE_SIZE)),
        moved=2 * rows * packed,
    )
    width = ar.intermediate_size
    yield OpShape(
        "silu_mul",
        f"{label}: 2 x {width}",
        lambda dtype: Case("", (random(1, rows, 2 * width, dtype=dtype),)),
    )


def _ar_matrices(ar: ARConfig) -> dict[str, tuple[int, int]]:
    return {
        "qkv": (ar.query_size + 2 * ar.kv_size, ar.hidden_size),
        "attention out": (ar.hidden_size, ar.query_size),
        "gate|up": (2 * ar.intermediate_size, ar.hidden_size),
        "down": (ar.hidden_size, ar.intermediate_size),
    }


def _row_linear(batch: int, rows: int, columns: int, logits: bool) -> Make:
    def make(dtype: torch.dtype) -> Case:
        if logits:
            return product_case("", dtype, batch, rows, columns, out=torch.zeros(batch, rows))
        return product_case("", dtype, batch, rows, columns)

    return make


def _row_linear_w8(batch: int, rows: int, columns: int, logits: bool) -> Make:
    def make(dtype: torch.dtype) -> Case:
        out = {"out": torch.zeros(batch, rows)} if logits else {}
        x = random(1, batch, columns, dtype=dtype)
        return Case("", (x, *quantized(2, rows, columns)), out, written=tuple(out))

    return make


def _fused(batch: int, name: str, rows: int, columns: int) -> Make:
    if name in ADDED:
        return lambda dtype: add_case("", dtype, batch, rows, columns)
    return lambda dtype: norm_case("", dtype, batch, rows, columns, gated=name == "gate|up")


def _sampling(config: ModelConfig, batch: int) -> Case:
    codes, sampling = config.image_tokens.num_image_tokens, SamplingParams()
    top_k = sampling.top_k_for(codes, config.ar.vocab_size)
    return sample_case("", random(1, batch, codes, scale=3.0), 1.0, top_k, sampling.top_p)


def _windows(batch: int, context: int, tokens: int) -> Case:
    """Windows of one row; an image whose tokens are all there stays at the last."""
    max_blocks = -(-(context + tokens) // DEFAULT_PAGE_SIZE)
    first_slots = torch.arange(batch) * (tokens + 1)
    output_ids = torch.zeros((batch + 1) * (tokens + 1), dtype=torch.int64)
    page_table = int32(range(batch * max_blocks)).view(batch, max_blocks)
    counts = (int32([0] * batch), int32([context] * batch), first_slots, output_ids)
    sizes = (page_table, DEFAULT_PAGE_SIZE, tokens, 27)
    arguments = (torch.arange(batch), int32(range(batch + 1)), torch.arange(batch), *sizes, *counts)
    written = (int32([0] * batch), int32([0] * batch))
    return Case("", (*arguments, *written), written=(7, 8, 9, 10, 11, 12))
