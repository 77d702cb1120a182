"""The page of a validate record: what passed and what failed, by how much and why, and the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip3o_rt.measure.records import Record, number, shape_text
from blip3o_rt.measure.reports.page import image_uri, write_page
from blip3o_rt.measure.tables import provenance
from blip3o_rt.measure.units import number_text, significant

GROUPS = {
    "ops": "Operations against their definition in float64",
    "ar": "Decoder against transformers",
    "dit": "Diffusion transformer against diffusers",
    "vae": "Autoencoder against diffusers",
    "tatok": "Image tokenizer against transformers",
    "pipeline": "Whole pipeline against the published one",
    "determinism": "Same seed, same image",
    "golden": "Recorded runs",
}
IMAGES = {"ours": "ours", "reference": "reference", "difference": "difference, amplified"}
MORE_IS_BETTER = ("psnr", "ssim")  # measures of which more is better: their bound is the least allowed


def validate_html(record: dict[str, Any], path: str | Path) -> None:
    """Write the page of a validate record, images included, in one file that needs nothing else.

    The files that the record's images name are looked for beside `path`. A record that is partial, or lacks
    parts, gives a page that says in words what is missing.
    """
    lines = [line_cells(entry) for entry in entries(record, "lines")]
    folder = Path(path).parent
    context = {
        "title": "blip3o-rt validate",
        "summary": summary(record, lines),
        "complete": record.get("complete", True),
        "provenance": list(provenance(Record.of(record))),
        "record": record,
        "notes": [str(note) for note in record.get("notes") or ()],
        "failures": [line for line in lines if line["passed"] is False],
        "groups": grouped(lines),
        "images": [image_cells(entry, folder) for entry in entries(record, "images")],
    }
    write_page("validate.html", path, context)


def entries(record: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """A list of the record; empty where it is missing or null."""
    return [entry for entry in record.get(key) or [] if isinstance(entry, Mapping)]


def summary(record: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """How many checks passed, on what."""
    model = record.get("model") or {}
    size = f" on the {model['size']} model" if model.get("size") else ""
    failed = sum(line["passed"] is False for line in lines)
    if not lines:
        return f"No check was made{size}."
    if failed:
        return f"{failed} of {len(lines)} checks{size} FAILED."
    passed = sum(line["passed"] is True for line in lines)
    return f"{'All ' if passed == len(lines) else ''}{passed} of {len(lines)} checks{size} passed."


def grouped(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines by group in the order of the model, with the columns that a group needs."""
    names = list(dict.fromkeys([*GROUPS, *(line["group"] for line in lines)]))
    found = []
    for name in names:
        members = [line for line in lines if line["group"] == name]
        if members:
            found.append(
                {
                    "title": GROUPS.get(name, name),
                    "lines": members,
                    "passed": sum(line["passed"] is True for line in members),
                    "ops": any(line["implementation"] for line in members),
                    "shapes": any(line["shape"] for line in members),
                    "yardstick": any(line["reference_error"] for line in members),
                }
            )
    return found


def line_cells(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of one check; empty where the record says nothing."""
    measure = str(entry.get("measure") or "")
    bound = number(entry.get("bound"))
    relation = "≥" if measure.lower().startswith(MORE_IS_BETTER) else "≤"
    parts = [
        entry.get("name"),
        entry.get("implementation"),
        entry.get("dtype"),
        shape_text(entry.get("shape")),
    ]
    return {
        "group": str(entry.get("group") or "other"),
        "name": str(entry.get("name") or ""),
        "label": ", ".join(str(part) for part in parts if part),
        "implementation": str(entry.get("implementation") or ""),
        "dtype": str(entry.get("dtype") or ""),
        "shape": shape_text(entry.get("shape")),
        "measure": measure,
        "found": value_text(number(entry.get("found")), measure),
        "bound": "" if bound is None else f"{relation} {value_text(bound, measure)}",
        "reference_error": value_text(number(entry.get("reference_error")), measure),
        "passed": entry.get("passed"),
        "why": sentence(entry.get("why")),
        "detail": sentence(entry.get("detail")),
    }


def value_text(value: float | None, measure: str) -> str:
    """A measured error or likeness; empty for None."""
    if value is None:
        return ""
    if measure.lower().startswith("ssim"):
        return f"{value:.5f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else significant(value)


def sentence(text: object) -> str:
    """Text as a sentence, so that it can stand beside others."""
    found = str(text or "").strip()
    found = found[:1].upper() + found[1:]
    return found if not found or found.endswith((".", "!", "?")) else f"{found}."


def image_cells(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A compared image: its three images as addresses that need no file, and how alike two of them are."""
    psnr, ssim = number(entry.get("psnr")), number(entry.get("ssim"))
    quality = (
        ["no pixel differs"] if psnr is None and ssim == 1.0 else []
    )  # a PSNR without bound is no number
    quality += [f"PSNR {number_text(psnr)} dB"] if psnr is not None else []
    quality += [f"SSIM {ssim:.4f}"] if ssim is not None else []
    parts = []
    amplified = number(entry.get("amplified"))
    labels = {**IMAGES, "difference": f"difference, times {amplified:.0f}"} if amplified else IMAGES
    for key, label in labels.items():
        file = entry.get(key)
        parts.append((label, image_uri(folder / str(file)) if file else None, file))
    return {"name": str(entry.get("name") or "image"), "quality": ", ".join(quality), "parts": parts}
