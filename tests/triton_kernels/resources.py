"""What the Triton kernels take of a multiprocessor at the published geometry, compiled without a GPU.

As a program (`python -m tests.triton_kernels.resources`): writes the table beside it anew.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from blip3o_rt import ops
from blip3o_rt.checkpoint.source import KNOWN_SANA
from blip3o_rt.vae.layout import GATED_EXPANSION

TABLE = Path(__file__).with_name("resources.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float8_e4m3fn: "*fp8e4nv"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DIVISIBLE = [["tt.divisibility", 16]]
IMAGE_SIDE, KEYS = 1024, 730  # pixels; tokens of an image's plan, with the one that begins it


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments it was launched with."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def source(self) -> ASTSource:
        """What Triton compiles for these arguments: ones are constants, multiples of 16 known as such."""
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        for parameter in self.kernel.params:
            value, place = self.arguments[parameter.name], (parameter.num,)
            signature[parameter.name] = kind = "constexpr" if parameter.is_constexpr else kind_of(value)
            if kind == "constexpr":
                constants[place] = value
            elif is_divisible(value):
                attributes[place] = DIVISIBLE
        return ASTSource(self.kernel, signature, constants, attributes)

    @property
    def key(self) -> str:
        """Equal for launches that share their machine code."""
        source = self.source
        return f"{self.kernel.__name__} {source.signature} {source.constants} {source.attrs} {self.options}"

    def compile(self) -> Resources:
        """What the machine code takes."""
        compiled = triton.compile(self.source, target=TARGET, options=self.options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            said = subprocess.run(
                [TOOLS / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True
            ).stdout
        found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
        return Resources(found["REG"], compiled.metadata.shared, found["STACK"] + found["LOCAL"])


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers per thread, bytes of shared memory per block, bytes of stack per thread."""

    registers: int
    shared: int
    stack: int


