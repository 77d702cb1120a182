"""Every op at the model's own shapes: inputs to time it on, and what it must move and compute there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blip3o_rt.ar.kv_cache import DEFAULT_PAGE_SIZE
from blip3o_rt.config import ARConfig, ModelConfig
from blip3o_rt.measure.bench.work import FLOPS_PER_PRODUCT, Work
from blip3o_rt.measure.cases.attention import (
    append_case,
    cross_case,
    decode_case,
    paged_case,
    prefill_case,
    relu_case,
)
from blip3o_rt.measure.cases.image import (
    codebook,
    convolution_case,
    glu_case,
    separable_case,
    shuffle_case,
    unshuffle_case,
)
from blip3o_rt.measure.cases.linear import add_case, gated_case, norm_case, product_case
from blip3o_rt.measure.cases.norm import add_norm_case, channel_case, keep_case, residual_case
from blip3o_rt.measure.cases.quantized import fp8_case, integers_case, quantize_case, quantized, scale_case
from blip3o_rt.measure.cases.sampling import euler_case, sample_case
from blip3o_rt.measure.validate.case import Case, int32, random
from blip3o_rt.ops.dtypes import E4M3
from blip3o_rt.params import SamplingParams
from blip3o_rt.vae.layout import GATED_EXPANSION

BOTH, FP32 = (torch.float32, torch.bfloat16), (torch.float32,)
PREFILL = 64  # tokens of a prompt
ADDED = ("attention out", "down")  # products that are added to the residual


@dataclass(frozen=True)
class OpShape:
    """An op at one of the model's shapes.

    Attributes:
        case: makes the inputs, of a label, a dtype and the sizes.
        limits: of the first sizes where results are compared with float64, which takes longer.
        products: multiply-adds.
        moved: elements of the activations' dtype, read or written, if not those of all inputs and the result.
        reads: whether little of that is written.
    """

    op: str
    label: str
    case: Callable[..., Case]
    sizes: tuple[Any, ...]
    limits: tuple[int, ...] = ()
    products: int = 0
    moved: int | None = None
    reads: bool = False
    dtypes: tuple[torch.dtype, ...] = BOTH

    def make(self, dtype: torch.dtype) -> Case:
        """The inputs to time it on."""
        return self.case("", dtype, *self.sizes)

    def make_small(self, dtype: torch.dtype) -> Case:
        """The inputs to check it on."""
        few = [min(size, limit) for size, limit in zip(self.sizes, self.limits, strict=False)]
        return self.case("", dtype, *few, *self.sizes[len(few) :])

    def work(self, case: Case, result: Tensor) -> Work:
        """Bytes read and written, and operations, of one call."""
        flops = FLOPS_PER_PRODUCT * self.products
        if self.moved is not None:
            return Work(self.moved * case.arguments[0].element_size(), flops)
        # What is updated in place is read and written; the result may be one of the arguments.
        written = [case.arguments[w] if isinstance(w, int) else case.options[w] for w in case.written]
        tensors = [*case.arguments, *case.options.values(), *(written or [result])]
        return Work(sum(t.nbytes for t in tensors if isinstance(t, Tensor)), flops)


def product(
    op: str, label: str, case: Callable[..., Case], *sizes: int, limits: tuple[int, ...] = (), **options: Any
) -> OpShape:
    """An op that multiplies two matrices: rows of the one, rows of the other, columns of both."""
    return OpShape(op, label, case, sizes, limits, products=math.prod(sizes), **options)


def op_shapes(config: ModelConfig, batches: Sequence[int]) -> Iterator[OpShape]:
    """All ops, decoding at each batch size; what the model does not have is left out."""
    for batch in batches:
        yield from decoding(config, batch)
    yield from prompt(config.ar)
    yield from denoising_step(config)
    yield from image_decoding(config)
    if config.ta_tok is not None:
        tokens, codes, width = config.ta_tok.tokens, config.ta_tok.codebook_size, config.ta_tok.bottleneck_dim
        label, limits = f"{tokens} tokens, {codes} codes of {width}", (40, 4096)
        yield product(
            "nearest_code", label, _codes, tokens, codes, width, limits=limits, reads=True, dtypes=FP32
        )


# The autoregressive stage


def decoding(config: ModelConfig, batch: int) -> Iterator[OpShape]:
    """A token of each of `batch` images."""
    ar, images, label = config.ar, config.image_tokens, f"decode x{batch}"
    sizes: tuple[Any, ...]
    plain: Callable[..., Case]
    w8: Callable[..., Case]
    yield from _token_rows(ar, batch, label)
    matrices, codes = _matrices(ar), images.num_image_tokens
    for name, (rows, columns) in {**matrices, "head, image rows": (codes, ar.hidden_size)}.items():
        what, sizes = f"{label}: {name} {rows} x {columns}", (batch, rows, columns)
        plain, w8 = product_case, _w8
        if name not in matrices:
            plain, w8 = _logits, partial(_w8, logits=True)
        yield product("row_linear", what, plain, *sizes, limits=(batch, 4096), reads=True)
        yield product("row_linear_w8", what, w8, *sizes, limits=(batch, 4096), reads=True)
    for name, (rows, columns) in matrices.items():
        what = f"{label}: {name} {rows} x {columns}"
        if name in ADDED:
            yield product("row_linear_add", what, add_case, batch, rows, columns, reads=True)
        else:
            case = partial(norm_case, gated=name == "gate|up")
            yield product("norm_row_linear", what, case, batch, rows, columns, reads=True)
    context = images.tokens_per_image // 2 + PREFILL
    what, sizes = f"{label}: {context} positions", ([context] * batch, *_heads(ar))
    products, cached = 2 * batch * context * ar.query_size, context * ar.kv_size
    moved = 2 * batch * (cached + ar.query_size)
    yield OpShape(
        "paged_decode_attention", what, paged_case, sizes, products=products, moved=moved, reads=True
    )
    moved += 2 * batch * ar.kv_size
    yield OpShape("decode_attention", what, decode_case, sizes, products=products, moved=moved, reads=True)
    top_k = SamplingParams().top_k_for(codes, ar.vocab_size)
    what, sizes = f"{label}: {codes} logits", (batch, codes, top_k)
    yield OpShape("sample_tokens", what, _sampling, sizes, reads=True, dtypes=FP32)
    what = f"{label}: {context} positions, embeddings of {ar.hidden_size}"
    sizes = batch, context, images.tokens_per_image, ar.hidden_size
    yield OpShape("advance_windows", what, _windows, sizes)
    what, sizes = f"{label}: {ar.hidden_size} wide", (batch, ar.hidden_size, batch)
    yield OpShape("rms_norm_keep", what, keep_case, sizes)


def prompt(ar: ARConfig) -> Iterator[OpShape]:
    """Reading a prompt."""
    label = f"prompt of {PREFILL}"
    yield from _token_rows(ar, PREFILL, label)
    for name, (rows, columns) in _matrices(ar).items():
        what, sizes, limits = f"{label}: {name} {rows} x {columns}", (PREFILL, rows, columns), (PREFILL, 1200)
        yield product("linear", what, _biased, *sizes, limits=limits)
        yield product("linear_w8a16", what, _w8, *sizes, limits=limits)
    yield OpShape(
        "paged_prefill_attention",
        f"{label}: {ar.num_heads} heads on {ar.num_kv_heads}",
        prefill_case,
        ([PREFILL], [PREFILL], *_heads(ar)),
        products=PREFILL * (PREFILL + 1) * ar.query_size,  # half of what attends to every position
        moved=2 * PREFILL * (ar.query_size + ar.kv_size),
    )


def _token_rows(ar: ARConfig, rows: int, label: str) -> Iterator[OpShape]:
    """The ops that treat each token alone."""
    hidden, width = ar.hidden_size, ar.intermediate_size
    what, moved = f"{label}: {hidden} wide, residual", 4 * rows * hidden + hidden
    yield OpShape("rms_norm", what, residual_case, (rows, hidden), moved=moved)
    what = f"{label}: {ar.num_heads}+2x{ar.num_kv_heads} heads of {ar.head_dim}"
    sizes = *_heads(ar), list(range(rows)), -(-rows // DEFAULT_PAGE_SIZE)
    moved = 2 * rows * (ar.query_size + 2 * ar.kv_size)
    yield OpShape("qk_norm_rope_append", what, append_case, sizes, moved=moved)
    yield OpShape("silu_mul", f"{label}: 2 x {width}", _rows, (rows, 2 * width))


def _heads(ar: ARConfig) -> tuple[int, int, int, int]:
    return ar.num_heads, ar.num_kv_heads, ar.head_dim, DEFAULT_PAGE_SIZE


def _matrices(ar: ARConfig) -> dict[str, tuple[int, int]]:
    return {
        "qkv": (ar.query_size + 2 * ar.kv_size, ar.hidden_size),
        "attention out": (ar.hidden_size, ar.query_size),
        "gate|up": (2 * ar.intermediate_size, ar.hidden_size),
        "down": (ar.hidden_size, ar.intermediate_size),
    }


# The diffusion transformer


def denoising_step(config: ModelConfig) -> Iterator[OpShape]:
    """A step of text-to-image, both branches of guidance."""
    dit = config.dit
    sizes: tuple[Any, ...]
    side, width, hidden = dit.sample_size // dit.patch_size, dit.width, dit.mlp_hidden
    tokens = side**2
    rows, label = 2 * tokens, f"dit: 2 x {tokens} tokens of {width}"
    yield OpShape("layer_norm_modulate", label, _modulated, (tokens, width, dit.norm_eps))
    yield OpShape("gated_add", label, _gated, (tokens, width))
    case = partial(add_norm_case, gated=True)
    yield OpShape("add_layer_norm_modulate", label, case, (tokens, width), moved=4 * rows * width)
    for name, values in (("int8", torch.int8), ("e4m3", E4M3)):
        sizes = rows, width, values
        yield OpShape("quantize_rows", f"{label} to {name}", _quantized, sizes, moved=rows * width)
    what, sizes, limits = f"dit: {rows} x {width} x {3 * width}", (rows, 3 * width, width), (64, 256)
    yield product("integer_product", what, _integers, *sizes, limits=limits, dtypes=FP32)
    yield OpShape("scale_product", label, scale_case, (rows, width), (64,))
    for name, outputs, inputs in (
        ("q|k|v", 3 * width, width),
        ("attention out", width, width),
        ("feed-forward in", 2 * hidden, width),
        ("feed-forward out", width, hidden),
    ):
        what = f"dit: 2 x {tokens} tokens, {name} {outputs} x {inputs}"
        yield product("linear", what, _biased, rows, outputs, inputs, limits=(64, 1200))
    what = f"dit: 2 x {tokens} tokens, attention out {width} x {width}"
    yield product("linear_gated_add", what, gated_case, rows, width, width, limits=(64, 1200))
    what = f"dit: 2 x {tokens} x {width} to {3 * width}"
    yield product("linear_fp8", what, _fp8, rows, 3 * width, width, limits=limits)
    what, sizes = f"dit: 2 x {tokens} tokens, {dit.num_heads} heads of {dit.head_dim}", (2, tokens)
    yield _relu_attention(what, *sizes, dit.num_heads, dit.head_dim, norm=dit.qk_norm)
    keys, heads = config.image_tokens.tokens_per_image + 1, (dit.num_cross_heads, dit.cross_head_dim)
    what = f"dit: {tokens} queries, {keys} keys, {heads[0]} heads of {heads[1]}"
    case, products = partial(cross_case, norm=dit.qk_norm), 2 * tokens * keys * dit.cross_width
    yield OpShape("cross_attention", what, case, (tokens, keys, *heads), products=products)
    what, sizes = f"dit: 2 x {side} x {side}, 2 x {hidden} channels", (2, side, side, hidden)
    yield OpShape("depthwise_glu", what, glu_case, sizes, (1, 8, 8), products=rows * 9 * 2 * hidden)
    channels, side = config.vae.latent_channels, dit.sample_size
    what = f"dit: {channels} x {side} x {side}"
    yield OpShape("guided_euler_step", what, _euler, ((channels, side, side),), dtypes=FP32)


def _relu_attention(
    label: str, batch: int, tokens: int, heads: int, head_dim: int, *limits: int, norm: bool
) -> OpShape:
    case, products = partial(relu_case, norm=norm), batch * tokens * heads * 2 * (head_dim + 1) * head_dim
    sizes = batch, tokens, heads, head_dim
    return OpShape("relu_linear_attention", label, case, sizes, limits, products=products)


# The autoencoder


def image_decoding(config: ModelConfig) -> Iterator[OpShape]:
    """Norms at the finest and the coarsest resolution, and the attention blocks where there are any."""
    vae, stages = config.vae, config.vae.decoder_stages
    sizes: tuple[int, ...]
    sides = [config.image_size >> index for index in range(len(stages))]
    ends = {(stages[i].channels, sides[i]) for i in (0, -1) if stages[i].layers}
    for channels, side in sorted(ends, reverse=True):
        label = f"vae: {side} x {side}, {channels} channels"
        sizes, moved = (side, side, channels), 3 * side**2 * channels + 2 * channels
        yield OpShape("channel_rms_norm", f"{label}, residual", _in_place, sizes, (64, 64), moved=moved)
    upsampled = [i for i, stage in enumerate(stages[:-1]) if stage.layers]
    for i in upsampled[:1]:
        side, fine, coarse = sides[i], stages[i].channels, stages[i + 1].channels
        label, area, limits = f"vae: {side} x {side}", side**2, (64,)
        what, sizes = f"{label}, {coarse} to {fine} channels", (side, coarse, fine)
        yield OpShape(
            "add_pixel_shuffle",
            what,
            _square(shuffle_case),
            sizes,
            limits,
            moved=area * (2 * fine + coarse // 4),
        )
        what, sizes = f"{label}, {fine} to {coarse} channels", (side, fine, coarse)
        yield OpShape(
            "add_pixel_unshuffle",
            what,
            _square(unshuffle_case),
            sizes,
            limits,
            moved=area * (fine + coarse // 2),
        )
        what, sizes, products = f"{label}, {fine} channels", (side, fine, fine), 9 * area * fine**2
        yield OpShape("convolution_silu", what, _square(convolution_case), sizes, (32,), products=products)
    attending = [i for i, stage in enumerate(stages) if stage.block == "EfficientViTBlock" and stage.layers]
    for i in sorted({attending[0], attending[-1]} if attending else ()):
        side, channels, head_dim = sides[i], stages[i].channels, vae.attention_head_dim
        label, heads, hidden = f"vae: {side} x {side}", channels // head_dim, GATED_EXPANSION * channels
        what, sizes = f"{label}, {heads} heads of {head_dim}", (1, side**2, heads, head_dim)
        yield _relu_attention(what, *sizes, 1, 1024, norm=False)
        for kernel in stages[i].multiscales[:1]:
            what, case = f"{label}, {3 * heads} groups of {head_dim}", _square(separable_case)
            sizes, work = (side, 3 * channels, head_dim, kernel), 3 * channels * (kernel**2 + head_dim)
            yield OpShape("separable_convolution", what, case, sizes, (16,), products=side**2 * work)
        what, sizes, products = f"{label}, 2 x {hidden} channels", (1, side, side, hidden), 9 * 2 * hidden
        yield OpShape("depthwise_glu", what, glu_case, sizes, (1, 8, 8), products=side**2 * products)


# Cases, of a label, a dtype and sizes


def _rows(label: str, dtype: torch.dtype, *sizes: int) -> Case:
    return Case(label, (random(1, *sizes, dtype=dtype),))


def _biased(label: str, dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> Case:
    return product_case(label, dtype, rows, outputs, inputs, bias=random(3, outputs, dtype=dtype))


def _logits(label: str, dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> Case:
    return product_case(label, dtype, rows, outputs, inputs, out=torch.zeros(rows, outputs))


def _w8(
    label: str, dtype: torch.dtype, rows: int, outputs: int, inputs: int, *, logits: bool = False
) -> Case:
    out = {"out": torch.zeros(rows, outputs)} if logits else {}
    return Case(
        label, (random(1, rows, inputs, dtype=dtype), *quantized(2, outputs, inputs)), out, tuple(out)
    )


def _fp8(label: str, dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> Case:
    return fp8_case(label, dtype, rows, inputs, outputs)


def _integers(label: str, dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> Case:
    return integers_case(label, rows, inputs, outputs)


def _codes(label: str, dtype: torch.dtype, tokens: int, codes: int, width: int) -> Case:
    return Case(label, (random(1, tokens, width), codebook(codes, width)))


def _sampling(label: str, dtype: torch.dtype, batch: int, codes: int, top_k: int) -> Case:
    return sample_case(label, random(1, batch, codes, scale=3.0), 1.0, top_k, SamplingParams().top_p)


def _windows(label: str, dtype: torch.dtype, batch: int, context: int, tokens: int, width: int) -> Case:
    """Windows of one row, each of another token; an image whose tokens are all there stays at the last."""
    max_pages = -(-(context + tokens) // DEFAULT_PAGE_SIZE)
    first_slots = torch.arange(batch) * (tokens + 1)
    output_ids = torch.zeros((batch + 1) * (tokens + 1), dtype=torch.int64)
    page_table = int32(range(batch * max_pages)).view(batch, max_pages)
    counts = (int32([0] * batch), int32([context] * batch), first_slots, output_ids)
    sizes = (page_table, DEFAULT_PAGE_SIZE, tokens, 27)
    first_ids = torch.zeros(batch, dtype=torch.int64)
    arguments = (torch.arange(batch), int32(range(batch + 1)), first_ids, *sizes, *counts)
    written = (int32([0] * batch), int32([0] * batch))
    embedding, embedded = (random(seed, batch, width, dtype=dtype) for seed in (1, 2))
    options = {"embedding": embedding, "embedded": embedded}
    return Case(label, (*arguments, *written), options, (7, 8, 9, 10, 11, 12, "embedded"))


def _modulated(label: str, dtype: torch.dtype, tokens: int, width: int, eps: float) -> Case:
    return Case(label, (random(1, 2, tokens, width, dtype=dtype), random(2, width), random(3, width), eps))


def _gated(label: str, dtype: torch.dtype, tokens: int, width: int) -> Case:
    residual, x = (random(seed, 2, tokens, width, dtype=dtype) for seed in (1, 2))
    return Case(label, (residual, x, random(3, width)), written=(0,))


def _quantized(label: str, dtype: torch.dtype, rows: int, width: int, values: torch.dtype) -> Case:
    return quantize_case(label, random(1, rows, width, dtype=dtype), values)


def _euler(label: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> Case:
    return euler_case(label, shape, 2.0)


def _in_place(label: str, dtype: torch.dtype, height: int, width: int, channels: int) -> Case:
    """A norm with a residual, into its own input."""
    case = channel_case(label, dtype, 1, height, width, channels)
    return replace(case, options={**case.options, "out": case.arguments[0]}, written=("out",))


def _square(case: Callable[..., Case]) -> Callable[..., Case]:
    """The case of one square image, of its side and what else the case takes."""
    return lambda label, dtype, side, *sizes: case(label, dtype, 1, (side, side), *sizes)
