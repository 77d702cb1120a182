"""Images down to one pixel; as many channels as before, half as many, twice as many, one of four; a bias."""

from collections.abc import Iterator

from blip3o_rt.measure.validate.case import DTYPES, Case, random


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for height, width in ((1, 1), (3, 5)):
            for channels, wanted in ((1, 1), (4, 1), (4, 3), (12, 6), (7, 7), (16, 32), (300, 150)):
                result = random(1, 2, 2 * height, 2 * width, wanted, dtype=dtype)
                x = random(2, 2, height, width, channels, dtype=dtype)
                label = f"{height} x {width}, {channels} to {wanted} channels"
                yield Case(label, (result, x), written=(0,))
                bias = random(3, wanted, dtype=dtype)
                yield Case(f"{label}, bias", (result, x), {"bias": bias}, written=(0,))
