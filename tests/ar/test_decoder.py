"""The decoder against transformers' Qwen3: prefill, ragged paged decoding, independence of batch-mates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blip3o_rt.ar.kv_cache import PagedKVCache, Sequence
from blip3o_rt.ar.model import PREFILL_CHUNK, Decoder, DecodeStep
from blip3o_rt.config import ARConfig
from tests.ar.oracle import cached, oracle, runtime_weights, small_config

# Both sides compute in float32 with sums in different order; over a few layers the relative L2 difference
# stays under 2e-6 for these sizes, so 1e-5 leaves room for other matmul libraries and still catches a wrong
# epsilon or position.
FLOAT32_TOLERANCE = 1e-5


def relative_l2(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def make_decoder(
    config: ARConfig,
    weights: dict[str, Tensor],
    page_size: int,
    num_pages: int = 64,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Decoder:
    embedding = weights["embed_tokens.weight"]
    cache = PagedKVCache(
        config, num_pages, page_size=page_size, dtype=embedding.dtype, device=embedding.device
    )
    return Decoder(config, weights, cache, max_rows=8, prefill_chunk=prefill_chunk)


def run_ragged(decoder: Decoder, streams: list[Tensor], prompt_lengths: list[int]) -> list[Tensor]:
    """Prefill each stream's prompt, then decode the rest one token at a time, all streams together."""
    cache = decoder.cache
    sequences = [Sequence() for _ in streams]
    states: list[list[Tensor]] = []
    for stream, length, sequence in zip(streams, prompt_lengths, sequences, strict=True):
        cache.reserve(sequence, len(stream))
        states.append(list(decoder.prefill(decoder.embed(stream[:length]), sequence)))
    blocks = max(len(sequence.page_table) for sequence in sequences)
    table = torch.tensor(
        [s.page_table + [0] * (blocks - len(s.page_table)) for s in sequences], dtype=torch.int32
    )
    steps = len(streams[0]) - prompt_lengths[0]
    for step in range(steps):
        positions = [length + step for length in prompt_lengths]
        slot_mapping = [
            cache.slot_mapping(s, position, position + 1)[0]
            for s, position in zip(sequences, positions, strict=True)
        ]
        tokens = torch.stack([stream[position] for stream, position in zip(streams, positions, strict=True)])
        as_int32 = torch.tensor([positions, slot_mapping], dtype=torch.int32)
        slots = torch.arange(len(streams)).flip(0)
        step_of_rows = DecodeStep(as_int32[0], as_int32[1], as_int32[0] + 1, table, slots)
        kept = torch.zeros(len(streams), decoder.config.hidden_size, dtype=decoder.dtype)
        hidden = decoder.decode(decoder.embed(tokens), step_of_rows, kept)
        assert torch.equal(kept.flip(0), hidden)
        for row, state in enumerate(hidden):
            states[row].append(state.clone())
    for sequence in sequences:
        cache.release(sequence)
    return [torch.stack(rows) for rows in states]


geometries = st.builds(
    small_config,
    hidden_size=st.sampled_from([16, 40, 72]),
    intermediate_size=st.sampled_from([24, 56, 129]),
    num_layers=st.integers(1, 3),
    num_heads=st.sampled_from([2, 4, 6]),
    num_kv_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([2, 16, 64, 128]),
    rms_norm_eps=st.sampled_from([1e-6, 1e-3]),
    rope_theta=st.sampled_from([1e4, 1e6]),
    tie_word_embeddings=st.booleans(),
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    config=geometries,
    page_size=st.sampled_from([1, 4, 16]),
    prompt_lengths=st.lists(st.integers(1, 18), min_size=1, max_size=3),
    new_tokens=st.integers(1, 6),
    prefill_chunk=st.sampled_from([1, 5, 16, PREFILL_CHUNK]),
    seed=st.integers(0, 1000),
)
def test_hidden_states_and_logits_match_qwen3(
    config: ARConfig,
    page_size: int,
    prompt_lengths: list[int],
    new_tokens: int,
    prefill_chunk: int,
    seed: int,
) -> None:
    model = oracle(config, seed)
    decoder = make_decoder(config, runtime_weights(config, model), page_size, 96, prefill_chunk)
    streams = [torch.randint(0, config.vocab_size, (length + new_tokens,)) for length in prompt_lengths]
    for found, stream in zip(run_ragged(decoder, streams, prompt_lengths), streams, strict=True):
        with torch.no_grad():
            expected = model(stream[None], output_hidden_states=True)
        assert relative_l2(found, expected.hidden_states[-1][0]) < FLOAT32_TOLERANCE
        out = torch.empty(len(found), config.vocab_size - 5)
        logits = decoder.logits(found, range(5, config.vocab_size), out=out)
        assert relative_l2(logits, expected.logits[0, :, 5:]) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shared", "length"), [(8, 9), (8, 16), (16, 17), (24, 29)])
def test_a_prompt_behind_shared_pages_has_the_bits_of_one_read_alone(
    shared: int, length: int, dtype: torch.dtype
) -> None:
    config = small_config(head_dim=64)
    decoder = make_decoder(config, runtime_weights(config, oracle(config), dtype), 4, prefill_chunk=8)
    cache, alone, other = decoder.cache, Sequence(), Sequence()
    ids = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
    cache.reserve(alone, length)
    expected = decoder.prefill(decoder.embed(ids), alone)
    cache.reserve(other, shared + 3)
    decoder.prefill(decoder.embed(torch.cat([ids[:shared], ids[:3]])), other)
    behind = cache.fork(other, shared)
    cache.reserve(behind, length)
    found = decoder.prefill(decoder.embed(ids[shared:]), behind)
    assert torch.equal(found, expected[shared:])
    for layer in range(config.num_layers):
        for mine, theirs in zip(
            cached(cache, layer, behind, length), cached(cache, layer, alone, length), strict=True
        ):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch_mates(dtype: torch.dtype) -> None:
    config = small_config(head_dim=128, hidden_size=96)
    decoder = make_decoder(config, runtime_weights(config, oracle(config), dtype), page_size=4)
    lengths = [1, 7, 8, 13]
    streams = [torch.randint(0, config.vocab_size, (length + 5,)) for length in lengths]
    together = run_ragged(decoder, streams, lengths)
    backwards = run_ragged(decoder, streams[::-1], lengths[::-1])[::-1]
    for index, (stream, length) in enumerate(zip(streams, lengths, strict=True)):
        alone = run_ragged(decoder, [stream], [length])[0]
        assert torch.equal(together[index], alone)
        assert torch.equal(backwards[index], alone)


def test_bfloat16_error_is_no_worse_than_the_references() -> None:
    """Against the float32 model, our bfloat16 error is at most 1.5 times that of transformers' own
    bfloat16."""
    config = small_config(hidden_size=128, intermediate_size=256, head_dim=64, num_layers=3)
    model = oracle(config)
    stream = torch.randint(0, config.vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        bfloat16_weights = {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}
        model.load_state_dict(bfloat16_weights)
        exact = model(stream[None], output_hidden_states=True).hidden_states[-1][0]
        decoder = make_decoder(config, runtime_weights(config, model, torch.bfloat16), page_size=8)
        found = run_ragged(decoder, [stream], [10])[0]
        reference = model.bfloat16()(stream[None], output_hidden_states=True).hidden_states[-1][0]
    assert relative_l2(found, exact) <= 1.5 * relative_l2(reference, exact)
