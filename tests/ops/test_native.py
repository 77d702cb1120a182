"""The compiled module seen from Python: messages of its matcher, its instruction sets, its threads."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_rt import ops
from blip3o_rt.errors import OpError
from blip3o_rt.measure.cases.attention import append_case, paged_case
from blip3o_rt.measure.cases.quantized import quantized
from blip3o_rt.measure.validate.case import int32, random
from blip3o_rt.measure.validate.finding import worst_error
from blip3o_rt.ops import native
from blip3o_rt.ops.registry import Op
from tests.warm import run_python

pytestmark = pytest.mark.skipif(native.cpu_module() is None, reason=str(native.cpu_unavailable()))


def attention(**changes: object) -> None:
    names = ("q", "k_cache", "v_cache", "page_table", "context_lens", "scale")
    case = paged_case("", torch.float32, [9, 3], 4, 2, 16, 4)
    ops.paged_decode_attention(**(dict(zip(names, case.arguments, strict=True)) | changes))


def append(position: int, value: int) -> None:
    arguments = list(append_case("", torch.float32, 4, 2, 16, 4, [0, 5]).arguments)
    arguments[position] = int32([0, value])
    ops.qk_norm_rope_append(*arguments)


WRONG_CALLS: list[tuple[Callable[[], object], str]] = [
    (
        lambda: ops.rms_norm(torch.ones(2, 8), torch.ones(7), 1e-6),
        "rms_norm: weight has shape [7]; accepted: [D = 8] (D as in x)",
    ),
    (
        lambda: ops.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6, bias=torch.ones(8, dtype=torch.float64)),
        "rms_norm: bias has dtype float64; accepted: float32",
    ),
    (
        lambda: ops.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6, residual=torch.ones(3, 8)),
        "rms_norm: residual has shape [3, 8]; accepted: [... = 2, D = 8] (..., D as in x)",
    ),
    (
        lambda: ops.rms_norm(torch.ones(2, 8, 3).transpose(1, 2), torch.ones(8), 1e-6),
        "rms_norm: x has strides [24, 1, 3] for shape [2, 3, 8]; accepted: contiguous rows at one distance "
        "(call .contiguous())",
    ),
    (
        lambda: ops.rms_norm(torch.ones(2, 8), torch.ones(8, device="meta"), 1e-6),
        "an argument is no plain tensor: RuntimeError: Cannot pack tensors on meta",
    ),
    (lambda: ops.silu_mul(torch.ones(2, 7)), "silu_mul: gate_up has shape [2, 7]; accepted: [..., 2 I]"),
    (
        lambda: ops.row_linear(torch.ones(2, 8), torch.ones(4, 9)),
        "row_linear: weight has shape [4, 9]; accepted: [N, K = 8] (K as in x)",
    ),
    (
        lambda: ops.row_linear(torch.ones(2, 8), torch.ones(4, 8), out=torch.ones(2, 4, dtype=torch.int32)),
        "row_linear: out has dtype int32; accepted: float32",
    ),
    (
        lambda: ops.row_linear(same := torch.ones(2, 8), torch.ones(8, 8), out=same),
        "row_linear: out must not be the memory of x; give it memory of its own",
    ),
    (
        lambda: ops.norm_row_linear(
            torch.ones(2, 8), torch.ones(8), 1e-6, torch.ones(4, 8), gated=True, out=torch.ones(2, 4)
        ),
        "norm_row_linear: out has shape [2, 4]; accepted: [M = 2, N / (1 + gated) = 2] "
        "(M as in x, N as in weight)",
    ),
    (
        lambda: ops.norm_row_linear(torch.ones(2, 8), torch.ones(7), 1e-6, torch.ones(4, 8)),
        "norm_row_linear: norm_weight has shape [7]; accepted: [K = 8] (K as in x)",
    ),
    (
        lambda: ops.norm_row_linear(
            same := torch.ones(2, 8), torch.ones(8), 1e-6, torch.ones(8, 8), out=same
        ),
        "norm_row_linear: out must not be the memory of x; give it memory of its own",
    ),
    (
        lambda: ops.row_linear_add(torch.ones(2, 8), torch.ones(4, 8), torch.ones(2, 5)),
        "row_linear_add: residual has shape [2, 5]; accepted: [M = 2, N = 4] (M as in x, N as in weight)",
    ),
    (
        lambda: ops.row_linear_add(same := torch.ones(2, 8), torch.ones(8, 8), same),
        "row_linear_add: residual must not be the memory of x; give it memory of its own",
    ),
    (
        lambda: ops.row_linear_w8(torch.ones(2, 8), torch.ones(4, 8), torch.ones(4)),
        "row_linear_w8: weight has dtype float32; accepted: int8 or float8_e4m3fn",
    ),
    (
        lambda: ops.row_linear_w8(
            torch.ones(2, 8), torch.ones(4, 8, dtype=torch.int8), torch.ones(4, dtype=torch.bfloat16)
        ),
        "row_linear_w8: scale has dtype bfloat16; accepted: float32",
    ),
    (
        lambda: ops.row_linear_w8(torch.ones(2, 8), torch.ones(4, 8, dtype=torch.int8), torch.ones(3)),
        "row_linear_w8: scale has shape [3]; accepted: [N = 4] (N as in weight)",
    ),
    (
        lambda: native.cpu().linear_w8a16(
            torch.ones(2, 7).bfloat16(),
            torch.ones(4, 7).to(torch.int8),
            torch.ones(4),
            out=torch.ones(2, 4).bfloat16(),
        ),
        "linear_w8a16: K must be even: steps are multiplied in pairs",
    ),
    (
        lambda: native.cpu().linear(
            torch.ones(2, 8).bfloat16(),
            torch.ones(4, 8).bfloat16(),
            torch.ones(4),
            out=torch.ones(2, 4).bfloat16(),
        ),
        "linear: bias has dtype float32; accepted: bfloat16",
    ),
    (
        lambda: ops.linear(torch.ones(2, 8), torch.ones(4, 8), out=torch.ones(2, 5)),
        "linear: out has shape [2, 5]; accepted: [... = 2, N = 4] (... as in x, N as in weight)",
    ),
    (
        lambda: ops.linear(torch.ones(2, 3, 8), torch.ones(4, 8), out=torch.ones(2, 5, 4)[:, :3]),
        "linear: out must be contiguous, or a matrix; give it memory of its own",
    ),
    (
        lambda: native.cpu().linear(
            same := torch.ones(8, 8).bfloat16(), torch.ones(8, 8).bfloat16(), None, out=same
        ),
        "linear: out must not be the memory of x; give it memory of its own",
    ),
    (
        lambda: ops.quantize_rows(torch.ones(2, 8), torch.ones(3)),
        "quantize_rows: scale has shape [3]; accepted: [... = 2] (... as in x)",
    ),
    (
        lambda: ops.scale_product(
            torch.ones(2, 8, dtype=torch.int32), torch.ones(8), out=torch.ones(2, 8, dtype=torch.int32)
        ),
        "scale_product: out has dtype int32; accepted: float32 or bfloat16",
    ),
    (
        lambda: ops.scale_product(torch.ones(2, 8), torch.ones(8), out=torch.ones(2, 8).bfloat16()),
        "scale_product: out has dtype bfloat16; accepted: float32",
    ),
    (
        lambda: ops.nearest_code(torch.ones(2, 0), torch.ones(3, 0)),
        "nearest_code: features and codebook must be at least one wide",
    ),
    (
        lambda: attention(k_cache=torch.ones(7, 4, 2, 16).transpose(1, 2)),
        "paged_decode_attention: k_cache has strides [128, 16, 32, 1] for shape [7, 2, 4, 16]; accepted: "
        "contiguous (call .contiguous())",
    ),
    (
        lambda: attention(page_table=torch.ones(2, 3)),
        "paged_decode_attention: page_table has dtype float32; accepted: int32",
    ),
    (
        lambda: attention(q=torch.ones(2, 5, 16)),
        "paged_decode_attention: Hq (of q) must be a multiple of Hkv (of k_cache)",
    ),
    (
        lambda: attention(context_lens=int32([9, 13])),
        "paged_decode_attention: context_lens[1] is 13; accepted: 0 to 12, what page_table holds",
    ),
    (
        lambda: attention(page_table=int32([1, 2, 3, 4, 5, 7]).reshape(2, 3), context_lens=int32([9, 9])),
        "paged_decode_attention: page_table[1, 2] is 7; accepted: 0 to 6, the pages of k_cache",
    ),
    (
        lambda: ops.relu_linear_attention(torch.ones(1, 4, 18), None, None, 4, 1e-5),
        "relu_linear_attention: qkv has shape [1, 4, 18]; accepted: [B, N, 3 num_heads d]",
    ),
    (
        lambda: ops.relu_linear_attention(torch.ones(4, 18), None, None, 3, 1e-5),
        "relu_linear_attention: qkv has shape [4, 18]; accepted: [B, N, 3 num_heads d]",
    ),
    (
        lambda: ops.cross_attention(torch.ones(4, 18), *2 * [torch.ones(2, 3, 8)], None, 1e-5),
        "cross_attention: query has shape [4, 18]; accepted: [N, H d = 16] (H, d as in key)",
    ),
    (
        lambda: ops.cross_attention(torch.ones(4, 16), *2 * [torch.ones(2, 8, 3).mT], None, 1e-5),
        "cross_attention: rows of key and value must be contiguous (call .contiguous())",
    ),
    (
        lambda: ops.cross_attention(torch.ones(4, 16), *2 * [torch.ones(2, 0, 8)], None, 1e-5),
        "cross_attention: there must be at least one key, one wide",
    ),
    (
        lambda: ops.depthwise_glu(
            torch.ones(1, 2, 2, 6), torch.ones(6), torch.ones(6, 1, 5, 5), torch.ones(6)
        ),
        "depthwise_glu: weight has shape [6, 1, 5, 5]; accepted: [2 C = 6, 1, 3, 3] (C as in x)",
    ),
    (
        lambda: ops.layer_norm_modulate(torch.ones(2, 8), torch.ones(8), torch.ones(7), 1e-6),
        "layer_norm_modulate: scale has shape [7]; accepted: [D = 8] (D as in x)",
    ),
    (
        lambda: ops.gated_add(torch.ones(2, 8), torch.ones(3, 8), torch.ones(8)),
        "gated_add: x has shape [3, 8]; accepted: [... = 2, D = 8] (..., D as in residual)",
    ),
    (
        lambda: ops.channel_rms_norm(torch.ones(2, 8), torch.ones(8), torch.ones(9), 1e-6),
        "channel_rms_norm: bias has shape [9]; accepted: [C = 8] (C as in x)",
    ),
    (
        lambda: append(4, 50),
        "qk_norm_rope_append: positions[1] is 50; accepted: 0 to 49, the rows of cos_sin_cache",
    ),
    (
        lambda: append(5, 16),
        "qk_norm_rope_append: slot_mapping[1] is 16; accepted: -1 to 15, the slots of the cache "
        "(-1: not written)",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG_CALLS, ids=[message[:60] for _, message in WRONG_CALLS])
def test_wrong_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(OpError) as error:
        call()
    assert str(error.value) == message


def parameters(function: Any) -> list[str]:
    """Names of a bound function's parameters in order; "*" stands before those that are given by name."""
    signature = function.__doc__.split("\n", 1)[0]
    return re.findall(r"(?:^|, )(\*|\w+(?=:))", signature.partition("(")[2])


