"""Conversion: the same weights as loading in memory, all or nothing on the disk, in bounded memory."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip3o_rt.checkpoint import convert as convert_module
from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.checkpoint.manifest import MANIFEST, Manifest, check_files
from blip3o_rt.checkpoint.parts import layouts, weight_bytes
from blip3o_rt.checkpoint.tensor_file import SafetensorsWriter, file_sha256
from blip3o_rt.errors import CheckpointError
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from tests.warm import run_python

from .conftest import ALL_FLAGS, edit_tensors

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def assert_same_weights(original: Path, converted: Path, dtype: str) -> None:
    first = load_checkpoint(original, dtype=TORCH_DTYPES[dtype])
    second = load_checkpoint(converted)
    assert first.config == second.config
    assert first.dtype == second.dtype == TORCH_DTYPES[dtype]
    specs = layouts(first.config)
    assert specs.keys() == first.weights.keys() == second.weights.keys()
    for part, tensors in first.weights.items():
        assert tensors.keys() == second.weights[part].keys() == {spec.name for spec in specs[part]}
        for name, tensor in tensors.items():
            assert tensor.dtype == second.weights[part][name].dtype
            assert torch.equal(tensor, second.weights[part][name]), name


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("which", ["t2i", "edit"])
def test_reference_checkpoints_load_the_same_from_both_layouts(
    which: str, dtype: str, reference_dir: Path, tmp_path: Path
) -> None:
    source = reference_dir / which / "checkpoint"
    manifest = convert(source, tmp_path / "converted", dtype=dtype, progress=False)
    assert_same_weights(source, tmp_path / "converted", dtype)
    assert manifest.warnings == []
    assert manifest == Manifest.read(tmp_path / "converted")
    assert set(manifest.sources) >= {"config.json", "model.safetensors", "sana/vae/config.json"}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("tower", ["inside", "file", "none"])
def test_both_layouts_load_the_same(tower: str, dtype: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_random_checkpoint(source, dtype="fp32", shards=2, tower=tower)
    convert(source, tmp_path / "converted", dtype=dtype, progress=False)
    assert_same_weights(source, tmp_path / "converted", dtype)
    assert (tmp_path / "converted" / "ta_tok.safetensors").exists() == (tower != "none")


def test_the_manifest_says_what_is_on_the_disk(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "converted"
    manifest = convert(checkpoint, target, progress=False)
    written = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert written == {MANIFEST, *manifest.files}
    for folder, records in ((target, manifest.files), (checkpoint, manifest.sources)):
        for name, record in records.items():
            assert record.size == (folder / name).stat().st_size
            assert record.sha256 == file_sha256(folder / name)
    data = json.loads((target / MANIFEST).read_text())
    assert (data["format_version"], data["dtype"], data["source"]) == (1, "bf16", str(checkpoint))


def test_written_files_open_with_the_library(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "converted", progress=False)
    for part, specs in layouts(load_checkpoint(checkpoint).config).items():
        tensors = load_file(tmp_path / "converted" / f"{part}.safetensors")
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            spec.name: spec.shape for spec in specs
        }


def test_an_unknown_tensor_is_in_the_manifest(checkpoint: Path, tmp_path: Path) -> None:
    edit_tensors(
        checkpoint / "model.safetensors", lambda tensors: tensors.update({"model.new.bias": torch.zeros(2)})
    )
    manifest = convert(checkpoint, tmp_path / "converted", progress=False)
    assert manifest.warnings == ["model.new.bias is not known and was left out"]


def nothing_but_the_source(checkpoint: Path) -> bool:
    return [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_a_bad_tensor_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.sana_vae.decoder.conv_out.bias"][0] = float("nan")

    edit_tensors(checkpoint / "model.safetensors", spoil)
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.bias' contains NaN"):
        convert(checkpoint, tmp_path / "converted", progress=False)
    assert nothing_but_the_source(checkpoint)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_nothing_behind_and_a_rerun_works(
    code: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def write(self: SafetensorsWriter, piece: torch.Tensor) -> None:
        nonlocal written
        written += 1
        if written > 40:
            raise OSError(code, os.strerror(code))
        original_write(self, piece)

    original_write = SafetensorsWriter.write
    monkeypatch.setattr(SafetensorsWriter, "write", write)
    with pytest.raises(
        CheckpointError, match=r"converted: not written, .*needs .* GiB.*run it again"
    ) as refusal:
        convert(checkpoint, tmp_path / "converted", progress=False)
    assert ("the disk is full" in str(refusal.value)) == (code != errno.EIO)
    assert nothing_but_the_source(checkpoint)
    monkeypatch.undo()
    convert(checkpoint, tmp_path / "converted", progress=False)
    assert_same_weights(checkpoint, tmp_path / "converted", "bf16")


CONVERT = """
import sys
from blip3o_rt.checkpoint.convert import convert
convert(sys.argv[1], sys.argv[2], progress=False)
"""

KILLED = """
import os, signal, sys
from blip3o_rt.checkpoint import convert as module
from blip3o_rt.checkpoint.tensor_file import SafetensorsWriter
calls, write, publish = 0, SafetensorsWriter.write, module._publish
def counting_write(self, piece):
    global calls
    calls += 1
    if sys.argv[3] == "writing" and calls == 60:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, piece)
