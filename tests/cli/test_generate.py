"""blip3o-rt generate: options reach the model, images and reports their files; refusals are one line."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from blip3o_rt.cli import commands, drawing, outputs
from blip3o_rt.cli import options as cli_options
from blip3o_rt.cli.commands import build_parser
from blip3o_rt.errors import CheckpointError, GenerationError
from blip3o_rt.files import replacing
from blip3o_rt.images import FORMATS
from blip3o_rt.metadata import image_fields, read_metadata, save_png
from tests.cli.conftest import Command, FakePipeline


def test_defaults_are_the_published_ones(command: Command, pipeline: type[FakePipeline]) -> None:
    assert command("generate", "a red circle") == 0
    load, generate = pipeline.calls
    places = {"diffusion": None, "ta_tok": None, "cache_dir": None}
    places |= {"variant": None, "allow_base_weights": False}  # type: ignore[dict-item]
    tier = {"tier": "exact", "switches": {}}
    assert load == ("load", (None,), {"device": "auto", "dtype": "auto", **tier, **places})
    assert generate == (
        "generate",
        (["a red circle"],),
        {
            "n": 1,
            "seed": 0,
            "steps": 30,
            "guidance": 2.0,
            "temperature": 1.0,
            "top_k": None,
            "top_p": 0.95,
            "image_tokens_only": True,
            "draft_window": "auto",
            "progress": True,
        },
    )
    assert command.files() == ["out/a-red-circle-0.png"]


def test_every_option_reaches_the_model(command: Command, pipeline: type[FakePipeline]) -> None:
    options = (
        "-n 2 --seed 5 --steps 4 --guidance 1.5 --temperature 0.5 --top-k 7 --top-p 0.9 --whole-vocabulary"
        " --draft-window 4"
    )
    places = "--model m --diffusion d --ta-tok t.pth --cache-dir c --device cpu --dtype bf16 --quiet"
    places += " --variant fp16 --allow-base-weights"
    sizes = "--max-batch 8 --max-prompt-tokens 99 --tier fast --switch ar_weights=int8"
    assert command("generate", "x", "y", *options.split(), *places.split(), *sizes.split()) == 0
    load, generate = pipeline.calls
    assert load[1] == ("m",)
    assert load[2] == {
        "device": "cpu",
        "dtype": "bf16",
        "tier": "fast",
        "switches": {"ar_weights": "int8"},
        "diffusion": Path("d"),
        "ta_tok": Path("t.pth"),
        "variant": "fp16",
        "allow_base_weights": True,
        "cache_dir": Path("c"),
        "max_batch": 8,
        "max_prompt_tokens": 99,
    }
    assert generate[1] == (["x", "y"],)
    assert generate[2] == {
        "n": 2,
        "seed": 5,
        "steps": 4,
        "guidance": 1.5,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "image_tokens_only": False,
        "draft_window": 4,
        "progress": False,
    }


def test_the_real_pipeline_takes_these_arguments() -> None:
    from blip3o_rt.pipeline import Pipeline

    arguments = build_parser().parse_args(["generate", "x"])
    keywords = cli_options.request_arguments(arguments)
    inspect.signature(Pipeline.generate).bind(None, ["x"], on_image=print, **keywords)
    inspect.signature(Pipeline.edit).bind(None, "x", [Image.new("RGB", (1, 1))], on_image=print, **keywords)
    sizes = {"max_batch": 4, "max_prompt_tokens": 1536}
    inspect.signature(Pipeline.load).bind(
        None,
        device="auto",
        dtype="auto",
        diffusion=None,
        ta_tok=None,
        variant=None,
        allow_base_weights=False,
        cache_dir=None,
        **sizes,
    )


def test_images_are_named_after_prompt_and_seed(command: Command, pipeline: type[FakePipeline]) -> None:
    assert (
        command("generate", "A red circle!", "Красный круг", "?!", "-n", "2", "--seed", "3", "--out", "a/b")
        == 0
    )
    names = ["a-red-circle-3", "a-red-circle-4", "image-3", "image-4", "красный-круг-3", "красный-круг-4"]
    assert command.files() == [f"a/b/{name}.png" for name in names]
    fields = read_metadata(command.folder / "a/b/красный-круг-4.png")
    assert (fields["prompt"], fields["seed"], fields["parameters"]) == ("Красный круг", 4, {"steps": 30})
    with Image.open(command.folder / "a/b/a-red-circle-4.png") as image:
        assert image.getpixel((0, 0)) == (4, 0, 0)


def test_prompts_that_come_out_alike_do_not_overwrite_each_other(
    command: Command, pipeline: type[FakePipeline]
) -> None:
    assert command("generate", "a cat", "A cat.", "a-cat", "--out", "o") == 0
    assert command.files() == ["o/a-cat-0.png", "o/a-cat-2-0.png", "o/a-cat-3-0.png"]
    assert read_metadata(command.folder / "o/a-cat-3-0.png")["prompt"] == "a-cat"


def test_names_stay_within_a_file_systems_limit(command: Command, pipeline: type[FakePipeline]) -> None:
    assert command("generate", "𠀀" * 500, "--seed", str(2**63 - 1), "--out", "o") == 0
    (name,) = command.files()
    longest_while_written = f".{name.removeprefix('o/')}.12345678.part"
    assert len(longest_while_written.encode()) <= 255


def test_one_image_into_one_file(command: Command, pipeline: type[FakePipeline]) -> None:
    assert command("generate", "x", "--out", "deep/x.PNG") == 0
    assert command.files() == ["deep/x.PNG"]
    assert command.output.splitlines()[0] == "deep/x.PNG"


@pytest.mark.parametrize("arguments", [["x", "y"], ["x", "-n", "2"]])
def test_several_images_into_one_file(
    command: Command, pipeline: type[FakePipeline], arguments: list[str]
) -> None:
    message = command.refused("generate", *arguments, "--out", "x.png")
    assert message == "--out is x.png but there are 2 images to write: give a folder"
    assert pipeline.calls == []


def test_a_file_in_the_place_of_the_folder(command: Command, pipeline: type[FakePipeline]) -> None:
    (command.folder / "taken").write_text("mine")
    assert "a file: accepted is a .png" in command.refused("generate", "x", "--out", "taken")
    assert pipeline.calls == []


def test_a_folder_that_cannot_be_made(command: Command, pipeline: type[FakePipeline]) -> None:
    (command.folder / "taken").write_text("mine")
    assert command.refused("generate", "x", "--out", "taken/o").startswith("taken/o: Not a directory")


def test_table_and_paths_are_printed(command: Command, pipeline: type[FakePipeline]) -> None:
    assert command("generate", "x") == 0
    assert "8.0 tokens/s" in command.output
    assert command.output.splitlines()[0] == "out/x-0.png"


def test_quiet_prints_the_paths_alone(command: Command, pipeline: type[FakePipeline]) -> None:
    assert command("generate", "x", "--quiet") == 0
    assert (command.output, command.errors) == ("out/x-0.png\n", "")


def test_tokens_that_are_not_image_tokens_are_reported(
    command: Command, pipeline: type[FakePipeline]
) -> None:
    pipeline.non_image_positions = (3, 5)
    assert command("generate", "x", "--whole-vocabulary") == 0
    expected = "out/x-0.png: 2 of its tokens, the first at position 3, are not image tokens"
    assert command.errors == f"blip3o-rt: warning: {expected}\n"


def test_report_file(command: Command, pipeline: type[FakePipeline]) -> None:
    assert command("generate", "x", "--report", "r/report.json") == 0
    report = json.loads((command.folder / "r/report.json").read_text())
    assert report["stages"]["tokens"] == {"seconds": 2.0, "work": 16}


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        ("folder", "a folder: accepted is a file's path"),
        ("taken/report.json", "File exists"),
        ("taken/deep/report.json", "Not a directory"),
        ("x.png", "where an image goes"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    command: Command, pipeline: type[FakePipeline], report: str, reason: str
) -> None:
    (command.folder / "folder").mkdir()
    (command.folder / "taken").write_text("mine")
    assert reason in command.refused("generate", "x", "--out", "x.png", "--report", report)
    assert pipeline.calls == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--trace t.txt", "a trace goes to a file ending in .json or .json.gz, not t.txt"),
        ("--trace t.json --report t.json", "--trace is t.json, where the report goes"),
        ("--trace t.json --trace-tokens -1", "--trace-tokens is -1: accepted is 0 (all) or more"),
        ("--trace t.json --nvtx", "not allowed with argument"),
    ],
)
def test_a_trace_that_cannot_be_is_refused_before_the_model_is_loaded(
    command: Command, pipeline: type[FakePipeline], options: str, reason: str
) -> None:
    assert reason in command.refused("generate", "x", *options.split())
    assert pipeline.calls == []


@pytest.mark.parametrize("option", ["--out", "--report", "--trace"])
def test_a_folder_that_may_not_be_written(
    command: Command, pipeline: type[FakePipeline], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    def locked(dir: Path) -> object:
        if dir == Path("locked"):
            raise OSError(30, "Read-only file system")
        return temporary_file(dir=dir)

    temporary_file = outputs.tempfile.TemporaryFile
    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", locked)
    reason = "which may not be written (Read-only file system)"
    expected = f"{option} needs the folder locked, {reason}: choose another"
    name = "x.json" if option == "--trace" else "x.png"
    assert command.refused("generate", "x", option, f"locked/{name}") == expected
    assert pipeline.calls == []


@pytest.mark.parametrize("option", ["--out", "--report", "--trace"])
def test_what_is_no_regular_file_is_never_replaced(
    command: Command, pipeline: type[FakePipeline], option: str
) -> None:
    name = "x.json" if option == "--trace" else "x.png"
    os.mkfifo(name)
    expected = f"{option} is {name}, no regular file, which is not replaced: choose another"
    assert command.refused("generate", "x", option, name) == expected
    assert pipeline.calls == []
    with pytest.raises(OSError, match="not a regular file, and not replaced"), replacing(name):
        pytest.fail("it was to be replaced")
    assert Path(name).is_fifo()


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs Linux's /sys")
def test_a_folder_that_only_seems_writable(command: Command, pipeline: type[FakePipeline]) -> None:
    """Linux tells the superuser that it is, and then makes no file in it."""
    assert "may not be written" in command.refused("generate", "x", "--out", "/sys/kernel/x.png")
    assert pipeline.calls == []


def test_images_are_there_whatever_becomes_of_the_report(
    command: Command, pipeline: type[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "r.json")

    monkeypatch.setattr(drawing, "write_report", full)
    assert command("generate", "x", "--report", "r.json") == 2
    assert command.errors == "blip3o-rt: error: r.json: No space left on device\n"
    assert command.files() == ["out/x-0.png"]


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("-n", "0", "1 to 64"),
        ("-n", "65", "1 to 64"),
        ("--seed", "-1", "0 to 9223372036854775807"),
        ("--steps", "0", "1 to 1000"),
        ("--guidance", "nan", "0 to 100"),
        ("--guidance", "-1", "0 to 100"),
        ("--temperature", "0", "greedy is top_k=1"),
        ("--top-k", "-1", "0 (off)"),
        ("--top-p", "0", "above 0 and at most 1"),
        ("--top-p", "inf", "above 0 and at most 1"),
        ("--draft-window", "0", "a whole number from 1"),
        ("--draft-window", "17", "a whole number from 1"),
        ("--draft-window", "many", '"auto", or a whole number'),
        ("--max-batch", "0", "1 to 256"),
        ("--max-batch", "-3", "1 to 256"),
        ("--max-prompt-tokens", "-5", "16 to 1000000"),
    ],
)
def test_out_of_range_is_refused_before_the_model_is_loaded(
    command: Command, pipeline: type[FakePipeline], option: str, value: str, accepted: str
) -> None:
    assert accepted in command.refused(
        "generate", "x", f"{option}={value}" if option != "-n" else f"-n{value}"
    )
    assert pipeline.calls == []
    assert command.files() == []


def test_our_errors_are_one_line(command: Command, pipeline: type[FakePipeline]) -> None:
    pipeline.failure = CheckpointError("the tensor is not there: convert again")
    assert command.refused("generate", "x") == "the tensor is not there: convert again"


def test_a_failed_image_does_not_take_the_others_along(
    command: Command, pipeline: type[FakePipeline]
) -> None:
    pipeline.failure, pipeline.fails_at = GenerationError("image 2: the logits are not finite"), 2
    assert command("generate", "x", "-n", "3") == 2
    assert command.files() == ["out/x-0.png", "out/x-1.png"]
    assert (command.output, command.errors) == (
        "out/x-0.png\nout/x-1.png\n",
        "blip3o-rt: error: image 2: the logits are not finite\n",
    )


def test_our_mistakes_keep_their_traceback(command: Command, pipeline: type[FakePipeline]) -> None:
    pipeline.failure = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        command("generate", "x")


def test_interrupt(command: Command, pipeline: type[FakePipeline]) -> None:
    pipeline.failure = KeyboardInterrupt()
    assert command("generate", "x") == 130
    assert (command.output, command.errors) == ("", "blip3o-rt: interrupted\n")
    assert command.files() == []


def test_an_interrupt_keeps_the_images_drawn_so_far(command: Command, pipeline: type[FakePipeline]) -> None:
    pipeline.failure, pipeline.fails_at = KeyboardInterrupt(), 63
    assert command("generate", "x", "-n", "64") == 130
    assert command.output.splitlines() == [f"out/x-{seed}.png" for seed in range(63)]
    assert len(command.files()) == 63


COMMON = ["jpg", "JPEG", "jpe", "webp", "gif", "bmp", "tif", "tiff"]
RARE = ["avif", "jfif", "jp2", "heic", "ico", "tga", "ppm", "pgm", "apng", "svg"]


@pytest.mark.parametrize("suffix", COMMON + RARE + ["icb", "dng", "cr2", "psb", "svgz"])
def test_another_image_format(command: Command, pipeline: type[FakePipeline], suffix: str) -> None:
    expected = f"--out is a.{suffix}: accepted is a .png for one image, or a folder"
    assert command.refused("generate", "x", "--out", f"a.{suffix}") == expected
    assert list(command.folder.iterdir()) == []


def test_every_format_that_is_read_is_refused_by_each_of_its_names() -> None:
    Image.init()
    read = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS} - {".png"}
    assert [suffix for suffix in sorted(read) if not outputs.OTHER_IMAGE_SUFFIXES.fullmatch(suffix)] == []


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee the documentation."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_runs_out_is_one_line(
    command: Command, pipeline: type[FakePipeline], failure: Exception
) -> None:
    pipeline.failure = failure
    assert command.refused("generate", "x").startswith("out of memory")


def test_a_gpu_that_fails_is_one_line(command: Command, pipeline: type[FakePipeline]) -> None:
    pipeline.failure = torch.AcceleratorError("CUDA error: an illegal memory access\nmore lines")
    message = command.refused("generate", "x")
    assert message.startswith("the GPU failed (CUDA error: an illegal memory access):")


def test_a_runtime_error_of_another_kind_keeps_its_traceback(
    command: Command, pipeline: type[FakePipeline]
) -> None:
    pipeline.failure = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        command("generate", "x")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "COMMAND (see blip3o-rt --help)"),
        (["generate"], "PROMPT (see blip3o-rt generate --help)"),
        (["generate", "x", "--dtype", "fp64"], "invalid choice: 'fp64'"),
        (["generate", "x", "-n", "many"], "invalid int value: 'many'"),
        (["doctor", "two\nlines"], "unrecognized arguments: two lines"),
        (["paint", "x"], "invalid choice: 'paint'"),
    ],
)
def test_what_argparse_refuses_is_one_line(command: Command, arguments: list[str], reason: str) -> None:
    assert reason in command.refused(*arguments)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["generate", "--help"], ["doctor", "--help"]]
)
def test_help_does_not_wait_for_pytorch(arguments: list[str]) -> None:
    program = (
        "import sys; from blip3o_rt.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.splitlines()[-1] == "[]"
    assert result.stdout.startswith(("usage: ", "blip3o-rt 0."))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "raise ValueError('\\nInvalid log settings')",
            "a_library cannot be imported (Invalid log settings)",
        ),
        ("import no_such_library", "a_library cannot be imported (No module named 'no_such_library')"),
        (None, "a_library cannot be imported (No module named 'a_library')"),
    ],
)
def test_a_library_that_cannot_be_imported_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str | None, reason: str
) -> None:
    """As PyTorch with a wrong TORCH_LOGS, or tqdm with a wrong TQDM_MININTERVAL."""
    if body is not None:
        (tmp_path / "a_library.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(commands, "parse", lambda argv: importlib.import_module("a_library"))
    assert command.refused("generate", "x").startswith(reason)


def test_a_current_folder_that_was_removed_is_named(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert command.refused("doctor") == "the current folder is not there any more: change to another"


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("OMP_NUM_THREADS", ["1", " 16 ", "2,1"], ["abc", "", "0", "-1", "4.0", "100000", "\u0661"]),
        ("GOMP_CPU_AFFINITY", ["0-3", "0 2 4-6:2"], ["abc"]),
        ("OMP_PROC_BIND", ["TRUE", "close", "spread,close"], ["nonsense"]),
        ("OMP_PLACES", ["cores", "cores(2)", "{0:4},{4:4}"], ["2 cores"]),
        ("OMP_SCHEDULE", ["static", "dynamic,4"], ["xyz"]),
    ],
)
def test_what_openmp_does_not_take_is_ignored_in_one_line(
    command: Command,
    pipeline: type[FakePipeline],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    right: list[str],
    wrong: list[str],
) -> None:
    for text in right + wrong:
        for options in ([], ["--quiet"]):
            monkeypatch.setenv(name, text)
            assert command("generate", "x", *options) == 0
            assert (name in os.environ) == (text in right)  # OpenMP has not read it yet
            said = f"blip3o-rt: warning: {name} is {text!r}, which OpenMP does not take: it is ignored\n"
            assert command.errors == (said if text in wrong and text and not options else "")


def test_a_name_keeps_the_letters_of_every_script(command: Command, pipeline: type[FakePipeline]) -> None:
    """Vowel signs are marks, not letters: without them these two are one name."""
    assert command("generate", "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0939\u0928\u0926") == 0
    assert command.files() == [
        "out/\u0939\u0928\u0926-0.png",
        "out/\u0939\u093f\u0928\u094d\u0926\u0940-0.png",
    ]
    assert outputs.file_name("cafe\u0301 au lait") == "caf\xe9-au-lait"
    assert outputs.file_name("\u0915\u093f" * 40) == "\u0915\u093f" * 24


def test_a_path_is_printed_in_one_line(command: Command, pipeline: type[FakePipeline]) -> None:
    assert command("generate", "x", "--quiet", "--out", "two\nlines\x1b[31m/\u0915\u200d.png") == 0
    assert command.output == "two\\nlines\\x1b[31m/\u0915\u200d.png\n"
    assert command.files() == ["two\nlines\x1b[31m/\u0915\u200d.png"]


def test_another_request_gets_another_name(command: Command, pipeline: type[FakePipeline]) -> None:
    assert command("generate", "x", "--steps", "3") == 0
    assert command("generate", "x", "--steps", "4") == 0
    assert command.output.splitlines()[0] == "out/x-2-0.png"
    assert command("generate", "x", "--steps", "3") == 0  # the first again: the same image
    assert command.output.splitlines()[0] == "out/x-0.png"
    assert command.files() == ["out/x-0.png", "out/x-2-0.png"]
    assert command("generate", "x", "--steps", "5", "--overwrite") == 0
    assert command.files() == ["out/x-0.png", "out/x-2-0.png"]
    assert read_metadata(command.folder / "out/x-0.png")["parameters"] == {"steps": 5}


def test_what_is_not_ours_is_never_replaced(command: Command, pipeline: type[FakePipeline]) -> None:
    (command.folder / "out").mkdir()
    Image.new("RGB", (3, 3)).save(command.folder / "out/x-0.png")
    (command.folder / "out/x-2-0.png").write_text("notes")
    assert command("generate", "x") == 0
    assert command.output.splitlines()[0] == "out/x-3-0.png"


def test_the_same_prompt_twice_does_not_overwrite_itself(
    command: Command, pipeline: type[FakePipeline]
) -> None:
    assert command("generate", "x", "x", "--overwrite") == 0
    assert command.files() == ["out/x-0.png", "out/x-2-0.png"]


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "a" * 300, "a" * 300 + "/x.png"])
@pytest.mark.parametrize("option", ["--out", "--report"])
def test_a_name_that_cannot_be_held_is_refused_before_the_work(
    command: Command, pipeline: type[FakePipeline], option: str, name: str
) -> None:
    assert "File name too long" in command.refused("generate", "x", option, name)
    assert pipeline.calls == []


@pytest.mark.parametrize("option", ["--out", "--report"])
@pytest.mark.parametrize(("to", "reason"), [("gone/x.png", "a folder that is not there"), ("a.png", "loop")])
def test_a_link_to_no_place_is_refused_before_the_work(
    command: Command, pipeline: type[FakePipeline], option: str, to: str, reason: str
) -> None:
    (command.folder / "a.png").symlink_to(to)
    assert reason in command.refused("generate", "x", option, "a.png")
    assert pipeline.calls == []


def test_options_may_stand_between_prompts(command: Command, pipeline: type[FakePipeline]) -> None:
    assert command("generate", "x", "--steps", "2", "y", "-n", "1", "z") == 0
    assert pipeline.calls[1][1] == (["x", "y", "z"],)
    assert command("generate", "--steps", "2", "--", "-a prompt", "--quiet") == 0
    assert pipeline.calls[3][1] == (["-a prompt", "--quiet"],)


def test_the_home_folder_in_an_option(
    command: Command, pipeline: type[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(command.folder / "home"))
    assert command("generate", "x", "--out=~/o", "--report=~/r.json", "--model=~/m") == 0
    assert command.files() == ["home/o/x-0.png", "home/r.json"]
    assert pipeline.calls[0][1] == (str(command.folder / "home/m"),)


def test_messages_do_not_contradict_themselves(command: Command, pipeline: type[FakePipeline]) -> None:
    message = command.refused("generate", "x", "--top-p", "1.0000001")
    assert message.startswith("top_p is 1.0000001: accepted is a number above 0 and at most 1")


@pytest.mark.parametrize("file", ["like.png", "m/config.json", "link.png"])
@pytest.mark.parametrize("option", ["--report", "--trace"])
def test_a_report_never_replaces_an_input(
    command: Command, pipeline: type[FakePipeline], file: str, option: str
) -> None:
    (command.folder / "m").mkdir()
    (command.folder / "m/config.json").write_text("{}")
    save_png(Image.new("RGB", (1, 1)), command.folder / "like.png", LIKED)
    (command.folder / "link.png").symlink_to("like.png")
    if option == "--trace" and not file.endswith("json"):
        pytest.skip("a trace is refused by its name")
    before = (command.folder / file).read_bytes()
    message = command.refused("generate", "x", "--like", "like.png", "--model", "m", option, file)
    assert "is read from: accepted is another file's path" in message
    assert (command.folder / file).read_bytes() == before


PARAMETERS = {
    "steps": 7,
    "guidance": 1.5,
    "temperature": 0.5,
    "top_k": 9,
    "top_p": 0.8,
    "image_tokens_only": False,
    "token_seed": 5,
    "tier": "fast",
    "switches": {"ar_weights": "int8"},
}
ORIGIN = {"task": "text-to-image", "references": [], "dtype": "bf16", "device": "cpu"}
LIKED = image_fields("a cat", 5, PARAMETERS, **ORIGIN)


def liked(command: Command, **changes: object) -> str:
    save_png(Image.new("RGB", (1, 1)), command.folder / "like.png", LIKED | changes)
    return "like.png"


def test_like_draws_a_file_again(command: Command, pipeline: type[FakePipeline]) -> None:
    assert command("generate", "--like", liked(command), "--quiet") == 0
    load, generate = pipeline.calls
    assert (load[2]["dtype"], load[2]["tier"], load[2]["switches"]) == (
        "bf16",
        "fast",
        {"ar_weights": "int8"},
    )
    assert generate[1] == (["a cat"],)
    drawn = {name: PARAMETERS[name] for name in ("steps", "guidance", "temperature", "top_k", "top_p")}
    drawn |= {"image_tokens_only": False, "seed": 5, "n": 1, "draft_window": "auto", "progress": False}
    assert generate[2] == drawn


def test_what_is_given_beside_like_counts(command: Command, pipeline: type[FakePipeline]) -> None:
    assert command("generate", "a dog", "--like", liked(command), "--seed", "6", "--steps", "2", "-n2") == 0
    call = pipeline.calls[1]
    assert call[1] == (["a dog"],)
    assert (call[2]["seed"], call[2]["steps"], call[2]["n"], call[2]["top_k"]) == (6, 2, 2, 9)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "edit"}, "made by another command: blip3o-rt edit --like like.png IMAGE"),
        (
            {"checkpoint": {"name": "mine", "sha256": ""}},
            "drawn with checkpoint mine: give its folder with --model",
        ),
        ({"parameters": PARAMETERS | {"token_seed": 6}}, "have two seeds"),
        ({"parameters": {"tokens": "given", "steps": 3}}, "whose tokens came from a program"),
        ({"parameters": "Steps: 20, Sampler: Euler"}, "does not say how to draw it"),
    ],
)
def test_what_like_cannot_draw_is_refused(
    command: Command, pipeline: type[FakePipeline], changes: dict[str, object], reason: str
) -> None:
    assert reason in command.refused("generate", "--like", liked(command, **changes))
    assert pipeline.calls == []


def test_an_ordinary_png_has_nothing_to_be_like(command: Command, pipeline: type[FakePipeline]) -> None:
    Image.new("RGB", (1, 1)).save(command.folder / "a.png")
    assert "does not say how to draw it" in command.refused("generate", "--like", "a.png")


def test_another_checkpoint_than_the_files_is_said(command: Command, pipeline: type[FakePipeline]) -> None:
    like = liked(command, checkpoint={"name": "mine", "sha256": "ab"})
    assert command("generate", "--like", like, "--model", "m") == 0
    (line,) = command.errors.splitlines()
    assert line.startswith("blip3o-rt: warning: out/a-cat-5.png differs from like.png in its checkpoint")
    assert command("generate", "--like", like, "--model", "m", "--quiet") == 0
    assert command.errors == ""
