"""Every op at the model's own shapes: inputs to time it on, and what it must move and compute there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.ar.kv_cache import DEFAULT_PAGE_SIZE
from blip3o_rt.bench.work import FLOPS_PER_PRODUCT, Work
from blip3o_rt.config import ARConfig, DiTConfig, ModelConfig, VAEConfig
from blip3o_rt.params import SamplingParams
from blip3o_rt.quantisation import E4M3
from blip3o_rt.vae.layout import GATED_EXPANSION
from blip3o_rt.validate.case import Case, int32, random

PREFILL = 64  # tokens of a prompt
EPS = 1e-6
BOTH = (torch.float32, torch.bfloat16)
FP32 = (torch.float32,)
Make = Callable[[torch.dtype], Case]


@dataclass(frozen=True)
class OpShape:
    """An op at one of the model's shapes.

    make: the inputs in a dtype. moved: elements of the activations' dtype, read or written, if not those of
    all inputs and the result. reads: little of that is written. products: multiply-adds. check: smaller
    inputs for the comparison with float64, where the shape itself is large.
    """

    op: str
    label: str
    make: Make
    products: int = 0
    moved: int | None = None
    reads: bool = False
    dtypes: tuple[torch.dtype, ...] = BOTH
    check: Make | None = None

    def work(self, case: Case, result: Tensor) -> Work:
        """Bytes read and written, and operations, of one call."""
        flops = FLOPS_PER_PRODUCT * self.products
        if self.moved is not None:
            return Work(self.moved * case.arguments[0].element_size(), flops)
        tensors = [*case.arguments, *case.options.values()]
        # What is updated in place is read and written; the result may be one of the arguments.
        written = [case.arguments[w] if isinstance(w, int) else case.options[w] for w in case.written]
        outputs = written or [result]
        return Work(sum(t.numel() * t.element_size() for t in (*tensors, *outputs) if _is_tensor(t)), flops)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def op_shapes(config: ModelConfig, batches: Sequence[int]) -> Iterator[OpShape]:
    """All ops, decoding at each batch size; what the model does not have is left out."""
    for batch in batches:
        yield from _decoding(config, batch)
    yield from _prefill(config.ar)
    yield from _dit(config)
    yield from _vae(config)
    if config.ta_tok is not None:
        tokens, width, codes = config.ta_tok.tokens, config.ta_tok.bottleneck_dim, config.ta_tok.codebook_size
        yield OpShape(
            "nearest_code",
            f"{tokens} tokens, {codes} codes of {width}",
            lambda _: Case("", (random(1, tokens, width), F.normalize(random(2, codes, width), dim=1))),
            products=tokens * codes * width,
            reads=True,
            dtypes=FP32,
            check=lambda _: Case("", (random(1, 40, width), F.normalize(random(2, 4096, width), dim=1))),
        )


# Decoder


def _decoding(config: ModelConfig, batch: int) -> Iterator[OpShape]:
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
            "row_linear_int8",
            f"decode x{batch}: {name} {rows} x {columns}",
            _row_linear_int8(batch, rows, columns, logits),
            products=batch * rows * columns,
            reads=True,
            check=_row_linear_int8(batch, min(rows, 4096), columns, logits),
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
        "advance_rows", f"decode x{batch}: {context} positions", lambda _: _rows(batch, context), dtypes=FP32
    )


def _prefill(ar: ARConfig) -> Iterator[OpShape]:
    yield from _ar_rows(ar, PREFILL, f"prompt of {PREFILL}")
    for name, (rows, columns) in _ar_matrices(ar).items():
        yield OpShape(
            "linear",
            f"prompt of {PREFILL}: {name} {rows} x {columns}",
            _linear(PREFILL, rows, columns),
            products=PREFILL * rows * columns,
            check=_linear(PREFILL, min(rows, 1200), columns),
        )
        yield OpShape(
            "linear_int8",
            f"prompt of {PREFILL}: {name} {rows} x {columns}",
            _row_linear_int8(PREFILL, rows, columns, False),
            products=PREFILL * rows * columns,
            check=_row_linear_int8(PREFILL, min(rows, 1200), columns, False),
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


def _linear(tokens: int, rows: int, columns: int) -> Make:
    return lambda dtype: Case(
        "",
        (
            random(1, tokens, columns, dtype=dtype),
            random(2, rows, columns, dtype=dtype, scale=columns**-0.5),
            random(3, rows, dtype=dtype),
        ),
    )


def _row_linear_int8(batch: int, rows: int, columns: int, logits: bool) -> Make:
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
    qkv, *weights, rope_table = _append(ar, batch, dtype).arguments[:4]
    _, *caches, table, lengths, scale = _paged_attention(ar, batch, context, dtype).arguments
    slots = table[:, -1] * DEFAULT_PAGE_SIZE + (context - 1) % DEFAULT_PAGE_SIZE
    token = (qkv, *weights, rope_table, lengths - 1, slots)
    return Case("", (*token, *caches, table, lengths, EPS, scale), written=(6, 7))


def _sampling(config: ModelConfig, batch: int) -> Case:
    codes, sampling = config.image_tokens.num_image_tokens, SamplingParams()
    top_k = sampling.top_k_for(codes, config.ar.vocab_size)
    rows = (torch.ones(batch), int32([top_k] * batch), torch.full((batch,), sampling.top_p))
    return Case("", (random(1, batch, codes, scale=3.0), *rows, torch.arange(batch), int32(range(batch))))


def _rows(batch: int, context: int) -> Case:
    """Rows with room for more calls than are timed; what is full stays as it is."""
    max_blocks = 2 * context // DEFAULT_PAGE_SIZE
    places, counts = torch.arange(batch) * max_blocks * DEFAULT_PAGE_SIZE, int32([context] * batch)
    kept = torch.zeros(batch * max_blocks * DEFAULT_PAGE_SIZE, dtype=torch.int64)
    block_table = int32(range(batch * max_blocks)).view(batch, max_blocks)
    state = (counts, counts.clone(), places, kept, counts.clone(), counts.clone())
    draws, first_ids = torch.arange(batch), torch.arange(batch)
    return Case("", (draws, first_ids, block_table, DEFAULT_PAGE_SIZE, *state), written=(4, 5, 6, 7, 8, 9))


# Diffusion transformer


def _dit(config: ModelConfig) -> Iterator[OpShape]:
    dit = config.dit
    side, width = dit.sample_size // dit.patch_size, dit.width
    tokens = side**2
    label = f"dit: 2 x {tokens} tokens of {width}"

    def rows(seed: int, dtype: torch.dtype) -> Tensor:
        return random(seed, 2, tokens, width, dtype=dtype)

    yield OpShape(
        "layer_norm_modulate",
        label,
        lambda dtype: Case("", (rows(1, dtype), random(2, width), random(3, width), dit.norm_eps)),
    )
    yield OpShape(
        "gated_add",
        label,
        lambda dtype: Case("", (rows(1, dtype), rows(2, dtype), random(3, width)), written=(0,)),
    )
    for name, values in (("int8", torch.int8), ("e4m3", E4M3)):
        yield OpShape(
            "quantise_rows",
            f"{label} to {name}",
            _quantised_rows(2 * tokens, width, values),
            moved=2 * tokens * width,
        )
    yield OpShape(
        "scale_product",
        label,
        lambda dtype: _scaled(2 * tokens, width, dtype),
        check=lambda dtype: _scaled(min(2 * tokens, 64), width, dtype),
    )
    for name, outputs, inputs in (
        ("q|k|v", 3 * width, width),
        ("attention out", width, width),
        ("feed-forward in", 2 * dit.mlp_hidden, width),
        ("feed-forward out", width, dit.mlp_hidden),
    ):
        yield OpShape(
            "linear",
            f"dit: 2 x {tokens} tokens, {name} {outputs} x {inputs}",
            _linear(2 * tokens, outputs, inputs),
            products=2 * tokens * outputs * inputs,
            check=_linear(min(2 * tokens, 64), min(outputs, 1200), inputs),
        )
    yield OpShape(
        "linear_fp8",
        f"dit: 2 x {tokens} x {width} to {3 * width}",
        lambda dtype: _scaled_rows(2 * tokens, width, 3 * width, dtype),
        products=2 * tokens * width * 3 * width,
        check=lambda dtype: _scaled_rows(min(2 * tokens, 64), width, min(3 * width, 256), dtype),
    )
    yield OpShape(
        "relu_linear_attention",
        f"dit: 2 x {tokens} tokens, {dit.num_heads} heads of {dit.head_dim}",
        lambda dtype: _linear_attention(2, tokens, dit.num_heads, dit.head_dim, dtype, norm=dit.qk_norm),
        products=2 * tokens * dit.num_heads * 2 * (dit.head_dim + 1) * dit.head_dim,
    )
    keys = config.image_tokens.tokens_per_image + 1
    yield OpShape(
        "cross_attention",
        f"dit: {tokens} queries, {keys} keys, {dit.num_cross_heads} heads of {dit.cross_head_dim}",
        lambda dtype: _cross_attention(dit, tokens, keys, dtype),
        products=2 * tokens * keys * dit.cross_width,
    )
    yield OpShape(
        "depthwise_glu",
        f"dit: 2 x {side} x {side}, 2 x {dit.mlp_hidden} channels",
        _depthwise_glu(2, side, dit.mlp_hidden),
        products=2 * tokens * 9 * 2 * dit.mlp_hidden,
        check=_depthwise_glu(1, min(side, 8), dit.mlp_hidden),
    )
    channels = config.vae.latent_channels
    yield OpShape(
        "guided_euler_step",
        f"dit: {channels} x {dit.sample_size} x {dit.sample_size}",
        lambda _: _euler(channels, dit.sample_size),
        dtypes=FP32,
    )


def _linear_attention(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, *, norm: bool
) -> Case:
    width = heads * head_dim
    weights = [1 + random(seed, width, scale=0.3) for seed in (2, 3)]
    norms = tuple(weight.to(dtype) for weight in weights) if norm else (None, None)
    return Case("", (random(1, batch, tokens, 3 * width, dtype=dtype), *norms, heads, 1e-5))


def _quantised_rows(rows: int, width: int, values: torch.dtype) -> Make:
    def make(dtype: torch.dtype) -> Case:
        return Case("", (random(1, rows, width, dtype=dtype), torch.zeros(rows)), {"dtype": values}, (1,))

    return make


def _scaled(rows: int, columns: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(1)
    product = torch.randint(-(2**24), 2**24, (rows, columns), generator=generator, dtype=torch.int32)
    scales = {"row_scale": random(2, rows).abs() / 127, "bias": random(3, columns, dtype=dtype)}
    out = torch.zeros(rows, columns, dtype=dtype)
    return Case("", (product, random(4, columns).abs() / 127), {**scales, "out": out}, written=("out",))


def _scaled_rows(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Case:
    x, weight = random(1, rows, inputs).to(E4M3), random(2, outputs, inputs).to(E4M3)
    row_scale, scale = random(3, rows).abs() / 448, random(4, outputs).abs() / 448
    out = torch.zeros(rows, outputs, dtype=dtype)
    return Case("", (x, row_scale, weight, scale), {"out": out}, written=("out",))


def _cross_attention(dit: DiTConfig, tokens: int, keys: int, dtype: torch.dtype) -> Case:
    shape = (dit.num_cross_heads, keys, dit.cross_head_dim)
    key, value = random(2, *shape, dtype=dtype), random(3, *shape, dtype=dtype)
    weight = random(4, dit.cross_width, dtype=dtype) if dit.qk_norm else None
    return Case("", (random(1, tokens, dit.cross_width, dtype=dtype), key, value, weight, 1e-5))


def _depthwise_glu(batch: int, side: int, hidden: int) -> Make:
    def make(dtype: torch.dtype) -> Case:
        biases = [random(seed, 2 * hidden, dtype=dtype) for seed in (2, 4)]
        weight = random(3, 2 * hidden, 1, 3, 3, dtype=dtype, scale=1 / 3)
        x = random(1, batch, side, side, 2 * hidden, dtype=dtype)
        return Case("", (x, biases[0], weight, biases[1]))

    return make


def _euler(channels: int, side: int) -> Case:
    latent, prediction = random(1, 1, channels, side, side), random(2, 2, channels, side, side)
    return Case("", (latent, prediction, torch.tensor(2.0), torch.tensor(-0.1)))


# Autoencoder


def _vae(config: ModelConfig) -> Iterator[OpShape]:
    """Norms at the finest and the coarsest resolution, and the attention blocks where there are any."""
    stages = config.vae.decoder_stages
    sides = [config.image_size >> index for index in range(len(stages))]
    ends = {(stages[i].channels, sides[i]) for i in (0, -1) if stages[i].layers}
    for channels, side in sorted(ends, reverse=True):
        yield OpShape(
            "channel_rms_norm",
            f"vae: {side} x {side}, {channels} channels, residual",
            _channel_norm(side, channels),
            moved=3 * side**2 * channels + 2 * channels,
            check=_channel_norm(min(side, 64), channels),
        )
    upsampled = [i for i, stage in enumerate(stages[:-1]) if stage.layers]
    for i in upsampled[:1]:
        fine, coarse = stages[i].channels, stages[i + 1].channels
        yield OpShape(
            "add_pixel_shuffle",
            f"vae: {sides[i]} x {sides[i]}, {coarse} to {fine} channels",
            _pixel_shuffle(sides[i], coarse, fine),
            moved=sides[i] ** 2 * (2 * fine + coarse // 4),
            check=_pixel_shuffle(min(sides[i], 64), coarse, fine),
        )
        yield OpShape(
            "add_pixel_unshuffle",
            f"vae: {sides[i]} x {sides[i]}, {fine} to {coarse} channels",
            _pixel_unshuffle(sides[i], fine, coarse),
            moved=sides[i] ** 2 * (fine + coarse // 2),
            check=_pixel_unshuffle(min(sides[i], 64), fine, coarse),
        )
        yield OpShape(
            "convolution_silu",
            f"vae: {sides[i]} x {sides[i]}, {fine} channels",
            _convolution_silu(sides[i], fine),
            products=9 * (sides[i] * fine) ** 2,
            check=_convolution_silu(min(sides[i], 32), fine),
        )
    attending = [i for i, stage in enumerate(stages) if stage.block == "EfficientViTBlock" and stage.layers]
    for i in sorted({attending[0], attending[-1]} if attending else ()):
        yield from _attention_block(config.vae, stages[i].channels, sides[i])


def _attention_block(vae: VAEConfig, channels: int, side: int) -> Iterator[OpShape]:
    head_dim, hidden = vae.attention_head_dim, GATED_EXPANSION * channels
    heads = channels // head_dim
    yield OpShape(
        "relu_linear_attention",
        f"vae: {side} x {side}, {heads} heads of {head_dim}",
        lambda dtype: _linear_attention(1, side**2, heads, head_dim, dtype, norm=False),
        products=side**2 * heads * 2 * (head_dim + 1) * head_dim,
        check=lambda dtype: _linear_attention(1, min(side, 32) ** 2, heads, head_dim, dtype, norm=False),
    )
    yield OpShape(
        "depthwise_glu",
        f"vae: {side} x {side}, 2 x {hidden} channels",
        _depthwise_glu(1, side, hidden),
        products=side**2 * 9 * 2 * hidden,
        check=_depthwise_glu(1, min(side, 8), hidden),
    )


def _pixel_shuffle(side: int, coarse: int, fine: int) -> Make:
    def make(dtype: torch.dtype) -> Case:
        result = random(1, 1, side, side, fine, dtype=dtype)
        return Case("", (result, random(2, 1, side // 2, side // 2, coarse, dtype=dtype)), written=(0,))

    return make


def _pixel_unshuffle(side: int, fine: int, coarse: int) -> Make:
    def make(dtype: torch.dtype) -> Case:
        result = random(1, 1, side // 2, side // 2, coarse, dtype=dtype)
        return Case("", (result, random(2, 1, side, side, fine, dtype=dtype)), written=(0,))

    return make


def _convolution_silu(side: int, channels: int) -> Make:
    def make(dtype: torch.dtype) -> Case:
        x, bias = random(1, 1, side, side, channels, dtype=dtype), random(3, channels, dtype=dtype)
        weight = random(2, channels, 3, 3, channels, dtype=dtype, scale=(9 * channels) ** -0.5)
        return Case("", (x, weight, bias))

    return make


def _channel_norm(side: int, channels: int) -> Make:
    def make(dtype: torch.dtype) -> Case:
        shape = (1, side, side, channels)
        x, residual = random(1, *shape, dtype=dtype), random(2, *shape, dtype=dtype)
        weights = [random(seed, channels, dtype=dtype) for seed in (3, 4)]
        return Case("", (x, *weights, EPS), {"residual": residual, "out": x}, written=("out",))

    return make
