"""The CPU kernels built for another processor, as a module whose calls run in an emulator."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from blip3o_rt.errors import OpError

CSRC = Path(__file__).parents[3] / "csrc"
DTYPES = (  # in the order of DType in tensor_view.h
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float64,
    torch.float16,
    torch.uint8,
    torch.bool,
)


def build(compiler: str, folder: Path, thread_pool: Path = CSRC / "cpu" / "thread_pool.cpp") -> Path:
    """The program of server.cpp with the portable kernels, warnings being errors."""
    flags = ["-std=gnu++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=fast", "-Wno-psabi"]
    flags += ["-DBLIP3O_ISA=portable", "-DBLIP3O_VECTOR_BYTES=16", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    objects = []
    kernels = [path for path in sorted((CSRC / "cpu").glob("*.cpp")) if path.name != "thread_pool.cpp"]
    for source in [*kernels, thread_pool, Path(__file__).with_name("server.cpp")]:
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run([compiler, *flags, "-c", str(source), "-o", objects[-1]], check=True)
    program = folder / "server"
    subprocess.run([compiler, *objects, "-o", str(program), "-pthread", "-ldl"], check=True)
    return program


class EmulatedKernels:
    """Stands in for blip3o_rt._cpu: `command` runs the program that `build` made.

    Memory of more than `most_bytes` is zeros in a call, and what a call writes to it is lost.
    """

    def __init__(self, command: Sequence[str], most_bytes: int = 2**40) -> None:
        self._most_bytes = most_bytes
        listed = subprocess.run([*command, "list"], check=True, capture_output=True, text=True).stdout
        self.parameters = dict(line.split("\t") for line in listed.splitlines())
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._to, self._from = self.process.stdin, self.process.stdout

    def close(self) -> None:
        self._to.close()
        self.process.wait()

    def isa(self) -> str:
        return "portable"

    def isas(self) -> list[str]:
        return ["portable"]

    def set_isa(self, name: str) -> None:
        assert name == "portable"

    def has_bf16_products(self) -> bool:
        return True  # so that no op passes its kernel over; they are widened

    def __getattr__(self, op_name: str) -> Callable[..., None]:
        if op_name not in self.parameters:
            raise AttributeError(op_name)

        def call(*args: Any, **kwargs: Any) -> None:
            self._call(op_name, args, kwargs)

        return call

    def _call(self, op_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = [p.partition("=")[0] for p in self.parameters[op_name].split(", ") if p != "*"]
        given = dict(zip(names, args, strict=False)) | kwargs
        assert set(given) <= set(names), (op_name, set(given) - set(names))
        storages = _storages(given.values())
        self._to.write(op_name.encode() + b"\n" + struct.pack("=q", len(storages)))
        sent = [storage for storage in storages.values() if storage.numel() <= self._most_bytes]
        for storage in storages.values():
            if storage.numel() > self._most_bytes:
                self._to.write(struct.pack("=q", -storage.numel()))
            else:
                self._to.write(struct.pack("=q", storage.numel()) + storage.numpy().tobytes())
        for name in names:
            self._to.write(_encoded(given.get(name), list(storages)))
        self._to.flush()
        (length,) = struct.unpack("=q", _exactly(self._from, 8))
        if length:
            raise OpError(_exactly(self._from, length).decode())
        for storage in sent:
            written = bytearray(_exactly(self._from, storage.numel()))
            storage.copy_(torch.frombuffer(written, dtype=torch.uint8))


def _storages(values: Any) -> dict[int, Tensor]:
    """The bytes that the tensors among the values share, by address; none that are empty."""
    found = {}
    for value in values:
        if isinstance(value, Tensor) and value.untyped_storage().nbytes():
            storage = value.untyped_storage()
            found[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage)
    return found


def _encoded(value: Any, addresses: list[int]) -> bytes:
    """A parameter as server.cpp reads it."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        filled = storage.nbytes() > 0
        place = addresses.index(storage.data_ptr()) if filled else -1
        offset = value.storage_offset() * value.element_size() if filled else 0
        numbers = (place, offset, DTYPES.index(value.dtype), value.dim(), *value.shape, *value.stride())
        return struct.pack(f"=B{len(numbers)}q", 1, *numbers)
    if isinstance(value, bool | int | float):
        return struct.pack("=Bd", 2, value)
    return b"\0"


def _exactly(stream: IO[bytes], size: int) -> bytes:
    found = stream.read(size)
    if len(found) != size:
        raise RuntimeError("the emulated kernels ended: see their messages above")
    return found
