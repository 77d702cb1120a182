"""Files that are there whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the target's place after the block; none is left after an error.

    It ends as the target's name does, for writers that go by that. Raises OSError where the folder cannot be
    written.
    """
    target = Path(target)
    temporary = target.with_name(f".{secrets.token_hex(4)}.{target.name}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
