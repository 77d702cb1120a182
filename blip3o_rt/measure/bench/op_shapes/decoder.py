"""The ops of a prompt and of decoded tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from blip3o_rt.ar.kv_cache import DEFAULT_PAGE_SIZE
from blip3o_rt.config import ARConfig, ModelConfig
from blip3o_rt.measure.bench.op_shapes.shape import FP32, Make, OpShape, linear
from blip3o_rt.measure.validate.case import Case, int32, random
from blip3o_rt.params import SamplingParams

PREFILL = 64  # tokens of a prompt
EPS = 1e-6


def decoding(config: ModelConfig, batch: int) -> Iterator[OpShape]:
    """A token of each of `batch` pictures."""
    ar = config.ar
    yield from _ar_rows(ar, batch, f"decode x{batch}")
    heads = {"head, image rows": (config.image_tokens.num_image_tokens, ar.hidden_size)}
    for name, (rows, columns) in {**_ar_matrices(ar), **heads}.items():
        logits = name.startswith("head")
        yield OpShape(
            "row_linear",
            f"decode x{batch}: {name} {rows} x {columns}",
            _row_linear(batch, rows, columns, logits),
            products=batch * rows * columns,
            reads=True,
            check=_row_linear(batch, min(rows, 4096), columns, logits),
        )
        yield OpShape(
            "row_linear_w8",
            f"decode x{batch}: {name} {rows} x {columns}",
            _row_linear_w8(batch, rows, columns, logits),
            products=batch * rows * columns,
            reads=True,
            check=_row_linear_w8(batch, min(rows, 4096), columns, logits),
        )
    for name, (rows, columns) in _ar_matrices(ar).items():
        adds = name in ("attention out", "down")
        yield OpShape(
            "row_linear_add" if adds else "norm_row_linear",
            f"decode x{batch}: {name} {rows} x {columns}",
            _row_linear_add(batch, rows, columns) if adds else _norm_row_linear(batch, name, rows, columns),
            products=batch * rows * columns,
            reads=True,
        )
    context = config.image_tokens.tokens_per_image // 2 + PREFILL
    yield OpShape(
        "paged_decode_attention",
        f"decode x{batch}: {context} positions",
        lambda dtype: _paged_attention(ar, batch, context, dtype),
        products=2 * batch * context * ar.query_size,
        moved=2 * batch * (context * ar.kv_size + ar.query_size),
        reads=True,
    )
    yield OpShape(
        "decode_attention",
        f"decode x{batch}: {context} positions",
        lambda dtype: _decode_attention(ar, batch, context, dtype),
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
        lambda dtype: _prompt_attention(ar, PREFILL, dtype),
        products=PREFILL * (PREFILL + 1) * ar.query_size,  # half of what attends to every position
        moved=2 * PREFILL * (ar.query_size + ar.kv_size),
    )


def _ar_rows(ar: ARConfig, rows: int, label: str) -> Iterator[OpShape]:
    """The ops that treat each token alone."""
    hidden, packed = ar.hidden_size, ar.query_size + 2 * ar.kv_size

    def norm(dtype: torch.dtype) -> Case:
        x, residual = random(1, rows, hidden, dtype=dtype), random(2, rows, hidden, dtype=dtype)
        return Case(
            "", (x, random(3, hidden, dtype=dtype), EPS), {"residual": residual}, written=("residual",)
        )

    yield OpShape("rms_norm", f"{label}: {hidden} wide, residual", norm, moved=4 * rows * hidden + hidden)
    yield OpShape(
        "qk_norm_rope_append",
        f"{label}: {ar.num_heads}+2x{ar.num_kv_heads} heads of {ar.head_dim}",
        lambda dtype: _append(ar, rows, dtype),
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
        weight = random(2, rows, columns, dtype=dtype, scale=columns**-0.5)
        out = {"out": torch.zeros(batch, rows)} if logits else {}
        return Case("", (random(1, batch, columns, dtype=dtype), weight), out, written=tuple(out))

    return make


def _row_linear_w8(batch: int, rows: int, columns: int, logits: bool) -> Make:
    def make(dtype: torch.dtype) -> Case:
        generator = torch.Generator().manual_seed(2)
        weight = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
        scale = torch.full((rows,), columns**-0.5 / 127)
        out = {"out": torch.zeros(batch, rows)} if logits else {}
        return Case("", (random(1, batch, columns, dtype=dtype), weight, scale), out, written=tuple(out))

    return make


def _norm_row_linear(batch: int, name: str, rows: int, columns: int) -> Make:
    def make(dtype: torch.dtype) -> Case:
        x, norm_weight = random(1, batch, columns, dtype=dtype), random(3, columns, dtype=dtype)
        weight = random(2, rows, columns, dtype=dtype, scale=columns**-0.5)
        return Case("", (x, norm_weight, EPS, weight), {"gated": name == "gate|up"})

    return make


def _row_linear_add(batch: int, rows: int, columns: int) -> Make:
    def make(dtype: torch.dtype) -> Case:
        weight = random(2, rows, columns, dtype=dtype, scale=columns**-0.5)
        x, residual = random(1, batch, columns, dtype=dtype), random(3, batch, rows, dtype=dtype)
        return Case("", (x, weight, residual), written=(2,))

    return make


def _append(ar: ARConfig, tokens: int, dtype: torch.dtype) -> Case:
    pages = -(-tokens // DEFAULT_PAGE_SIZE)
    shape = (pages, ar.num_kv_heads, DEFAULT_PAGE_SIZE, ar.head_dim)
    angles = random(2, 1024, ar.head_dim // 2, scale=3.0)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    qkv = random(1, tokens, ar.query_size + 2 * ar.kv_size, dtype=dtype)
    weights = [random(seed, ar.head_dim, dtype=dtype) for seed in (3, 4)]
    caches = [torch.zeros(shape, dtype=dtype) for _ in range(2)]
    places = int32(range(tokens))
    return Case("", (qkv, *weights, table, places, places.clone(), *caches, EPS), written=(6, 7))


def _paged_attention(ar: ARConfig, batch: int, context: int, dtype: torch.dtype) -> Case:
    blocks = -(-context // DEFAULT_PAGE_SIZE)
    order = torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(9))
    shape = (batch * blocks, ar.num_kv_heads, DEFAULT_PAGE_SIZE, ar.head_dim)
    caches = [random(seed, *shape, dtype=dtype) for seed in (1, 2)]
    table = order.to(torch.int32).reshape(batch, blocks)
    q = random(3, batch, ar.num_heads, ar.head_dim, dtype=dtype)
    return Case("", (q, *caches, table, int32([context] * batch), ar.head_dim**-0.5))


def _prompt_attention(ar: ARConfig, tokens: int, dtype: torch.dtype) -> Case:
    _, *caches, table, lengths, scale = _paged_attention(ar, 1, tokens, dtype).arguments
    q = random(3, tokens, ar.num_heads, ar.head_dim, dtype=dtype)
    return Case("", (q, *caches, table, int32([0, tokens]), lengths, scale))


def _decode_attention(ar: ARConfig, batch: int, context: int, dtype: torch.dtype) -> Case:
    """A token at the last of the positions, whose place is written anew by each call."""
    qkv, *weights, cos_sin_cache = _append(ar, batch, dtype).arguments[:4]
    _, *caches, table, lengths, scale = _paged_attention(ar, batch, context, dtype).arguments
    slot_mapping = table[:, -1] * DEFAULT_PAGE_SIZE + (context - 1) % DEFAULT_PAGE_SIZE
    token = (qkv, *weights, cos_sin_cache, lengths - 1, slot_mapping)
    return Case("", (*token, *caches, table, lengths, EPS, scale), written=(6, 7))


def _sampling(config: ModelConfig, batch: int) -> Case:
    codes, sampling = config.image_tokens.num_image_tokens, SamplingParams()
    top_k = sampling.top_k_for(codes, config.ar.vocab_size)
    rows = (torch.ones(batch), int32([top_k] * batch), torch.full((batch,), sampling.top_p))
    return Case("", (random(1, batch, codes, scale=3.0), *rows, torch.arange(batch), int32(range(batch))))


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
