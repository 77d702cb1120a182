"""The record of a validation: filled line by line and saved after each, so that none is lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from blip3o_rt.measure.records import Record
from blip3o_rt.measure.validate.line import Line

FILE = "validate.json"


@dataclass(kw_only=True)
class ValidateRecord(Record):
    """Lines and compared images, as they are in the file."""

    kind: str = "validate"
    lines: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)

    def add(self, item: Line | str) -> None:
        """A line, or a note on the run."""
        if isinstance(item, Line):
            self.lines.append(item.to_dict())
            self.save()
        else:
            self.note(item)
