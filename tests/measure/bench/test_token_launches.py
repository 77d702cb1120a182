"""The counts of a token step: every op of every layer, bytes beside the least, and nothing left forced."""

from __future__ import annotations

import pytest
import torch

from blip3o_rt import ops
from blip3o_rt.measure.bench import token_launches, work
from blip3o_rt.measure.random_checkpoint import preset


@pytest.mark.parametrize("size", ["tiny", "published"])
@pytest.mark.parametrize("batch", [1, 32])
def test_counts_are_those_of_the_layers(size: str, batch: int) -> None:
    config, context = preset(size), 100
    counts = token_launches.token_counts(config, torch.bfloat16, batch=batch, context=context)
    layers = config.ar.num_layers
    calls = {name: count.calls for name, count in counts.items()}
    if batch == 1:
        assert calls["norm_row_linear"] == calls["row_linear_add"] == 2 * layers
        assert calls["row_linear"] == calls["rms_norm"] == 1  # the head, the norm before it
    else:  # normed once, not by every block of a product
        assert calls["row_linear_add"] == calls["rms_norm"] - 1 == calls["row_linear"] - 1 == 2 * layers
        assert calls["silu_mul"] == layers
    assert calls["decode_attention"] == layers
    assert calls["sample_tokens"] == calls[token_launches.EMBEDDING] == 1
    rows = len(config.image_tokens.image_token_range)
    least = work.ar_token(config.ar, 2, batch=batch, context=context, head_rows=rows).bytes
    moved = sum(count.bytes for count in counts.values())
    assert moved > least
    if size == "published":
        assert moved < 1.06 * least  # activations are little beside weights and cache


def test_ops_compute_again_afterwards() -> None:
    token_launches.token_counts(preset("tiny"), torch.float32, batch=1, context=9)
    x = torch.randn(2, 8)
    assert torch.allclose(ops.row_linear(x, torch.eye(8)), x)


def test_the_command_prints_a_table_for_each_batch(capsys: pytest.CaptureFixture[str]) -> None:
    token_launches.main(["--size", "tiny", "--batch", "1,2", "--context", "50"])
    printed = capsys.readouterr().out
    assert printed.count("launches") == printed.count("the least to read") == 2
    for wrong in (["--batch", "0"], ["--batch", "1,a"], ["--context", "0"]):
        with pytest.raises(SystemExit):
            token_launches.main(["--size", "tiny", *wrong])
