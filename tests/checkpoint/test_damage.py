"""Damaged files, and values that cannot be: refused or reported, each as what it is."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.checkpoint.manifest import Manifest, check_files
from blip3o_rt.checkpoint.tensor_file import file_sha256
from blip3o_rt.errors import CheckpointError
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint

from .conftest import ALL_FLAGS, edit_json, edit_tensors

MODEL = "model.safetensors"
MATRIX = "model.layers.1.mlp.up_proj.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 8000000000\n"


@pytest.fixture
def with_file(tmp_path: Path) -> Path:
    """A tiny checkpoint whose image tokenizer is in ta_tok.pth."""
    write_random_checkpoint(tmp_path / "source", preset("tiny", ALL_FLAGS), seed=3, tower="file")
    return tmp_path / "source"


def test_a_download_whose_second_half_is_zeros_is_refused(checkpoint: Path) -> None:
    data = (checkpoint / MODEL).read_bytes()
    half = len(data) // 2
    (checkpoint / MODEL).write_bytes(data[:half] + bytes(len(data) - half))
    with pytest.raises(CheckpointError, match="is zero"):
        load_checkpoint(checkpoint)


def test_a_matrix_that_is_all_but_zero_is_refused(checkpoint: Path) -> None:
    def empty(tensors: dict[str, Tensor]) -> None:
        tensors[MATRIX].zero_()[3, 5] = 1.0

    edit_tensors(checkpoint / MODEL, empty)
    with pytest.raises(CheckpointError, match=rf"{MATRIX}' is zero \(all but 1 of 8192"):
        load_checkpoint(checkpoint)


def zero_in_place(file: Path, name: str) -> None:
    """Overwrite the bytes of a tensor, as a lost block of a disk does."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:start])[name]["data_offsets"]
    data[start + begin : start + end] = bytes(end - begin)
    file.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.self_attn.q_norm.weight", "model.sana.caption_norm.weight"]
)
def test_the_weight_of_a_norm_that_is_zero_is_refused(name: str, checkpoint: Path) -> None:
    zero_in_place(checkpoint / MODEL, name)
    with pytest.raises(CheckpointError, match=rf"{name}' is zero \(all but 0 of"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(("part", "name"), [("ar", "norm.weight"), ("vae", "decoder.norm_out.weight")])
def test_the_weight_of_a_norm_that_is_zero_in_a_conversion_is_refused(
    part: str, name: str, checkpoint: Path, tmp_path: Path
) -> None:
    convert(checkpoint, tmp_path / "converted", progress=False)
    zero_in_place(tmp_path / "converted" / f"{part}.safetensors", name)
    with pytest.raises(CheckpointError, match=rf"{name}' is zero throughout"):
        load_checkpoint(tmp_path / "converted")


def test_zero_biases_and_half_zero_matrices_are_fine(checkpoint: Path) -> None:
    def empty(tensors: dict[str, Tensor]) -> None:
        tensors["model.diffusion_connector.0.bias"].zero_()
        tensors[MATRIX][64:].zero_()

    edit_tensors(checkpoint / MODEL, empty)
    load_checkpoint(checkpoint)


def test_a_conversion_that_is_zero_at_its_end_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "converted", progress=False)
    file = tmp_path / "converted" / "dit.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(CheckpointError, match="is zero throughout"):
        load_checkpoint(tmp_path / "converted")


def test_bytes_behind_the_last_tensor_are_refused(checkpoint: Path) -> None:
    data = (checkpoint / MODEL).read_bytes()
    (checkpoint / MODEL).write_bytes(data + data)
    with pytest.raises(CheckpointError, match=rf"\({len(data)} bytes follow its last tensor\)"):
        load_checkpoint(checkpoint)


def test_a_flipped_bit_in_ta_tok_is_found_by_its_checksum(with_file: Path) -> None:
    path = with_file / "ta_tok.pth"
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 256 + largest.file_size // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"ta_tok\.pth: damaged, a checksum differs"):
        load_checkpoint(with_file)


@pytest.mark.parametrize("change", ["grad", "meta", "sparse", "half", "transposed"])
def test_tensors_of_ta_tok_of_every_kind(change: str, with_file: Path) -> None:
    data = torch.load(with_file / "ta_tok.pth", weights_only=True)
    name = "encode_task_layer.0.weight"
    tensor = data["model"]["sd"][name]
    data["model"]["sd"][name] = {
        "grad": lambda: tensor.requires_grad_(),
        "meta": lambda: tensor.to("meta"),
        "sparse": lambda: tensor.to_sparse(),
        "half": lambda: tensor.half(),
        "transposed": lambda: tensor.T.contiguous().T,
    }[change]()
    torch.save(data, with_file / "ta_tok.pth")
    if change in ("meta", "sparse"):
        with pytest.raises(
            CheckpointError, match=rf"{name}' is stored as .*(meta|sparse).*; accepted: floating"
        ):
            load_checkpoint(with_file)
    else:
        assert torch.equal(
            load_checkpoint(with_file).weights["ta_tok"][name].float(), tensor.detach().float()
        )