def contract(op: Op[Any, Any]) -> list[str]:
    """The same of an op."""
    names: list[str] = []
    for name, parameter in inspect.signature(op.reference).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in names:
            names.append("*")
        names.append(name)
    return names


@pytest.mark.parametrize(
    "op", [o for o in ops.all_ops().values() if "cpu" in o.implementation_names], ids=str
)
def test_a_binding_takes_the_arguments_of_its_op(op: Op[Any, Any]) -> None:
    assert parameters(getattr(native.cpu(), op.name)) == contract(op)


@pytest.mark.parametrize(("rows", "inputs"), [(9, 128), (35, 2048), (20, 6144)])
def test_linear_w8a16_rounds_once(rows: int, inputs: int) -> None:
    """The op's tolerance leaves room for a rounding that this kernel does not make.

    2e-5: a sum of thousands in float32, one after the other, and nothing else.
    """
    x, (weight, scale) = random(1, rows, inputs, dtype=torch.bfloat16), quantized(2, 100, inputs)
    found = torch.empty(rows, 100, dtype=torch.bfloat16)
    native.cpu().linear_w8a16(x, weight, scale, out=found)
    exact = x.double() @ (weight.double() * scale.double()[:, None]).T
    assert worst_error(found, exact) < 2e-5


@pytest.mark.parametrize("keys", [2, 49, 383, 384])
def test_cross_attention_rounds_queries_and_weights_alone(keys: int) -> None:
    """The op's tolerance in bfloat16 leaves room for two roundings; against the same made in float64, 1e-3.

    What is left is a number between two of bfloat16 that float32 and float64 round to different sides. Keys
    of one panel: with more, weights are rounded beside the largest so far.
    """
    if not native.cpu().has_bf16_products():
        pytest.skip("the kernels in use multiply floats")
    tokens, heads, head_dim = 70, 3, 112
    query = random(1, tokens, heads * head_dim, dtype=torch.bfloat16)
    key, value = (random(seed, heads, keys, head_dim, dtype=torch.bfloat16) for seed in (2, 3))
    found = torch.empty_like(query)
    native.cpu().cross_attention(query, key, value, None, 0.0, out=found)
    scaled = (query.float() / head_dim**0.5).bfloat16().double()
    logits = scaled.unflatten(-1, (heads, -1)).transpose(0, 1) @ key.double().mT
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    exact = weights.float().bfloat16().double() @ value.double() / weights.sum(-1, keepdim=True)
    assert worst_error(found, exact.transpose(0, 1).flatten(1)) < 1e-3


