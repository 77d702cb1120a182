"""Mistakes that kernels make, planted one by one: each is caught, and the line that fails names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.measure.validate.ar import ar_lines
from blip3o_rt.measure.validate.dit import dit_lines
from blip3o_rt.measure.validate.line import Line
from blip3o_rt.measure.validate.subject import Subject
from blip3o_rt.measure.validate.sweep import sweep
from blip3o_rt.measure.validate.table import row
from tests.csrc.simt.build import CSRC, SimtCompiler
from tests.measure.validate.conftest import Plant

DTYPES = ("fp32", "bf16")
HAVE_EPS = (
    "channel_rms_norm",
    "cross_attention",
    "layer_norm_modulate",
    "qk_norm_rope_append",
    "relu_linear_attention",
    "rms_norm",
)
IN_8_BITS = {"quantize_rows"}  # ops whose results are
# Those that round once, to a result in bfloat16.
IN_BF16 = sorted(
    name
    for name, op in ops.all_ops().items()
    if op.tolerance.get(torch.bfloat16, 1) < 2**-12 and name not in IN_8_BITS
)


def failures(op_name: str, implementation: str = "planted") -> list[Line]:
    """What validate says of one implementation of an op, where it fails."""
    lines = list(sweep([op_name], DTYPES, only={(op_name, implementation)}))
    assert lines
    assert all(isinstance(line, Line) for line in lines)
    return [line for line in lines if isinstance(line, Line) and not line.passed]


def assert_named(lines: list[Line], op_name: str, implementation: str = "planted") -> None:
    """The first line sums up, the others name one case each; all name op and implementation."""
    assert lines
    assert lines[0].shape is None
    assert any(line.shape is not None for line in lines)
    for line in lines:
        text = row(line)
        assert text.startswith("FAIL ops")
        assert op_name in text
        assert implementation in text
        assert line.detail


@pytest.mark.parametrize(
    "op_name",
    [
        name if name in HAVE_EPS else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in ops.all_ops()
    ],
)
def test_the_reference_itself_passes(op_name: str, plant: Plant) -> None:
    """What the faults below change is right without them."""
    plant(op_name, ops.all_ops()[op_name].reference)
    assert failures(op_name) == []


# Kernels


@pytest.mark.parametrize("op_name", HAVE_EPS)
@pytest.mark.parametrize("factor", [10, 0.1, 0])
def test_wrong_epsilon(op_name: str, factor: float, plant: Plant) -> None:
    reference = ops.all_ops()[op_name].reference
    plant(op_name, with_changed_eps(reference, factor))
    assert_named(failures(op_name), op_name)


def with_changed_eps(reference: Callable[..., Tensor], factor: float) -> Callable[..., Tensor]:
    """eps is the one number that every op with a norm takes."""

    def run(*arguments: Any, **options: Any) -> Tensor:
        changed = [factor * a if isinstance(a, float) else a for a in arguments]
        return reference(*changed, **options)

    return run


def swapped(x: Tensor) -> Tensor:
    """The second half of the last dimension, then the first."""
    return torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)


def swapped_gate(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    return ops.silu_mul.reference(swapped(gate_up), out=out)


def swapped_depthwise(x: Tensor, *weights: Tensor, out: Tensor | None = None) -> Tensor:
    input_bias, weight, bias = weights
    halves = [torch.cat(t.chunk(2)[::-1]) for t in (weight, bias)]
    return ops.depthwise_glu.reference(swapped(x), swapped(input_bias), *halves, out=out)


def swapped_guidance(latent: Tensor, prediction: Tensor, *scalars: Tensor, out: Any = None) -> Tensor:
    return ops.guided_euler_step.reference(latent, prediction.flip(0), *scalars, out=out)


def swapped_rotation(qkv: Tensor, *rest: Any, out: Tensor | None = None) -> Tensor:
    """The angle is taken with the other sign: (a, b) becomes (a cos + b sin, b cos - a sin)."""
    q_weight, k_weight, cos_sin_cache, *others = rest
    cos, sin = cos_sin_cache.chunk(2, dim=-1)
    return ops.qk_norm_rope_append.reference(
        qkv, q_weight, k_weight, torch.cat([cos, -sin], dim=-1), *others, out=out
    )


def swapped_modulation(x: Tensor, shift: Tensor, scale: Tensor, eps: float, **options: Any) -> Tensor:
    return ops.layer_norm_modulate.reference(x, scale, shift, eps, **options)


@pytest.mark.parametrize(
    ("op_name", "run"),
    [
        ("silu_mul", swapped_gate),
        ("depthwise_glu", swapped_depthwise),
        ("guided_euler_step", swapped_guidance),
        ("qk_norm_rope_append", swapped_rotation),
        ("layer_norm_modulate", swapped_modulation),
    ],
)
def test_swapped_half(op_name: str, run: Callable[..., Tensor], plant: Plant) -> None:
    plant(op_name, run)
    assert_named(failures(op_name), op_name)


def next_page(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, *rest: Any, **options: Any
) -> Tensor:
    """The last page of a context is looked up one too far to the left, as `(length - 1) / page - 1` would."""
    lengths = rest[0]
    page_size = k_cache.shape[2]
    last = ((lengths - 1).clamp(min=0) // page_size).long()[:, None]
    shifted = page_table.scatter(1, last, page_table.gather(1, (last - 1).clamp(min=0)))
    return ops.paged_decode_attention.reference(q, k_cache, v_cache, shifted, *rest, **options)


def one_position_short(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, *rest: Any, **options: Any
) -> Tensor:
    lengths, scale = rest
    shorter = (lengths - 1).clamp(min=0)
    return ops.paged_decode_attention.reference(q, k_cache, v_cache, page_table, shorter, scale, **options)


def next_slot(*arguments: Any, **options: Any) -> Tensor:
    *before, slots, k_cache, v_cache, eps = arguments
    last = k_cache.shape[0] * k_cache.shape[2] - 1
    moved = torch.where(slots < 0, slots, (slots + 1).clamp(max=last))
    return ops.qk_norm_rope_append.reference(*before, moved, k_cache, v_cache, eps, **options)


def writes_what_is_not_to_be_written(*arguments: Any, **options: Any) -> Tensor:
    *before, slots, k_cache, v_cache, eps = arguments
    return ops.qk_norm_rope_append.reference(*before, slots.clamp(min=0), k_cache, v_cache, eps, **options)


@pytest.mark.parametrize(
    ("op_name", "run"),
    [
        ("paged_decode_attention", next_page),
        ("paged_decode_attention", one_position_short),
        ("qk_norm_rope_append", next_slot),
        ("qk_norm_rope_append", writes_what_is_not_to_be_written),
    ],
)
def test_off_by_one_page_or_slot(op_name: str, run: Callable[..., Tensor], plant: Plant) -> None:
    plant(op_name, run)
    assert_named(failures(op_name), op_name)


def truncated(x: Tensor) -> Tensor:
    """float32 to bfloat16 by dropping the low bits, as a store without rounding does."""
    return (x.contiguous().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


def truncating(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The reference in float32, with every bfloat16 result truncated, those written in place too."""

    def run(*arguments: Any, **options: Any) -> Tensor:
        given = [*arguments, *options.values()]
        wide = {id(a): a.float() for a in given if isinstance(a, Tensor) and a.dtype == torch.bfloat16}
        before = {key: value.clone() for key, value in wide.items()}
        result = reference(
            *(wide.get(id(a), a) for a in arguments),
            **{name: wide.get(id(a), a) for name, a in options.items()},
        )
        for argument in given:
            if id(argument) in wide and not torch.equal(wide[id(argument)], before[id(argument)]):
                argument.copy_(truncated(wide[id(argument)]))
        out = options.get("out")
        first: Tensor = arguments[0]  # a bfloat16 weight beside float32 gives float32
        narrow = first.dtype == torch.bfloat16 and (out is None or out.dtype == torch.bfloat16)
        return truncated(result) if narrow else result

    return run


