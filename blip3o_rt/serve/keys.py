"""Bearer keys: who may ask, from a file of one key a line."""

from __future__ import annotations

import hashlib
from pathlib import Path

from blip3o_rt.errors import ParameterError


class Keys:
    """The keys of a file, kept as hashes.

    A line is a key and, after a space, the name it is logged by; `#` begins a comment. A key is at least 16
    characters, or `sha256:` and its hash in hexadecimal digits.

    Raises:
        ParameterError: The file has no keys, or a line that is none.
    """

    def __init__(self, path: Path) -> None:
        self._names: dict[bytes, str] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            words = line.partition("#")[0].split()
            if words:
                self._names[_hash(words[0], path, number)] = words[1] if words[1:] else f"key-{number}"
        if not self._names:
            raise ParameterError(f"{path} has no keys: accepted is a key of 16 characters or more a line")

    def name(self, authorization: str | None) -> str | None:
        """The name of the key in an Authorization header; None where it is not one of them."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        return self._names.get(hashlib.sha256(key.strip().encode()).digest())  # no timing: it is a hash


def _hash(word: str, path: Path, number: int) -> bytes:
    try:
        if word.startswith("sha256:") and len(bytes.fromhex(word[7:])) == 32:
            return bytes.fromhex(word[7:])
    except ValueError:
        pass
    if word.startswith("sha256:") or len(word) < 16:
        raise ParameterError(
            f"{path} line {number} is not a key: accepted are 16 characters or more, or sha256: and 64 digits"
        )
    return hashlib.sha256(word.encode()).digest()
