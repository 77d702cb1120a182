"""Widths around the vector lengths, gates in fp32 and in the dtype of the rows, parts of larger tensors."""

from collections.abc import Iterator

from blip3o_rt.measure.validate.case import DTYPES, Case, random


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for width in (1, 7, 16, 33, 1030):
            residual, x = random(1, 2, 3, width, dtype=dtype), random(2, 2, 3, width, dtype=dtype)
            yield Case(f"width {width}", (residual, x, random(3, width)), written=(0,))
        gate = random(3, 40, dtype=dtype)
        residual, x = random(1, 2, 300, 40, dtype=dtype), random(2, 2, 300, 40, dtype=dtype)
        yield Case("gate in the dtype of the rows", (residual, x, gate), written=(0,))
        yield Case("zero gate", (residual, x, 0 * gate), written=(0,))
        yield Case("one half of two", (residual[1:], x[1:], gate), written=(0,))
        gaps = random(4, 3, 80, dtype=dtype)[:, :40]
        yield Case("rows with gaps", (gaps, random(5, 3, 40, dtype=dtype), gate), written=(0,))
