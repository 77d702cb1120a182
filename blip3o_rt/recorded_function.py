"""A function of tensors, recorded for the shapes that it mostly gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from blip3o_rt import trace
from blip3o_rt.graphs import Recorder

R = TypeVar("R")

Shapes = tuple[tuple[int, ...], ...]


class RecordedFunction(Generic[R]):
    """Calls of `function`: replayed for the shapes that were prepared, made as they are for others.

    The function takes tensors on one device and of one dtype each, and keeps to what a graph demands
    (graphs.py). Where there are graphs, the recorder is told of calls that ran without one.
    """

    def __init__(self, name: str, function: Callable[..., R], recorder: Recorder) -> None:
        self._name = name
        self._function = function
        self._recorder = recorder
        self._recorded: dict[Shapes, tuple[list[Tensor], Callable[[], R]]] = {}

    def prepare(self, *examples: Tensor) -> None:
        """Record calls with arguments like these; without graphs make one, which compiles its kernels."""
        buffers = [torch.zeros_like(example) for example in examples]
        work = self._recorder.record(_described(self._name, buffers), lambda: self._function(*buffers))
        if self._recorder.captures:
            self._recorded[_shapes(buffers)] = buffers, work
        else:
            work()

    def __call__(self, *arguments: Tensor) -> R:
        """The function's result, which no later call overwrites."""
        with trace.span(self._name):
            recorded = self._recorded.get(_shapes(arguments))
            if recorded is None:
                if self._recorder.captures:
                    self._recorder.not_recorded.add(_described(self._name, arguments))
                return self._function(*arguments)
            buffers, work = recorded
            for buffer, argument in zip(buffers, arguments, strict=True):
                buffer.copy_(argument)
            return tree_map(Tensor.clone, work())


def _shapes(tensors: list[Tensor] | tuple[Tensor, ...]) -> Shapes:
    return tuple(tuple(tensor.shape) for tensor in tensors)


def _described(name: str, tensors: list[Tensor] | tuple[Tensor, ...]) -> str:
    return f"{name} of {', '.join(str(list(tensor.shape)) for tensor in tensors)}"
