"""Launches and bytes of a token, a denoising step and decoding, against counts by hand on the tiny geometry.

L = 2 layers of D = 64 channels (cross 64), 64 image tokens (128 of an edit), 65 tokens of the condition (and
64 cells of an edit's reference), all in bfloat16.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip3o_rt import ops
from blip3o_rt.measure.bench import count, work
from blip3o_rt.measure.bench.count import CONVOLUTION_BIAS, PRODUCTS, Count
from blip3o_rt.measure.random_checkpoint import preset
from blip3o_rt.measure.validate.checkpoint import EDITING

L, D, N, M = 2, 64, 64, 65
BF16, FP32 = 2, 4


@pytest.mark.parametrize("size", ["tiny", "published"])
@pytest.mark.parametrize("batch", [1, 32])
def test_a_token_is_that_of_the_layers(size: str, batch: int) -> None:
    config, positions = preset(size), 100
    found = count.token(config, torch.bfloat16, batch=batch, positions=positions)
    layers = config.ar.num_layers
    calls = {name: of.calls for name, of in found.counts.items()}
    if batch == 1:
        assert calls["norm_row_linear"] == calls["row_linear_add"] == 2 * layers
        assert calls["row_linear"] == calls["rms_norm_keep"] == 1  # the head, the norm before it
        assert found.total.launches == 5 * layers + 4  # and a draw, and a move
    else:  # normed once, not by every block of a product
        assert calls["row_linear_add"] == calls["rms_norm"] == calls["row_linear"] - 1 == 2 * layers
        assert calls["silu_mul"] == layers
    assert calls["decode_attention"] == layers
    assert found.counts["sample_tokens"] == Count(1, 1, found.counts["sample_tokens"].bytes)
    rows = len(config.image_tokens.image_token_range)
    least = work.ar_token(config.ar, 2, batch=batch, context=positions, head_rows=rows).bytes
    assert found.total.bytes > least
    if size == "published":
        assert found.total.bytes < 1.06 * least  # activations are little beside weights and cache


@pytest.mark.parametrize(("edit", "tokens", "attended"), [(False, N, 1), (True, 2 * N, 2)])
def test_a_denoising_step(edit: bool, tokens: int, attended: int) -> None:
    """attended: the branches whose cross-attention is computed; one of identical tokens is a constant."""
    config = preset("tiny", EDITING)
    found = count.denoising_step(config, torch.bfloat16, edit=edit)
    # Of a block: q|k|v, out, query, out, and the two 1x1 convolutions; and the first and last projection.
    # That of the first out also adds to the residual, through the gate.
    assert found.counts[PRODUCTS].launches == 5 * L + 2
    assert found.counts["linear_gated_add"] == Count(L, L, found.counts["linear_gated_add"].bytes)
    calls = {name: of.calls for name, of in found.counts.items()}
    assert calls["layer_norm_modulate"] == 1  # all others are added to first, in the same pass
    assert calls["add_layer_norm_modulate"] == 2 * L
    assert "gated_add" not in calls
    assert calls["cross_attention"] == attended * L
    assert calls["relu_linear_attention"] == calls["depthwise_glu"] == L
    assert calls["guided_euler_step"] == calls["repeat"] == 1
    assert found.counts["relu_linear_attention"].launches == 3 * L
    assert found.counts["cross_attention"].launches == 2 * attended * L  # the RMS of the queries is one
    if attended == 1:  # queries twice, once for their RMS, and their weight; keys and values; the result
        assert found.counts["cross_attention"].bytes == L * (3 * tokens + 1 + 2 * M) * D * BF16
    rows, vectors = tokens * D, 2 * D * FP32
    assert found.counts["layer_norm_modulate"].bytes == 2 * rows * BF16 + vectors  # of one branch
    # Behind the cross-attention of the branches that are computed, and behind the feed-forward, whose gate is
    # a vector too; the last one writes float32.
    attention = (3 * 2 + attended) * rows * BF16 + vectors + (attended == 1) * D * BF16
    feed_forward = 4 * 2 * rows * BF16 + vectors + D * FP32
    moved = L * (attention + feed_forward) + 2 * rows * (FP32 - BF16)
    assert found.counts["add_layer_norm_modulate"].bytes == moved
    assert found.counts["repeat"].bytes == 3 * rows * BF16


def test_the_documentation_says_the_launches_of_the_published_size() -> None:
    config, dtype = preset("published"), torch.bfloat16
    page = " ".join((Path(__file__).parents[3] / "docs" / "kernels.md").read_text(encoding="utf-8").split())
    for words, counter in (
        ("a token is {} launches", count.token(config, dtype, batch=1, positions=100)),
        ("which makes {} launches", count.token(config, dtype, batch=32, positions=100)),
        ("a step is {} launches", count.denoising_step(config, dtype)),
    ):
        assert words.format(counter.total.launches) in page


def test_a_step_computes_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both branches' q|k|v, out and 1x1 convolutions of all blocks, but the first block's attention once."""
    found = count.denoising_step(preset("tiny"), torch.bfloat16)
    hidden = 160
    attention, feed_forward, cross = 4 * D * D, 3 * D * hidden, 2 * D * D
    ends = 16 * D + 2 * 16 * D  # from and to 16 channels
    products = N * (2 * L * (attention + feed_forward) - attention + L * cross + ends)
    assert found.flops == 2 * products


def test_decoding() -> None:
    config = preset("tiny")
    found = count.decoding(config, torch.bfloat16)
    whole = work.vae_decode(config, BF16, shortened=True).flops
    assert 0.9 * whole < found.flops < whole  # but for linear attention, which is a pass
    assert found.counts["convolution_silu"].launches == found.counts["convolution_silu"].calls > 0
    assert found.counts[CONVOLUTION_BIAS].calls < found.counts[PRODUCTS].calls


def test_ops_compute_again_afterwards() -> None:
    count.token(preset("tiny"), torch.float32, batch=1, positions=9)
    x = torch.randn(2, 8)
    assert torch.allclose(ops.row_linear(x, torch.eye(8)), x)
    assert torch.allclose(ops.rms_norm(x, torch.ones(8), 0.0), x / x.square().mean(-1, keepdim=True).sqrt())


def test_operator_calls_are_operators_and_native_kernels() -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    assert count.operator_calls(lambda: x.view(16).reshape(2, 8) + 1) == 1  # views launch nothing
    with ops.force("rms_norm", "torch"):
        by_definition = count.operator_calls(lambda: ops.rms_norm(x, weight, 1e-6))
    assert by_definition > 2
    if ops.rms_norm.named("cpu").available() is None:
        assert count.operator_calls(lambda: ops.rms_norm(x, weight, 1e-6)) < by_definition


def test_the_command_prints_a_table_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    count.main(["--model", "tiny", "--batch", "1,2", "--positions", "50"])
    printed = capsys.readouterr().out
    for title in ("ar.token x1\n", "ar.token x2\n", "dit.step\n", "dit.step.edit\n", "vae.decode\n"):
        assert title in printed
    for wrong in (["--batch", "0"], ["--batch", "1,a"], ["--positions", "0"]):
        with pytest.raises(SystemExit):
            count.main(["--model", "tiny", *wrong])
