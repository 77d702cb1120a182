"""transformers' own decoder of a published checkpoint, and the log-probabilities that it gives."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def decoder_of(checkpoint: Path) -> Qwen3ForCausalLM:
    """The decoder of a checkpoint in the published layout, float32."""
    fields = json.loads((checkpoint / "config.json").read_text())
    config = Qwen3Config.from_dict({**fields, "model_type": "qwen3", "torch_dtype": "float32"})
    model = Qwen3ForCausalLM(config).float().eval()
    state = {
        name: tensor.float()
        for path in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    missing, _ = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@torch.no_grad()
def logits(model: Qwen3ForCausalLM, prompt_ids: Tensor, token_ids: Tensor) -> Tensor:
    """float32 [T, vocabulary]: what each token of [T] was drawn from, in one pass over prompt and tokens."""
    ids = torch.cat([prompt_ids, token_ids])[None]
    return model(ids).logits[0, len(prompt_ids) - 1 : -1].float()


def raw_log_probs(rows: Tensor, token_ids: Tensor) -> Tensor:
    """Of the whole vocabulary at temperature 1, [T]."""
    return rows.double().log_softmax(-1).gather(1, token_ids[:, None])[:, 0]


def processed_log_probs(
    rows: Tensor, token_ids: Tensor, *, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """After transformers' own processors in the published order, [T]."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return raw_log_probs(processors(token_ids[:, None], rows), token_ids)
