"""Files that are there whole or not at all: written beside their target, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: str | os.PathLike[str], *, new: bool = False) -> Iterator[Path]:
    """A new file's path to write to, which takes the target's place after the block.

    A link keeps pointing where it points: the file there is replaced. A file that is replaced hands on its
    mode. After an error the target is what it was and nothing else is left.

    Args:
        target: The file to make or replace.
        new: Replace nothing: the name is taken by making the file, also before other processes.

    Yields:
        A path that ends as the target's name does, for writers that go by that.

    Raises:
        FileExistsError: It is there, and `new` was asked for.
        OSError: The file cannot be written; it names the target.
    """
    place = Path(target).resolve()  # through links
    if place.exists() and not place.is_file():
        raise OSError(errno.EINVAL, "not a regular file, and not replaced", str(target))
    temporary = place.with_name(f".{secrets.token_hex(4)}.{place.name[-16:]}")
    try:
        yield temporary
        if new:
            place.touch(exist_ok=False)
        elif place.exists():
            temporary.chmod(stat.S_IMODE(place.stat().st_mode))
        temporary.replace(place)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise type(error)(error.errno, error.strerror, str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)
