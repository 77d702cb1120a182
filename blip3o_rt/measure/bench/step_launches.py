"""What a denoising step and decoding a latent launch and move beside their products, before and after.

    python -m blip3o_rt.measure.bench.step_launches --size published

Ours and diffusers' eager modules run on tensors that have no memory. A product is a matrix product, a
convolution or torch's fused attention: what a library computes. Everything else is a pass, which only moves
activations about and is what there is to save; bytes are those that every pass reads and writes if no cache
holds anything from one launch to the next, an op's inputs and results once, and twice what a kernel of its
own normalises. Ours counts its own attention ops as passes too, so it is not favoured. Views launch nothing,
every other operator of torch one kernel, and the bias of a convolution that is not depthwise one more.

The last table takes one optimisation of ours out at a time (see `ablation`): what that adds is what it saves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from blip3o_rt import ops
from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.checkpoint.parts import DTYPES, layouts
from blip3o_rt.measure.bench import peers
from blip3o_rt.measure.bench.ablation import ALL_OPS, DECODER, EDIT, LINES, STEP, Switch, Variant, listed
from blip3o_rt.measure.bench.compose import OURS
from blip3o_rt.measure.bench.counts import AnyOp, Count, as_text, counted_ops, total
from blip3o_rt.measure.bench.peer_modules import missing_package
from blip3o_rt.measure.bench.stages import DitStage, VaeStage
from blip3o_rt.measure.bench.timing import Contender
from blip3o_rt.measure.provenance import record_head, write_record
from blip3o_rt.measure.random_checkpoint import preset
from blip3o_rt.measure.validate.checkpoint import EDITING
from blip3o_rt.ops.registry import REFERENCE

KIND = "step_launches"
SIZES = ("published", "tiny")
COUNTED = (STEP, EDIT, DECODER)
DIFFUSERS = "diffusers"
PRODUCTS = ("linear",)  # ops whose GPU kernels are a library's product
WITH_A_PRODUCT = ("convolution_silu",)  # ops whose GPU kernels are a library's product and a pass behind it
CONVOLUTION_BIAS = "convolution bias"  # cuDNN has none: torch adds it in a pass, but to depthwise ones
IN_TORCH = "its definition in torch"
NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "detach")


@dataclass
class StepCount:
    """Counts of one call: products and their operations, and passes by op.

    Passes of torch have the names of its operators. Operations are those of the attention ops too.
    """

    products: int = 0
    flops: int = 0
    passes: dict[str, Count] = field(default_factory=dict)

    @property
    def all_passes(self) -> Count:
        return total(self.passes.values())

    @property
    def launches(self) -> int:
        return self.products + self.all_passes.launches

    def add_pass(self, name: str, launches: int, moved: int) -> None:
        self.passes.setdefault(name, Count()).add(launches, moved)


def meta_checkpoint(size: str, dtype: torch.dtype) -> Checkpoint:
    """A checkpoint that edits, of a geometry and without values: transformer and autoencoder."""
    config, device = preset(size, EDITING), torch.device("meta")
    weights = {
        part: {
            spec.name: torch.empty(spec.shape, dtype=spec.dtype or dtype, device=device)
            for spec in layouts(config)[part]
        }
        for part in ("dit", "vae")
    }
    return Checkpoint(config, weights, Path(), dtype, device, Path())


def contender(checkpoint: Checkpoint, line: str, who: str) -> Contender:
    """Our call of a line, or diffusers'."""
    if who == OURS:
        return LINES[line].build(checkpoint)
    if line == DECODER:
        return Contender(who, peers.VaePeer(VaeStage(checkpoint)).decode)
    return Contender(who, peers.DitPeer(DitStage(checkpoint, edit=line == EDIT)).step)


def counted(timed: Contender, references: frozenset[str] = frozenset()) -> StepCount:
    """What one call runs. references: ops that run as their definitions in torch."""
    found = StepCount()
    with torch.no_grad():
        timed.prepare()
        with _counting(found, references):
            timed.call()
    return found


