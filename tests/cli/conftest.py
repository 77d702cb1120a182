"""A stand-in for the model, so that the command line is tested apart from what it calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from blip3o_rt.cli import main
from blip3o_rt.metadata import image_fields
from blip3o_rt.result import Report, Stage


class FakeResult(list[Image.Image]):
    """Images with their plans and a report, as the pipeline returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: list[SimpleNamespace] = []

    report = Report((Stage("tokens", 2.0, 16),), {"rms_norm": ("cpu",)}, 2**20, "cpu", "fp32", "exact")


class FakePipeline:
    """Returns one-pixel images whose red is the seed, and remembers how it was called."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]]
    failure: BaseException | None
    fails_at: int  # the images before this one are there when the failure comes
    non_image_positions: tuple[int, ...]

    @classmethod
    def load(cls, *arguments: Any, **keywords: Any) -> FakePipeline:
        cls.calls.append(("load", arguments, keywords))
        return cls()

    def generate(self, prompts: Sequence[str], **keywords: Any) -> FakeResult:
        return self._draw("generate", (prompts,), keywords, prompts)

    def edit(self, prompt: str, references: Sequence[Image.Image], **keywords: Any) -> FakeResult:
        return self._draw("edit", (prompt, references), keywords, [prompt])

    def _draw(
        self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any], prompts: Sequence[str]
    ) -> FakeResult:
        on_image: Callable[[int, Image.Image], None] = keywords.pop("on_image")
        self.calls.append((name, arguments, keywords))
        result = FakeResult()
        for prompt in prompts:
            for seed in range(keywords["seed"], keywords["seed"] + keywords["n"]):
                if self.failure is not None and len(result) == self.fails_at:
                    raise self.failure
                image = Image.new("RGB", (1, 1), (seed % 256, 0, 0))
                image.info.update(image_fields(prompt, seed, {"steps": keywords["steps"]}))
                on_image(len(result), image)
                result.append(image)
                result.plans.append(SimpleNamespace(non_image_positions=self.non_image_positions))
        return result


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> type[FakePipeline]:
    """The stand-in, in the place of blip3o_rt.pipeline.Pipeline."""
    module = ModuleType("blip3o_rt.pipeline")
    FakePipeline.calls, FakePipeline.non_image_positions = [], ()
    FakePipeline.failure, FakePipeline.fails_at = None, 0
    module.Pipeline = FakePipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "blip3o_rt.pipeline", module)
    return FakePipeline


class Command:
    """Runs blip3o-rt in a folder of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys
        self.output = self.errors = ""

    def __call__(self, *arguments: str | Path) -> int:
        """The exit code; what it printed is in `output` and `errors`."""
        code = main([str(argument) for argument in arguments])
        self.output, self.errors = self._capsys.readouterr()
        return code

    def refused(self, *arguments: str | Path) -> str:
        """The one line with which the command is refused; checks that it is one line and the exit code 2."""
        assert self(*arguments) == 2
        assert self.output == ""
        line = self.errors.removesuffix("\n")
        assert "\n" not in line
        assert line.startswith("blip3o-rt: error: ")
        return line.removeprefix("blip3o-rt: error: ")

    def files(self) -> list[str]:
        """Every file in the folder, as sorted relative paths."""
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(tmp_path, capsys)