@pytest.mark.parametrize("op_name", IN_BF16)
def test_bf16_truncation(op_name: str, plant: Plant) -> None:
    plant(op_name, truncating(ops.all_ops()[op_name].reference))
    lines = failures(op_name)
    assert_named(lines, op_name)
    assert {line.dtype for line in lines} == {"bf16"}
    # Half a unit in the last place of a number not far from the rms: far above the tolerance, not just above.
    assert lines[0].found is not None
    assert lines[0].found > 100 * lines[0].bound


@pytest.fixture(scope="module")
def barrier_dropped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The CUDA kernel of rms_norm, run thread by thread on the CPU, without its barrier."""
    source = (CSRC / "cuda" / "rms_norm.cu").read_text()
    assert "__syncthreads();" in source
    return build(SimtCompiler(tmp_path_factory.mktemp("simt")), source.replace("__syncthreads();", ""))


def build(compiler: SimtCompiler, source: str) -> Any:
    return compiler.build("rms_norm", source, "barrier_dropped")


@pytest.mark.exhaustive
def test_dropped_barrier(barrier_dropped: Any, plant: Plant) -> None:
    def run(
        x: Tensor, weight: Tensor, eps: float, *, bias: Any = None, residual: Any = None, out: Any = None
    ) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
        barrier_dropped.rms_norm(x, weight, eps, bias, residual, out)
        return out

    plant("rms_norm", run, "simt")
    found: list[Line] = []
    for descending in (False, True):  # the order in which the threads of a block are run
        barrier_dropped.set_descending(descending)
        found += failures("rms_norm", "simt")
    assert_named(found, "rms_norm", "simt")


# Kernels in the stages: the line that fails says where to look


def failed_names(lines: Iterator[Line]) -> set[str]:
    return {line.name for line in lines if not line.passed}


def test_a_wrong_page_shows_where_tokens_are_drawn_one_by_one(subject: Subject, plant: Plant) -> None:
    assert failed_names(ar_lines(subject, ["fp32"])) == set()
    plant("paged_decode_attention", next_page)
    names = failed_names(ar_lines(subject, ["fp32"]))
    assert "hidden states, token by token" in names
    assert "hidden states, replayed" not in names  # a pass over the prompt does not read pages


def test_swapped_rotation_shows_in_both_passes(subject: Subject, plant: Plant) -> None:
    plant("qk_norm_rope_append", swapped_rotation)
    names = failed_names(ar_lines(subject, ["fp32"]))
    assert {"hidden states, token by token", "hidden states, replayed"} <= names


def test_swapped_guidance_shows_in_the_latents_only(subject: Subject, plant: Plant) -> None:
    plant("guided_euler_step", swapped_guidance)
    names = failed_names(dit_lines(subject, ["fp32"]))
    assert names == {"text: latents after each step", "edit: latents after each step"}


@pytest.mark.parametrize("constant", ["QK_NORM_EPS", "CAPTION_NORM_EPS"])
def test_wrong_epsilon_in_a_stage(constant: str, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"blip3o_rt.dit.model.{constant}", 1e-3)
    assert any("prediction" in name for name in failed_names(dit_lines(subject, ["fp32"])))


def test_truncated_activations_show_in_a_stage(subject: Subject, plant: Plant) -> None:
    """Against the published modules in bfloat16, which round."""
    assert failed_names(ar_lines(subject, ["bf16"])) == set()
    for name in ("paged_decode_attention", "qk_norm_rope_append", "norm_row_linear", "row_linear_add"):
        plant(name, truncating(ops.all_ops()[name].reference), dtypes=(torch.bfloat16,))
    assert "hidden states, token by token" in failed_names(ar_lines(subject, ["bf16"]))
