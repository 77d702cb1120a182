"""Random checkpoints: reproducible, readable by everybody, with weights of a sane size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from blip3o_rt.checkpoint.load import load_checkpoint, open_checkpoint
from blip3o_rt.config import ImageTokenConfig, ModelConfig
from blip3o_rt.errors import CheckpointError
from blip3o_rt.measure import random_checkpoint
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from tests.checkpoint.conftest import ALL_FLAGS


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_checkpoint(tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_threads_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for threads, ahead in ((1, 0), (3, 100_000)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(random_checkpoint, "MADE_AHEAD", ahead)
        write_random_checkpoint(tmp_path / str(threads))
        files.append((tmp_path / str(threads) / "model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_it_reads_back_as_it_was_asked(dtype: str, tmp_path: Path) -> None:
    config = preset("tiny", ALL_FLAGS)
    assert write_random_checkpoint(tmp_path / "source", config, dtype=dtype) == config
    original = open_checkpoint(tmp_path / "source")
    assert original.config == config
    assert original.stored_dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]


def test_it_is_small(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "source", preset("tiny", ALL_FLAGS))
    assert sum(path.stat().st_size for path in (tmp_path / "source").rglob("*") if path.is_file()) < 4e6


def test_weights_keep_activations_sane(tmp_path: Path) -> None:
    """Matrices have variance 1 / fan-in, norms are about 1: five standard errors of each estimate."""
    write_random_checkpoint(tmp_path / "source", dtype="fp32")
    for name, tensor in load_file(tmp_path / "source" / "model.safetensors").items():
        if tensor.ndim >= 2:
            scaled = tensor * tensor[0].numel() ** 0.5
            assert abs(float(scaled.square().mean()) - 1) < 5 * (2 / tensor.numel()) ** 0.5, name
        elif name.endswith(".weight"):
            assert abs(float(tensor.mean()) - 1) < 5 * 0.1 / tensor.numel() ** 0.5, name


def moved(config: ModelConfig, first: int) -> ModelConfig:
    """The image vocabulary elsewhere, in another order and with a gap."""
    tokens = ImageTokenConfig(first + 9, first, first + 2, first + 10, 40, 64)
    assert config.ta_tok is not None
    return replace(
        config,
        image_tokens=tokens,
        ar=replace(config.ar, vocab_size=first + 60),
        ta_tok=replace(config.ta_tok, codebook_size=40),
    )


@pytest.mark.parametrize("first", [None, 262, 1000])
def test_the_tokenizer_has_every_special_token_at_its_id(first: int | None, tmp_path: Path) -> None:
    config = preset("tiny") if first is None else moved(preset("tiny"), first)
    write_random_checkpoint(tmp_path / "source", config)
    tokens = config.image_tokens
    tokenizer = PreTrainedTokenizerFast.from_pretrained(load_checkpoint(tmp_path / "source").tokenizer_dir)
    expected = {
        "<im_start>": tokens.image_start_tag_id,
        "<im_end>": tokens.image_end_tag_id,
        "<S0>": tokens.scale_start_token_id,
        "<I0>": tokens.image_start_token_id,
        f"<I{tokens.num_image_tokens - 1}>": tokens.image_start_token_id + tokens.num_image_tokens - 1,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in expected} == expected
    assert len(tokenizer) <= config.ar.vocab_size
    specials = [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
    ]
    text = "ein süßes 猫 \n" + "".join(specials) + "<im_start><S0><I3>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(ids.count(tokenizer.convert_tokens_to_ids(token)) == 1 for token in specials)
    assert ids[-3:] == [expected["<im_start>"], expected["<S0>"], expected["<I0>"] + 3]
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be."}, {"role": "user", "content": "x"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert chat == "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"


def test_an_image_vocabulary_that_leaves_no_room_for_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="at least 262"):
        write_random_checkpoint(tmp_path / "source", moved(preset("tiny"), 100))


def test_arguments_that_are_not_accepted(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="exists; accepted: a new or empty folder"):
        write_random_checkpoint(tmp_path / "full")
    with pytest.raises(CheckpointError, match="preset is 'huge'; accepted: tiny or published"):
        write_random_checkpoint(tmp_path / "new", "huge")
    with pytest.raises(CheckpointError, match="dtype is 'fp16'"):
        write_random_checkpoint(tmp_path / "new", dtype="fp16")
    with pytest.raises(CheckpointError, match="tower is 'outside'"):
        write_random_checkpoint(tmp_path / "new", tower="outside")
    with pytest.raises(CheckpointError, match="shards is 0"):
        write_random_checkpoint(tmp_path / "new", shards=0)
    assert not (tmp_path / "new").exists()