@contextmanager
def _counting(found: StepCount, references: frozenset[str]) -> Iterator[None]:
    operators, attention = _Operators(found), _Attention(found)

    def run(op: AnyOp, given: Mapping[str, Any]) -> Any:
        if op.name in references or op.name in PRODUCTS:
            return op.reference(**given)
        with operators.paused(), attention.paused():
            result = op.reference(**given)
        if op.name in WITH_A_PRODUCT:
            found.products += 1
            found.add_pass(op.name, 1, 2 * result.nbytes)
        else:
            found.add_pass(op.name, launches_of(op.name, given), moved_by(op.name, given, result))
        return result

    with ExitStack() as stack:
        stack.enter_context(counted_ops(run))
        stack.enter_context(attention)
        stack.enter_context(operators)
        yield


def launches_of(op: str, given: Mapping[str, Any]) -> int:
    """Kernels that a call of an op launches in triton_kernels: states and results of linear attention are
    two; the RMS of its keys, or of the queries of cross-attention, is one more."""
    kernels = 2 if op == "relu_linear_attention" else 1
    return kernels + (normed_ahead(op, given) > 0)


def moved_by(op: str, given: Mapping[str, Any], result: Tensor) -> int:
    """Bytes of an op's inputs and its result, and again of what a kernel of its own reads for its RMS."""
    inputs = {id(t): t.nbytes for name, t in given.items() if isinstance(t, Tensor) and name != "out"}
    return sum(inputs.values()) + result.nbytes + normed_ahead(op, given)


def normed_ahead(op: str, given: Mapping[str, Any]) -> int:
    """Bytes of the queries or keys whose RMS over all heads an attention computes in a kernel of its own."""
    if op == "relu_linear_attention" and given["k_weight"] is not None:
        return int(given["qkv"].nbytes) // 3
    if op == "cross_attention" and given["query_weight"] is not None:
        return int(given["query"].nbytes)
    return 0


class _Pausable:
    """A mode that can leave out the launches of what runs within a block; their operations count."""

    def __init__(self, found: StepCount) -> None:
        super().__init__()
        self._found, self._active = found, True

    @contextmanager
    def paused(self) -> Iterator[None]:
        before, self._active = self._active, False
        try:
            yield
        finally:
            self._active = before


class _Operators(_Pausable, TorchDispatchMode):
    """Counts torch's operators but for views."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        name = packet.__name__
        if name == "convolution" and any(map(_channels_last, args[:2])):
            result = result.contiguous(memory_format=torch.channels_last)  # as libraries do, "meta" does not
        if packet in flop_registry:
            self._found.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        if not self._active or func.is_view or name in NO_LAUNCH or (name == "copy_" and _same(*args[:2])):
            return result
        if packet in flop_registry:
            self._found.products += 1
            if name == "convolution" and args[2] is not None and args[8] == 1:
                self._found.add_pass(CONVOLUTION_BIAS, 1, 2 * result.nbytes)
        else:
            given = args[1:] if name == "copy_" else args  # what it writes it does not read
            inputs = _tensors([*given, *(v for k, v in (kwargs or {}).items() if k != "out")])
            self._found.add_pass(name, 1, sum(t.nbytes for t in (*inputs, *_tensors([result]))))
        return result


class _Attention(_Pausable, TorchFunctionMode):
    """Counts torch's attention as the one kernel that it is on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._active and func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            self._found.products += 1
            keys = key.shape[-2]
            self._found.flops += 2 * keys * (query.numel() + query[..., 0].numel() * value.shape[-1])
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


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


# Optimisations


def switches_of(line: str, whole: StepCount) -> Iterator[Switch]:
    """What can be taken out of a line and counted: the listed switches of its stage, and its fused ops."""
    yield from (switch for switch in listed(line, torch.device("cuda")) if switch.off.options)
    fused = [name for name in whole.passes if name in ops.all_ops()]
    for name in fused:
        yield Switch(name, (line,), Variant(IN_TORCH, {name: REFERENCE}), Variant("one op"))
    yield Switch(ALL_OPS, (line,), Variant(IN_TORCH, dict.fromkeys(fused, REFERENCE)), Variant("fused"))


def without(checkpoint: Checkpoint, line: str, off: Variant) -> StepCount:
    """A line of ours with one side of a switch."""
    return counted(LINES[line].build(checkpoint, **off.options), frozenset(off.forced))


# Record and tables


