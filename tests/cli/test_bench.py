"""blip3o-rt bench from end to end on the tiny model: tables, files, exit codes, refusals, interruption."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blip3o_rt.measure.bench import baseline_modules, baselines, stages
from blip3o_rt.measure.bench import run as bench_run
from tests.cli.conftest import Command

WRONG = """
from blip3o_rt import ops

@ops.silu_mul.implementation("wrong", device="cpu")
def silu_mul(gate_up, *, out=None):
    up, gate = gate_up.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints for all tests of this file."""
    return tmp_path_factory.mktemp("work")


def quick(work: Path, *options: str) -> tuple[str, ...]:
    return ("bench", "--model", "tiny", "--quick", "--out", "r", "--work", str(work), *options)


def record() -> dict[str, Any]:
    return json.loads(Path("r/bench.json").read_text())


def test_lines_with_units_and_files(command: Command, work: Path) -> None:
    options = quick(work, "--lines", "ar.token,dit.step", "--dtype", "fp32", "--batch", "1,2")
    assert command(*options, "--trace", "r/trace.json") == 0
    assert command.files() == ["r/bench.html", "r/bench.json", "r/trace.json"]
    first, second, *rows = command.output.splitlines()
    assert first.startswith("model: tiny, fp32, exact, cpu, ")
    assert second.startswith("rooflines: read ")
    assert " GB/s, " in second
    (header,) = (row for row in rows if row.startswith("line "))
    wanted = {"cold", "median", "p90", "fastest", "n", "rate", "peak memory", "utilization", "op calls"}
    assert wanted | {"ratio"} <= set(filter(None, (cell.strip() for cell in header.split("  "))))
    (step,) = (row for row in rows if row.startswith("dit.step") and " ours " in row)
    assert "s/step" in step
    assert sum("tokens/s" in row for row in rows) == 6  # two batches; ours, transformers and published
    assert command.errors.count("ar.token") == 2  # as they come
    assert record()["complete"]
    assert record()["command"][:1] == ["blip3o-rt"]


def test_old_names_of_options_still_work(command: Command, work: Path) -> None:
    options = ("--size", "tiny", "--stages", "connector", "--peers", "none", "--budget", "5", "--quiet")
    assert command(*quick(work, *options)) == 0
    assert [line["who"] for line in record()["lines"]] == ["ours"]
    assert "--size is deprecated: its name is --model" in command.errors
    assert "--stages is deprecated: its name is --lines" in command.errors
    assert "--peers is deprecated: its name is --baselines" in command.errors
    assert "--budget is deprecated and ignored" in command.errors


def test_quiet_says_where_the_record_is(command: Command, work: Path) -> None:
    assert command(*quick(work, "--lines", "connector", "--quiet")) == 0
    assert command.output.splitlines() == ["r/bench.json", "r/bench.html"]
    assert command.errors == ""


def test_a_wrong_kernel_exits_with_1(command: Command, work: Path) -> None:
    Path("kernel.py").write_text(WRONG)
    assert command(*quick(work, "--ops", "silu_mul", "--kernel", "kernel.py")) == 1
    assert "WRONG" in command.output
    assert record()["model"]["switches"]["kernels"] == ["silu_mul=wrong"]
    assert record()["lines"] == []  # stages only where they are asked for


def test_the_switches_of_one_line(command: Command, work: Path) -> None:
    assert command(*quick(work, "--ablate", "ar.prefill", "--quiet")) == 0
    assert {entry["line"] for entry in record()["ablations"]} == {"ar.prefill"}
    assert "ar_weights=int8" in {entry["switch"] for entry in record()["ablations"]}
    assert record()["lines"] == []
    assert command(*quick(work, "--ablate", "connector")) == 2
    assert "ablate has 'connector': accepted are all, tatok, " in command.errors


@pytest.mark.parametrize("place", ["rooflines", "line"])
def test_interrupted(command: Command, work: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Before anything is measured, and on the way: record and page are there, and say that it is not all."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    if place == "rooflines":
        monkeypatch.setattr(bench_run.Run, "rooflines", interrupted)
    else:
        monkeypatch.setattr(stages.ConnectorStage, "run", interrupted)
    assert command(*quick(work, "--lines", "connector")) == 130
    assert command.errors.endswith("blip3o-rt: interrupted\n")
    assert "interrupted: this is what had been measured until then" in command.output
    assert not record()["complete"]
    assert Path("r/bench.html").is_file()


def test_without_the_baselines_packages(
    command: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they would have been beside is measured all the same, and one line says what to do."""

    def missing(name: str) -> None:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(baseline_modules.importlib, "import_module", missing)
    assert command(*quick(work, "--lines", "connector", "--baselines", "diffusers,published")) == 0
    (note,) = (line for line in command.errors.splitlines() if "left out" in line)
    assert note.startswith("diffusers, published left out: ")
    assert note.endswith("pip install 'blip3o_rt[bench]'")
    assert [line["who"] for line in record()["lines"]] == ["ours"]