def kind_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def is_divisible(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0  # allocations begin at such addresses
    return isinstance(value, int) and value % 16 == 0


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block kernels are not launched; gives the list that their launches go into."""
    launches: list[Launch] = []

    def run(self: Any, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        names = [parameter.name for parameter in self.params]
        options = {name: value for name, value in named.items() if name not in names}
        constants = {name: value for name, value in named.items() if name in names}
        launches.append(Launch(self, dict(zip(names, values, strict=False)) | constants, options))

    launching = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = launching


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def call(op_name: str, *arguments: Any, **options: Any) -> None:
    """An op's call on its Triton implementation. Raises ValueError where that does not take it."""
    implementation = ops.all_ops()[op_name].named("triton")
    bound = ops.all_ops()[op_name].bind(*arguments, **options)
    reason = implementation.refusal(bound)
    if reason is not None:
        raise ValueError(f"{op_name}: {reason}")
    implementation.run(bound)


Call = tuple[
    str, str, tuple[Any, ...], dict[str, Any]
]  # where in the model, the op, its arguments, its options


def transformer_calls(dtype: torch.dtype) -> Iterator[Call]:
    """The calls of a step of the published transformer: text to image, and editing with two null tokens."""
    config = json.loads((KNOWN_SANA / "transformer/config.json").read_text())
    side, heads, cross_heads = (
        config[name] for name in ("sample_size", "num_attention_heads", "num_cross_attention_heads")
    )
    cross_dim = config["cross_attention_head_dim"]
    tokens, width, cross = side**2, heads * config["attention_head_dim"], cross_heads * cross_dim
    x, vector, norm = empty(2, tokens, width, dtype=dtype), empty(width), empty(width, dtype=dtype)
    yield "dit", "layer_norm_modulate", (x, vector, vector, 1e-6), {}
    yield "dit last norm", "layer_norm_modulate", (x, vector, vector, 1e-6), {"out": empty(2, tokens, width)}
    yield "dit", "gated_add", (x, x, vector), {}
    yield "dit", "add_layer_norm_modulate", (x, x, vector, vector, 1e-6), {"gate": vector}
    options = {"gate": vector, "out": empty(2, tokens, width)}
    yield "dit last norm", "add_layer_norm_modulate", (x, x, vector, vector, 1e-6), options
    yield "dit constant", "add_layer_norm_modulate", (x, x[1:], vector, vector, 1e-6), {"constant": norm}
    qkv = empty(2, tokens, 3 * width, dtype=dtype)
    yield "dit", "relu_linear_attention", (qkv, norm, norm, heads, 1e-5), {}
    query, query_weight = empty(tokens, cross, dtype=dtype), empty(cross, dtype=dtype)
    for keys in (KEYS, KEYS + tokens, 2):
        key = empty(cross_heads, keys, cross_dim, dtype=dtype)
        options = {"log_multiplicity": empty(2)} if keys == 2 else {}
        yield f"dit {keys} keys", "cross_attention", (query, key, key, query_weight, 1e-5), options
    hidden = int(config["mlp_ratio"] * width)
    yield "dit", "depthwise_glu", glu(2, side, hidden, dtype), {}
    weight = empty(width, hidden, dtype=dtype)
    yield "dit", "linear", (empty(2 * tokens, hidden, dtype=dtype), weight, norm), {}
    if dtype == torch.bfloat16:
        square = empty(width, width, dtype=dtype)
        yield "dit", "linear_gated_add", (x, square, x, vector, norm), {}
    yield "dit without bias", "linear", (empty(2 * tokens, hidden, dtype=dtype), weight), {}
    for inputs in (width, hidden):
        rows = empty(2 * tokens, inputs, dtype=dtype), empty(2 * tokens)
        yield f"dit {inputs} channels", "quantize_rows", rows, {"dtype": torch.float8_e4m3fn}
    latent, scalar = empty(1, config["in_channels"], side, side), empty()
    prediction = empty(2, config["out_channels"], side, side)
    yield "dit", "guided_euler_step", (latent, prediction, scalar, scalar), {"out": latent}


def autoencoder_calls(dtype: torch.dtype) -> Iterator[Call]:
    """The calls of the published autoencoder; encoder and decoder have the same stages."""
    config = json.loads((KNOWN_SANA / "vae/config.json").read_text())
    stages = zip(config["decoder_block_out_channels"], config["decoder_block_types"], strict=True)
    for stage, (channels, block) in enumerate(stages):
        side = IMAGE_SIDE >> stage
        place = f"vae {side} x {side}"
        x, vector = empty(1, side, side, channels, dtype=dtype), empty(channels, dtype=dtype)
        yield place, "channel_rms_norm", (x, vector, vector, 1e-5), {"residual": x, "out": x}
        if stage == 0:
            yield "vae last norm", "channel_rms_norm", (x, vector, vector, 1e-5), {"relu": True, "out": x}
        if stage + 1 < len(config["decoder_block_types"]):
            coarse = config["decoder_block_out_channels"][stage + 1]
            smaller, bias = empty(1, side // 2, side // 2, coarse, dtype=dtype), empty(coarse, dtype=dtype)
            yield place, "add_pixel_shuffle", (x, smaller), {"bias": vector}
            yield place, "add_pixel_unshuffle", (smaller, x), {"bias": bias}
        if block == "ResBlock":
            yield place, "convolution_silu", (x, empty(channels, 3, 3, channels, dtype=dtype), vector), {}
        if block == "EfficientViTBlock":
            heads = channels // config["attention_head_dim"]
            qkv = empty(1, side**2, 3 * channels, dtype=dtype)
            scales = empty(1, side**2, 2 * channels, dtype=dtype)
            options = {"out": scales[..., channels:]}
            yield place, "relu_linear_attention", (qkv, None, None, heads, 0.0), options
            yield place, "separable_convolution", separable(side, 3 * channels, config, dtype), {}
            yield place, "depthwise_glu", glu(1, side, GATED_EXPANSION * channels, dtype), {}


def separable(side: int, channels: int, config: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The arguments of separable_convolution."""
    group, (kernel, *_) = config["attention_head_dim"], config["decoder_qkv_multiscales"][-1]
    depth, point = empty(channels, kernel, kernel, 1, dtype=dtype), empty(channels, 1, 1, group, dtype=dtype)
    return empty(1, side, side, channels, dtype=dtype), depth, point


def glu(batch: int, side: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The arguments of depthwise_glu."""
    bias, taps = empty(2 * hidden, dtype=dtype), empty(2 * hidden, 1, 3, 3, dtype=dtype)
    return empty(batch, side, side, 2 * hidden, dtype=dtype), bias, taps, bias


def published_launches() -> dict[str, Launch]:
    """Every specialization that the published model launches, by dtype, first place, op and kernel."""
    found: dict[str, Launch] = {}
    known: set[str] = set()
    for dtype_name, dtype in DTYPES.items():
        for place, op_name, arguments, options in [*transformer_calls(dtype), *autoencoder_calls(dtype)]:
            with recorded() as made:
                call(op_name, *arguments, **options)
            for launch in made:
                if launch.key not in known:
                    known.add(launch.key)
                    found[f"{dtype_name} {place}: {op_name}{launch.kernel.__name__}"] = launch
    return found


def versions() -> dict[str, str]:
    """What decides how registers are allocated."""
    said = subprocess.run([TOOLS / "ptxas", "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    return {"triton": triton.__version__, "ptxas": found[1] if found else "unknown"}


def main() -> None:
    """Writes the table."""
    kernels = {name: asdict(launch.compile()) for name, launch in published_launches().items()}
    TABLE.write_text(json.dumps({"target": "sm_90", **versions(), "kernels": kernels}, indent=1) + "\n")


if __name__ == "__main__":
    main()
