"""Tokenizer files that cannot be used are refused before anything is written, and at load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.errors import CheckpointError
from blip3o_rt.pipeline import Pipeline

from .conftest import edit_json

TEMPLATES = {
    "no end": "{% for",
    "raises": "{{ raise_exception('not this way') }}",
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "recurses": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "counts": "{% for i in range(10**12) %}{{ i }}{% endfor %}",
    "undefined": "{{ nothing.of.that.name }}",
    "leaves the message out": "<|im_start|>user",
}


def refused(checkpoint: Path, target: Path, message: str) -> None:
    for use in (lambda: convert(checkpoint, target, progress=False), lambda: Pipeline.load(checkpoint)):
        with pytest.raises(CheckpointError, match=message) as found:
            use()
        assert "\n" not in str(found.value)
    assert not target.exists()


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_cannot_be_used_is_refused(template: str, checkpoint: Path, tmp_path: Path) -> None:
    edit_json(checkpoint / "tokenizer_config.json", {"chat_template": template})
    refused(checkpoint, tmp_path / "converted", "chat template")


def test_a_setting_that_the_library_chokes_on_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    edit_json(checkpoint / "tokenizer_config.json", {"added_tokens_decoder": 5})
    refused(checkpoint, tmp_path / "converted", "tokenizer")


def test_the_older_tokenizer_files_are_not_enough(checkpoint: Path, tmp_path: Path) -> None:
    data = json.loads((checkpoint / "tokenizer.json").read_text())
    (checkpoint / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
    (checkpoint / "merges.txt").write_text("")
    (checkpoint / "tokenizer.json").unlink()
    refused(checkpoint, tmp_path / "converted", r"no tokenizer; accepted: tokenizer\.json")


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, marks=pytest.mark.exhaustive),
        {"transformers_version": "4.51.3", "model_type": "mistral"},
    ],
)
def test_a_large_vocabulary_is_read_as_it_is_and_in_silence(checkpoint: Path, config: dict[str, str]) -> None:
    """Above 100,000 entries the library warns of another model's regular expression."""
    path = checkpoint / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in data["added_tokens"]}
    vocabulary |= {f"word{number}": len(vocabulary) + number for number in range(100_001)}
    path.write_text(json.dumps(data))
    (checkpoint / "config.json").write_text(json.dumps(config))
    text = "a red circle, 3 Blue squares!"
    program = (
        "import sys; from pathlib import Path; from blip3o_rt.ar.prompt import PromptEncoder\n"
        "from blip3o_rt.measure.random_checkpoint import preset\n"
        "prompts = PromptEncoder(Path(sys.argv[1]), preset('tiny').image_tokens, 1000)\n"
        "print(prompts._ids(sys.argv[2]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint), text], capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout) == Tokenizer.from_file(str(path)).encode(text).ids
    assert found.stderr == ""


def test_a_tokenizer_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "tokenizer.json"
    path.write_text(path.read_text().replace('"<S0>"', '"<T0>"'))
    refused(checkpoint, tmp_path / "converted", "tokenizer maps '<S0>'")
