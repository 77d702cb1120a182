"""Whether this machine holds the published size: convert, load and run a random 3B checkpoint.

    python benchmarks/full_size.py --work /tmp/full-size

Each phase runs in a process of its own, so that its peak memory is its own. The checkpoint takes 9 GB of
disk as published and 9 GB converted; an existing one in the work folder is used again.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

PHASES = ("write", "convert", "run")
TOKENS = 8


def write(work: Path) -> None:
    """A seeded random checkpoint in the published layout."""
    from blip3o_rt.measure.random_checkpoint import write_random_checkpoint

    if not (work / "published").exists():
        write_random_checkpoint(work / "published", "published", seed=0, shards=3)


def convert(work: Path) -> None:
    """The same in the runtime layout, bfloat16."""
    from blip3o_rt.checkpoint.convert import convert as convert_checkpoint

    if not (work / "converted").exists():
        convert_checkpoint(work / "published", work / "converted", dtype="bf16")


def run(work: Path) -> None:
    """A few sampled tokens, then a whole plan from replayed tokens, one denoising step and the decoder."""
    import torch

    from blip3o_rt import Pipeline
    from blip3o_rt.errors import Cancelled
    from blip3o_rt.params import Progress

    begin = time.perf_counter()
    pipeline = Pipeline.load(work / "converted", device="cpu", dtype="bf16", max_batch=1)
    print(f"  load {time.perf_counter() - begin:.1f} s")
    stamps: list[float] = []

    def stop_after_a_few(progress: Progress) -> bool:
        stamps.append(time.perf_counter())
        return progress.done < TOKENS

    try:
        pipeline.plan("a red circle on a blue background", callback=stop_after_a_few)
    except Cancelled:
        print(f"  {TOKENS} tokens, {(stamps[-1] - stamps[0]) / TOKENS:.3f} s each")
    ids = pipeline.config.image_tokens
    count = ids.tokens_per_image
    replayed = ids.image_token_range.start + torch.arange(count) % ids.num_image_tokens
    begin = time.perf_counter()
    plan = pipeline.plan("a red circle on a blue background", token_ids=replayed)
    print(f"  {count} tokens replayed in {time.perf_counter() - begin:.1f} s")
    begin = time.perf_counter()
    latent = pipeline.render(plan, steps=1, output="latent")
    print(f"  one denoising step with its tables and condition {time.perf_counter() - begin:.1f} s")
    if not bool(torch.isfinite(torch.as_tensor(latent)).all()):
        raise SystemExit("the latent is not finite")
    begin = time.perf_counter()
    pipeline.render(plan, steps=1)
    print(f"  the same with the picture {time.perf_counter() - begin:.1f} s")


def main() -> None:
    description, _, details = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(description=description, epilog=details)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--phase", choices=PHASES, help="run one phase only, in this process")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.phase is not None:
        run_phase(arguments.phase, arguments.work)
        return
    for phase in PHASES:
        command = [sys.executable, __file__, "--work", str(arguments.work), "--phase", phase]
        subprocess.run(command, check=True)


def run_phase(phase: str, work: Path) -> None:
    """Run one phase in this process and print its time and peak memory."""
    print(phase, flush=True)
    begin = time.perf_counter()
    {"write": write, "convert": convert, "run": run}[phase](work)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    print(f"  {time.perf_counter() - begin:.1f} s in all, peak memory {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