@pytest.mark.parametrize(
    "lines",
    [["dit.step"], pytest.param(["ar.token", "vae.decode"], marks=pytest.mark.exhaustive)],
    ids=",".join,
)
def test_float32_beside_mixed(lines: list[str], command: Command, work: Path) -> None:
    """The same weights in float32 are a baseline of our own."""
    options = ("--lines", ",".join([*lines, "connector"]), "--baselines", "fp32")
    assert command(*quick(work, *options, "--dtype", "mixed")) == 0
    found = {(line["name"], line["who"]) for line in record()["lines"]}
    assert found == {(name, who) for name in lines for who in ("ours", "fp32")} | {("connector", "ours")}


def test_float32_is_no_baseline_of_itself(command: Command, work: Path) -> None:
    options = ("--lines", "dit.step,connector", "--baselines", "fp32", "--dtype", "fp32")
    assert command(*quick(work, *options)) == 0
    assert {line["who"] for line in record()["lines"]} == {"ours"}


def test_compare(command: Command) -> None:
    def write(name: str, seconds: float) -> None:
        line = {
            "name": "dit.step",
            "who": "ours",
            "batch": 1,
            "samples": [seconds + i * 1e-4 for i in range(9)],
        }
        machine = {"cpu": "x", "cores": 2, "gpu": None, "instruction_sets": []}
        model = {"size": "tiny", "dtype": "fp32", "tier": "exact", "device": "cpu", "threads": 1}
        head = {"kind": "bench", "version": 1, "machine": machine, "versions": {}, "model": model}
        Path(name).write_text(json.dumps({**head, "lines": [line], "ops": []}))

    write("a.json", 1.0)
    write("b.json", 1.5)
    assert command("bench", "compare", "a.json", "b.json") == 0
    assert "+50.0%" in command.output
    assert command.output.endswith("1 slower\n")
    assert command("bench", "compare", "a.json", "b.json", "--fail-slower", "60") == 0
    assert command("bench", "compare", "a.json", "b.json", "--fail-slower", "10") == 1
    assert command("bench", "compare", "b.json", "a.json", "--json") == 0
    assert json.loads(command.output)[0]["verdict"] == "faster"
    assert "nowhere.json" in command.refused("bench", "compare", "a.json", "nowhere.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lines", "foo"), "lines has 'foo': accepted are all, tatok, "),
        (("--baselines", "vllm"), "baselines has 'vllm': accepted are transformers, "),
        (("--batch", "0"), "batch is '0': accepted are numbers from 1 to 256"),
        (("--batch", "1,x"), "batch is '1,x'"),
        (("--model", "nowhere"), "--model is 'nowhere': accepted are published, tiny, shapes or"),
        (("--ops", "nosuch"), "there is no op 'nosuch'; the ops are: "),
        (("--runs", "0"), "runs is 0: accepted is 1 to"),
        (("--kernel", "no.py"), "no.py: there is no such file"),
        (("--trace", "x.txt"), "a trace goes to a file ending in .json"),
        (("--dtype", "fp16"), "invalid choice: 'fp16'"),
    ],
)
def test_refusals(options: tuple[str, ...], message: str, command: Command) -> None:
    assert message in command.refused("bench", *options)
    assert command.files() == []


def test_a_compiled_baseline_is_left_out_where_torch_cannot_compile(
    command: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        baselines, "compile_problem", lambda _: "torch.compile does not work here (no compiler)"
    )
    assert command(*quick(work, "--lines", "connector", "--baselines", "compiled,graphed")) == 0
    assert "note: compiled left out: torch.compile does not work here (no compiler)" in command.output
    assert "note: graphed left out: CUDA graphs need a GPU" in command.output


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom blip3o_rt.cli import main\n"
        "try:\n    main(['bench', '--help'])\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
