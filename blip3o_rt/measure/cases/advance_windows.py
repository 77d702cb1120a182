"""Windows of one row and of many: draws that agree with guesses, guesses made, ends of images, page edges."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from blip3o_rt.measure.validate.case import Case, int32

GRID_WIDTH = 4


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


def case(
    label: str,
    windows: Sequence[Window],
    *,
    tokens: int = 24,
    page_size: int = 4,
    max_blocks: int = 9,
    loose: int = 0,
    no_token: Sequence[int] = (),
) -> Case:
    """Each image has a range of output slots of its own; `loose` rows at the end belong to no window.

    no_token: rows whose draw is -1.
    """
    generator = torch.Generator().manual_seed(len(windows) + 31 * tokens)
    rows = sum(window.rows for window in windows) + loose
    ids = torch.randint(0, 3, ((len(windows) + 1) * (tokens + 1),), generator=generator)  # few: they repeat
    pages = torch.randperm(rows * max_blocks, generator=generator).to(torch.int32).view(rows, max_blocks)
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
        label,
        (*arguments, *counts, int32([-5] * rows), int32([-5] * rows)),
        written=(7, 8, 9, 10, 11, 12),
    )


def repeats_late() -> Case:
    """Of its tokens the early ones repeat both others, the late ones the last one only."""
    found = case("an image that repeats the last token late", [Window(2, 36, 8, 1)], tokens=48, max_blocks=13)
    output_ids = found.arguments[10]
    output_ids[:20] = 0
    output_ids[20:36] = torch.arange(16) // 5 + 1
    return found


def cases() -> Iterator[Case]:
    yield case("one row", [Window(1, 0)])
    for page_size in (1, 3, 16):
        edges = [Window(prompt, 1) for prompt in (1, page_size, 2 * page_size - 1, 2 * page_size)]
        yield case(f"edges of pages of {page_size}", edges, page_size=page_size, max_blocks=60)
    yield case("padding between", [Window(3, 2), Window(0, 0), Window(5, 1), Window(0, 0)], loose=3)
    yield case("images that do not fit their pages", [Window(12, 2), Window(13, 2), Window(40, 5, 3, 3)])
    yield case("nothing but padding", [Window(0, 0)] * 3, loose=2)
    yield case("no window", [], loose=3)
    yield case("no rows", [])
    for agree in range(6):
        yield case(f"{agree} of 5 draws as guessed", [Window(7, 9, 5, 5, agree), Window(3, 1, 5, 5, agree)])
    yield case("windows of many sizes", [Window(5, size + 1, size, size, size // 2) for size in range(1, 17)])
    yield case("a window that has just grown", [Window(5, 6, 8, 1), Window(6, 7, 8, 3, 2)])
    yield case("a window that has just shrunk", [Window(5, 6, 2, 8, 8)])
    yield case("the first tokens", [Window(2, 0, 6, 1), Window(2, 1, 6, 6, 3), Window(2, 4, 12, 4, 4)])
    for kept in range(18, 25):
        ends = [Window(6, kept, 6, 6, agree) for agree in (0, 2, 6)]
        yield case(f"the last tokens, from {kept} of 24", ends, loose=1)
    yield case("one token to each image", [Window(3, 0, 2, 1), Window(3, 1, 3, 3)], tokens=1)
    yield case("guesses from the row above", [Window(2, 12, 9, 1), Window(2, 16, 3, 3, 1)])
    yield repeats_late()
    yield case("draws that are no token", [Window(3, 2), Window(5, 4, 4, 4, 4)], no_token=(0, 2))
    yield case("as many rows as a batch has", [Window(9, row % 20) for row in range(64)])
    yield case(
        "more windows than a block has threads", [Window(9, row % 7, 1 + row % 3, 2, 1) for row in range(300)]
    )
