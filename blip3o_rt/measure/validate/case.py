"""One call of an op, and its comparison with the reference computed in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.ops.registry import Op

DTYPES = (torch.float32, torch.bfloat16)
# Of x and of a weight, with what a label says of them.
PRODUCTS = (
    (torch.float32, torch.float32, ""),
    (torch.bfloat16, torch.bfloat16, ""),
    (torch.float32, torch.bfloat16, ", bfloat16 weight"),
)


@dataclass(frozen=True)
class Case:
    """Arguments of a call. `written`: positions or names of arguments that the op changes, also compared."""

    label: str
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    written: tuple[int | str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the first argument, which counts as the case's; of `out` where that has 8-bit floats."""
        first: torch.dtype = self.arguments[0].dtype
        return self.options["out"].dtype if first == torch.float8_e4m3fn else first


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers, rounded to the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def int32(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def copies(case: Case, device: str = "cpu", widen: bool = False) -> tuple[list[Any], dict[str, Any]]:
    """The arguments as fresh tensors (same strides); floating ones in float64 if `widen`."""

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
        return fresh.double() if widen and value.is_floating_point() else fresh.to(device)

    return [copy(a) for a in case.arguments], {name: copy(value) for name, value in case.options.items()}


def outputs(case: Case, arguments: list[Any], options: dict[str, Any], result: Tensor) -> list[Tensor]:
    """The result and every written argument."""
    return [result, *(arguments[w] if isinstance(w, int) else options[w] for w in case.written)]


def run(op: Op[Any, Any], implementation: str, case: Case, device: str = "cpu") -> list[Tensor]:
    """What the named implementation makes of the case, on the CPU."""
    arguments, options = copies(case, device)
    with ops.force(op.name, implementation):
        result = op(*arguments, **options)
    return [output.cpu() for output in outputs(case, arguments, options, result)]


def run_exact(op: Op[Any, Any], case: Case) -> list[Tensor]:
    """What the reference makes of the case in float64."""
    arguments, options = copies(case, widen=True)
    return outputs(case, arguments, options, op.reference(*arguments, **options))
