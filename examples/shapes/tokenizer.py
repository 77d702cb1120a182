"""The embedded model's text tokenizer: byte-level BPE over the captions' words, and the special tokens.

Every word of the captions is one token, any other text falls back to bytes. The fixed sentences of the
prompts are one token each: on a small model they would otherwise be most of the sequence.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from blip3o_rt.measure.shapes.captions import caption
from blip3o_rt.measure.shapes.edits import random_edit
from blip3o_rt.measure.shapes.scene import random_scene

from .model_config import CODEBOOK_SIZE

SYSTEM = "You are a helpful assistant."
TEXT_TO_IMAGE = "Please generate image based on the following caption:"
EDIT = "Please edit this image according to the following instruction:"
CHAT_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)
TAG_TOKENS = ("<im_start>", "<im_end>")
SCALE_TOKENS = ("<S0>", "<S1>", "<S2>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS_LINES = 4000


def _corpus() -> list[str]:
    rng = random.Random(0)
    captions = (caption(random_scene(rng), rng) for _ in range(CORPUS_LINES))
    edits = (random_edit(rng, held_out=True).instruction + ".\n" for _ in range(CORPUS_LINES))
    chat = ("system\n", "user\n", "assistant\n", SYSTEM, TEXT_TO_IMAGE, EDIT)
    return [
        *itertools.chain.from_iterable((" " + line, line) for line in itertools.chain(captions, edits)),
        *chat * 10,
    ]


def train_tokenizer() -> Tokenizer:
    """The tokenizer with text tokens first, then special tokens, tags, scales and image tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=10, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CHAT_TOKENS])
    sentences = (SYSTEM, TEXT_TO_IMAGE, EDIT)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in sentences])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in TAG_TOKENS])
    images = [f"<I{i}>" for i in range(CODEBOOK_SIZE)]
    tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in (*SCALE_TOKENS, *images)]
    )
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    added = json.loads(tokenizer.to_str())["added_tokens"]
    names = {
        "additional_special_tokens": [token for token in CHAT_TOKENS if token != "<|endoftext|>"],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    config = {
        **names,
        "added_tokens_decoder": {str(token.pop("id")): token for token in added},
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


class PromptTokenizer:
    """Prompt ids of captions and edits, in the published wording, up to and including `<im_start><S0>`."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.first_image_id = self.tokenizer.convert_tokens_to_ids("<I0>")
        self.image_pad_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.vocab_size = len(self.tokenizer)

    def text_to_image(self, prompt: str) -> list[int]:
        """Prompt ids of a caption."""
        return self._encode(f"{TEXT_TO_IMAGE} {prompt}")

    def edit(self, prompt: str, codes: list[int]) -> list[int]:
        """Prompt ids of an edit of an image with these codes."""
        pads = "<|image_pad|>" * len(codes)
        ids = self._encode(f"{EDIT} {prompt}.\n<|vision_start|>{pads}<|vision_end|>")
        images = iter(codes)
        return [next(images) + self.first_image_id if i == self.image_pad_id else i for i in ids]

    def _encode(self, content: str) -> list[int]:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text + "<im_start><S0>")["input_ids"]
