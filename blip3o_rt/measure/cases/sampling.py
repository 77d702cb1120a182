"""Cases of sampling, of tokens and of latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blip3o_rt.measure.validate.case import PRODUCTS, Case, int32, random
from blip3o_rt.ops.dtypes import name_of

GRID_WIDTH = 4


def sample_case(
    label: str, logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Case:
    batch = logits.shape[0]
    per_row = (torch.full((batch,), temperature), int32([top_k] * batch), torch.full((batch,), top_p))
    seeds = torch.arange(batch) * 2**40 - 3  # negative, and more than 32 bits
    return Case(label, (logits, *per_row, seeds, int32(range(5, 5 + batch))))


def sample_tokens_cases() -> Iterator[Case]:
    """Vocabularies from one token on, mixes of top-k and top-p, ties, impossible tokens and broken rows."""
    for vocabulary in (1, 2, 5, 1000, 4099):
        logits = random(vocabulary, 4, vocabulary, scale=3.0)
        for top_k in dict.fromkeys((0, 1, 4, vocabulary, vocabulary + 7)):
            for top_p in (1.0, 0.9, 1e-6):
                label = f"{vocabulary} tokens, top_k {top_k}, top_p {top_p}"
                yield sample_case(label, logits, 1.0, top_k, top_p)
    logits = random(2, 3, 40_000, scale=3.0)
    logits[1] = (logits[1] * 4).round() / 4  # ties
    logits[2, :20_000] = -torch.inf
    for top_k, top_p in ((0, 1.0), (1200, 0.95), (1200, 1.0), (9000, 0.8), (0, 0.9), (0, 1e-6)):
        yield sample_case(f"many tokens, top_k {top_k}, top_p {top_p}", logits, 1.0, top_k, top_p)
    broken = random(3, 3, 40_000)
    broken[0, 39_999], broken[2, 0] = torch.nan, torch.inf
    yield sample_case("many tokens, broken rows", broken, 1.0, 50)
    logits = random(1, 8, 300, scale=2.0)
    yield sample_case("hot", logits, 3.0, 40, 0.8)
    yield sample_case("cold", logits, 0.01, 40, 0.8)
    ties = (logits * 2).round() / 2 * torch.where(logits > 0, 1.0, -1.0)  # some zeros are negative
    for top_k in (1, 17, 50, 299):
        yield sample_case(f"ties, top_k {top_k}", ties, 1.0, top_k, 0.93)
    yield sample_case("one logit everywhere", torch.full((4, 50), -2.5), 1.0, 7)
    zeros = torch.zeros(4, 50)
    zeros[:, 1::3] = -0.0
    yield sample_case("zeros of both signs", zeros, 1.0, 7)
    masked = logits.masked_fill(torch.arange(300) % 3 > 0, -torch.inf)
    for top_k, top_p in ((0, 1.0), (150, 1.0), (150, 0.9), (10, 0.5)):
        yield sample_case(f"impossible tokens, top_k {top_k}, top_p {top_p}", masked, 1.0, top_k, top_p)
    broken = logits.clone()
    broken[1, 7], broken[3, 299], broken[5], broken[6, :299] = torch.nan, torch.inf, -torch.inf, -torch.inf
    yield sample_case("broken rows", broken, 1.0, 20, 0.9)
    yield sample_case("broken rows, greedy", broken, 1.0, 1)
    mixed = sample_case("each row its own parameters", logits)
    mixed.arguments[1][:] = torch.tensor([1, 0.5, 2, 0, -1, torch.nan, 1, 1])
    mixed.arguments[2][:] = int32([0, 1, 2, 3, 4, 5, 300, -1])
    mixed.arguments[3][:] = torch.tensor([0.1, 1, 0.9, 1, 1, 1, 0.99, 0.0])
    yield mixed


@dataclass(frozen=True)
class Window:
    """An image with `kept` tokens behind a prompt, whose last pass decoded `decoded` of its `rows` rows.

    agree: how many draws in a row are the guesses that were read.
    """

    prompt: int
    kept: int
    rows: int = 1
    decoded: int = 1
    agree: int = 0


def window_case(
    label: str,
    windows: Sequence[Window],
    *,
    tokens: int = 24,
    page_size: int = 4,
    max_pages: int = 9,
    loose: int = 0,
    no_token: Sequence[int] = (),
) -> Case:
    """Each image has a range of output slots of its own; `loose` rows at the end belong to no window.

    no_token: rows whose draw is -1.
    """
    generator = torch.Generator().manual_seed(len(windows) + 31 * tokens)
    rows = sum(window.rows for window in windows) + loose
    ids = torch.randint(0, 3, ((len(windows) + 1) * (tokens + 1),), generator=generator)  # few: they repeat
    pages = torch.randperm(rows * max_pages, generator=generator).to(torch.int32).view(rows, max_pages)
    sampled = torch.randint(3, 6, (rows,), generator=generator)
    num_generated, context_lens = int32([0] * rows), int32([0] * rows)
    output_slots = torch.full((rows,), len(ids) - 1)
    bounds = [0]
    for image, window in enumerate(windows):
        begin = bounds[-1]
        bounds.append(begin + window.rows)
        pages[begin : bounds[-1]] = pages[begin : begin + 1]
        for row in range(min(window.decoded, window.rows)):
            number = window.kept + row
            if number > tokens:
                break
            num_generated[begin + row] = number
            context_lens[begin + row] = window.prompt + number if window.prompt else 0
            output_slots[begin + row] = image * (tokens + 1) + number
            if row < window.agree and number < tokens:
                sampled[begin + row] = ids[output_slots[begin + row]]
    sampled[list(no_token)] = -1
    first_ids = torch.arange(rows) % 2 * 151_936
    arguments = (sampled, int32(bounds), first_ids, pages, page_size, tokens, GRID_WIDTH)
    counts = (num_generated, context_lens, output_slots, ids)
    return Case(
        label, (*arguments, *counts, int32([-5] * rows), int32([-5] * rows)), written=(7, 8, 9, 10, 11, 12)
    )


def repeats_late() -> Case:
    """Of its tokens the early ones repeat both others, the late ones the last one only."""
    found = window_case(
        "an image that repeats the last token late", [Window(2, 36, 8, 1)], tokens=48, max_pages=13
    )
    output_ids = found.arguments[10]
    output_ids[:20] = 0
    output_ids[20:36] = torch.arange(16) // 5 + 1
    return found


def embedded_case(label: str, weights: torch.dtype, dtype: torch.dtype, width: int, begin: int = 0) -> Case:
    """Windows whose tokens are embedded, not all of ids that have one; rows with gaps unless begin is 0."""
    windows = [Window(2, 9, 4, 4, 2), Window(0, 0), Window(5, 3), Window(6, 22, 6, 6, 6)]
    found = window_case(label, windows, loose=2, no_token=(0,))
    rows, wide = len(found.arguments[0]), width + 2 * begin
    found.arguments[2][:] = torch.arange(rows) % 2 * 6
    options = {
        "embedding": random(1, 8, wide, dtype=weights)[:, begin : begin + width],
        "embedded": random(2, rows, wide, dtype=dtype)[:, begin : begin + width],
    }
    return replace(found, options=options, written=(*found.written, "embedded"))


def advance_windows_cases() -> Iterator[Case]:
    """Windows of one row and of many: draws that agree with guesses, guesses, ends of images and pages."""
    yield window_case("one row", [Window(1, 0)])
    for page_size in (1, 3, 16):
        edges = [Window(prompt, 1) for prompt in (1, page_size, 2 * page_size - 1, 2 * page_size)]
        yield window_case(f"edges of pages of {page_size}", edges, page_size=page_size, max_pages=60)
    yield window_case("padding between", [Window(3, 2), Window(0, 0), Window(5, 1), Window(0, 0)], loose=3)
    yield window_case(
        "images that do not fit their pages", [Window(12, 2), Window(13, 2), Window(40, 5, 3, 3)]
    )
    yield window_case("nothing but padding", [Window(0, 0)] * 3, loose=2)
    yield window_case("no window", [], loose=3)
    yield window_case("no rows", [])
    for agree in range(6):
        yield window_case(
            f"{agree} of 5 draws as guessed", [Window(7, 9, 5, 5, agree), Window(3, 1, 5, 5, agree)]
        )
    yield window_case(
        "windows of many sizes", [Window(5, size + 1, size, size, size // 2) for size in range(1, 17)]
    )
    yield window_case("a window that has just grown", [Window(5, 6, 8, 1), Window(6, 7, 8, 3, 2)])
    yield window_case("a window that has just shrunk", [Window(5, 6, 2, 8, 8)])
    yield window_case("the first tokens", [Window(2, 0, 6, 1), Window(2, 1, 6, 6, 3), Window(2, 4, 12, 4, 4)])
    for kept in range(18, 25):
        ends = [Window(6, kept, 6, 6, agree) for agree in (0, 2, 6)]
        yield window_case(f"the last tokens, from {kept} of 24", ends, loose=1)
    yield window_case("one token to each image", [Window(3, 0, 2, 1), Window(3, 1, 3, 3)], tokens=1)
    yield window_case("guesses from the row above", [Window(2, 12, 9, 1), Window(2, 16, 3, 3, 1)])
    yield repeats_late()
    yield window_case("draws that are no token", [Window(3, 2), Window(5, 4, 4, 4, 4)], no_token=(0, 2))
    for dtype, weights, beside in PRODUCTS:
        what = f"{name_of(dtype)}{beside}"
        for width in (1, 7, 16, 33, 128, 2072):
            yield embedded_case(f"embeddings of {width}, {what}", weights, dtype, width)
        yield embedded_case(f"embeddings with gaps, {what}", weights, dtype, 40, 8)
        yield embedded_case(f"embeddings at odd places, {what}", weights, dtype, 40, 3)
    yield window_case("as many rows as a batch has", [Window(9, row % 20) for row in range(64)])
    yield window_case(
        "more windows than a block has threads", [Window(9, row % 7, 1 + row % 3, 2, 1) for row in range(300)]
    )


def euler_case(label: str, shape: tuple[int, int, int], guidance_scale: float) -> Case:
    latent, prediction = random(1, 1, *shape), random(2, 2, *shape)
    return Case(label, (latent, prediction, torch.tensor(guidance_scale), torch.tensor(-1 / 30)))


def guided_euler_step_cases() -> Iterator[Case]:
    """Grids, guidance off, on and strong, and latents and predictions that are parts of larger tensors."""
    for shape in ((1, 1, 1), (4, 5, 7), (32, 32, 32)):
        for guidance_scale in (0.0, 1.0, 2.0, 9.5):
            yield euler_case(f"{shape}, guidance {guidance_scale}", shape, guidance_scale)
    latent, prediction = random(3, 1, 4, 5, 14)[..., :7], random(4, 2, 8, 5, 14)[:, :4, :, :7]
    scalars = torch.tensor(2.0), torch.tensor(-1 / 30)
    yield Case("parts of larger tensors", (latent, prediction, *scalars))
    out = random(5, 1, 4, 5, 7)
    yield Case("given out", (latent, prediction, *scalars), {"out": out}, written=("out",))
