"""Faults planted in the Triton kernels are caught by the cases of their op, interpreted on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.planting import plant
from tests.triton_kernels import interpreted

KERNELS = Path(__file__).parents[2] / "triton_kernels"
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton (requirements-dev.txt)"
    ),
]
# Op, file, what is right, what is not (but touches no memory that is not the op's).
FAULTS = [
    ("layer_norm_modulate", "layer_norm_modulate", "gain = 1.0 + ", "gain = "),
    ("layer_norm_modulate", "layer_norm_modulate", "tl.where(inside, y - ", "tl.where(True, y - "),
    ("add_layer_norm_modulate", "add_layer_norm_modulate", "gain = 1.0 + ", "gain = "),
    (
        "add_layer_norm_modulate",
        "add_layer_norm_modulate",
        "mask=inside & (row >= skipped)",
        "mask=inside & (row > skipped)",
    ),
    ("add_layer_norm_modulate", "add_layer_norm_modulate", "if gate is not None:", "if False:"),
    (
        "add_layer_norm_modulate",
        "add_layer_norm_modulate",
        "row < skipped, ",
        "row <= skipped, ",
    ),
    ("add_layer_norm_modulate", "add_layer_norm_modulate", "    tl.store(place, total, mask=inside)\n", ""),
    (
        "add_layer_norm_modulate",
        "add_layer_norm_modulate",
        "y = total.to(tl.float32)",
        "y = total.to(tl.float32) - added",
    ),
    ("add_layer_norm_modulate", "add_layer_norm_modulate", "tl.where(inside, y - ", "tl.where(True, y - "),
    ("gated_add", "gated_add", "+ added", "- added"),
    ("linear", "linear", "left = inputs - done", "left = inputs - done - 1"),  # a lost tail
    ("linear", "linear", "weight_place += block_inputs", "weight_place += 0"),
    ("linear", "linear", "down = min(row_tiles - first, group)", "down = group"),
    ("linear", "linear", "if bias is not None:", "if False:"),
    ("linear", "linear", "* x_column\n", "\n"),
    ("linear_gated_add", "linear", "left = inputs - done", "left = inputs - done - 1"),
    ("linear_gated_add", "linear", "if gate is None:", "if True:"),
    ("linear_gated_add", "linear", "output + half, rows", "output, rows"),
    ("linear_gated_add", "linear", "tl.load(gate + output, ", "tl.load(gate + output * 0, "),
    (
        "linear_gated_add",
        "linear",
        "mask=inside, other=0.0).to(tl.float32) + added",
        "mask=inside) * 0 + added",
    ),
    ("linear_gated_add", "linear", "bias is not None", "bias is not None and gate is None"),
    ("guided_euler_step", "guided_euler_step", "tl.load(half + prediction_half", "tl.load(half"),
    ("guided_euler_step", "guided_euler_step", "(conditional - null)", "(null - conditional)"),
    (
        "add_pixel_shuffle",
        "add_pixel_shuffle",
        "(row & 1) * 2 + (column & 1)",
        "(column & 1) * 2 + (row & 1)",
    ),
    ("add_pixel_shuffle", "add_pixel_shuffle", "if bias is not None:", "if False:"),
    (
        "add_pixel_unshuffle",
        "add_pixel_unshuffle",
        "(source >> 1 & 1) * 2 * width",
        "(source >> 1 & 1) * width",
    ),
    ("quantize_rows", "quantize_rows", "LARGEST = 448.0", "LARGEST = 240.0"),
    ("quantize_rows", "quantize_rows", "tl.where(inverse <= 3.4028234663852886e38, inverse, 0.0)", "inverse"),
    ("quantize_rows", "quantize_rows", " & 0x7FFFFFFF", ""),
    ("add_pixel_unshuffle", "add_pixel_unshuffle", "total / group", "total / 4"),
    ("convolution_silu", "convolution_silu", "index % channels", "index // channels % channels"),
    ("separable_convolution", "separable_convolution", " & (columns >= 0)", ""),
    ("separable_convolution", "separable_convolution", " & (columns < width)", ""),
    ("separable_convolution", "separable_convolution", "(down * side + right)", "(right * side + down)"),
    ("separable_convolution", "separable_convolution", "in range(side)", "in range(side // 2, side)"),
    ("separable_convolution", "separable_convolution", "channel[None, :] * group", "input[None, :] * group"),
    (
        "separable_convolution",
        "separable_convolution",
        "program_id(2).to(tl.int64) * height * width",
        "program_id(2).to(tl.int64) * height",
    ),
    ("channel_rms_norm", "channel_rms_norm", "/ width + eps", "/ block_width + eps"),
    ("channel_rms_norm", "channel_rms_norm", "tl.where(y < 0, 0.0, y)", "tl.maximum(y, 0.0)"),
    ("channel_rms_norm", "channel_rms_norm", "if residual is not None:", "if False:"),
    ("relu_linear_attention", "relu_linear_attention", "for _ in range(chunks):", "for _ in range(1):"),
    ("relu_linear_attention", "relu_linear_attention", "k * factor[:, None] *", "k *"),
    ("relu_linear_attention", "relu_linear_attention", " + 1e-15", ""),
    ("relu_linear_attention", "relu_linear_attention", "q = tl.where(q < 0, 0.0, q)", "q = q"),
    ("relu_linear_attention", "relu_linear_attention", "tl.where(q < 0, 0.0, q)", "tl.maximum(q, 0.0)"),
    ("relu_linear_attention", "relu_linear_attention", "tl.where(k < 0, 0.0, k)", "tl.maximum(k, 0.0)"),
    ("relu_linear_attention", "inverse_rms", "/ width + eps", "/ width"),
    ("relu_linear_attention", "products", "total = tl.dot(a_high, b_middle, total)", "total = total"),
    ("relu_linear_attention", "products", "total = tl.dot(middle, b, total)", "total = total"),
    ("depthwise_glu", "depthwise_glu", "tl.where(c_inside, ", "tl.where(True, "),
    ("depthwise_glu", "depthwise_glu", "inverse * (a_below * c_below)", "inverse * (a_below * b_below)"),
    ("depthwise_glu", "depthwise_glu", "tl.minimum(-x, 28.0)", "-x"),
    ("depthwise_glu", "depthwise_glu", "gate_here + left * g10", "gate_above + left * g10"),
    ("depthwise_glu", "depthwise_glu", "value_above + left * v20", "value_above + left * v22"),
    ("depthwise_glu", "depthwise_glu", "range(band - 1,", "range(band,"),
    ("cross_attention", "cross_attention", "total * kept + ", "total + "),
    ("cross_attention", "cross_attention", "attended *= kept[:, None]", "attended *= 1.0"),
    ("cross_attention", "cross_attention", "tl.where(present[None, :], logits, ", "tl.where(True, logits, "),
    ("cross_attention", "cross_attention", "if log_multiplicity is not None:", "if False:"),
    ("cross_attention", "cross_attention", "-3.4028234663852886e38", "float('-inf')"),
    ("cross_attention", "cross_attention", "v, attended,", "v, 0.0 * attended,"),
    ("cross_attention", "cross_attention", "p.to(v.dtype)", "(tl.floor(p * 32) / 32).to(v.dtype)"),
    ("cross_attention", "cross_attention", "q = q.to(", "q = (tl.floor(q * 32) / 32).to("),
    ("cross_attention", "cross_attention", "LOG2_E * tl.load(", "tl.load("),
    ("cross_attention", "inverse_rms", "/ width + eps", "/ width"),
]


@pytest.fixture(scope="module")
def caught(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What the cases say of each of FAULTS."""
    folder, arguments = tmp_path_factory.mktemp("faults"), []
    for index, (op, file, correct, fault) in enumerate(FAULTS):
        source, path = (KERNELS / f"{file}.py").read_text(), folder / f"{index}.py"
        path.write_text(plant(source, correct, fault))
        arguments.append(f"{op}:{file}={path}")
    return [line["errors"] for line in interpreted.run(*arguments)]


@pytest.mark.parametrize("index", range(len(FAULTS)), ids=[f"{op}-{i}" for i, (op, *_) in enumerate(FAULTS)])
def test_planted_faults_are_caught(caught: list[list[str]], index: int) -> None:
    assert caught[index] != []
    assert not any("Interpreter" in line or "raised" in line for line in caught[index])