@pytest.mark.parametrize("isa", native.cpu().isas() if native.cpu_module() else [])
def test_products_of_bfloat16_are_those_of_the_kernels_in_use(isa: str) -> None:
    """A machine that has the instruction is kept from it by BLIP3O_CPU_ISA."""
    code = "from blip3o_rt.ops import native; print(native.cpu().isa(), native.cpu().has_bf16_products())"
    name, has_products = run_python(code, BLIP3O_CPU_ISA=isa).stdout.split()
    assert name == isa
    assert isa == "avx512" or has_products == "False"


def test_parameters_are_tensors_too() -> None:
    weight = torch.nn.Parameter(random(1, 5, 8))
    x = random(2, 2, 8)
    assert torch.equal(ops.row_linear(x, weight), ops.row_linear(x, weight.detach()))


def test_instruction_set_from_the_environment() -> None:
    done = run_python(
        "from blip3o_rt.ops import native; print(native.cpu().isa())", BLIP3O_CPU_ISA="portable"
    )
    assert done.stdout.split() == ["portable"], done.stderr


def test_instruction_set_that_the_machine_lacks() -> None:
    code = "import torch\nfrom blip3o_rt import ops\nops.silu_mul(torch.ones(1, 2))"
    done = run_python(code, BLIP3O_CPU_ISA="avx1024")
    assert done.returncode != 0
    assert "OpError: BLIP3O_CPU_ISA: this machine has no 'avx1024' kernels; accepted: portable" in done.stderr


