"""Cases of norms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from blip3o_rt.measure.validate.case import DTYPES, Case, copies, random
from blip3o_rt.measure.validate.finding import Finding, compare, compare_output
from blip3o_rt.ops.norm import layer_norm_modulate
from blip3o_rt.ops.registry import Op

EPS = 1e-6
CHANNEL_EPS = 1e-5


def residual_case(label: str, dtype: torch.dtype, rows: int, width: int) -> Case:
    """With a residual, which is updated."""
    arguments = random(1, rows, width, dtype=dtype), random(2, width, dtype=dtype), EPS
    return Case(label, arguments, {"residual": random(4, rows, width, dtype=dtype)}, written=("residual",))


def rms_norm_cases() -> Iterator[Case]:
    """Widths around the vector lengths, rows with gaps, each combination of bias and residual."""
    for dtype in DTYPES:
        for width in (1, 7, 16, 33, 128, 1030):
            both = residual_case(f"width {width}, residual, bias", dtype, 3, width)
            yield Case(f"width {width}", both.arguments)
            yield replace(both, options={"bias": random(3, width, dtype=dtype), **both.options})
        weight = random(2, 40, dtype=dtype)
        yield Case("one row of one dimension", (random(5, 40, dtype=dtype), weight, EPS))
        yield Case("no rows", (random(5, 0, 40, dtype=dtype), weight, EPS))
        yield Case("rows with gaps", (random(6, 5, 2, 40, dtype=dtype)[:, 1], weight, EPS))
        yield Case("many rows, three dimensions", (random(7, 2, 300, 40, dtype=dtype), weight, EPS))
        yield Case("large eps", (random(8, 2, 40, dtype=dtype, scale=1e-3), weight, 1e-2))
        out = random(9, 2, 40, dtype=dtype)
        yield Case("given out", (random(8, 2, 40, dtype=dtype), weight, EPS), {"out": out}, written=("out",))


def rms_norm_check(op: Op[Any, Any], case: Case, results: list[Tensor], exact: list[Tensor]) -> list[Finding]:
    """The updated residual is rounded before it is normed, so the norm is compared with that of what was
    written."""
    if "residual" not in case.written or results[1].shape != exact[1].shape:
        return compare(op, case, results, exact)
    (_, weight, eps), options = copies(case, widen=True)
    normed = op.reference(results[1].double(), weight, eps, bias=options.get("bias"))
    return [compare_output(op, results[0], normed), compare_output(op, results[1], exact[1], "residual")]


def keep_case(label: str, dtype: torch.dtype, rows: int, width: int, slots: int, begin: int = 0) -> Case:
    """Rows that go to slots in no order; rows with gaps unless begin is 0."""
    kept = random(4, slots, width + 2 * begin, dtype=dtype)[:, begin : begin + width]
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(3))[:rows]
    x, weight = random(1, rows, width, dtype=dtype), random(2, width, dtype=dtype)
    return Case(label, (x, weight, EPS, order, kept), written=(4,))


def rms_norm_keep_cases() -> Iterator[Case]:
    """Widths around the vector lengths, one row and many, all slots and few of them, a norm in place."""
    for dtype in DTYPES:
        for width in (1, 7, 16, 33, 128, 2056):
            yield keep_case(f"width {width}", dtype, 3, width, 5)
        for rows in (0, 1, 64):
            yield keep_case(f"{rows} rows", dtype, rows, 40, 64)
        yield keep_case("slots with gaps", dtype, 3, 40, 5, 8)
        yield keep_case("slots at odd places", dtype, 3, 40, 5, 3)
        out = random(5, 3, 40, dtype=dtype)
        yield replace(keep_case("given out", dtype, 3, 40, 5), options={"out": out}, written=(4, "out"))
        apart = keep_case("rows with gaps", dtype, 3, 40, 5)
        yield replace(apart, arguments=(random(6, 3, 2, 40, dtype=dtype)[:, 1], *apart.arguments[1:]))


def layer_norm_modulate_cases() -> Iterator[Case]:
    """Widths around the vector lengths, fp32 modulation of bf16 rows, means far from zero, constant rows."""
    for dtype in DTYPES:
        for width in (1, 7, 16, 33, 224, 1030):
            shift, scale = random(2, width, scale=0.5), random(3, width, scale=0.5)
            yield Case(f"width {width}", (random(1, 2, 3, width, dtype=dtype), shift, scale, EPS))
        shift, scale = random(2, 40), random(3, 40)
        narrow = shift.to(dtype), scale.to(dtype)
        x = random(4, 2, 5, 40, dtype=dtype)
        yield Case("modulation in the dtype of x", (x, *narrow, EPS))
        yield Case("rows with gaps", (random(5, 2, 5, 80, dtype=dtype)[..., 40:], shift, scale, EPS))
        yield Case("large eps", (random(6, 3, 40, dtype=dtype, scale=1e-3), shift, scale, 1e-2))
        yield Case("mean far from zero", (random(7, 3, 40, dtype=dtype) + 8, shift, scale, EPS))
        yield Case("constant rows", (torch.full((3, 40), 2.5, dtype=dtype), shift, scale, EPS))
        yield Case("many rows", (random(8, 2, 300, 40, dtype=dtype), shift, scale, EPS))
        for out_dtype in dict.fromkeys((dtype, torch.float32)):
            out = random(9, 2, 5, 40, dtype=out_dtype)
            yield Case(f"given out {out_dtype}", (x, shift, scale, EPS), {"out": out}, written=("out",))


def add_norm_case(
    label: str, dtype: torch.dtype, tokens: int, width: int, *, gated: bool, images: int = 2, least: int = 0
) -> Case:
    """As many images of the residual; the first `least` have a constant in the place of an x."""
    residual, x = random(1, images, tokens, width, dtype=dtype), random(2, images, tokens, width, dtype=dtype)
    options = {"gate": random(5, width)} if gated else {}
    if least:
        options["constant"] = random(6, width, dtype=dtype)
    vectors = random(3, width, scale=0.5), random(4, width, scale=0.5)
    return Case(label, (residual, x[least:], *vectors, EPS), options, (0,))


def add_layer_norm_modulate_cases() -> Iterator[Case]:
    """Widths around the vector lengths, gated and not, with a constant for the first image, wider results."""
    for dtype in DTYPES:
        for width in (1, 7, 33, 224, 1030):
            yield add_norm_case(f"width {width}, gated", dtype, 3, width, gated=True)
            yield add_norm_case(f"width {width}, constant", dtype, 3, width, gated=False, least=1)
        yield add_norm_case("one image", dtype, 5, 40, gated=False, images=1)
        yield add_norm_case("a constant and a gate", dtype, 5, 40, gated=True, images=3, least=1)
        yield add_norm_case("many rows", dtype, 300, 40, gated=True)
        yield add_norm_case("a constant alone", dtype, 5, 40, gated=False, images=1, least=1)
        case = add_norm_case("rows with gaps", dtype, 5, 80, gated=True)
        residual, x = (part[..., 40:] for part in case.arguments[:2])
        vectors = (random(seed, 40) for seed in (3, 4))
        yield replace(case, arguments=(residual, x, *vectors, EPS), options={"gate": random(5, 40)})
        for out_dtype in dict.fromkeys((dtype, torch.float32)):
            case = add_norm_case(f"given out {out_dtype}", dtype, 5, 40, gated=True)
            out = random(9, 2, 5, 40, dtype=out_dtype)
            yield replace(case, options={**case.options, "out": out}, written=(0, "out"))


def add_layer_norm_modulate_check(
    op: Op[Any, Any], case: Case, results: list[Tensor], exact: list[Tensor]
) -> list[Finding]:
    """The sum is rounded before it is normed, so the norm is compared with that of what was written."""
    if [result.shape for result in results] != [one.shape for one in exact]:
        return compare(op, case, results, exact)
    (*_, shift, scale, eps), _ = copies(case, widen=True)
    normed = layer_norm_modulate.reference(results[1].double(), shift, scale, eps)
    return [compare_output(op, results[0], normed), compare_output(op, results[1], exact[1], "residual")]


def channel_case(label: str, dtype: torch.dtype, *shape: int) -> Case:
    """Over the last dimension, with a residual."""
    x, residual = random(1, *shape, dtype=dtype), random(2, *shape, dtype=dtype)
    weight, bias = (random(seed, shape[-1], dtype=dtype) for seed in (3, 4))
    return Case(label, (x, weight, bias, CHANNEL_EPS), {"residual": residual})


def channel_rms_norm_cases() -> Iterator[Case]:
    """Channels around the vector lengths, images beyond one step, with a residual, a ReLU and without."""
    for dtype in DTYPES:
        for channels in (1, 7, 16, 33, 128, 1030):
            both = channel_case(f"{channels} channels and a residual", dtype, 2, 3, 4, channels)
            yield both
            yield Case(f"{channels} channels", both.arguments)
            yield Case(f"{channels} channels and ReLU", both.arguments, {"relu": True})
        yield channel_case("more than one step", dtype, 1, 70, 70, 64)
        weight, bias = random(7, 64, dtype=dtype), random(8, 64, dtype=dtype)
        x, residual = random(9, 5, 64, dtype=dtype), random(10, 5, 64, dtype=dtype)
        yield Case("eps shows", (3e-3 * x, weight, bias, CHANNEL_EPS))
        yield Case("zeros", (0 * x, weight, bias, CHANNEL_EPS))
        out = random(11, 5, 64, dtype=dtype)
        yield Case("residual and ReLU", (x, weight, bias, CHANNEL_EPS), {"residual": residual, "relu": True})
        x[2, 7] = math.nan
        yield Case("ReLU of no number", (x, weight, bias, CHANNEL_EPS), {"relu": True})
        x = random(12, 5, 64, dtype=dtype)
        yield Case(
            "given out", (x, weight, bias, CHANNEL_EPS), {"residual": residual, "out": out}, written=("out",)
        )
