"""What one token of each picture costs at a geometry, counted without weights: launches and bytes by op.

    python -m blip3o_rt.measure.bench.token_launches --size published --batch 1,32

The engine's own token step runs on tensors that have no memory, with every op replaced by one that only
counts. Bytes are what each launch reads and writes if no cache holds anything from one launch to the next;
the least that all of them together must read is that of `work.ar_token`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_rt.ar.kv_cache import DEFAULT_PAGE_SIZE, PagedKVCache
from blip3o_rt.ar.layout import layout
from blip3o_rt.ar.model import Decoder
from blip3o_rt.ar.token_step import Row, TokenBatch, TokenSteps
from blip3o_rt.checkpoint.parts import DTYPES
from blip3o_rt.config import ModelConfig
from blip3o_rt.graphs import Recorder
from blip3o_rt.measure.bench import work
from blip3o_rt.measure.bench.counts import AnyOp, Count, as_text, counted_ops
from blip3o_rt.measure.random_checkpoint import preset
from blip3o_rt.params import MAX_BATCH, SamplingParams

PROMPT = 35  # positions of a prompt of a few words with its template
SIZES = ("published", "tiny")
CUDA_LAUNCHES = {"sample_tokens": 2}  # of a call, in csrc/cuda; 1 of all others
OF_FEW_ROWS = ("norm_row_linear",)  # ops whose CUDA kernel takes few rows; more are computed by other ops
PARTLY_READ = ("k_cache", "v_cache", "cos_sin_cache")  # of which a call touches a few rows
EMBEDDING = "torch: embedding"
TORCH = "torch: the rest"


def token_counts(config: ModelConfig, dtype: torch.dtype, *, batch: int, context: int) -> dict[str, Count]:
    """One token of `batch` pictures that attend to `context` positions each, by op, in the order of first
    use."""
    rows = _rows(config, dtype, batch, context)
    counts: dict[str, Count] = {}
    with counted_ops(partial(_count_op, counts, config, context)), _TorchCount(counts, config.ar.vocab_size):
        rows.step()
    return counts


def _rows(config: ModelConfig, dtype: torch.dtype, batch: int, context: int) -> TokenBatch:
    device, tokens = torch.device("meta"), config.image_tokens.tokens_per_image
    weights = {s.name: torch.empty(s.shape, dtype=dtype, device=device) for s in layout(config.ar)}
    pages = -(-(context + tokens) // DEFAULT_PAGE_SIZE)
    cache = PagedKVCache(config.ar, batch * pages, dtype=dtype, device=device)
    decoder = Decoder(config.ar, weights, cache, max_batch=batch)
    rows = [
        Row(params=SamplingParams(), prompt_length=context - 1, lane=lane) for lane in range(batch)
    ]  # the new token is the last of the context
    for row in rows:
        cache.reserve(row.sequence, context + tokens)
    steps = TokenSteps(decoder, config.image_tokens, Recorder.of(device), max_batch=batch, max_blocks=pages)
    return steps.lay_out(rows)


def _count_op(
    counts: dict[str, Count], config: ModelConfig, context: int, op: AnyOp, given: Mapping[str, Any]
) -> Tensor:
    """Count a call of an op, which gives back its `out` unwritten; one of several ops counts as those."""
    if not _is_one_kernel(op, given):
        result: Tensor = op.named("composed").run(**given)
        return result
    moved = sum(
        tensor.nbytes * (2 if name == "residual" else 1)  # which is read and written
        for name, tensor in given.items()
        if isinstance(tensor, Tensor) and name not in PARTLY_READ
    )
    if "k_cache" in given:
        positions = context if "context_lens" in given else 1
        rows = len(given["q"] if "q" in given else given["qkv"])
        moved += rows * positions * 2 * config.ar.kv_size * given["k_cache"].itemsize
    if "cos_sin_cache" in given:
        moved += len(given["qkv"]) * config.ar.head_dim * given["cos_sin_cache"].itemsize
    counts.setdefault(op.name, Count()).add(CUDA_LAUNCHES.get(op.name, 1), moved)
    return given["out"] if "out" in given else given["residual"]


def _is_one_kernel(op: AnyOp, given: Mapping[str, Any]) -> bool:
    """Whether a CUDA kernel takes a call that several ops could compute as well."""
    if op.name not in OF_FEW_ROWS:
        return True
    cuda = op.named("cuda")
    return not (cuda.takes("cuda", given["x"].dtype) or cuda.supports(**given))


class _TorchCount(TorchDispatchMode):
    """Counts torch's own operators but for views and fresh memory, which launch nothing."""

    def __init__(self, counts: dict[str, Count], vocabulary: int) -> None:
        super().__init__()
        self._counts, self._vocabulary = counts, vocabulary

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.empty.memory_format:
            embeds = func is torch.ops.aten.index_select.out and len(args[0]) == self._vocabulary
            name = EMBEDDING if embeds else TORCH
            self._counts.setdefault(name, Count()).add(1, 2 * result.nbytes if name == EMBEDDING else 0)
        return result


def report(config: ModelConfig, dtype: torch.dtype, *, batch: int, context: int) -> str:
    """The counts of a token step as a table."""
    counts = token_counts(config, dtype, batch=batch, context=context)
    head_rows = len(config.image_tokens.image_token_range)
    least = work.ar_token(config.ar, dtype.itemsize, batch=batch, context=context, head_rows=head_rows)
    title = f"one token of each of {batch}, {context} positions, {config.ar.num_layers} layers, {dtype}"
    return f"{title}\n{as_text(counts)}\nthe least to read: {least.bytes / 1e6:.3f} MB\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m blip3o_rt.measure.bench.token_launches", description=report.__doc__
    )
    parser.add_argument("--size", choices=SIZES, default="published", help="geometry (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(%(default)s)")
    parser.add_argument("--batch", default="1", metavar="N,N", help="pictures at a time (%(default)s)")
    parser.add_argument("--context", type=int, metavar="N", help="positions (half-way into a picture)")
    parsed = parser.parse_args(arguments)
    config = preset(parsed.size)
    longest = config.ar.max_position_embeddings
    if parsed.context is not None and not 1 <= parsed.context <= longest:
        parser.error(f"context is {parsed.context}: accepted is a number from 1 to {longest}")
    context = parsed.context or PROMPT + config.image_tokens.tokens_per_image // 2
    for batch in parsed.batch.split(","):
        if not batch.strip().isdecimal() or not 1 <= int(batch) <= MAX_BATCH:
            parser.error(f"batch is {parsed.batch!r}: accepted are numbers from 1 to {MAX_BATCH}, as 1,2,4")
        print(report(config, DTYPES[parsed.dtype], batch=int(batch), context=context))


if __name__ == "__main__":
    main()
