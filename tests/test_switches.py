"""Tiers and switches: what goes together, and one line for what does not."""

from __future__ import annotations

import pytest
import torch

from blip3o_rt.errors import ParameterError
from blip3o_rt.ops import triton_backend
from blip3o_rt.switches import (
    SWITCHES,
    check_device,
    check_stored,
    check_switches,
    check_tier,
    parse_switches,
    plan_switches,
    render_switches,
    setting,
    weight_switches,
)

INT8 = {"ar_weights": "int8"}
DEFAULTS = {**INT8, "dit_weights": "int8"}  # of a CPU


def test_tiers() -> None:
    assert check_tier("exact") == check_tier("exact", {}) == {}
    assert check_tier("fast") == check_tier("fast", {}) == DEFAULTS
    assert check_tier("fast", INT8) == INT8


def test_tier_fast_takes_by_itself_what_the_device_has() -> None:
    assert check_tier("fast", None, "cpu") == DEFAULTS
    assert check_tier("fast", None, "cuda") == INT8
    assert check_tier("fast", DEFAULTS, "cuda") == DEFAULTS  # named, so refused where it is loaded


def test_a_setting_stands_for_a_value() -> None:
    assert setting(INT8, "ar_weights") == "int8"
    assert setting({}, "ar_weights") is None


def test_weights_are_converted_for_switches_of_the_weights() -> None:
    assert check_stored(INT8) == weight_switches(INT8) == INT8
    assert check_stored(None) == {}
    assert weight_switches({**INT8, "step_cache": "2"}) == INT8
    with pytest.raises(
        ParameterError, match="switch step_cache acts while an image is made and changes no weight"
    ):
        check_stored({"step_cache": "2"})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("guidance_interval=0.2:0.9", (0.2, 0.9)),
        ("guidance_interval=.5:.5", (0.5, 0.5)),
        ("step_cache=3", 3),
        ("solver=dpm++", "dpm++"),
    ],
)
def test_settings_are_read(text: str, value: object) -> None:
    switches = parse_switches([text])
    assert setting(switches, text.partition("=")[0]) == value
    assert parse_switches([f"{name}={value}" for name, value in switches.items()]) == switches


@pytest.mark.parametrize(
    ("name", "accepted", "texts"),
    [
        (
            "guidance_interval",
            "LOW:HIGH, noise levels from 0 to 1, as 0:0.9",
            ["", "0.5", "0.5:0.2", "-1:1", "0:1.1", "nan:1", "0:nan", "a:b", "0:0.5:1", "(0.2, 0.9)"],
        ),
        ("step_cache", "a whole number from 1 (all are made) to 10", ["0", "11", "2.5", "", "-2", "two"]),
        ("solver", "dpm++", ["euler", "DPM++", ""]),
    ],
)
def test_settings_that_cannot_be(name: str, accepted: str, texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(ParameterError) as error:
            check_switches({name: text})
        assert str(error.value) == f"switch {name} is {text!r}: accepted is {accepted}, or no such switch"


def test_a_setting_that_is_a_number_is_read_as_text() -> None:
    assert check_switches({"step_cache": 2}) == {"step_cache": "2"}  # type: ignore[dict-item]


def test_switches_as_text() -> None:
    assert parse_switches(None) == parse_switches([]) == {}
    assert parse_switches([" ar_weights = int8"]) == INT8


@pytest.mark.parametrize(
    ("tier", "switches", "message"),
    [
        ("fats", {}, "tier is 'fats': accepted is 'exact', the published mathematics, or 'fast', whose "),
        ("exact", INT8, "switch ar_weights is lossy and tier is 'exact': choose tier 'fast', or no switch"),
        ("fast", {"weights": "int8"}, "there is no switch 'weights': accepted are ar_weights"),
        ("fast", {"ar_weights": "int4"}, "switch ar_weights is 'int4': accepted is int8 or fp8, or no "),
    ],
)
def test_refusals(tier: str, switches: dict[str, str], message: str) -> None:
    with pytest.raises(ParameterError) as error:
        check_tier(tier, switches)
    assert str(error.value).startswith(message)


def test_a_switch_is_refused_on_a_device_without_its_kernel() -> None:
    check_device({}, "cuda")
    check_device(INT8, "cpu")
    check_device(INT8, "cuda")
    with pytest.raises(
        ParameterError, match=r"switch dit_weights=int8 has no kernel for device 'cuda'.*device 'cpu'"
    ):
        check_device({"dit_weights": "int8"}, "cuda")


def test_a_switch_is_refused_where_this_machines_gpus_do_not_run_its_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not only the kind of device counts: 8-bit floating point came with compute capability 8.9."""
    fp8, capability = {"dit_weights": "fp8"}, (9, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(triton_backend, "unavailable", lambda: None)
    check_device(fp8, "cuda")
    monkeypatch.setattr(triton_backend, "unavailable", lambda: "triton is not installed; pip install it")
    with pytest.raises(ParameterError, match=r"no kernel of op quantize_rows here .*: triton is not inst"):
        check_device(fp8, "cuda")
    capability = (8, 0)
    with pytest.raises(ParameterError) as error:
        check_device(fp8, "cuda")
    assert str(error.value) == (
        "switch dit_weights=fp8 has no kernel of op linear_fp8 here and would be slower than tier 'exact': "
        "NVIDIA A100 is older than compute capability 8.9; hide that GPU with CUDA_VISIBLE_DEVICES; or "
        "choose tier 'exact'"
    )


def test_a_switch_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ParameterError) as error:
        parse_switches(["step_cache=2", "solver=dpm++", "step_cache = 3"])
    assert str(error.value) == "switch step_cache is given as '2' and '3': give it once"


def test_every_switch_acts_on_the_plan_or_on_its_image() -> None:
    assert set(plan_switches(SWITCHES)) == {"ar_weights"}
    assert {*plan_switches(SWITCHES), *render_switches(SWITCHES)} == {*SWITCHES}


def test_a_switch_without_a_setting_is_refused() -> None:
    with pytest.raises(
        ParameterError, match="switch 'int8' is not of the form name=setting, as ar_weights=int8"
    ):
        parse_switches(["int8"])
