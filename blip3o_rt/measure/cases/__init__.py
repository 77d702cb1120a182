"""Calls of each op that every implementation has to get right: cases() -> Iterator[Case], a module per op.

A module may define check(op, case, results, exact) -> list[Finding] to replace the comparison of numbers:
where near-ties let results differ without being wrong, or where the contract rounds in between.
"""