def killed_publish(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
SafetensorsWriter.write = counting_write
if sys.argv[3] == "publishing":
    module._publish = killed_publish
module.convert(sys.argv[1], sys.argv[2], progress=False)
"""


@pytest.mark.parametrize("moment", ["writing", "publishing"])
def test_a_killed_conversion_leaves_no_destination_and_a_rerun_works(
    moment: str, checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "converted"
    killed = run_python(KILLED, checkpoint, target, moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not target.exists()
    assert list(tmp_path.glob(".converted.partial-*"))
    convert(checkpoint, target, progress=False)
    assert_same_weights(checkpoint, target, "bf16")
    assert not list(tmp_path.glob(".converted.partial-*"))


def test_a_file_size_limit_is_reported(checkpoint: Path, tmp_path: Path) -> None:
    """A disk that really refuses bytes, by a limit on the size of any one file."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    result = run_python(limit + CONVERT, checkpoint, tmp_path / "converted")
    assert "CheckpointError" in result.stderr
    assert "not written, File too large" in result.stderr
    assert nothing_but_the_source(checkpoint)


def test_too_little_room_is_said_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"no room, the conversion needs .* GiB"):
        convert(checkpoint, tmp_path / "converted", progress=False)
    assert nothing_but_the_source(checkpoint)


def test_room_that_is_short_by_a_byte_is_said_so(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(weight_bytes(preset("tiny", ALL_FLAGS), torch.bfloat16).values())
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError) as found:
        convert(checkpoint, tmp_path / "out", progress=False)
    wanted, free = map(float, re.findall(r"([\d.]+) GiB", str(found.value)))
    assert wanted > free


def test_no_thread_stays_where_no_bar_was_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    convert(checkpoint, tmp_path / "out", progress=False)
    load_checkpoint(checkpoint, cache_dir=tmp_path / "cache")
    assert set(threading.enumerate()) == before


def test_a_conversion_in_progress_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "converted"
    with convert_module._partial_folder(target) as running:
        convert(checkpoint, target, progress=False)
        assert running.is_dir()
    assert not running.exists()
    assert load_checkpoint(target, verify=True)


