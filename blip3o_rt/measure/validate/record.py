"""The record of a validation: filled line by line and saved after each, so that none is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip3o_rt.measure.provenance import record_head, write_record
from blip3o_rt.measure.validate.line import Line

FILE = "validate.json"


class Record:
    """A validate record in memory and, after every change, in its folder.

    model: what was validated. images: entries that whoever writes images appends to.
    """

    def __init__(
        self, folder: Path, command: Sequence[str], model: Mapping[str, Any], images: list[dict[str, Any]]
    ) -> None:
        self.path = folder / FILE
        self.data: dict[str, Any] = {
            **record_head("validate", command),
            "model": dict(model),
            "lines": [],
            "images": images,
            "notes": [],
        }

    def add(self, item: Line | str) -> None:
        """A line, or a note on the run."""
        if isinstance(item, Line):
            self.data["lines"].append(item.to_dict())
        else:
            self.data["notes"].append(item)
        self.save()

    def finish(self) -> None:
        """Everything asked for was compared."""
        self.data["complete"] = True
        self.save()

    def save(self) -> None:
        """Write what there is."""
        write_record(self.path, self.data)
