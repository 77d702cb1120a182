"""How alike two images are: gray levels, PSNR and SSIM; and the files that show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage.metrics import structural_similarity

from blip3o_rt.measure.validate.bounds import BF16_RATIO
from blip3o_rt.measure.validate.line import Line, at_least, at_most
from blip3o_rt.metadata import save_png

AMPLIFIED = 32  # times, in the image of the difference
FP32_PSNR = 20 * math.log10(255)  # every value off by one gray level
FP32_SSIM = 0.999
WHY_ROUNDED = "each value rounds to the same or the next gray level"


@dataclass(frozen=True)
class Likeness:
    """Of two images: dB (inf where equal), structural similarity, share of values off by more than one."""

    psnr: float
    ssim: float
    off_by_more: float

    @classmethod
    def of(cls, image: np.ndarray, expected: np.ndarray) -> Likeness:
        """Of gray levels uint8 [H, W, 3] of the same size."""
        difference = image.astype(int) - expected.astype(int)
        square = float((difference**2).mean())
        return cls(
            psnr=10 * math.log10(255**2 / square) if square else math.inf,
            ssim=ssim(image, expected),
            off_by_more=float((np.abs(difference) > 1).mean()),
        )


def ssim(image: np.ndarray, expected: np.ndarray) -> float:
    """Structural similarity of gray levels uint8 [H, W, 3], as in the paper.

    Gaussian windows of standard deviation 1.5 (Wang et al. 2004, doi 10.1109/TIP.2003.819861).
    """
    return float(
        structural_similarity(
            image,
            expected,
            channel_axis=2,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def image_lines(
    group: str,
    name: str,
    dtype: str,
    found: Likeness,
    yardstick: Likeness | None,
    *,
    ratio: float = BF16_RATIO,
) -> Iterator[Line]:
    """How like the published image in float32 ours is.

    yardstick: how like it the published one in bfloat16 is, for "bf16" lines: our error may be `ratio` times
    its error, and our loss of similarity, which goes as the error's square, ratio^2 times its loss.
    """
    equal = "the images are equal" if math.isinf(found.psnr) else None
    psnr = partial(at_least, group, f"{name}: PSNR", dtype, "PSNR dB", _decibels(found), detail=equal)
    similarity = partial(at_least, group, f"{name}: SSIM", dtype, "SSIM", found.ssim)
    if yardstick is None:
        measure, off, why = "share off by more than one", found.off_by_more, WHY_ROUNDED
        yield at_most(group, f"{name}: gray levels", dtype, measure, off, 0.0, why=why)
        yield psnr(FP32_PSNR, why=why)
        yield similarity(FP32_SSIM, why=why)
        return
    known = _decibels(yardstick)
    why = f"{ratio:g} x the published bfloat16 image's error, in dB"
    yield psnr(known - 20 * math.log10(ratio), why=why, reference_error=known)
    why = f"{ratio:g}^2 x the published bfloat16 image's loss"
    least = 1 - ratio**2 * (1 - yardstick.ssim)
    yield similarity(least, why=why, reference_error=yardstick.ssim)


def _decibels(likeness: Likeness) -> float:
    """The PSNR as a figure: equal images get that of one value in a billion off by one."""
    return min(likeness.psnr, FP32_PSNR + 90.0)


Compared = Callable[[str, np.ndarray, np.ndarray], Likeness]  # name, our image, the published one


class ImageFiles:
    """Writes compared images into a folder and keeps their entries of the record."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.entries: list[dict[str, Any]] = []

    def __call__(self, name: str, image: np.ndarray, expected: np.ndarray) -> Likeness:
        """Write our image, the published one and their difference, amplified, as PNG files.

        Gray levels uint8 [H, W, 3]; gives how alike the two are.
        """
        stem = "-".join("".join(c if c.isalnum() else " " for c in name).split())
        difference = np.abs(image.astype(int) - expected.astype(int)) * AMPLIFIED
        files = {
            "ours": image,
            "reference": expected,
            "difference": difference.clip(max=255).astype(np.uint8),
        }
        for kind, levels in files.items():
            save_png(Image.fromarray(levels), self._folder / f"{stem}-{kind}.png", {})
        likeness = Likeness.of(image, expected)
        self.entries.append(
            {
                "name": name,
                **{kind: f"{stem}-{kind}.png" for kind in files},
                "psnr": likeness.psnr if math.isfinite(likeness.psnr) else None,
                "ssim": likeness.ssim,
                "amplified": AMPLIFIED,
            }
        )
        return likeness
