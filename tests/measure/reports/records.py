"""Made-up records, complete and with parts missing, for what reads records."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from PIL import Image

HEAD: dict[str, Any] = {
    "version": 1,
    "created": "2026-01-02T03:04:05+00:00",
    "machine": {
        "cpu": "Imaginary 9000",
        "cores": 2,
        "memory_bytes": 16 * 2**30,
        "gpu": None,
        "driver": None,
        "instruction_sets": ["avx2", "avx512f"],
    },
    "versions": {"blip3o_rt": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "triton": None},
    "commit": "0123456789ab",
    "complete": True,
}
MODEL = {
    "size": "published",
    "dtype": "bf16",
    "tier": "exact",
    "device": "cpu",
    "threads": 2,
    "switches": {},
    "tokens_per_image": 729,
    "steps": 30,
}

# name: what, who -> seconds of a call, units of work in it, bytes, operations
STAGES: dict[str, tuple[str, dict[str, float], float, float | None, float | None]] = {
    "ar.prefill": ("one prompt", {"ours": 0.9, "transformers": 1.4}, 40, 3e9, 2.2e11),
    "ar.token": (
        "one decoded token",
        {"ours": 0.13, "transformers": 0.22, "published": 0.25, "published-compiled": 0.2},
        1,
        3.1e9,
        6.2e9,
    ),
    "connector": ("one image", {"ours": 0.031, "published": 0.066}, 1, 3e7, 1.4e10),
    "dit.tables": ("one schedule", {"ours": 0.8}, 1, 1e8, 4e9),
    "dit.condition": ("one image", {"ours": 0.2}, 1, 1e8, 1e11),
    "ar.second_pass": ("the whole sequence", {"published": 11.0}, 800, None, None),
    "dit.step": (
        "one guided step",
        {"ours": 14.5, "diffusers": 21.0, "published-compiled": 19.0},
        1,
        3.4e9,
        5.3e12,
    ),
    "vae.decode": (
        "one image",
        {"ours": 27.0, "diffusers": 37.0, "published-compiled": 33.0},
        1,
        9e9,
        8.4e12,
    ),
}
ENDS = {"ours": 560.0, "published": 830.0, "published-compiled": 720.0}


def timed(
    name: str, who: str, seconds: float, *, per: float = 1.0, batch: int = 1, n: int = 10
) -> dict[str, Any]:
    """A line with noise of a few per cent, the same at every call."""
    noise = random.Random(f"{name} {who} {batch}")
    samples = [seconds * (1 + 0.02 * abs(noise.gauss(0, 1))) for _ in range(n)]
    ordered = sorted(samples)
    return {
        "name": name,
        "who": who,
        "batch": batch,
        "samples": samples,
        "cold": 1.6 * max(samples),
        "median": (ordered[(n - 1) // 2] + ordered[n // 2]) / 2,
        "p90": ordered[int(0.9 * n) - 1],
        "min": ordered[0],
        "n": n,
        "per": per,
        "peak_memory": 9 * 2**30 if who == "ours" else None,
        "launches": None,
        "note": None,
    }


def bench_record() -> dict[str, Any]:
    """A whole bench record, with every part that a page can show."""
    lines = []
    for name, (what, times, per, moved, flops) in STAGES.items():
        for who, seconds in times.items():
            line = timed(name, who, seconds, per=per)
            work = {"bytes": moved, "flops": flops, "ceiling": "read", "share": 0.83} if who == "ours" else {}
            lines.append({**line, "what": what, **work})
    lines += [{**timed("image", who, seconds, n=3), "what": "one image"} for who, seconds in ENDS.items()]
    lines += [
        {**timed("image", "ours", 560.0 * batch**0.7, batch=batch, per=batch), "what": "one image"}
        for batch in (2, 4)
    ]
    return {
        "kind": "bench",
        "command": ["blip3o-rt", "bench", "--size", "published", "--ablate"],
        **HEAD,
        "model": MODEL,
        "ceilings": [
            {"name": "read", "dtype": None, "unit": "GB/s", "value": 31.2, "samples": [30.9, 31.2, 31.4]},
            {"name": "copy", "dtype": None, "unit": "GB/s", "value": 33.0, "samples": [33.0]},
            {"name": "matmul", "dtype": "fp32", "unit": "GFLOP/s", "value": 200.0, "samples": [200.0]},
            {"name": "matmul", "dtype": "bf16", "unit": "GFLOP/s", "value": 436.0, "samples": [436.0]},
        ],
        "lines": lines,
        "ops": [
            op("rms_norm", "cpu", 4e-6, 1.3e5, 8e4, error=3e-8, ok=True),
            op("rms_norm", "torch", 2e-5, 1.3e5, 8e4, error=4e-8, ok=True),
            op("row_linear", "cpu", 8.2e-4, 2.5e7, 2.5e7, error=2e-7, ok=True),
            op("silu_mul", "cpu", 9e-6, 3.7e4, 2.4e4, error=2e-2, ok=False),
        ],
        "ablations": [
            ablated("native row_linear", "ar.token", 1.55),
            ablated("native decode attention", "ar.token", 1.12),
            ablated("all ops", "ar.token", 1.7),
            ablated("one null token", "dit.step", 1.04),
            ablated("token-major", "dit.step", 0.97),
        ],
    }


def op(
    name: str, implementation: str, seconds: float, moved: float, flops: float, *, error: float, ok: bool
) -> dict[str, Any]:
    line = timed(name, implementation, seconds)
    kept = {key: line[key] for key in ("samples", "median", "p90", "min", "n")}
    return {
        "op": name,
        "implementation": implementation,
        "dtype": "bf16",
        "shape": [1, 2048],
        **kept,
        "bytes": moved,
        "flops": flops,
        "ceiling": "read",
        "share": moved / seconds / 31.2e9,
        "error": error,
        "bound": 1e-2,
        "ok": ok,
    }


def ablated(switch: str, line: str, ratio: float) -> dict[str, Any]:
    samples = [0.13, 0.131, 0.132]
    return {
        "switch": switch,
        "off": "torch",
        "on": "cpu",
        "line": line,
        "samples_off": [ratio * sample for sample in samples],
        "samples_on": samples,
        "ratio": ratio,
    }


def validate_record(folder: Path) -> dict[str, Any]:
    """A whole validate record with one failure, and its images in a folder."""
    for name, colour in (("ours", "#c03030"), ("reference", "#c23030"), ("difference", "#101010")):
        Image.new("RGB", (48, 48), colour).save(folder / f"red-{name}.png")
    lines = [
        check("ops", "rms_norm", "worst error", 3.1e-8, 1e-6, implementation="cpu", shape="7 x 129"),
        check("ops", "silu_mul", "worst error", 2.5e-2, 3.9e-3, implementation="cpu", shape="3 x 64"),
        check("ar", "hidden states", "relative L2", 4.0e-3, 6.6e-3, reference_error=4.4e-3),
        check("dit", "noise prediction, step 0", "relative L2", 9.1e-3, 1.2e-2, reference_error=8.0e-3),
        check("pipeline", "image", "PSNR dB", 44.2, 38.0),
        check("determinism", "two runs", "different values", 0.0, 0.0),
    ]
    images = {name: f"red-{name}.png" for name in ("ours", "reference", "difference")}
    return {
        "kind": "validate",
        "command": ["blip3o-rt", "validate", "--size", "shapes"],
        **HEAD,
        "model": {**MODEL, "size": "shapes"},
        "lines": lines,
        "images": [{"name": "a red circle", **images, "psnr": 44.2, "ssim": 0.9987}],
    }


def check(group: str, name: str, measure: str, found: float, bound: float, **more: Any) -> dict[str, Any]:
    """One checked line; more of PSNR is better."""
    passed = found >= bound if measure.startswith("PSNR") else found <= bound
    return {
        "group": group,
        "name": name,
        "implementation": None,
        "dtype": "bf16",
        "shape": None,
        "measure": measure,
        "found": found,
        "reference_error": None,
        "bound": bound,
        "why": "1.5 times what the reference itself loses in bf16"
        if "reference_error" in more
        else "one rounding",
        "passed": passed,
        "detail": None,
        **more,
    }
