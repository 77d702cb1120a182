"""What is no prompt is refused in one line that says why, and which of a list it was."""

from __future__ import annotations

import pytest

from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.errors import PromptError
from blip3o_rt.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(embedded_checkpoint(), device="cpu", dtype="fp32", max_prompt_tokens=64)


@pytest.mark.parametrize(
    "prompt",
    ["", " \n\t", "\u200b", "\0", "\u2060\ufeff\u00ad", "\u3164", "\u2800\u2800", "\u200d\ufe0f", "\u0301"],
)
def test_a_prompt_that_shows_nothing_is_empty(pipeline: Pipeline, prompt: str) -> None:
    with pytest.raises(PromptError, match=r"^the prompt is empty"):
        pipeline.generate(prompt, steps=1)


def test_invalid_unicode_is_not_called_empty(pipeline: Pipeline) -> None:
    with pytest.raises(PromptError, match="not valid Unicode"):
        pipeline.generate("\udce9", steps=1)


def test_a_prompt_that_is_too_long_names_the_limit_that_can_be_asked_for(pipeline: Pipeline) -> None:
    positions = pipeline.config.ar.max_position_embeddings - pipeline.config.image_tokens.tokens_per_image
    with pytest.raises(PromptError, match=rf"at most 64 are .* larger max_prompt_tokens, to {positions}$"):
        pipeline.generate("a red circle " * 40, steps=1)


def test_where_the_checkpoint_is_the_limit_no_larger_one_is_advised() -> None:
    pipeline = Pipeline.load(device="cpu", dtype="fp32", max_prompt_tokens=1_000_000)
    positions = pipeline.config.ar.max_position_embeddings - pipeline.config.image_tokens.tokens_per_image
    with pytest.raises(PromptError, match=f"at most {positions} are accepted: shorten it, the checkpoint"):
        pipeline.generate("a red circle " * positions, steps=1)


@pytest.mark.parametrize(("prompt", "reason"), [("", "is empty"), ("a circle " * 90, "tokens long")])
def test_which_prompt_of_a_list_it_was(pipeline: Pipeline, prompt: str, reason: str) -> None:
    with pytest.raises(PromptError, match=f"^prompt 2 of 3: .*{reason}"):
        pipeline.generate(["a red circle", prompt, "a blue square"], steps=1)


def test_a_long_prompt_prints_nothing(pipeline: Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PromptError):
        pipeline.generate("a red circle " * 4000, steps=1)
    assert capfd.readouterr() == ("", "")