def test_an_existing_destination_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "converted"
    (target / "inner").mkdir(parents=True)
    (target / "precious.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(CheckpointError, match="exists and is not a converted checkpoint"):
            convert(checkpoint, target, force=force, progress=False)
    with pytest.raises(CheckpointError, match="exists and is not a converted checkpoint"):
        convert(checkpoint, target / "precious.txt", progress=False)
    assert (target / "precious.txt").read_text() == "mine"


def test_an_earlier_conversion_is_replaced_by_force_only(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "converted"
    target.mkdir()  # an empty folder is a free name
    convert(checkpoint, target, dtype="fp32", progress=False)
    with pytest.raises(CheckpointError, match=r"already holds a converted checkpoint; accepted: .*--force"):
        convert(checkpoint, target, progress=False)
    convert(checkpoint, target, force=True, progress=False)
    assert Manifest.read(target).dtype == "bf16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "source"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "failed"), KeyboardInterrupt()])
def test_a_replaced_conversion_is_put_back_after_an_error(
    error: BaseException, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "converted"
    before = convert(checkpoint, target, dtype="fp32", progress=False)
    rename = Path.rename

    def fail_at_the_second(self: Path, destination: Path) -> Path:
        if destination == target and ".partial-" in self.name:
            raise error
        return rename(self, destination)

    monkeypatch.setattr(Path, "rename", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError):
        convert(checkpoint, target, force=True, progress=False)
    assert Manifest.read(target) == before
    check_files(target, before, checksums=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "source"]


KILLED_BETWEEN_RENAMES = """
import os, signal, sys
from pathlib import Path
from blip3o_rt.checkpoint.convert import convert
rename = Path.rename
def killed_rename(self, target):
    rename(self, target)
    if ".replaced-" in Path(target).name:
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = killed_rename
convert(sys.argv[1], sys.argv[2], force=True, progress=False)
"""


@pytest.mark.parametrize("force", [False, True])
def test_a_replaced_conversion_is_put_back_after_a_kill(
    force: bool, checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "converted"
    before = convert(checkpoint, target, dtype="fp32", progress=False)
    killed = run_python(KILLED_BETWEEN_RENAMES, checkpoint, target)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not target.exists()
    with convert_module._partial_folder(target):  # the clean-up after dead runs leaves it alone
        (replaced,) = tmp_path.glob(".converted.replaced-*")
    with convert_module._locked(replaced) as locked:  # so does a run while another is replacing
        assert locked
        convert_module._restore_replaced(target)
        assert not target.exists()
    if force:
        assert convert(checkpoint, target, force=True, progress=False).dtype == "bf16"
    else:
        with pytest.raises(CheckpointError, match="already holds a converted checkpoint"):
            convert(checkpoint, target, progress=False)
        check_files(target, before, checksums=True)
    assert Manifest.read(target).dtype == ("bf16" if force else "fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "source"]


def test_what_cannot_be_converted(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype is 'fp16'; accepted: bf16 or fp32"):
        convert(checkpoint, tmp_path / "converted", dtype="fp16", progress=False)
    convert(checkpoint, tmp_path / "converted", progress=False)
    with pytest.raises(CheckpointError, match="already converted"):
        convert(tmp_path / "converted", tmp_path / "again", progress=False)


def test_the_destination_is_readable_as_other_files_are(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    convert(checkpoint, tmp_path / "converted", progress=False)
    assert (tmp_path / "converted").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_names_with_special_characters(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "a [b]* ü"
    killed = run_python(KILLED, checkpoint, target, "writing")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    convert(checkpoint, target, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["source", target.name])
    check_files(target, Manifest.read(target), checksums=True)


MEASURED = """
import sys, threading
from pathlib import Path
from blip3o_rt.checkpoint import tensor_file
from blip3o_rt.checkpoint.convert import convert
tensor_file.CHUNK_BYTES = int(sys.argv[3])
def held():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
before = peak = held()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, held())
threading.Thread(target=watch, daemon=True).start()
convert(sys.argv[1], sys.argv[2], dtype="bf16", progress=False)
done.set()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory counters")
def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """A 200 MB float32 embedding passes through in pieces of 4 MiB and takes memory for a few of them.

    Holding it whole would take 200 MB, in the output's type 100 MB. Only memory of its own counts: how many
    pages of files and libraries are mapped beside it is the kernel's choice.
    """
    tiny = preset("tiny")
    large = replace(tiny, ar=replace(tiny.ar, vocab_size=800_000, tie_word_embeddings=True))
    write_random_checkpoint(tmp_path / "source", large, dtype="fp32")
    assert (tmp_path / "source" / "model.safetensors").stat().st_size > 200e6
    arguments = [str(tmp_path / "source"), str(tmp_path / "converted"), str(4 * 2**20)]
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 64e6
