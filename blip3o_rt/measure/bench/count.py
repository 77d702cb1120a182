"""How many kernels a call launches and how many bytes they move.

    python -m blip3o_rt.measure.bench.count --model published --batch 1,32

Without a GPU the stages run on tensors that have no memory: every op of the runtime counts what its kernels
launch, and every operator of torch counts as one kernel, views as none. Bytes are what each launch reads and
writes if no cache holds anything from one launch to the next.

A product is what a library computes: a matrix product or a convolution. Everything else is a pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from blip3o_rt import ops
from blip3o_rt.ar.kv_cache import DEFAULT_PAGE_SIZE, PagedKVCache
from blip3o_rt.ar.model import Decoder
from blip3o_rt.ar.token_step import Member, TokenSteps
from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.checkpoint.parts import DTYPES, layouts
from blip3o_rt.cli.options import Renamed
from blip3o_rt.config import ModelConfig
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.measure import RANDOM_MODELS
from blip3o_rt.measure.bench import work
from blip3o_rt.measure.bench.stages import DitStage, VaeStage
from blip3o_rt.measure.random_checkpoint import preset
from blip3o_rt.measure.validate.checkpoint import EDITING
from blip3o_rt.ops import registry
from blip3o_rt.ops.registry import Implementation, Op
from blip3o_rt.params import MAX_BATCH, SamplingParams
from blip3o_rt.precision import precision_of

PROMPT = 35  # tokens of a short prompt with its template
PRODUCTS = "products"  # the row of a library's matrix products and convolutions
CONVOLUTION_BIAS = "convolution bias"  # cuDNN has none: torch adds it in a pass, but to depthwise ones
LAUNCHES = {"relu_linear_attention": 2}  # of a call; 1 of all other ops
SOME_CALLS = {"norm_row_linear": "cuda", "linear_gated_add": "triton"}  # ops whose kernel takes some calls
PARTLY_READ = ("k_cache", "v_cache", "cos_sin_cache", "embedding", "kept")  # of which a call needs few rows
ROWS_OF = ("index_select", "index_copy_")  # operators that touch some rows of a tensor
UPDATED = ("rms_norm", "add_layer_norm_modulate")  # ops that write a residual beside their result
NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "detach")


@dataclass
class Count:
    """Calls of one kind, the kernels they launch on a GPU, and the bytes they move."""

    calls: int = 0
    launches: int = 0
    bytes: int = 0


class Counter(TorchDispatchMode):
    """Counts within its block, by op and by operator of torch.

    Attributes:
        counts: name of an op of the runtime or of an operator of torch -> Count.
        flops: operations of the products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Count] = {}
        self.flops = 0
        self._active = True

    @property
    def total(self) -> Count:
        found = self.counts.values()
        return Count(*(sum(getattr(count, name) for count in found) for name in vars(Count())))

    def add(self, name: str, launches: int, moved: int) -> None:
        count = self.counts.setdefault(name, Count())
        count.calls += 1
        count.launches += launches
        count.bytes += moved

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block nothing is counted: what runs there counts itself."""
        before, self._active = self._active, False
        try:
            yield
        finally:
            self._active = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet, name = func.overloadpacket, func.overloadpacket.__name__
        if name == "convolution" and any(map(_channels_last, args[:2])):
            result = result.contiguous(memory_format=torch.channels_last)  # as libraries do, "meta" does not
        silent = func.is_view or name in NO_LAUNCH or (name == "copy_" and _same(*args[:2]))
        if not self._active or silent:
            return result
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
            self.add(PRODUCTS, 1, 0)
            if name == "convolution" and args[2] is not None and args[8] == 1:
                self.add(CONVOLUTION_BIAS, 1, 2 * result.nbytes)
        elif name in ROWS_OF:
            rows = result if name == "index_select" else args[3]
            self.add(name, 1, 2 * rows.nbytes)
        else:
            given = args[1:] if name == "copy_" else args  # what it writes it does not read
            inputs = _tensors([*given, *(value for key, value in kwargs.items() if key != "out")])
            self.add(name, 1, sum(tensor.nbytes for tensor in (*inputs, *_tensors([result]))))
        return result


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _same(target: Tensor, source: Tensor) -> bool:
    """Whether a copy would be of a tensor to itself, which torch leaves out: what x[0] += y ends with."""
    places = [(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()) for t in (target, source)]
    return places[0] == places[1]


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """Tensors among values and in the lists among them, scalars left out."""
    flat = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    return [value for value in flat if isinstance(value, Tensor) and value.ndim > 0]


# Calls that run


def operator_calls(call: Callable[[], Any]) -> int:
    """Torch's operators but for views, and native kernels of the runtime, that a call runs."""
    native = 0

    @contextmanager
    def counted(name: str) -> Iterator[None]:
        nonlocal native
        native += not name.endswith(f"[{registry.REFERENCE}]")  # counted by the operators that it calls
        yield

    with Counter() as counter, registry.ranges(counted):
        call()
    return counter.total.calls + native


