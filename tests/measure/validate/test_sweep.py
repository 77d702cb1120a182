"""The sweep over ops: a line per implementation and dtype, failing cases singly, nothing left out unsaid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.errors import OpError
from blip3o_rt.measure.cases import cases_of
from blip3o_rt.measure.validate.line import Line
from blip3o_rt.measure.validate.sweep import check_op_names, selected, sweep, variants
from blip3o_rt.ops import native
from tests.measure.validate.conftest import Plant


def lines_of(op_name: str, implementation: str, *dtypes: str) -> list[Line]:
    found = list(sweep([op_name], dtypes or ("fp32", "bf16"), only={(op_name, implementation)}))
    assert all(isinstance(line, Line) for line in found)
    return [line for line in found if isinstance(line, Line)]


def test_one_line_per_variant_and_dtype() -> None:
    found = [item for item in sweep(["silu_mul"], ("fp32", "bf16")) if isinstance(item, Line)]
    expected = [(variant, dtype) for variant in [*variants("cpu"), "torch"] for dtype in ("fp32", "bf16")]
    assert [(line.implementation, line.dtype) for line in found] == expected
    assert all(line.passed and line.shape is None and line.group == "ops" for line in found)
    assert all("worst of 8 cases: " in (line.detail or "") for line in found)


def test_only_the_dtypes_asked_for() -> None:
    assert {line.dtype for line in lines_of("silu_mul", "torch", "bf16")} == {"bf16"}
    assert {line.dtype for line in lines_of("guided_euler_step", "torch")} == {"fp32"}  # has no bf16


def test_what_cannot_run_is_a_note(plant: Plant) -> None:
    plant("silu_mul", ops.silu_mul.reference, available=lambda: "it is not built; build it")
    note = "ops: not run on 'planted' (it is not built; build it): silu_mul"
    assert note in list(sweep(["silu_mul"], ("fp32",)))


def test_what_takes_no_case_is_a_note_and_fails_where_it_was_asked_for(plant: Plant) -> None:
    """Nothing compared is nothing shown to be right."""
    plant("silu_mul", ops.silu_mul.reference, supports=lambda *_, **__: "takes nothing today")
    note = "ops: silu_mul on 'planted' took none of 8 bf16 cases (takes nothing today)"
    everything = list(sweep(["silu_mul"], ("bf16",)))
    assert note in everything
    assert all(item.passed for item in everything if isinstance(item, Line))
    first, line = sweep(["silu_mul"], ("bf16",), only={("silu_mul", "planted")})
    assert first == note
    assert isinstance(line, Line)
    assert (line.passed, line.measure) == (False, "kernels that took no case")


def test_a_kernel_asked_for_that_cannot_run_fails(plant: Plant) -> None:
    plant("silu_mul", ops.silu_mul.reference, available=lambda: "it is not built; build it")
    line, note = sweep(["silu_mul"], ("fp32",), only={("silu_mul", "planted")})
    assert isinstance(line, Line)
    assert (line.passed, line.detail) == (False, "it is not built; build it")
    assert note == "ops: not run on 'planted' (it is not built; build it): silu_mul"


def test_a_kernel_that_raises_fails_case_by_case(plant: Plant) -> None:
    def run(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
        if gate_up.shape[1] == 10:
            raise IndexError("off the edge\nof the row")
        return ops.silu_mul.reference(gate_up, out=out)

    plant("silu_mul", run)
    whole, single = lines_of("silu_mul", "planted", "fp32")
    assert not whole.passed
    assert whole.to_dict()["found"] is None
    assert (whole.detail or "").startswith("1 of 8 cases fail")
    assert single.shape == "2 x 5"
    assert single.detail == "2 x 5: raised IndexError: off the edge"


def test_a_result_of_another_shape_fails(plant: Plant) -> None:
    plant("silu_mul", lambda gate_up, *, out=None: gate_up)
    lines = lines_of("silu_mul", "planted", "fp32")
    assert not lines[0].passed
    assert "shape" in (lines[1].detail or "")


def test_cases_that_an_implementation_does_not_take_are_counted(plant: Plant) -> None:
    def even(gate_up: Tensor, *_: Any, **__: Any) -> str | None:
        return None if gate_up.shape[1] % 4 == 0 else "takes even widths"

    plant("silu_mul", ops.silu_mul.reference, supports=even)
    (line,) = lines_of("silu_mul", "planted", "fp32")
    assert line.passed
    assert "2 not taken (takes even widths)" in (line.detail or "")


def test_a_written_argument_that_was_not_written_fails(plant: Plant) -> None:
    """`out` is returned right, but what the caller holds is not."""

    def run(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
        return ops.silu_mul.reference(gate_up)

    plant("silu_mul", run)
    failed = [line for line in lines_of("silu_mul", "planted", "fp32") if line.shape]
    assert [line.shape for line in failed] == ["given out"]
    assert "(out)" in (failed[0].detail or "")


def test_selected_puts_the_instruction_set_back() -> None:
    module = native.cpu_module()
    if module is None:
        pytest.skip("needs blip3o_rt._cpu")
    before = module.isa()
    for isa in module.isas():
        with selected(f"cpu-{isa}") as name:
            assert (name, module.isa()) == ("cpu", isa)
    assert module.isa() == before
    with selected("cpu-of-mine") as name:
        assert name == "cpu-of-mine"


def test_unknown_ops_are_refused() -> None:
    assert check_op_names(["silu_mul", "rms_norm"]) == ["rms_norm", "silu_mul"]
    with pytest.raises(OpError, match=r"no op 'rmsnorm' to validate; the ops are: .*rms_norm"):
        check_op_names(["rmsnorm"])


def test_labels_name_one_case_each() -> None:
    """A line that fails names its case by label and dtype."""
    for name in ops.all_ops():
        found = [(case.label, case.arguments[0].dtype) for case in cases_of(name)]
        repeated = {label for label in found if found.count(label) > 1}
        assert not repeated, (name, repeated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arguments_are_not_shared_between_implementations(dtype: torch.dtype, plant: Plant) -> None:
    """One that destroys its inputs does not spoil the case for the next."""

    def run(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
        result = ops.silu_mul.reference(gate_up, out=out)
        gate_up.zero_()
        return result

    plant("silu_mul", run)
    assert all(item.passed for item in sweep(["silu_mul"], ("fp32", "bf16")) if isinstance(item, Line))
