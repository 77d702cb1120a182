"""The streaming reader and writer against the safetensors library, and damaged files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_rt.checkpoint import tensor_file
from blip3o_rt.checkpoint.tensor_file import (
    ALIGNMENT,
    SafetensorsWriter,
    StoredTensor,
    TensorHeader,
    aligned_order,
    file_sha256,
    read_safetensors,
    read_torch_file,
)
from blip3o_rt.errors import CheckpointError

SHAPES = st.lists(st.integers(1, 9), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def read_whole(tensor: StoredTensor) -> Tensor:
    return torch.cat([piece.clone() for piece in tensor.chunks()]).reshape(tensor.shape)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(entries=st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_library_reads_what_is_written(
    entries: list[tuple[tuple[int, ...], torch.dtype]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("written") / "file.safetensors"
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"tensor.{index}": torch.randn(shape, generator=generator).to(dtype)
        for index, (shape, dtype) in enumerate(entries)
    }
    headers = aligned_order([TensorHeader(name, tuple(t.shape), t.dtype) for name, t in tensors.items()])
    with SafetensorsWriter(path, headers) as writer:
        for header in headers:
            for piece in tensors[header.name].reshape(-1).split(5):
                writer.write(piece)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert writer.written == path.stat().st_size
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == file_sha256(path)
    mapped = [loaded[header.name] for header in headers if header.size % ALIGNMENT == 0]
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in mapped)


@pytest.mark.parametrize("chunk", [8, 24, 2**20])
def test_reads_what_the_library_writes(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        "a": torch.randn(5, 3),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(()),
        "d": torch.randn(2, 1, 3, 3).double(),
    }
    save_file(tensors, tmp_path / "file.safetensors")
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", chunk)
    stored = read_safetensors(tmp_path / "file.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (stored[name].shape, stored[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(read_whole(stored[name]), tensor)


def test_a_writer_that_is_given_too_little_fails(tmp_path: Path) -> None:
    header = TensorHeader("a", (4,), torch.float32)
    with pytest.raises(RuntimeError, match="promised"), SafetensorsWriter(tmp_path / "f", [header]) as writer:
        writer.write(torch.zeros(3))


def damaged(path: Path, kind: str) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    contents = {
        "cut in the data": data[:-1],
        "cut in the header": data[: 8 + length // 2],
        "cut in the length": data[:5],
        "empty": b"",
        "not safetensors": b"PK\x03\x04" + data[4:],
        "header not JSON": data[:8] + b"x" * length + data[8 + length :],
        "shape and bytes differ": data.replace(b'"shape":[4,4]', b'"shape":[4,5]'),
        "negative offset": data.replace(b"[0,64]", b"[-9,5]"),
        "longer": data + bytes(3),
        "a gap": data.replace(b"[0,64]", b"[8,72]") + bytes(8),
    }
    path.write_bytes(contents[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut in the data", "truncated"),
        ("cut in the header", "truncated"),
        ("cut in the length", "not a valid safetensors file"),
        ("empty", "not a valid safetensors file"),
        ("not safetensors", "truncated|not a valid"),
        ("header not JSON", "does not parse"),
        ("shape and bytes differ", "occupies 64 bytes"),
        ("negative offset", "occupies 14 bytes"),
        ("longer", "3 bytes follow its last tensor"),
        ("a gap", "overlap or leave a gap at byte 0"),
    ],
)
def test_damaged_files_are_refused(kind: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.ones(4, 4)}, path)
    damaged(path, kind)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_safetensors(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_cut_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.ones(4, 4)}, path)
    stored = read_safetensors(path)["a"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        read_whole(stored)


class _RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("import pathlib; pathlib.Path('ran').touch()",))


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"args": {}, "sd": _RunsCode()}}, tmp_path / "ta_tok.pth")
    with pytest.raises(CheckpointError, match="would run code") as refusal:
        read_torch_file(tmp_path / "ta_tok.pth")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_a_cut_torch_file_is_refused(keep: float, tmp_path: Path) -> None:
    path = tmp_path / "ta_tok.pth"
    torch.save({"a": torch.ones(1000)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(CheckpointError, match="truncated or not a torch file") as refusal:
        read_torch_file(path)
    assert "\n" not in str(refusal.value)


def test_a_missing_torch_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ta_tok\.pth: not found"):
        read_torch_file(tmp_path / "ta_tok.pth")


def test_tensors_do_not_share_the_written_file(tmp_path: Path) -> None:
    """A mapped weight that is written to is copied: the file stays as it was."""
    path = tmp_path / "file.safetensors"
    with SafetensorsWriter(path, [TensorHeader("a", (16,), torch.float32)]) as writer:
        writer.write(torch.ones(16))
    with safe_open(path, framework="pt") as file:
        file.get_tensor("a").zero_()
    assert torch.equal(load_file(path)["a"], torch.ones(16))
