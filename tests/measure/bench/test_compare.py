"""Verdicts on samples whose truth is known: noise is the same, 20% is not, a slow machine is no fault."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blip3o_rt.errors import ParameterError
from blip3o_rt.measure.bench import compare
from blip3o_rt.measure.records import BenchRecord

MACHINE = {"cpu": "a", "cores": 2, "memory_bytes": 1, "gpu": None, "driver": None, "instruction_sets": []}
MODEL = {"size": "shapes", "dtype": "bf16", "tier": "exact", "device": "cpu", "threads": 2, "switches": {}}
VERSIONS = {"torch": "2.13.0", "transformers": "5.17.0", "diffusers": "0.42.1"}


def samples(seed: int, seconds: float, count: int, noise: float = 0.05) -> list[float]:
    """Times with the one-sided noise that machines have."""
    return list(seconds * (1 + noise * np.random.default_rng(seed).exponential(size=count)))


def record(*lines: tuple[str, str, list[float]], ops: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "kind": "bench",
        "version": 1,
        "machine": dict(MACHINE),
        "model": dict(MODEL),
        "versions": dict(VERSIONS),
        "lines": [{"name": n, "who": w, "batch": 1, "samples": found} for n, w, found in lines],
        "ops": ops or [],
    }


def compared(before: dict[str, Any], after: dict[str, Any]) -> list[compare.Verdict]:
    return compare.compare_records(BenchRecord.of(before), BenchRecord.of(after))


def verdict(before: list[float], after: list[float]) -> str:
    return compare.judge("line", before, after).verdict


@pytest.mark.parametrize("count", [3, 5, 10, 40])
def test_the_same_distribution_is_the_same(count: int) -> None:
    found = [verdict(samples(seed, 1.0, count), samples(seed + 1000, 1.0, count)) for seed in range(40)]
    assert found.count("same") >= 38  # a 95% interval may err, and the margin forgives most of it


@pytest.mark.parametrize("count", [3, 5, 10, 40])
@pytest.mark.parametrize(("factor", "expected"), [(1.2, "slower"), (1 / 1.2, "faster")])
def test_a_fifth_is_seen(count: int, factor: float, expected: str) -> None:
    for seed in range(20):
        before = samples(seed, 1.0, count, noise=0.01)
        assert verdict(before, samples(seed + 1000, factor, count, noise=0.01)) == expected


def test_noise_larger_than_the_change_is_no_verdict() -> None:
    found = [verdict(samples(s, 1.0, 5, noise=1.0), samples(s + 99, 1.1, 5, noise=1.0)) for s in range(20)]
    assert found.count("same") >= 17


def test_a_sure_change_below_the_margin_is_the_same() -> None:
    assert verdict([1.0] * 50, [1.01] * 50) == "same"


def test_too_few_samples_are_unsure() -> None:
    assert verdict([1.0, 1.0], [2.0, 2.0]) == "unsure"
    assert verdict([1.0] * 30, [2.0]) == "unsure"


def test_the_same_records_give_the_same_verdict() -> None:
    before, after = samples(1, 1.0, 10), samples(2, 1.05, 10)
    assert compare.judge("line", before, after) == compare.judge("line", before, after)


def tokens(seed: int, ours: float, baseline: float) -> dict[str, Any]:
    return record(
        ("ar.token", "ours", samples(seed, ours, 20)),
        ("ar.token", "transformers", samples(seed + 1, baseline, 20)),
    )


def test_a_slower_machine_slows_the_baseline_as_much() -> None:
    before, after = tokens(1, 1.0, 2.0), tokens(3, 1.3, 2.6)
    (found,) = compared(before, after)
    assert (found.baseline, found.verdict) == ("transformers", "same")
    assert found.change == pytest.approx(1.0, abs=0.05)
    after["versions"]["transformers"] = "6.0"  # another baseline altogether
    (found,) = compared(before, after)
    assert (found.baseline, found.verdict) == (None, "slower")


def test_a_change_of_ours_shows_beside_a_steady_baseline() -> None:
    (found,) = compared(tokens(1, 1.0, 2.0), tokens(3, 0.7, 2.0))
    assert (found.line, found.verdict) == ("ar.token", "faster")


def test_lines_of_one_record_and_those_that_failed_are_passed_over() -> None:
    before = record(("a", "ours", [1.0] * 5), ("b", "ours", [1.0] * 5), ("c", "ours", []))
    after = record(("a", "ours", [1.0] * 5), ("c", "ours", [1.0]), ("d", "ours", [1.0]))
    assert [v.line for v in compared(before, after)] == ["a"]
    assert compare.as_text([]) == "the records have no line in common"


def test_ops_are_compared_by_shape_and_dtype() -> None:
    def op(seconds: float, dtype: str) -> dict[str, Any]:
        entry = {"op": "rms_norm", "implementation": "cpu", "shape": "decode x1"}
        return {**entry, "dtype": dtype, "samples": samples(1, seconds, 10)}

    found = compared(
        record(ops=[op(1.0, "bf16"), op(1.0, "fp32")]), record(ops=[op(2.0, "bf16"), op(1.0, "fp32")])
    )
    assert [(v.line, v.verdict) for v in found] == [
        ("rms_norm cpu bf16, decode x1", "slower"),
        ("rms_norm cpu fp32, decode x1", "same"),
    ]


def test_only_what_is_surely_slower_fails() -> None:
    slow = compare.judge("line", [1.0] * 10, [1.2] * 10)
    assert compare.slower_than([slow], 10.0)
    assert not compare.slower_than([slow], 25.0)
    unsure = compare.judge("line", [1.0] * 2, [9.0] * 2)
    assert not compare.slower_than([unsure], 10.0)


def write(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_other_machines_and_models_are_refused_unless_forced(tmp_path: Path) -> None:
    before = record(("a", "ours", [1.0] * 5))
    after = copy.deepcopy(before)
    after["machine"]["cores"] = 64
    after["model"]["dtype"] = "fp32"
    paths = write(tmp_path / "a.json", before), write(tmp_path / "b.json", after)
    with pytest.raises(ParameterError) as caught:
        compare.compare_files(*paths)
    assert "cores is 2 in the first, 64 in the second" in str(caught.value)
    assert "dtype is bf16 in the first, fp32 in the second" in str(caught.value)
    assert len(compare.compare_files(*paths, force=True)) == 1


def test_other_switches_are_another_model() -> None:
    before = record(("a", "ours", [1.0] * 5))
    before["model"]["switches"] = {"BLIP3O_OPS": None, "ar_weights": "int8"}
    after = copy.deepcopy(before)
    after["model"]["switches"] |= {"BLIP3O_OPS": "rms_norm=torch", "graphs": "on"}  # not in older records
    assert compare.differences(BenchRecord.of(before), BenchRecord.of(after)) == []
    after["model"]["switches"] |= {"step_cache": "2", "graphs": "off"}
    assert compare.differences(BenchRecord.of(before), BenchRecord.of(after)) == [
        "step_cache is None in the first, 2 in the second",
        "graphs is None in the first, off in the second",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a bench record"),
        ('{"kind": "validate"}', "is not a bench record"),
        ('{"kind": "bench", "version": 9}', "is a record of version 9: accepted is 1"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ParameterError, match=message):
        compare.compare_files(path, path)
