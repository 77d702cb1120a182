"""Every parameter of an image is in every interface: Python, the command line, HTTP and the page."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from blip3o_rt.cli.commands import build_parser
from blip3o_rt.cli.options import sampling_arguments
from blip3o_rt.params import DIFFUSION_NAMES, SAMPLING_NAMES, DiffusionParams, SamplingParams
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.serve import schema
from blip3o_rt.serve.schema import EditRequest, GenerationRequest, ImageRequest, JobRequest

NAMES = (*SAMPLING_NAMES, *DIFFUSION_NAMES)
DEFAULTS = vars(SamplingParams()) | vars(DiffusionParams())
PAGE = Path(schema.__file__).parent / "page"
NOT_IN_HTTP = {"image_tokens_only"}  # docs/serving.md says why

METHODS: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {  # what each is given, and what it takes
    "plan": (("red",), SAMPLING_NAMES),
    "render": ((None,), DIFFUSION_NAMES),
    "generate": (("red",), NAMES),
    "edit": (("red", "image.png"), NAMES),
    "generate_each": (([],), NAMES),
    "rollout": ((["red"],), NAMES),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_of_the_pipeline_passes_on_every_parameter(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    given, names = METHODS[method]
    parameters = inspect.signature(getattr(Pipeline, method)).parameters
    assert {name: parameters[name].default for name in names} == {name: DEFAULTS[name] for name in names}
    made: dict[str, Any] = {}
    for made_by in ("SamplingParams", "DiffusionParams"):
        monkeypatch.setattr(f"blip3o_rt.pipeline.pipeline.{made_by}", lambda **found: made.update(found))
    values = {name: object() for name in names}
    with pytest.raises(AttributeError):  # where the pipeline that there is none of would begin
        getattr(Pipeline, method)(None, *given, **values)
    assert {name: made[name] for name in names} == values


@pytest.mark.parametrize(
    "command", [["generate", "red"], ["edit", "red", "image.png"], ["batch", "rows", "--out", "x"]]
)
def test_a_command_has_an_option_for_every_parameter(command: list[str]) -> None:
    found = sampling_arguments(build_parser().parse_args(command))
    assert {name: found[name] for name in NAMES} == {name: DEFAULTS[name] for name in NAMES}


@pytest.mark.parametrize("request_class", [GenerationRequest, EditRequest, JobRequest])
def test_a_request_over_http_has_a_field_for_every_parameter(request_class: type[ImageRequest]) -> None:
    fields = request_class.model_fields
    assert {name: fields[name].default for name in NAMES if name in fields} == {
        name: DEFAULTS[name] for name in NAMES if name not in NOT_IN_HTTP
    }


def test_the_page_asks_for_every_parameter() -> None:
    (listed,) = re.findall(r"^const FIELDS = (\[.*\]);$", (PAGE / "page.js").read_text(), re.MULTILINE)
    asked = set(re.findall(r'<input id="(\w+)" name="\1"', (PAGE / "index.html").read_text()))
    wanted = {name for name in NAMES if name not in NOT_IN_HTTP}
    assert wanted - set(json.loads(listed)) == set()
    assert wanted - asked == set()
