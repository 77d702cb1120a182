"""What tiles of the autoencoder save and cost: memory, seconds, and the difference from the whole picture.

    python -m blip3o_rt.measure.bench.vae_tiles        # published geometry, random weights, minutes
    python -m blip3o_rt.measure.bench.vae_tiles --size shapes          # the embedded model

Every number of tiles is measured in a process of its own, because the most that a process has held is all
that a system remembers. It is a check by hand, apart from `bench`.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path

import psutil
import torch
from tabulate import tabulate
from torch import Tensor

from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.checkpoint.parts import DTYPES
from blip3o_rt.config import VAEConfig
from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.measure.random_checkpoint import preset
from blip3o_rt.switches import MAX_VAE_TILES
from blip3o_rt.vae.layout import layout
from blip3o_rt.vae.model import Autoencoder

SIZES, WAYS = ("published", "shapes", "tiny"), ("decode", "encode")
SHAPES = "shapes"


def weights_of(size: str, way: str, dtype: torch.dtype) -> tuple[VAEConfig, int, dict[str, Tensor]]:
    """Geometry, side of a picture in pixels, and weights, random unless of the embedded model.

    The half that is not run has weights without memory.
    """
    if size == SHAPES:
        checkpoint = load_checkpoint(embedded_checkpoint(), dtype=dtype, parts=["vae"])
        return checkpoint.config.vae, checkpoint.config.image_size, dict(checkpoint.weights["vae"])
    model = preset(size)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for spec in layout(model.vae):
        if not spec.name.startswith(f"{way}r."):
            weights[spec.name] = torch.zeros(1, dtype=dtype).expand(spec.shape)
            continue
        noise = torch.randn(spec.shape, generator=generator)
        if len(spec.shape) > 1:
            noise *= (2 / prod(spec.shape[1:])) ** 0.5
        elif spec.name.endswith("weight"):
            noise = 1 + 0.1 * noise
        weights[spec.name] = noise.to(dtype)
    return model.vae, model.image_size, weights


def measure(size: str, way: str, dtype: str, tiles: int, result: Path) -> None:
    """Decode or encode once; the result, MiB above what was held before, and seconds go into a file."""
    config, side, weights = weights_of(size, way, DTYPES[dtype])
    autoencoder = Autoencoder(config, weights, tiles=tiles)
    generator = torch.Generator().manual_seed(1)
    small = side // config.compression
    if way == "decode":
        given = torch.randn(1, config.latent_channels, small, small, generator=generator)
    else:
        given = torch.rand(1, config.image_channels, side, side, generator=generator) * 2 - 1
    held = psutil.Process().memory_info().rss
    begin, busy = time.perf_counter(), time.process_time()
    found = getattr(autoencoder, way)(given)
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    torch.save({"found": found, "memory": (most - held) / 2**20, "seconds": seconds, "busy": busy}, result)


def table(size: str, ways: Sequence[str], dtype: str, tiles: Sequence[int]) -> str:
    """Memory above what the process held before, time, and difference from the first of the tiles."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for way in ways:
            whole: Tensor | None = None
            for count in tiles:
                result = Path(folder) / f"{way}-{count}.pt"
                given = ["--size", size, "--ways", way, "--dtype", dtype, "--tiles", str(count)]
                command = [sys.executable, "-m", __spec__.name, *given, "--result", os.fspath(result)]
                subprocess.run(command, check=True)
                line = torch.load(result)
                whole = line["found"] if whole is None else whole
                row = [way, count, f"{line['memory']:.0f}", f"{line['seconds']:.1f}", f"{line['busy']:.1f}"]
                rows.append([*row, difference(line["found"], whole)])
    headers = ["", "tiles", "MiB", "seconds", "processor seconds", "difference"]
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 5))


def difference(found: Tensor, whole: Tensor) -> str:
    """The largest difference, and that of the whole in L2; that the bits are the same, where they are."""
    if torch.equal(found, whole):
        return "same bits"
    change = (found - whole).double()
    return f"{float(change.abs().max()):.1e}, L2 {float(change.norm() / whole.double().norm()):.1e}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m blip3o_rt.measure.bench.vae_tiles", description=table.__doc__
    )
    parser.add_argument("--size", choices=SIZES, default="published", help="geometry (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(%(default)s)")
    parser.add_argument("--ways", default="decode,encode", metavar="WAY,WAY", help="(%(default)s)")
    parser.add_argument("--tiles", default="1,2,4", metavar="N,N", help="along a side (%(default)s)")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    ways, tiles = parsed.ways.split(","), parsed.tiles.split(",")
    if not set(ways) <= set(WAYS):
        parser.error(f"ways is {parsed.ways!r}: accepted are {', '.join(WAYS)}")
    if not all(count.isdecimal() and 1 <= int(count) <= MAX_VAE_TILES for count in tiles):
        parser.error(f"tiles is {parsed.tiles!r}: accepted are numbers from 1 to {MAX_VAE_TILES}, as 1,2,4")
    if parsed.result is not None:
        measure(parsed.size, ways[0], parsed.dtype, int(tiles[0]), parsed.result)
    else:
        print(table(parsed.size, ways, parsed.dtype, [int(count) for count in tiles]))


if __name__ == "__main__":
    main()
