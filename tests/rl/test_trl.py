"""trl's own trainer on the embedded decoder, with rollouts of ours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.errors import ParameterError
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.rl.trl import RolloutFunc
from tests.rl import oracle

PROMPTS = ["a red circle", "a blue square"]


def trainer(model: torch.nn.Module, step: int = 0, temperature: float = 1.0) -> Any:
    return SimpleNamespace(
        args=SimpleNamespace(temperature=temperature),
        state=SimpleNamespace(global_step=step),
        model=model,
        accelerator=SimpleNamespace(process_index=0, unwrap_model=lambda model: model),
    )


def test_completions_are_in_the_order_of_the_prompts_and_of_the_trainers_weights() -> None:
    pipeline, model = Pipeline.load(device="cpu", dtype="fp32"), oracle.decoder_of(embedded_checkpoint())
    draw = RolloutFunc(pipeline, seed=5, images=False)
    messages = [[{"role": "user", "content": text}] for text in PROMPTS]
    found = draw([PROMPTS[0]] * 2 + [messages[1]] * 2 + [PROMPTS[0]], trainer(model))
    assert found["seed"] == [5, 6, 5, 6, 7]
    assert found["completion_ids"][1] == pipeline.plan(PROMPTS[0], seed=6).token_ids[0].tolist()
    assert found["completion_ids"][3] == pipeline.plan(PROMPTS[1], seed=6).token_ids[0].tolist()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    assert draw(PROMPTS, trainer(model))["seed"] == [8, 8]
    assert pipeline.weights_version == 1  # the trainer has made no step
    found = draw([PROMPTS[0]], trainer(model, step=1))
    assert pipeline.weights_version == 2
    prompt, tokens = (torch.tensor(found[name][0]) for name in ("prompt_ids", "completion_ids"))
    expected = oracle.raw_log_probs(oracle.logits(model, prompt, tokens), tokens)
    assert torch.allclose(torch.tensor(found["logprobs"][0]).double(), expected, rtol=0, atol=1e-4)


def test_what_a_trainer_cannot_ask_for() -> None:
    pipeline = Pipeline.load(device="cpu", dtype="fp32")
    with pytest.raises(ParameterError, match=r"accepted is 1\.0"):
        RolloutFunc(pipeline)(PROMPTS, trainer(torch.nn.Module(), temperature=0.5))
    with pytest.raises(ParameterError, match="accepted is text"):
        RolloutFunc(pipeline, images=False)([3], trainer(oracle.decoder_of(embedded_checkpoint())))


@pytest.mark.exhaustive
def test_the_trainer_trains(tmp_path: Path) -> None:
    """Two steps: rewards see the images, and weights go from the trainer to the pipeline."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoTokenizer

    pipeline = Pipeline.load(device="cpu", dtype="fp32")
    before = pipeline.weights_checksum()
    seen: list[torch.Tensor] = []

    def reward(completions: list[Any], image: list[torch.Tensor], **_: Any) -> list[float]:
        seen.extend(image)
        return [float(one[0].float().mean()) / 255 for one in image]  # how red

    grpo = trl.GRPOTrainer(
        model=oracle.decoder_of(embedded_checkpoint()),
        reward_funcs=reward,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=pipeline.config.image_tokens.tokens_per_image,
            max_steps=2,
            learning_rate=1e-4,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in PROMPTS]),
        processing_class=AutoTokenizer.from_pretrained(embedded_checkpoint()),
        rollout_func=RolloutFunc(pipeline, steps=2, top_k=0, top_p=1.0),
    )
    grpo.train()
    assert len(seen) == 8
    assert seen[0].dtype == torch.uint8
    assert pipeline.weights_version == 2
    assert pipeline.weights_checksum() != before