def test_without_the_compiled_module_ops_run_on_torch() -> None:
    code = (
        "import sys, torch\nsys.modules['blip3o_rt._cpu'] = None\n"
        "from blip3o_rt import ops\nfrom blip3o_rt.ops import native\n"
        "with ops.recording_usage() as used: ops.silu_mul(torch.ones(1, 2))\n"
        "print(used); print(native.cpu_unavailable())"
    )
    done = run_python(code)
    assert done.stdout.splitlines() == [
        "{'silu_mul': {'torch'}}",
        "blip3o_rt._cpu is not built; install a C++17 compiler (g++ or clang++), then run pip install again",
    ], done.stderr


def test_threads_follow_torch() -> None:
    code = "import torch; from blip3o_rt.ops import native; print(native.cpu().num_threads())"
    assert run_python(f"import torch; torch.set_num_threads(3); {code}").stdout.split() == ["3"]


def test_threads_follow_torch_when_it_changes_them() -> None:
    code = """
import threading, torch
from blip3o_rt import ops
from blip3o_rt.ops import native
x, weight = torch.randn(3, 512), torch.randn(2048, 512)
results, counts = [], []
def call():
    results.append(ops.row_linear(x, weight))
    counts.append(native.cpu().num_threads())
for threads in (2, 1, 3, 1):
    torch.set_num_threads(threads)
    call()
torch.set_num_threads(2)
other = threading.Thread(target=call)
other.start()
other.join()
native.cpu().set_num_threads(4)  # of its own, until torch's number changes
call()
print(counts, all(torch.equal(result, results[0]) for result in results))
"""
    done = run_python(code)
    assert done.stdout.strip() == "[2, 1, 3, 1, 2, 4] True", done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_torch_and_the_ops_share_their_threads() -> None:
    """Products of torch and calls of ops in turns: no more threads than torch alone has."""
    code = """
import ctypes, os, torch
from blip3o_rt import ops
x, weight, wide = torch.randn(3, 512), torch.randn(2048, 512), torch.randn(600, 600)
torch.set_num_threads(3)
wide @ wide
before = len(os.listdir("/proc/self/task"))
for _ in range(3):
    ops.row_linear(x, weight)
    wide @ wide
print(before, len(os.listdir("/proc/self/task")), hasattr(ctypes.CDLL(None), "GOMP_parallel"))
"""
    done = run_python(code)
    before, after, shared = done.stdout.split()
    if shared == "False":
        pytest.skip("torch is built with another OpenMP runtime than GNU's")
    assert int(before) >= 3
    assert int(after) == int(before), done.stderr


