"""Faults planted in the text of a kernel."""

from __future__ import annotations


def plant(source: str, old: str, new: str) -> str:
    """The source with every `old` replaced by the fault; fails where the source has changed and has none."""
    assert old in source, f"the source no longer contains {old!r}: plant the fault in what it has now"
    return source.replace(old, new)
