"""Every op x implementation x dtype x case against the op's reference in float64."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.errors import OpError
from blip3o_rt.machine import exact_arithmetic
from blip3o_rt.measure.cases import cases_of, check_of, ops_with_cases
from blip3o_rt.measure.records import describe
from blip3o_rt.measure.validate.case import Case, run, run_exact
from blip3o_rt.measure.validate.finding import Finding
from blip3o_rt.measure.validate.line import Line, at_most, severity
from blip3o_rt.ops import native
from blip3o_rt.ops.registry import Implementation, Op

DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int64: "fp32",  # ops on integers, and on numbers of tokens, are checked with those
    torch.int8: "fp32",
}


def variants(implementation: str) -> list[str]:
    """An implementation by name; "cpu" once per instruction set of this machine, as "cpu-avx512"."""
    module = native.cpu_module()
    if implementation == "cpu" and module is not None:
        return [f"cpu-{isa}" for isa in module.isas()]
    return [implementation]


@contextmanager
def selected(variant: str) -> Iterator[str]:
    """Within the block a variant's instruction set is in use; gives the name of its implementation."""
    isa = variant.removeprefix("cpu-") if variant.startswith("cpu-") else None
    if isa is None or native.cpu_module() is None or isa not in native.cpu().isas():
        yield variant
        return
    previous = native.cpu().isa()
    native.cpu().set_isa(isa)
    try:
        yield "cpu"
    finally:
        native.cpu().set_isa(previous)


def refusal(op: Op[Any, Any], implementation: Implementation, case: Case, device: str) -> str | None:
    """None where an implementation takes the case's call, else why not."""
    return (
        implementation.available()
        or implementation.takes(device, case.arguments[0].dtype)
        or implementation.refusal(op.bind(*case.arguments, **case.options))
    )


def findings(
    op: Op[Any, Any], variant: str, case: Case, device: str = "cpu", exact: list[Tensor] | None = None
) -> list[Finding]:
    """What a variant makes of a case, compared with the reference; whatever it raises is a finding too.

    exact: what the reference makes of the case in float64, where that is known already.
    """
    try:
        with selected(variant) as implementation, exact_arithmetic(torch.device(device)):
            results = run(op, implementation, case, device)
    except Exception as error:
        return [Finding("no result", math.nan, 0.0, detail=f"raised {describe(error)}")]
    return check_of(op.name)(op, case, results, run_exact(op, case) if exact is None else exact)


def sweep(
    op_names: Collection[str],
    dtypes: Collection[str],
    device: str = "cpu",
    only: Collection[tuple[str, str]] | None = None,
) -> Iterator[Line | str]:
    """Lines for the ops: one per variant and dtype with the worst of its cases, then each case that failed.

    dtypes: of "fp32" and "bf16". device: the type that implementations for any device run on. What cannot run
    here is given as a note, a string. only: pairs of op and implementation to restrict it to; one of them
    that was not compared at all is a line that failed.
    """
    not_run: dict[tuple[str, str], list[str]] = {}  # (implementation, why) -> ops
    for name in sorted(op_names):
        op = ops.all_ops()[name]
        for implementation in op.implementations:
            if only is not None and (name, implementation.name) not in only:
                continue
            where = implementation.device or device
            reason = implementation.available()
            if reason is None and where == "cuda" and device != "cuda":
                reason = f"the device is {device}"
            compared = False
            if reason is not None:
                not_run.setdefault((implementation.name, reason), []).append(name)
            else:
                for variant in variants(implementation.name):
                    for dtype in dtypes:
                        for item in _variant_lines(op, implementation, variant, dtype, where):
                            compared = compared or isinstance(item, Line)
                            yield item
            if only is not None and not compared:
                yield _not_compared(name, implementation.name, reason)
    for (implementation_name, reason), names in not_run.items():
        yield f"ops: not run on '{implementation_name}' ({reason}): {', '.join(names)}"


def _not_compared(op_name: str, implementation: str, reason: str | None) -> Line:
    """The line of an implementation that was asked for and ran on no case."""
    rest: dict[str, Any] = {
        "why": "what is asked for must be compared",
        "implementation": implementation,
        "detail": reason or "it takes none of the op's cases in these dtypes",
    }
    return at_most("ops", op_name, "", "kernels that took no case", 1.0, 0.0, **rest)


def _variant_lines(
    op: Op[Any, Any], implementation: Implementation, variant: str, dtype: str, device: str
) -> Iterator[Line | str]:
    """The line of one variant in one dtype, then a line for every case that failed.

    A note where it takes none of the cases; nothing where the op has none in the dtype.
    """
    cases = [c for c in cases_of(op.name) if DTYPE_NAMES.get(c.dtype) == dtype]
    with selected(variant):  # what it can take, an instruction set may decide
        refusals = {case.label: refusal(op, implementation, case, device) for case in cases}
    taken = [case for case in cases if refusals[case.label] is None]
    if not taken:
        if cases:
            reason = refusals[cases[0].label]
            yield f"ops: {op.name} on '{variant}' took none of {len(cases)} {dtype} cases ({reason})"
        return
    found = [(case, finding) for case in taken for finding in findings(op, variant, case, device)]
    failed = [(case, finding) for case, finding in found if not finding.passed]
    case, worst = max(failed or found, key=lambda pair: severity(pair[1].found, pair[1].bound))
    counted = f"worst of {len(taken)} cases: {_place(case, worst)}"
    passed_over = [reason for reason in refusals.values() if reason is not None]
    if passed_over:
        counted += f"; {len(passed_over)} not taken ({passed_over[0]})"
    if failed:
        counted = f"{len({case.label for case, _ in failed})} of {len(taken)} cases fail; {counted}"
    yield _op_line(op, variant, dtype, worst, counted)
    for case, finding in failed:
        yield _op_line(op, variant, dtype, finding, _place(case, finding), case.label)


def _place(case: Case, finding: Finding) -> str:
    output = f" ({finding.output})" if finding.output != "result" else ""
    return f"{case.label}{output}{': ' if finding.detail else ''}{finding.detail}"


def _op_line(
    op: Op[Any, Any], variant: str, dtype: str, finding: Finding, detail: str, shape: str | None = None
) -> Line:
    why = "the op's tolerance against its reference in float64"
    rest: dict[str, Any] = {"why": why, "implementation": variant, "shape": shape, "detail": detail}
    return at_most("ops", op.name, dtype, finding.measure, finding.found, finding.bound, **rest)


def check_op_names(op_names: Collection[str]) -> list[str]:
    """The names, in order. Raises OpError for an op that does not exist or has no cases."""
    known = set(ops.all_ops()) & ops_with_cases()
    for name in op_names:
        if name not in known:
            raise OpError(f"there is no op '{name}' to validate; the ops are: {', '.join(sorted(known))}")
    return sorted(op_names)
