"""Reading weight files piece by piece and writing them as a stream, never a whole file in memory."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from blip3o_rt.checkpoint.source import refuse_stand_in
from blip3o_rt.errors import CheckpointError, first_line

CHUNK_BYTES = 16 * 2**20  # read, convert and write at most about this much at once
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
HEADER_LIMIT = 100_000_000  # bytes, the format's own limit

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        path: The file.
        name: Its name there.
        shape: Its shape there.
        dtype: What its elements are, in words where they are nothing that torch computes with.
        read: `chunks`.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[int], Iterator[Tensor]]

    def chunks(self, every: int = 1) -> Iterator[Tensor]:
        """Its elements in order, as one-dimensional pieces, or one in `every` of these.

        A piece is valid until the next is taken.
        """
        return self.read(every)


Tensors = Mapping[str, StoredTensor]  # by name


def whole_tensor(stored: StoredTensor, chunks: Iterator[Tensor] | None = None) -> Tensor:
    """A tensor in memory, as stored; of its chunks where these are given."""
    assert isinstance(stored.dtype, torch.dtype)  # who reads has checked
    return filled(stored.shape, stored.dtype, stored.chunks() if chunks is None else chunks)


def filled(shape: tuple[int, ...], dtype: torch.dtype, chunks: Iterator[Tensor]) -> Tensor:
    """A tensor of the elements that come in one-dimensional chunks."""
    tensor = torch.empty(shape, dtype=dtype)
    flat, done = tensor.reshape(-1), 0
    for chunk in chunks:
        flat[done : done + chunk.numel()] = chunk
        done += chunk.numel()
    return tensor


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype | str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, read through plain file reads: memory use stays at one chunk.

    Raises CheckpointError when the file is missing, truncated or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            entries, data_start = _read_header(path, file, size)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; accepted: a complete copy of the checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({first_line(error)}); check the disk") from None
    return {
        name: StoredTensor(path, name, entry.shape, entry.dtype, partial(_chunks, path, entry, data_start))
        for name, entry in entries.items()
    }


def _chunks(path: Path, entry: _Entry, data_start: int, every: int) -> Iterator[Tensor]:
    assert isinstance(entry.dtype, torch.dtype)  # who reads has checked
    step = CHUNK_BYTES // entry.dtype.itemsize * entry.dtype.itemsize
    buffer = torch.empty(min(step, entry.end - entry.begin), dtype=torch.uint8)
    with path.open("rb") as file:
        for position in range(entry.begin, entry.end, step * every):
            file.seek(data_start + position)
            piece = buffer[: min(step, entry.end - position)]
            if file.readinto(piece.numpy().data) < len(piece):
                raise _truncated(path)
            yield piece.view(entry.dtype)


def _truncated(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: truncated, it ends before its tensors do; copy or download it again")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a valid safetensors file ({what}); copy or download it again")


def _read_header(path: Path, file: io.BufferedReader, size: int) -> tuple[dict[str, _Entry], int]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > HEADER_LIMIT:
        refuse_stand_in(path)
        raise _damaged(path, "its header length makes no sense")
    if size < 8 + length:
        raise _truncated(path)
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: _entry(fields) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header does not parse: {first_line(error)}") from None
    for name, entry in entries.items():
        stored = entry.end - entry.begin
        itemsize = entry.dtype.itemsize if isinstance(entry.dtype, torch.dtype) else None
        if entry.begin < 0 or stored < 0 or (itemsize and stored != math.prod(entry.shape) * itemsize):
            raise _damaged(path, f"{name} of shape {list(entry.shape)} occupies {stored} bytes")
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end:
            raise _damaged(path, f"its tensors overlap or leave a gap at byte {end}")
        end = entry.end
    if 8 + length + end > size:
        raise _truncated(path)
    if 8 + length + end < size:
        raise _damaged(path, f"{size - end - length - 8} bytes follow its last tensor")
    return entries, 8 + length


def _entry(fields: dict[str, object]) -> _Entry:
    dtype, shape, offsets = str(fields["dtype"]), fields["shape"], fields["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError("a tensor without shape and data_offsets")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
        raise ValueError("shape must be of integers")
    if any(isinstance(n, bool) or not isinstance(n, int) for n in offsets):
        raise ValueError("data_offsets must be integers")
    return _Entry(DTYPES.get(dtype, dtype), tuple(shape), offsets[0], offsets[1])


def read_torch_file(path: Path) -> object:
    """Load a torch file that holds nothing but tensors and plain values; tensors stay mapped to the file.

    Raises CheckpointError when it is missing, damaged, or a pickle that wants to run code.
    """
    try:
        refuse_stand_in(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; accepted: a ta_tok.pth file") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: refused, it holds Python objects that would run code when loaded; "
            "accepted: tensors and plain values only"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # the library raises what its archive and pickle readers raise
        raise CheckpointError(
            f"{path}: truncated or not a torch file ({first_line(error)}); copy or download it again"
        ) from None


def torch_tensors(path: Path, state: Mapping[object, object]) -> dict[str, StoredTensor]:
    """The tensors of a torch file's state dictionary; their pages are read only as they are used."""
    return {
        str(name): StoredTensor(
            path, str(name), tuple(value.shape), _kind(value), partial(_split, path, value)
        )
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def _kind(tensor: Tensor) -> torch.dtype | str:
    if tensor.is_meta:
        return "a shape without values (meta)"
    plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested
    return tensor.dtype if plain else f"{tensor.dtype}, quantized or sparse"


def _split(path: Path, tensor: Tensor, every: int) -> Iterator[Tensor]:
    stat = path.stat()
    _check_archive(path, stat.st_size, stat.st_mtime_ns)
    yield from tensor.detach().reshape(-1).split(max(1, CHUNK_BYTES // tensor.dtype.itemsize))[::every]


@lru_cache(maxsize=1)
def _check_archive(path: Path, size: int, modified: int) -> None:
    """Compare a torch file with the checksums in it, once; the oldest kind of file has none."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
            damaged = first_line(error)
        if damaged is not None:
            raise CheckpointError(
                f"{path}: damaged, a checksum differs ({damaged}); copy or download it again"
            )


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def aligned_order(headers: list[TensorHeader]) -> list[TensorHeader]:
    """An order in which every tensor whose size is a multiple of ALIGNMENT bytes starts at such a multiple.

    The format leaves no gaps between tensors, so those of other sizes go last, widest elements first.
    """
    return sorted(headers, key=lambda h: (h.size % ALIGNMENT != 0, -h.dtype.itemsize))


class SafetensorsWriter:
    """Writes a safetensors file as a stream: the header first, then each tensor's elements in its order.

    Used as a context manager. `written` and `sha256` describe the file once it is closed.
    """

    def __init__(
        self, path: Path, headers: list[TensorHeader], progress: Callable[[int], object] | None = None
    ) -> None:
        self.path = path
        self.written = 0
        self._expected = sum(header.size for header in headers)
        self._progress = progress
        self._hash = hashlib.sha256()
        self._header = _encode_header(headers)

    def __enter__(self) -> SafetensorsWriter:
        self._file = self.path.open("wb", buffering=0)
        self._write(self._header)
        return self

    def write(self, piece: Tensor) -> None:
        """Append a contiguous CPU tensor's elements."""
        data = piece.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK_BYTES):
            part = data[start : start + CHUNK_BYTES]
            self._write(part)
            if self._progress:
                self._progress(len(part))

    def _write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        view = memoryview(data)
        while view:
            count = self._file.write(view)
            view = view[count:]
            self.written += count

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                if self.written != len(self._header) + self._expected:
                    raise RuntimeError(f"{self.path}: wrote {self.written} bytes, promised another number")
                os.fsync(self._file.fileno())
        self.sha256 = self._hash.hexdigest()


def _encode_header(headers: list[TensorHeader]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for header in headers:
        end = offset + header.size
        fields[header.name] = {
            "dtype": DTYPE_NAMES[header.dtype],
            "shape": list(header.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def file_sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
            if progress:
                progress(len(piece))
    return digest.hexdigest()
