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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from blip3o_rt.errors import OpError

LEADING = "..."
TENSOR = re.compile(r"\s*(\w*)\s*\[([^\[\]]*)\]\s*(?:,|$)")
PRODUCT = re.compile(r"(?<=[\w)])\s+(?=[\w(])")  # "2 I" is 2 * I


@dataclass(frozen=True)
class Size:
    """One dimension: a number, a name, or an expression of both."""

    text: str
    expression: str
    names: frozenset[str]

    @classmethod
    def of(cls, text: str) -> Size:
        """The dimension of a text such as "D", "3" or "2 I"."""
        expression = PRODUCT.sub(" * ", text)
        return cls(text, expression, frozenset(compile(expression, text, "eval").co_names))


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

    @property
    def names(self) -> list[str]:
        """What its dimensions are made of, "..." too."""
        return [LEADING] * self.leading + [name for size in self.sizes for name in sorted(size.names)]


@dataclass(frozen=True)
class Shapes:
    """The shapes of an op's tensors.

    Attributes:
        tensors: By the names of the arguments.
        numbers: Names of dimensions that are numbers among the arguments.
        result: The shape of what the op returns, where it may make it.
        returned: Else the argument that it returns.
    """

    tensors: dict[str, Shape]
    numbers: set[str]
    result: Shape | None = None
    returned: str | None = None

    @classmethod
    def of(cls, text: str, argument_names: Iterable[str]) -> Shapes:
        """Those of a text in the notation at the head of this file."""
        arguments, _, result = (part.strip() for part in text.partition("->"))
        tensors = {name: Shape.of(dims) for name, dims in TENSOR.findall(arguments)}
        written = TENSOR.sub("", arguments).strip() or (TENSOR.sub("", result) if "[" in result else "")
        if written:
            raise ValueError(f"shapes {text!r}: cannot read {written!r}")
        if "[" in result:
            return cls(tensors, set(argument_names), Shape.of(result.strip("[]")))
        return cls(tensors, set(argument_names), returned=result or None)

    def like(self) -> str | None:
        """The first tensor whose shape the result has, whatever it is; None if there is none."""
        return next((name for name, shape in self.tensors.items() if shape == self.result), None)

    def check(self, op_name: str, call: Any) -> None:
        """Raise OpError, one line that names the tensor, where one of a bound call does not fit."""
        if self._fit(call):
            return
        out = {} if self.result is None or "out" not in call._fields else {"out": self.result}
        known = Shapes({}, self.numbers)
        for name, shape in {**self.tensors, **out}.items():
            tensor = getattr(call, name)
            if not isinstance(tensor, Tensor):
                continue
            found = Shapes({**known.tensors, name: shape}, self.numbers)
            if not found._fit(call):
                accepted = known._described(shape, call)
                raise OpError(f"{op_name}: {name} has shape {list(tensor.shape)}; accepted: {accepted}")
            known = found

    def _fit(self, call: Any) -> bool:
        try:
            return self._fits(call)
        except Exception:  # a dimension that is missing, or a division by none
            return False

    def _described(self, shape: Shape, call: Any) -> str:
        """A shape with the sizes that are known from these, and whence: [..., D = 8] (D as in x)."""
        origins = {name: tensor for tensor, s in reversed(self.tensors.items()) for name in s.names}
        known = origins.keys() | self.numbers
        parts = [LEADING] * shape.leading
        if shape.leading and LEADING in known:
            sizes = self._compiled("leading", self._leading(), ())(call)  # needs no dimension solved
            parts = [f"{LEADING} = {' x '.join(map(str, sizes)) or 'none'}"]
        for size in shape.sizes:
            is_known = size.names and size.names <= known
            value = self._compiled("value", size.expression, size.names)(call) if is_known else None
            parts.append(size.text if value is None else f"{size.text} = {value:g}")
        whence: dict[str, list[str]] = {}
        for name in dict.fromkeys(shape.names):
            if name in origins.keys() - self.numbers:
                whence.setdefault(origins[name], []).append(name)
        said = ", ".join(f"{', '.join(names)} as in {tensor}" for tensor, names in whence.items())
        return f"[{', '.join(parts)}]" + (f" ({said})" if said else "")

    # Calls pass through the two functions below, so they are compiled.

    @functools.cached_property
    def _fits(self) -> Callable[[Any], bool]:
        """Whether every tensor of a call that is given has its shape; fails where dimensions are missing."""
        tests = [
            f"call.{name} is None or call.{name}.shape == {self._code(s)}" for name, s in self.tensors.items()
        ]
        names = {name for shape in self.tensors.values() for name in shape.names} - {LEADING}
        tests += [f"{name} >= 0" for name in names - self.numbers]
        if self.result is not None:
            tests.append(
                f"(out := getattr(call, 'out', None)) is None or out.shape == {self._code(self.result)}"
            )
        return self._compiled("fits", " and ".join(f"({test})" for test in tests) or "True", names)

    @functools.cached_property
    def result_shape(self) -> Callable[[Any], tuple[int, ...]]:
        """The shape of a call's result, where its arguments fit."""
        assert self.result is not None
        return self._compiled("result_shape", self._code(self.result).replace("/", "//"), self.result.names)

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
        sizes = [f"*{self._leading()},"] if shape.leading else []
        return f"({' '.join([*sizes, *(f'{size.expression},' for size in shape.sizes)])})"

    def _leading(self) -> str:
        """The code of the leading dimensions."""
        tensor, shape = next((name, shape) for name, shape in self.tensors.items() if shape.leading)
        return f"call.{tensor}.shape[: call.{tensor}.ndim - {len(shape.sizes)}]"

    def _solve(self, name: str, lines: dict[str, str]) -> None:
        """Add the lines of code that give a name its value: from the first tensor that has it."""
        if name in lines or name == LEADING:
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
