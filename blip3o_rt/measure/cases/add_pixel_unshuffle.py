"""Images down to one pixel; as many channels as before, twice as many, half as many, four times; a bias."""

from collections.abc import Iterator

from blip3o_rt.measure.validate.case import DTYPES, Case, random


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for height, width in ((1, 1), (3, 5)):
            for channels, wanted in ((1, 1), (1, 4), (3, 4), (6, 12), (7, 7), (32, 16), (150, 300)):
                result = random(1, 2, height, width, wanted, dtype=dtype)
                x = random(2, 2, 2 * height, 2 * width, channels, dtype=dtype)
                label = f"{height} x {width}, {channels} to {wanted} channels"
                yield Case(label, (result, x), written=(0,))
                bias = random(3, wanted, dtype=dtype)
                yield Case(f"{label}, bias", (result, x), {"bias": bias}, written=(0,))
