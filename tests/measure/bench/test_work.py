"""Counts of bytes and operations: the published figures, and what torch counts on the baselines' modules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blip3o_rt import ops
from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.config import ModelConfig
from blip3o_rt.measure.bench import baselines, stages, work
from blip3o_rt.measure.bench.work import Work
from blip3o_rt.measure.random_checkpoint import preset
from blip3o_rt.measure.validate.checkpoint import EDITING

BF16 = 2
PUBLISHED = preset("published")


def token(config: ModelConfig, context: int = 0, head_rows: int = 0, batch: int = 1) -> Work:
    return work.ar_token(config.ar, BF16, batch=batch, context=context, head_rows=head_rows)


def test_published_token() -> None:
    """28 layers of 2048 x (4096 + 2048) and 3 x 2048 x 6144; the head's 217,210 rows, 65,536 of images."""
    layers = 28 * (2048 * 6144 + 3 * 2048 * 6144)
    assert token(PUBLISHED).bytes == 2 * layers == pytest.approx(2.82e9, rel=1e-3)
    whole, images = (token(PUBLISHED, head_rows=rows).bytes - 2 * layers for rows in (217_210, 65_536))
    assert whole == pytest.approx(0.89e9, rel=1e-3)
    assert images == pytest.approx(0.27e9, rel=1e-2)
    cache = token(PUBLISHED, context=770).bytes - 2 * layers
    assert cache == 770 * 2 * 28 * 8 * 128 * 2 == pytest.approx(0.1e9, rel=0.15)
    assert token(PUBLISHED).flops == 2 * layers


def test_a_batch_reads_the_weights_once_and_every_cache() -> None:
    one, four = token(PUBLISHED, context=500), token(PUBLISHED, context=500, batch=4)
    cache = 500 * 2 * 28 * 8 * 128 * 2
    assert four.bytes == one.bytes + 3 * cache
    assert four.flops == 4 * one.flops


def test_published_dit_step() -> None:
    """6.45 TFLOP a step with guidance, 193 for 30 steps; 158 without what is computed once for all steps or
    for both halves."""
    full, shortened = (work.dit_step(PUBLISHED, BF16, shortened=s) for s in (False, True))
    assert full.flops == pytest.approx(6.45e12, rel=1e-3)
    assert 30 * full.flops == pytest.approx(193e12, rel=4e-3)
    assert 30 * shortened.flops == pytest.approx(157.5e12, rel=1e-3)
    assert full.bytes == pytest.approx(3.21e9, rel=1e-2)
    assert shortened.bytes < full.bytes


def test_published_editing_step() -> None:
    """2048 tokens see 730 + 1024 of the condition; the two distinct null tokens cost next to nothing.

    Twice dit.step's tokens, and for each of them 1024 keys more: 2 x 20 x 2048 x 2 x 1024 x 2240 products
    of both halves.
    """
    edits = preset("published", EDITING)
    shape = work.step_shape(edits, edit=True)
    assert (shape.tokens, shape.counts, shape.condition) == (2048, (730, 1024), 1754)
    full, short = (work.dit_step(edits, BF16, shortened=s, edit=True) for s in (False, True))
    plain = [work.dit_step(edits, BF16, shortened=s) for s in (False, True)]
    keys = 2 * 20 * 2048 * 2 * 1024 * 2240  # operations of a half: two products per multiply-add
    condition = work.dit_condition(edits.dit, BF16, tokens=730).flops
    tables = 2 * work.dit_tables(edits.dit, BF16, steps=1).flops
    steps = [2 * (plain[0].flops - 2 * condition - tables), 2 * plain[1].flops]
    assert full.flops == steps[0] + 2 * keys + 2 * condition * 1754 // 730 + tables
    null = 20 * 2048 * 2 * (2 * 2240 * 2240 + 2 * 2 * 2240)
    assert short.flops == steps[1] + keys + null
    assert (full.bytes, short.bytes) == (plain[0].bytes, plain[1].bytes)


