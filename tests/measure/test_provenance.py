"""The head of a record: complete, ready for JSON, and honest about where the code came from."""

from __future__ import annotations

import json
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from blip3o_rt import __version__
from blip3o_rt.measure import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_head_has_every_field_and_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in provenance.DECIDING:
        monkeypatch.delenv(name, raising=False)
    head = json.loads(json.dumps(provenance.record_head("bench", ["blip3o-rt", "bench"])))
    assert list(head) == [
        "kind",
        "version",
        "created",
        "command",
        "machine",
        "versions",
        "commit",
        "complete",
    ]
    assert (head["kind"], head["version"], head["complete"]) == ("bench", 1, False)
    assert head["command"] == ["blip3o-rt", "bench"]
    assert datetime.fromisoformat(head["created"]).utcoffset() is not None
    assert set(head["machine"]) == {"cpu", "cores", "memory_bytes", "gpu", "driver", "instruction_sets"}
    assert head["machine"]["cores"] >= 1
    assert head["versions"]["blip3o_rt"] == __version__
    assert set(head["versions"]) == {"blip3o_rt", "python", "torch", "transformers", "diffusers", "triton"}


def test_the_command_says_what_the_environment_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in provenance.DECIDING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BLIP3O_CPU_ISA", "avx2")
    monkeypatch.setenv("BLIP3O_REFERENCE", "a folder")  # changes nothing that is measured
    assert provenance.record_head("bench", ["blip3o-rt"])["command"] == ["BLIP3O_CPU_ISA=avx2", "blip3o-rt"]


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="accepted are bench, validate, score"):
        provenance.record_head("guess", [])


def test_commit_of_a_checkout_and_whether_it_was_changed(tmp_path: Path) -> None:
    package = tmp_path / "blip3o_rt"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert provenance.commit(package) is None  # no repository
    git(tmp_path, "init", "--quiet")
    (tmp_path / "theirs").write_text("")
    git(tmp_path, "add", "theirs")
    git(tmp_path, "commit", "--quiet", "--no-verify", "--message", "a repository around an installed package")
    assert provenance.commit(package) is None
    git(tmp_path, "add", "blip3o_rt")
    git(tmp_path, "commit", "--quiet", "--no-verify", "--message", "the package's own")
    git(tmp_path, "tag", "--annotate", "v1", "--message", "a tag does not stand in for the commit")
    head = git(tmp_path, "rev-parse", "HEAD")
    found = provenance.commit(package)
    assert found is not None
    assert head.startswith(found)
    (package / "__init__.py").write_text("changed")
    assert provenance.commit(package) == f"{found}-dirty"
