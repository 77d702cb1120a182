"""A byte-level tokenizer for random checkpoints: no merges, every special token at the id it must have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from blip3o_rt.config import ModelConfig
from blip3o_rt.errors import CheckpointError

# They stand, in this order, right before the first token of the image vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def special_token_id(model: ModelConfig, token: str) -> int:
    """Vocabulary id of one of SPECIAL_TOKENS."""
    return _first_image_id(model) - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(token)


def _first_image_id(model: ModelConfig) -> int:
    """The image vocabulary's first id: tags, scales and image tokens are one run up to its last."""
    tokens = model.image_tokens
    return min(
        tokens.image_start_tag_id,
        tokens.image_end_tag_id,
        tokens.scale_start_token_id,
        tokens.image_start_token_id,
    )


def write_tokenizer(folder: Path, model: ModelConfig) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Raises CheckpointError when the ids leave no room for the bytes.
    """
    first_special = special_token_id(model, SPECIAL_TOKENS[0])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if first_special < len(alphabet):
        raise CheckpointError(
            f"the image vocabulary starts at {_first_image_id(model)}; accepted: at least "
            f"{len(alphabet) + len(SPECIAL_TOKENS)}, for the bytes and the special tokens before it"
        )
    fillers = (f"<unused{index}>" for index in range(len(alphabet), first_special))
    vocabulary = {token: index for index, token in enumerate([*alphabet, *fillers])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in _image_vocabulary(model)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": model.ar.max_position_embeddings,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _image_vocabulary(model: ModelConfig) -> Iterator[str]:
    """The image vocabulary's tokens in order of id, placeholders where the ids leave a gap."""
    tokens = model.image_tokens
    first_scale = tokens.scale_start_token_id
    scales = range(first_scale, max(first_scale + 1, tokens.image_start_token_id))
    names = {tokens.image_start_tag_id: "<im_start>", tokens.image_end_tag_id: "<im_end>"}
    names |= {token: f"<S{index}>" for index, token in enumerate(scales) if token not in names}
    names |= {token: f"<I{index}>" for index, token in enumerate(tokens.image_token_range)}
    for token in range(_first_image_id(model), max(names) + 1):
        yield names.get(token, f"<unused{token}>")