def test_published_autoencoder() -> None:
    """8.4 TFLOP to decode, 5.2 to encode; folded upsampling leaves 4/9 of its products."""
    full, folded = (work.vae_decode(PUBLISHED, BF16, shortened=s) for s in (False, True))
    assert full.flops == pytest.approx(8.4e12, rel=5e-3)
    assert work.vae_encode(PUBLISHED, BF16).flops == pytest.approx(5.2e12, rel=5e-3)
    upsampling = sum(
        2 * 9 * side**2 * wide * narrow
        for side, wide, narrow in (
            (1024, 256, 128),
            (512, 512, 256),
            (256, 512, 512),
            (128, 1024, 512),
            (64, 1024, 1024),
        )
    )
    assert full.flops - folded.flops == pytest.approx(5 / 9 * upsampling)


def counted(call: Callable[[], Any]) -> int:
    """Operations that torch counts of a call, our ops by definition: products, convolutions and attention."""
    with ExitStack() as contexts:
        for name in ops.all_ops():
            contexts.enter_context(ops.force(name, "torch"))
        contexts.enter_context(torch.no_grad())
        contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
        counter = contexts.enter_context(FlopCounterMode(display=False))
        call()
    return int(counter.get_total_flops())


def test_counts_are_those_of_the_baselines(checkpoint: Checkpoint) -> None:
    """On transformers' and diffusers' own modules. 2%: sums in linear attention are padded there."""
    ar = stages.ArStage(checkpoint, max_batch=1)
    language = baselines.LanguageBaseline(ar)
    prompt = len(ar.prompt_ids)
    whole = ar.prefill_work().flops
    # Torch counts the whole square of a causal attention.
    square = 4 * (prompt * prompt - prompt * (prompt + 1) // 2) * checkpoint.config.ar.query_size
    expected = whole + checkpoint.config.ar.num_layers * square
    assert counted(language.prefill) == pytest.approx(
        expected, rel=1e-3
    )  # the rotary angles are products too
    dit = stages.DitStage(checkpoint)
    assert counted(baselines.DitBaseline(dit).step) == pytest.approx(
        dit.step_work(shortened=False).flops, rel=0.02
    )
    edit = stages.DitStage(checkpoint, edit=True)
    assert counted(baselines.DitBaseline(edit).step) == pytest.approx(
        edit.step_work(shortened=False).flops, rel=0.02
    )
    vae = stages.VaeStage(checkpoint)
    baseline = baselines.VaeBaseline(vae)
    assert counted(baseline.decode) == pytest.approx(vae.decode_work(shortened=False).flops, rel=0.02)
    assert counted(baseline.encode) == pytest.approx(vae.encode_work().flops, rel=0.02)
    tower = stages.TatokStage(checkpoint)
    assert counted(baselines.TatokBaseline(tower).encode) == pytest.approx(tower.work().flops, rel=0.02)


def test_counts_of_ours_are_what_ours_computes(checkpoint: Checkpoint) -> None:
    dit = stages.DitStage(checkpoint)
    dit.prepare()
    assert counted(dit.step) == pytest.approx(dit.step_work(shortened=True).flops, rel=0.02)
    edit = stages.DitStage(checkpoint, edit=True)
    edit.prepare()
    assert counted(edit.step) == pytest.approx(edit.step_work(shortened=True).flops, rel=0.02)
    assert counted(dit.condition) == pytest.approx(dit.condition_work().flops, rel=0.02)
    assert counted(dit.tables) == dit.tables_work().flops
    vae = stages.VaeStage(checkpoint)
    assert counted(vae.decode) == pytest.approx(vae.decode_work(shortened=True).flops, rel=0.02)
    connector = stages.ConnectorStage(checkpoint)
    assert counted(connector.run) == connector.work().flops


def test_other_ways_to_resample_count_too() -> None:
    tiny = preset("tiny")
    shuffled = replace(tiny, vae=replace(tiny.vae, upsample="pixel_shuffle", downsample="pixel_unshuffle"))
    assert work.vae_decode(shuffled, 4, shortened=True) == work.vae_decode(shuffled, 4, shortened=False)
    assert (
        work.vae_encode(shuffled, 4).flops == work.vae_encode(tiny, 4).flops
    )  # a quarter of 4 times as many
    assert (
        work.vae_decode(shuffled, 4, shortened=False).flops == work.vae_decode(tiny, 4, shortened=False).flops
    )


def test_no_image_tokenizer_is_no_work() -> None:
    assert work.tatok_encode(replace(PUBLISHED, ta_tok=None), BF16) == Work(0, 0)
