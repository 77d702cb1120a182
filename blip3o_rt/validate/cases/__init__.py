"""Calls of each op that every implementation has to get right: cases() -> Iterator[Case], a module per op.

A module may define check(op, case, results, exact) to replace the comparison of numbers, where near-ties let
results differ without being wrong.
"""