def record(size: str, dtype: str, command: Sequence[str], says: Callable[[str], None]) -> dict[str, Any]:
    """Everything that is counted at a geometry; without diffusers what there is "before" is left out."""
    checkpoint = meta_checkpoint(size, DTYPES[dtype])
    reason = missing_package(DIFFUSERS)
    if reason is not None:
        says(f"diffusers left out: {reason}")
    data: dict[str, Any] = {**record_head(KIND, command), "size": size, "dtype": dtype}
    data |= {"lines": [], "switches": []}
    for line in COUNTED:
        for who in (OURS, *([DIFFUSERS] if reason is None else [])):
            found = counted(contender(checkpoint, line, who))
            data["lines"].append({"line": line, "who": who, **asdict(found)})
            if who == OURS:
                data["switches"] += list(_savings(checkpoint, line, found))
    return {**data, "complete": True}


def _savings(checkpoint: Checkpoint, line: str, whole: StepCount) -> Iterator[dict[str, Any]]:
    for switch in switches_of(line, whole):
        off = without(checkpoint, line, switch.off)
        yield {
            "line": line,
            "switch": switch.name,
            "off": switch.off.label,
            "launches": off.launches - whole.launches,
            "flops": off.flops - whole.flops,
            "bytes": off.all_passes.bytes - whole.all_passes.bytes,
        }


SUMMARY_HEADERS = ("call", "who", "launches", "of them products", "passes", "GFLOP", "moved by passes")
PASS_HEADERS = ("call", "pass of ours", "launches", "moved")
SWITCH_HEADERS = ("call", "optimisation", "without it", "launches saved", "GFLOP saved", "moving saved")


def summary_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """One row for each call and whose it is."""
    rows = []
    for entry in data["lines"]:
        passes, products = total(Count(**c) for c in entry["passes"].values()), entry["products"]
        launches = [products + passes.launches, products, passes.launches]
        moved = [gigaflops(entry["flops"]), megabytes(passes.bytes)]
        rows.append([entry["line"], entry["who"], *(f"{n:,}" for n in launches), *moved])
    return rows


def pass_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """One row for each pass of ours."""
    return [
        [entry["line"], name, f"{count['launches']:,}", megabytes(count["bytes"])]
        for entry in data["lines"]
        if entry["who"] == OURS
        for name, count in entry["passes"].items()
    ]


def switch_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """One row for each optimisation of a call."""
    return [
        [
            *(entry[key] for key in ("line", "switch", "off")),
            f"{entry['launches']:,}",
            gigaflops(entry["flops"]),
            megabytes(entry["bytes"]),
        ]
        for entry in data["switches"]
    ]


def gigaflops(operations: int) -> str:
    if not operations:
        return ""
    return f"{operations / 1e9:,.0f}" if abs(operations) >= 1e10 else f"{operations / 1e9:,.3f}"


def megabytes(moved: int) -> str:
    return f"{moved / 1e6:,.0f} MB" if abs(moved) >= 1e7 else f"{moved / 1e6:,.2f} MB"


def report(data: Mapping[str, Any]) -> str:
    """All tables for a terminal: each call by op, calls beside each other, and optimisations."""
    parts = []
    for entry in data["lines"]:
        passes = {name: Count(**count) for name, count in entry["passes"].items()}
        parts.append(f"{entry['line']}, {entry['who']}: passes\n{as_text(passes)}")
    for headers, rows in ((SUMMARY_HEADERS, summary_rows(data)), (SWITCH_HEADERS, switch_rows(data))):
        alignment = ["right" if "saved" in h or h in SUMMARY_HEADERS[2:] else "left" for h in headers]
        parts.append(tabulate(rows, headers, disable_numparse=True, colalign=alignment))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write the record where one is asked for."""
    name = "python -m blip3o_rt.measure.bench.step_launches"
    parser = argparse.ArgumentParser(prog=name, description=str(__doc__).partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="published", help="geometry (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    parsed = parser.parse_args(arguments)
    command = [*name.split(), "--size", parsed.size, "--dtype", parsed.dtype]
    data = record(parsed.size, parsed.dtype, command, lambda text: print(text, file=sys.stderr))
    if parsed.json is not None:
        write_record(parsed.json, data)
    print(report(data))


if __name__ == "__main__":
    main()
