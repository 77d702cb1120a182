"""Typed reading of a JSON configuration, with errors that name the file, the key and what is accepted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip3o_rt.errors import CheckpointError, ConfigError

REQUIRED = object()  # the default of a key that has none
MAX_LAYERS = 1000


class ConfigFile:
    """One configuration dictionary and the name it has in messages.

    Every getter raises ConfigError when the key is missing (and has no default) or holds a value that is not
    accepted.
    """

    def __init__(self, name: str, data: dict[str, Any]) -> None:
        self.name = name
        self.data = data

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Parse a file. Raises CheckpointError when it is missing or not a JSON object."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: not found; accepted: a checkpoint folder that has it") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a readable JSON file ({error}); copy it again") from None
        if not isinstance(data, dict):
            raise CheckpointError(f"{path}: holds a JSON {type(data).__name__}; accepted: a JSON object")
        return cls(str(path), data)

    def section(self, key: str) -> ConfigFile:
        """The object under `key`."""
        value = self.data.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return ConfigFile(f"{self.name}: {key}", value)

    def error(self, key: str, accepted: str) -> ConfigError:
        """The ConfigError for a missing or unaccepted value of `key`."""
        if key not in self.data:
            return ConfigError(f"{self.name}: {key} is missing; accepted: {accepted}")
        return ConfigError(f"{self.name}: {key} is {self.data[key]!r}; accepted: {accepted}")

    def _get(self, key: str, default: Any) -> Any:
        """The value, or the default where it is missing or null; REQUIRED itself where there is neither."""
        value = self.data.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = REQUIRED, minimum: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, f"an integer of at least {minimum}")
        return value

    def layers(self, key: str, default: Any = REQUIRED) -> int:
        """A number of layers, of which no known model has more than a thousand."""
        count = self.integer(key, default)
        if count > MAX_LAYERS:
            raise self.error(key, f"an integer from 1 to {MAX_LAYERS}")
        return count

    def number(self, key: str, default: Any = REQUIRED, *, positive: bool = True) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise self.error(key, "a positive number" if positive else "a number")
        if abs(value) == float("inf") or (positive and value <= 0):
            raise self.error(key, "a positive number" if positive else "a finite number")
        return float(value)

    def boolean(self, key: str, default: Any = REQUIRED) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: Any = REQUIRED) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, "text")
        return value

    def choice(self, key: str, accepted: Sequence[str], default: Any = REQUIRED) -> str:
        value = self._get(key, default)
        if value not in accepted:
            raise self.error(key, " or ".join(repr(option) for option in accepted))
        return str(value)

    def only(self, key: str, accepted: Any, *, required: bool = False) -> None:
        """Refuse anything but the one accepted value (or, unless required, a missing or null one)."""
        value = self.data.get(key)
        if (value is None and not required) or (value == accepted and type(value) is type(accepted)):
            return
        raise self.error(key, json.dumps(accepted))

    def per_stage(self, key: str, count: int, default: Any = REQUIRED) -> list[Any]:
        """A list of `count` entries, or one value that stands for all of them."""
        value = self._get(key, default)
        if value is REQUIRED:
            raise self.error(key, f"a list of {count} entries")
        if not isinstance(value, list | tuple):
            return [value] * count
        if len(value) != count:
            raise self.error(key, f"a list of {count} entries, as many as there are block_out_channels")
        return list(value)