@pytest.mark.parametrize("layout", ["published", "converted"])
def test_a_value_that_no_training_leaves_is_reported(layout: str, checkpoint: Path, tmp_path: Path) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[MATRIX].view(-1)[7] = -1e36

    edit_tensors(checkpoint / MODEL, flip)
    path = checkpoint
    if layout == "converted":
        path = tmp_path / "converted"
        convert(checkpoint, path, progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_checkpoint(path)
    assert [str(warning.message)[: len(MATRIX) + 31] for warning in caught] == [
        f"{MATRIX} holds values as large as 1e+36"[: len(MATRIX) + 31]
    ]


def test_a_number_beyond_bfloat16_is_refused_as_nan_is(checkpoint: Path, tmp_path: Path) -> None:
    """3.4028e38 is a float32 that rounds to infinity in bfloat16."""
    tensors = {name: tensor.float() for name, tensor in load_file(checkpoint / MODEL).items()}
    tensors["model.norm.weight"][0] = 3.4028e38
    save_file(tensors, checkpoint / MODEL)
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight' has numbers beyond the range of torch\.bfl"
    ):
        convert(checkpoint, tmp_path / "converted", progress=False)
    assert not (tmp_path / "converted").exists()
    with pytest.warns(UserWarning, match="as large as"):
        load_checkpoint(checkpoint, dtype=torch.float32)


def test_verifying_sees_infinity(checkpoint: Path, tmp_path: Path) -> None:
    """In a conversion that an earlier version wrote: its checksum is that of the infinity."""
    folder = tmp_path / "converted"
    manifest = convert(checkpoint, folder, progress=False)
    edit_tensors(folder / "ar.safetensors", lambda tensors: tensors["norm.weight"].fill_(float("inf")))
    size, digest = (folder / "ar.safetensors").stat().st_size, file_sha256(folder / "ar.safetensors")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit_json(
        folder / "manifest.json", {"files": {**files, "ar.safetensors": {"size": size, "sha256": digest}}}
    )
    with pytest.raises(
        CheckpointError, match=r"ar\.safetensors: tensor 'norm\.weight' contains NaN or infinity"
    ):
        check_files(folder, Manifest.read(folder), checksums=True)
    assert manifest.files.keys() == Manifest.read(folder).files.keys()


@pytest.mark.parametrize("dtype", ["C64", "U64", "F8_E8M0", "F4", "NEW"])
def test_types_that_are_not_needed_refuse_nothing(dtype: str, checkpoint: Path) -> None:
    edit_tensors(
        checkpoint / MODEL,
        lambda tensors: tensors.update({"freqs_cis": torch.zeros(3, dtype=torch.complex64)}),
    )
    data = (checkpoint / MODEL).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["freqs_cis"]["dtype"] = dtype
    if dtype in ("F8_E8M0", "F4"):
        header["freqs_cis"]["shape"] = [24 if dtype == "F8_E8M0" else 48]
    text = json.dumps(header).encode()
    (checkpoint / MODEL).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.warns(UserWarning, match="freqs_cis is not known and was left out"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("end", "shape"),
    [
        ("weight_scale", ()),
        ("weight_scale", (128, 1)),
        ("weight_scale_inv", (1, 1)),
        ("scale_weight", (1,)),
        ("weight.scale", (128,)),
    ],
)
def test_fp8_weights_are_refused_by_name(
    end: str, shape: tuple[int, ...], dtype: torch.dtype, checkpoint: Path
) -> None:
    """One scale for the tensor, for each row, or for each block, under the names of usual writers."""
    module = MATRIX.removesuffix("weight")

    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors[MATRIX] = tensors[MATRIX].to(dtype)
        tensors[module + end] = torch.ones(shape)
        tensors[module + "input_scale"] = torch.ones(())

    edit_tensors(checkpoint / MODEL, shrink)
    scale = re.escape(module + end)
    with pytest.raises(CheckpointError, match=rf"{MATRIX}' is stored as .*float8.* with scales '{scale}'"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "name",
    [MODEL, "config.json", "sana/vae/config.json", "tokenizer.json", "tokenizer_config.json", "ta_tok.pth"],
)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, r"a git-lfs pointer, not the file itself; run `git lfs pull`"),
        (b"<!DOCTYPE html>\n<html><title>Login</title></html>", "a web page, not the file itself"),
    ],
)
def test_what_stands_in_the_place_of_a_file_is_named(
    content: bytes, words: str, name: str, checkpoint: Path
) -> None:
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_named(encoding: str, name: str, checkpoint: Path) -> None:
    path = checkpoint / name
    path.write_bytes(path.read_text().encode(encoding))
    with pytest.raises(CheckpointError, match="begins with a byte order mark"):
        load_checkpoint(checkpoint)


def test_nested_json_is_refused_in_one_line(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(CheckpointError, match="not a readable JSON file") as found:
        load_checkpoint(checkpoint)
    assert "\n" not in str(found.value)
