"""From a user's words to the decoder's prompt ids, with the published chat wording."""

from __future__ import annotations

import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as library

from blip3o_rt.config import ImageTokenConfig
from blip3o_rt.errors import CheckpointError, PromptError, first_line, shown

SYSTEM = "You are a helpful assistant."
TEXT_TO_IMAGE = "Please generate image based on the following caption: {prompt}"
EDIT = "Please edit this image according to the following instruction: {prompt}.\n"
IMAGE_START = "<|vision_start|>"
IMAGE_PAD = "<|image_pad|>"
IMAGE_END = "<|vision_end|>"
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that show nothing
PROBE = "a red circle"  # every template is tried with it
# Every generation starts at the first scale token.
GENERATION_SUFFIX = "<im_start><S0>"
_verbosity = threading.Lock()  # the library has one for all threads


class PromptEncoder:
    """Tokenizes prompts with the checkpoint's own tokenizer and chat template.

    `max_tokens` is the longest prompt, counted in tokens with the template and any reference images;
    `positions` the longest that the checkpoint's positions leave (None: the same).
    Raises CheckpointError where the tokenizer does not know the tokens that the model's configuration names.
    """

    def __init__(
        self,
        tokenizer_dir: Path,
        image_tokens: ImageTokenConfig,
        max_tokens: int,
        positions: int | None = None,
    ) -> None:
        self._tokenizer = _load_tokenizer(tokenizer_dir)
        self._max_tokens = max_tokens
        self._positions = positions or max_tokens
        self._lock = threading.Lock()  # the tokenizer refuses a call from a second thread
        # The ids that only the template may write: markers of the chat, of images and the image tokens.
        self._reserved = set(self._tokenizer.all_special_ids) | set(self._tokenizer.added_tokens_decoder)
        self._require_id("<im_start>", image_tokens.image_start_tag_id)
        self._require_id("<S0>", image_tokens.scale_start_token_id)
        if "<I0>" in self._tokenizer.get_vocab():
            self._require_id("<I0>", image_tokens.image_start_token_id)
        self.image_pad_id = cast(int, self._tokenizer.convert_tokens_to_ids(IMAGE_PAD))
        if PROBE not in self._rendered(PROBE)[0]:
            raise CheckpointError(
                f"{tokenizer_dir}: the chat template leaves the message out; copy the checkpoint's own"
            )

    def check(self, prompt: str) -> None:
        """Raise PromptError where the words cannot be a prompt, whatever images come with them."""
        if not isinstance(prompt, str):
            raise PromptError(f"the prompt is {shown(prompt)}: accepted is a string")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise PromptError("the prompt is not valid Unicode text; write it in UTF-8") from None
        if not any(_is_visible(character) for character in prompt):
            raise PromptError("the prompt is empty; say in words what to draw or change")
        for token in self._ids(prompt, add_special_tokens=False):
            if token in self._reserved:
                raise PromptError(
                    f"the prompt contains the reserved token {self._tokenizer.decode([token])!r}; "
                    "write it in other words"
                )

    def encode(self, prompt: str, image_ids: Sequence[int] = ()) -> tuple[list[int], range]:
        """Prompt ids of a request, ending in `<im_start><S0>`, and where the reference image's stand in them.

        Args:
            prompt: What `check` let pass.
            image_ids: For an edit the vocabulary ids of the reference image's tokens (of several images one
                after another, between one pair of markers), or as many `image_pad_id` where features stand
                for them. None for text-to-image.
        """
        content = (EDIT if image_ids else TEXT_TO_IMAGE).format_map({"prompt": prompt})
        if image_ids:
            content += IMAGE_START + IMAGE_PAD * len(image_ids) + IMAGE_END
        ids = self._rendered(content)[1]
        if len(ids) > self._max_tokens:
            larger = f", or load with a larger max_prompt_tokens, to {self._positions}"
            raise PromptError(
                f"the prompt is {len(ids)} tokens long with its template and images; at most "
                f"{self._max_tokens} are accepted: shorten it"
                + (larger if self._max_tokens < self._positions else ", the checkpoint has no more positions")
            )
        if ids.count(self.image_pad_id) != len(image_ids):
            raise CheckpointError(
                f"the tokenizer does not know {IMAGE_START}, {IMAGE_PAD} and {IMAGE_END}, which edits need; "
                "use the tokenizer files that came with the checkpoint"
            )
        start = ids.index(self.image_pad_id) if image_ids else 0
        span = range(start, start + len(image_ids))
        ids[span.start : span.stop] = image_ids
        return ids, span

    def _ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        with self._lock:
            return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _rendered(self, content: str) -> tuple[str, list[int]]:
        """The chat that the template makes of a message, and its ids with those that start an image."""
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        try:
            text = str(
                self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
            return text, self._ids(text + GENERATION_SUFFIX)
        except Exception as error:  # a template is a program of somebody else's
            raise CheckpointError(
                f"the tokenizer's chat template fails ({first_line(error)}); use the tokenizer files that "
                "came with the checkpoint"
            ) from error

    def _require_id(self, token: str, expected: int) -> None:
        found = self._tokenizer.convert_tokens_to_ids(token)
        if found != expected:
            raise CheckpointError(
                f"the tokenizer maps {token!r} to {found}, but config.json says {expected}; "
                "use the tokenizer files that came with the checkpoint"
            )


def _is_visible(character: str) -> bool:
    """Whether a character shows anything by itself: no space, control, format character or bare mark."""
    return unicodedata.category(character)[0] not in "CZM" and character not in BLANK_LETTERS


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Without the library's advice on standard error, as of regular expressions of another model's."""
    with _verbosity:
        before = library.get_verbosity()
        library.set_verbosity(library.CRITICAL)
        try:
            yield
        finally:
            library.set_verbosity(before)


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of tokenizer.json with the chat template of tokenizer_config.json."""
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder}: tokenizer.json is missing; copy the tokenizer files of the checkpoint there"
        )
    try:
        with _quiet_library():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises what its JSON, Rust and template readers raise
        raise CheckpointError(f"{folder}: the tokenizer files cannot be read: {first_line(error)}") from error
    tokenizer.model_max_length = 10**9  # longer prompts are refused here; the library would print a line
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"{folder}: tokenizer_config.json has no chat_template; copy the checkpoint's own"
        )
    return tokenizer
