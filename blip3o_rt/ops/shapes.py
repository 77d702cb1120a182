"""Shapes of an op's tensors in a compact notation, and what of a call does not fit them.

    x [..., D], weight [D], bias [D], residual [..., D] -> [..., D]

A name is bound by the first tensor that has it, in the order written; every other one must agree. "..." is
any number of leading dimensions. A dimension may be a number or an expression, "2 I" or "(Hq + 2 Hkv) D", in
which at most one name is new. Names of the op's own numbers ("num_heads") stand for their values. Behind the
arrow is the shape of the result, or the name of the argument that is written and returned.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import Tensor

from blip3o_rt.errors import OpError

LEADING = "..."
TENSOR = re.compile(r"\s*(\w*)\s*\[([^\[\]]*)\]\s*(?:,|$)")
PRODUCT = re.compile(r"(?<=[\w)])\s+(?=[\w(])")  # "2 I" is 2 * I
Dims = dict[str, Any]  # name -> int; LEADING -> tuple of int


@dataclass(frozen=True)
class Size:
    """One dimension: a number, a name, or an expression of both."""

    text: str
    expression: str
    code: CodeType
    names: frozenset[str]

    @classmethod
    def of(cls, text: str) -> Size:
        """The dimension of a text such as "D", "3" or "2 I"."""
        expression = PRODUCT.sub(" * ", text)
        code = compile(expression, text, "eval")
        return cls(text, expression, code, frozenset(code.co_names))

    def value(self, dims: Dims) -> float:
        """What the expression is, all its names being bound."""
        found: float = eval(self.code, {"__builtins__": {}}, dims)
        return found

    def accepts(self, size: int, dims: Dims) -> bool:
        """Whether a dimension of this size fits; binds the name that is new, in which sizes are linear."""
        new = self.names - dims.keys()
        if new:
            (name,) = new
            none, one = self.value({**dims, name: 0}), self.value({**dims, name: 1})
            solved = (size - none) / (one - none) if one != none else -1
            if solved < 0 or solved != int(solved):
                return False
            dims[name] = int(solved)
        return self.value(dims) == size


@dataclass(frozen=True)
class Shape:
    """The dimensions of one tensor, "..." in front of them or not."""

    leading: bool
    sizes: tuple[Size, ...]

    @classmethod
    def of(cls, text: str) -> Shape:
        """The shape of a text such as "..., D"; of an empty one that of a scalar."""
        names = [part.strip() for part in text.split(",") if part.strip()]
        leading = names[:1] == [LEADING]
        return cls(leading, tuple(Size.of(name) for name in names[leading:]))

    def accepts(self, shape: tuple[int, ...], dims: Dims) -> bool:
        """Whether a tensor of this shape fits; binds names that are new."""
        extra = len(shape) - len(self.sizes)
        if extra < 0 or (extra and not self.leading):
            return False
        if self.leading and dims.setdefault(LEADING, tuple(shape[:extra])) != tuple(shape[:extra]):
            return False
        return all(size.accepts(found, dims) for size, found in zip(self.sizes, shape[extra:], strict=True))

    def describe(self, dims: Dims, origins: Mapping[str, str]) -> str:
        """The shape with the sizes that are known, and whence: [..., D = 8] (D as in x)."""
        parts = [f"{LEADING} = {_size_text(dims[LEADING])}" if LEADING in dims else LEADING] * self.leading
        for size in self.sizes:
            known = size.names and not size.names - dims.keys()
            parts.append(f"{size.text} = {size.value(dims):g}" if known else size.text)
        whence: dict[str, list[str]] = {}
        names = [LEADING] * self.leading + [name for size in self.sizes for name in sorted(size.names)]
        for name in dict.fromkeys(names):
            if name in origins:
                whence.setdefault(origins[name], []).append(name)
        said = ", ".join(f"{', '.join(names)} as in {tensor}" for tensor, names in whence.items())
        return f"[{', '.join(parts)}]" + (f" ({said})" if said else "")


def _size_text(size: int | tuple[int, ...]) -> str:
    return str(size) if isinstance(size, int) else " x ".join(map(str, size)) or "none"


class Shapes:
    """The shapes of an op's tensors, from the notation at the head of this file."""

    def __init__(self, text: str, argument_names: Iterable[str]) -> None:
        arguments, _, result = (part.strip() for part in text.partition("->"))
        self.tensors = {name: Shape.of(dims) for name, dims in TENSOR.findall(arguments)}
        written = TENSOR.sub("", arguments).strip() or (TENSOR.sub("", result) if "[" in result else "")
        if written:
            raise ValueError(f"shapes {text!r}: cannot read {written!r}")
        self.returned = None if "[" in result else result or None
        self.result = Shape.of(result.strip("[]")) if "[" in result else None
        shapes = [*self.tensors.values(), *([self.result] if self.result else [])]
        self.names = {name for shape in shapes for size in shape.sizes for name in size.names}
        self.numbers = self.names & set(argument_names)

    def like(self) -> str | None:
        """The first tensor whose shape the result has, whatever it is; None if there is none."""
        return next((name for name, shape in self.tensors.items() if shape == self.result), None)

    def check(self, op_name: str, call: Any) -> None:
        """Raise OpError, one line that names the tensor, where one of a bound call does not fit."""
        try:
            fits = self._fits(call)
        except Exception:  # a dimension that is missing, or a division by none
            fits = False
        if not fits:
            self._explain(op_name, call)

    def _explain(self, op_name: str, call: Any) -> None:
        dims: Dims = {name: getattr(call, name) for name in self.numbers}
        origins: dict[str, str] = {}
        for name, shape in self._given(call):
            tensor = getattr(call, name)
            if not isinstance(tensor, Tensor):
                continue
            if not shape.accepts(tensor.shape, found := dict(dims)):
                accepted = shape.describe(dims, origins)
                raise OpError(f"{op_name}: {name} has shape {list(tensor.shape)}; accepted: {accepted}")
            origins.update(dict.fromkeys(found.keys() - dims.keys(), name))
            dims = found

    def _given(self, call: Any) -> list[tuple[str, Shape]]:
        out = [("out", self.result)] if self.result is not None and "out" in call._fields else []
        return [*self.tensors.items(), *out]

    # Calls pass through the two functions below, so they are compiled.

    @functools.cached_property
    def _fits(self) -> Callable[[Any], bool]:
        """Whether every tensor of a call that is given has its shape; fails where dimensions are missing."""
        tests = [
            f"call.{name} is None or call.{name}.shape == {self._code(s)}" for name, s in self.tensors.items()
        ]
        tests += [f"{name} >= 0" for name in self.names - self.numbers]
        if self.result is not None:
            tests.append(
                f"(out := getattr(call, 'out', None)) is None or out.shape == {self._code(self.result)}"
            )
        return self._compiled("fits", " and ".join(f"({test})" for test in tests) or "True", self.names)

    @functools.cached_property
    def result_shape(self) -> Callable[[Any], tuple[int, ...]]:
        """The shape of a call's result, where its arguments fit."""
        assert self.result is not None
        names = {name for size in self.result.sizes for name in size.names}
        return self._compiled("result_shape", self._code(self.result).replace("/", "//"), names)

    def _compiled(self, name: str, value: str, names: Iterable[str]) -> Any:
        """The function of a call that solves for these dimensions and returns the value."""
        lines: dict[str, str] = {}
        for dimension in names:
            self._solve(dimension, lines)
        body = "".join(f"    {dimension} = {found}\n" for dimension, found in lines.items())
        found: dict[str, Any] = {}
        exec(f"def {name}(call):\n{body}    return {value}", found)
        return found[name]

    def _code(self, shape: Shape) -> str:
        """The code of a tuple."""
        sizes = [f"{size.expression}," for size in shape.sizes]
        if shape.leading:
            tensor, first = next((name, s) for name, s in self.tensors.items() if s.leading)
            sizes.insert(0, f"*call.{tensor}.shape[: call.{tensor}.ndim - {len(first.sizes)}],")
        return f"({' '.join(sizes)})"

    def _solve(self, name: str, lines: dict[str, str]) -> None:
        """Add the lines of code that give a name its value: from the first tensor that has it."""
        if name in lines:
            return
        if name in self.numbers:
            lines[name] = f"call.{name}"
            return
        for tensor, shape in self.tensors.items():
            for axis, size in enumerate(shape.sizes, -len(shape.sizes)):
                if name in size.names:
                    for other in size.names - {name}:
                        self._solve(other, lines)
                    none, one = (re.sub(rf"\b{name}\b", value, size.expression) for value in "01")
                    found = f"call.{tensor}.shape[{axis}]"
                    linear = f"({found} - ({none})) // (({one}) - ({none}))"
                    lines[name] = found if size.text == name else linear
                    return