def test_calls_from_many_threads_at_once() -> None:
    """The pool serves one caller at a time; the others compute alone, to the same bits."""
    x, weight = random(1, 5, 300), random(2, 600, 300)
    expected = ops.row_linear(x, weight)
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(ops.row_linear(x, weight), expected):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    native.cpu().set_num_threads(3)
    native.cpu().set_num_threads(2)
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_that_runs_out_in_a_thread_is_an_error_of_the_call() -> None:
    code = """
import resource, torch
from blip3o_rt.ops import native
module = native.cpu()
x, weight, out = torch.ones(1, 8_000_000), torch.ones(2, 8_000_000), torch.zeros(1, 2)
module.set_num_threads(1)
module.row_linear(x, weight, out=out)  # from here on only the other thread needs more memory
module.set_num_threads(2)
module.row_linear(x[:, :100], weight[:, :100].contiguous(), out=out)
pages = int(open("/proc/self/statm").read().split()[0])
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 10_000_000, limits[1]))
try:
    module.row_linear(x, weight, out=out)
except MemoryError:
    print("MemoryError")
resource.setrlimit(resource.RLIMIT_AS, limits)
module.row_linear(x, weight, out=out)
print(out.tolist())
"""
    done = run_python(code)
    assert done.stdout.splitlines() == ["MemoryError", "[[8000000.0, 8000000.0]]"], done.stderr


def test_a_child_forked_before_any_op_was_called_has_threads_of_its_own() -> None:
    """Those that torch used before are gone in it."""
    code = """
import os, signal, torch
from blip3o_rt import ops
from blip3o_rt.ops import native
torch.set_num_threads(3)
native.cpu()
x, weight, wide = torch.randn(4, 512), torch.randn(2048, 512), torch.randn(600, 600)
wide @ wide
child = os.fork()
if child == 0:
    signal.alarm(20)  # rather than wait for them
    result = ops.row_linear(x, weight)
    native.cpu().set_num_threads(1)
    os._exit(0 if torch.equal(ops.row_linear(x, weight), result) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run_python(code)
    assert done.stdout.split() == ["0"], done.stderr


def test_a_forked_child_has_threads_of_its_own() -> None:
    code = """
import os, sys, torch
from blip3o_rt import ops
from blip3o_rt.ops import native
native.cpu().set_num_threads(3)
x, weight = torch.randn(4, 512), torch.randn(2048, 512)
expected = ops.row_linear(x, weight)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(ops.row_linear(x, weight), expected) else 1)
assert torch.equal(ops.row_linear(x, weight), expected)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run_python(code)
    assert done.stdout.split() == ["0"], done.stderr