def kernel_launches(call: Callable[[], Any]) -> int:
    """Kernels, copies and fills that a GPU runs during a call, those of replayed graphs among them."""
    return len(_device_events(call))


def kernel_seconds(call: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Kernel -> how often a GPU runs it during a call, and its seconds in all; the longest first."""
    found: dict[str, dict[str, float]] = {}
    for event in _device_events(call):
        entry = found.setdefault(event.name, {"launches": 0, "seconds": 0.0})
        entry["launches"] += 1
        entry["seconds"] += event.device_time / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1]["seconds"]))


def _device_events(call: Callable[[], Any]) -> list[Any]:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return [event for event in found.events() if event.device_type == DeviceType.CUDA]


# Calls that are only counted


@contextmanager
def counting(positions: int = 1) -> Iterator[Counter]:
    """Within the block ops of the runtime only count themselves, whatever was forced before.

    Args:
        positions: of the key/value cache that a decoded token attends to.
    """
    counter = Counter()
    before = {op: op.force(None) for op in ops.all_ops().values()}
    try:
        for op in before:
            op.force(_counted(op, counter, positions))
        with torch.no_grad(), counter:
            yield counter
    finally:
        for op, implementation in before.items():
            op.force(implementation)


def _counted(op: Op[Any, Any], counter: Counter, positions: int) -> Implementation:
    def run(bound: Any) -> Any:
        given = bound._asdict()
        if op.name == "linear":  # a library's product, which torch's operator counts
            return op.reference(**given)
        if not _is_one_kernel(op, bound):
            return op.named("composed").run(bound)
        with counter.paused():
            result = _result(op, given)
        if op.name == "convolution_silu":  # a product and a pass behind it
            counter.add(PRODUCTS, 1, 0)
            counter.flops += 2 * result.numel() * given["weight"][0].numel()
            counter.add(op.name, 1, 2 * result.nbytes)
            return result
        if op.name == "linear_gated_add":
            counter.flops += 2 * result.numel() * given["x"].shape[-1]
        ahead = _normed_ahead(op.name, given)
        moved = _moved(op.name, given, result, positions) + ahead
        counter.add(op.name, LAUNCHES.get(op.name, 1) + (ahead > 0), moved)
        return result

    return Implementation("counted", run)


def _is_one_kernel(op: Op[Any, Any], bound: Any) -> bool:
    """Whether a kernel takes a call that several ops could compute as well."""
    if op.name not in SOME_CALLS:
        return True
    kernel = op.named(SOME_CALLS[op.name])
    return not (kernel.takes("cuda", bound.x.dtype) or kernel.refusal(bound))


def _result(op: Op[Any, Any], given: Mapping[str, Any]) -> Tensor:
    """What a call returns, unwritten where it was given the memory."""
    if given.get("out") is not None:
        return given["out"]
    return given["residual"] if op.shapes.returned == "residual" else op.reference(**given)


def _moved(op: str, given: Mapping[str, Any], result: Tensor, positions: int) -> int:
    """Bytes of an op's inputs, each once, and of what it writes."""
    inputs = {
        id(tensor): tensor.nbytes
        for name, tensor in given.items()
        if isinstance(tensor, Tensor) and name not in ("out", "product", *PARTLY_READ)
    }
    moved = sum(inputs.values()) + result.nbytes
    if op in UPDATED and given.get("residual") is not None:  # which is written too
        moved += given["residual"].nbytes
    if given.get("embedded") is not None:  # rows of an embedding
        moved += given["embedded"].nbytes
    if "kept" in given:  # rows that are written to a second place
        moved += result.nbytes
    if "k_cache" in given:
        rows = len(given["q"] if "q" in given else given["qkv"])
        cells = rows * (positions if "context_lens" in given else 1)
        moved += 2 * cells * given["k_cache"].shape[1] * given["k_cache"].shape[3] * given["k_cache"].itemsize
    if "cos_sin_cache" in given:
        moved += len(given["qkv"]) * given["cos_sin_cache"].shape[1] * given["cos_sin_cache"].itemsize
    return moved


def _normed_ahead(op: str, given: Mapping[str, Any]) -> int:
    """Bytes of the queries or keys whose RMS over all heads an attention computes in a kernel of its own."""
    if op == "relu_linear_attention" and given["k_weight"] is not None:
        return int(given["qkv"].nbytes) // 3
    if op == "cross_attention" and given["query_weight"] is not None:
        return int(given["query"].nbytes)
    return 0


# Stages without memory


def token(config: ModelConfig, dtype: torch.dtype, *, batch: int, positions: int) -> Counter:
    """One token of each of `batch` images, each attending to `positions` positions."""
    checkpoint = meta_checkpoint(config, dtype, ["ar"])
    tokens, device = config.image_tokens.tokens_per_image, checkpoint.device
    pages = -(-(positions + tokens) // DEFAULT_PAGE_SIZE)
    cache = PagedKVCache(config.ar, batch * pages, dtype=dtype, device=device)
    decoder = Decoder(config.ar, checkpoint.weights["ar"], cache, max_rows=batch)
    members = [
        Member(params=SamplingParams(), prompt_length=positions - 1, slot=slot) for slot in range(batch)
    ]
    for member in members:
        cache.reserve(member.sequence, positions + tokens)
    steps = TokenSteps(
        decoder,
        config.image_tokens,
        GraphRunner.of(device),
        max_batch=batch,
        max_rows=batch,
        max_pages=pages,
    )
    step = steps.lay_out(members)
    with counting(positions) as counter:
        step.step()
    return counter


def denoising_step(config: ModelConfig, dtype: torch.dtype, *, edit: bool = False) -> Counter:
    """One denoising step with guidance."""
    stage = DitStage(meta_checkpoint(config, dtype, ["dit"]), edit=edit)
    stage.prepare()
    with counting() as counter:
        stage.step()
    return counter


def decoding(config: ModelConfig, dtype: torch.dtype) -> Counter:
    """A latent to an image."""
    stage = VaeStage(meta_checkpoint(config, dtype, ["vae"]))
    with counting() as counter:
        stage.decode()
    return counter


def meta_checkpoint(config: ModelConfig, dtype: torch.dtype, parts: Sequence[str]) -> Checkpoint:
    """A checkpoint of a geometry, without values."""
    device = torch.device("meta")
    weights = {
        part: {
            spec.name: torch.empty(spec.shape, dtype=spec.dtype or dtype, device=device)
            for spec in layouts(config)[part]
        }
        for part in parts
    }
    return Checkpoint(config, weights, Path(), precision_of(dtype), device, Path())


# Tables


def as_text(title: str, counter: Counter) -> str:
    """The counts and their total as a table."""
    rows = [
        [name, count.calls, count.launches, f"{count.bytes / 1e6:,.3f}"]
        for name, count in [*counter.counts.items(), ("all", counter.total)]
    ]
    headers, aligned = ["op", "calls", "launches", "MB"], ("left", *["right"] * 3)
    table = tabulate(rows, headers, disable_numparse=True, colalign=aligned)
    return f"{title}\n{table}\nproducts: {counter.flops / 1e9:,.3f} GFLOP\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m blip3o_rt.measure.bench.count", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument(
        "--model", "--size", action=Renamed, choices=RANDOM_MODELS, default="published", help="(%(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(%(default)s)")
    parser.add_argument("--batch", default="1", metavar="N,N", help="tokens of so many images (%(default)s)")
    parser.add_argument("--positions", type=int, metavar="N", help="of a token (half-way into an image)")
    parsed = parser.parse_args(arguments)
    config, dtype = preset(parsed.model, EDITING), DTYPES[parsed.dtype]
    longest = config.ar.max_position_embeddings
    positions = parsed.positions
    if positions is None:
        positions = PROMPT + config.image_tokens.tokens_per_image // 2
    elif not 1 <= positions <= longest:
        parser.error(f"positions is {positions}: accepted is a number from 1 to {longest}")
    for text in parsed.batch.split(","):
        if not text.strip().isdecimal() or not 1 <= int(text) <= MAX_BATCH:
            parser.error(f"batch is {parsed.batch!r}: accepted are numbers from 1 to {MAX_BATCH}, as 1,2,4")
        batch = int(text)
        print(as_text(f"ar.token x{batch}", token(config, dtype, batch=batch, positions=positions)))
        rows = len(config.image_tokens.image_token_range)
        least = work.ar_token(config.ar, dtype.itemsize, batch=batch, context=positions, head_rows=rows)
        print(f"the least to read: {least.bytes / 1e6:,.3f} MB\n")
    print(as_text("dit.step", denoising_step(config, dtype)))
    print(as_text("dit.step.edit", denoising_step(config, dtype, edit=True)))
    print(as_text("vae.decode", decoding(config, dtype)))


if __name__ == "__main__":
    main()
