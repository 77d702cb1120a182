"""While tokens are drawn nothing is allocated, and an image that joins waits for nothing that is queued."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blip3o_rt import ops
from blip3o_rt.ar.engine import Request, TokenEngine, TokenPrompt
from blip3o_rt.ar.layout import quantized
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.ops import native
from blip3o_rt.params import SamplingParams
from tests.ar.oracle import image_tokens, oracle, runtime_weights, small_config

CONFIG = small_config()
WEIGHTS = runtime_weights(CONFIG, oracle(CONFIG))
needs_cpu_kernels = pytest.mark.skipif(native.cpu_module() is None, reason=str(native.cpu_unavailable()))
needs_gpu = pytest.mark.gpu("_cuda")


class Allocations(TorchDispatchMode):
    """The operators whose result is memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _storages(result) - _storages((args, kwargs)):
            self.found.append(str(func))
        return result


def _storages(values: Any) -> set[int]:
    return {value.untyped_storage()._cdata for value in tree_leaves(values) if isinstance(value, Tensor)}


class NoBlockingCopies(TorchFunctionMode):
    """Refuses copies from the host for which a GPU would have to finish what is queued."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        assert func is not torch.tensor or "device" not in kwargs, "a copy from pageable memory"
        return func(*args, **kwargs)


def make_engine(weights: dict[str, Tensor], runner: GraphRunner | None = None) -> TokenEngine:
    return TokenEngine(
        CONFIG, image_tokens(CONFIG), weights, max_batch=4, max_prompt_tokens=28, runner=runner
    )


def submit(engine: TokenEngine, length: int, n: int) -> list[Request]:
    """n images of a prompt of so many ids."""
    prompts = [TokenPrompt([*range(1, 1 + length)], SamplingParams(seed=seed)) for seed in range(n)]
    return [engine.submit(prompt) for prompt in prompts]


@needs_cpu_kernels
@pytest.mark.parametrize("weights", [WEIGHTS, quantized(WEIGHTS.items())], ids=["float32", "int8"])
@pytest.mark.parametrize("composed", [False, True])
def test_a_token_allocates_nothing(weights: dict[str, Tensor], composed: bool) -> None:
    """`composed` is what more than 8 rows take on a GPU."""
    engine = make_engine(weights)
    submit(engine, 5, n=3)
    with ops.force("norm_row_linear", "composed") if composed else nullcontext():
        engine.step()
        with Allocations() as allocations:
            engine.step()
    assert allocations.found == []


def test_what_joins_is_uploaded_without_waiting() -> None:
    engine = make_engine(WEIGHTS)
    submit(engine, 5, n=2)
    engine.step()
    with NoBlockingCopies():
        submit(engine, 17, n=2)
        engine.step()
    assert len(engine.step()) == 4


@needs_gpu
def test_an_image_joins_while_a_gpu_is_busy() -> None:
    engine = make_engine({name: tensor.cuda() for name, tensor in WEIGHTS.items()})
    engine.capture()
    for _ in range(2):  # the first loads kernels and pins memory
        torch.cuda.synchronize()
        torch.cuda._sleep(2 * 10**9)  # about a second
        queued = torch.cuda.Event()
        queued.record()
        (request,) = submit(engine, 17, n=1)
        engine.step()
        waited = queued.query()
        engine.cancel(request)
    assert not waited
