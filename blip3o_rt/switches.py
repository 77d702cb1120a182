"""The tiers, and the named switches of the fast one: what each gives up, and the settings it takes.

Tier "exact" computes the published mathematics and takes no switch. Tier "fast" turns on the switches it is
given, or where none is given those whose measured cost is small; a report names those that were on. A switch
is one entry of SWITCHES and a setting is text, as in "ar_weights=int8", which `setting` reads where it acts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from blip3o_rt.errors import ParameterError, shown

EXACT, FAST = "exact", "fast"
AR_WEIGHTS = "ar_weights"
DIT_WEIGHTS = "dit_weights"
GUIDANCE_INTERVAL = "guidance_interval"
STEP_CACHE = "step_cache"
SOLVER = "solver"
INT8 = "int8"
FP8 = "fp8"
DPM = "dpm++"
VAE_TILES = "vae_tiles"

MAX_STEP_CACHE = 10
MAX_VAE_TILES = 16

T = TypeVar("T")

NO_SWITCHES: Mapping[str, str] = {}


@dataclass(frozen=True)
class Switch:
    """One switch of the fast tier.

    accepted: its settings in words, for the errors. parse: what a setting stands for; raises ValueError where
    it is none. devices: types of device by setting, where not every device has it. kernels: per setting,
    {op: implementation} that must be available; otherwise the switch is refused. weights: whether weights are
    made for it, at load or when converted; any other acts while an image is made. default: what tier "fast"
    takes where no switch is named, None to leave it off.
    """

    accepted: str
    parse: Callable[[str], Any]
    devices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kernels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    weights: bool = False
    default: str | None = None

    def runs_on(self, setting: str, device_type: str) -> bool:
        """Whether a type of device has a setting."""
        return device_type in self.devices.get(setting, (device_type,))


def one_of(*names: str) -> Callable[[str], str]:
    """Settings that are names, and stand for themselves."""

    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return parse


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Settings that are whole numbers from low to high."""

    def parse(text: str) -> int:
        number = int(text)
        if not low <= number <= high:
            raise ValueError(text)
        return number

    return parse


def interval(text: str) -> tuple[float, float]:
    """A setting LOW:HIGH of two noise levels, 0 <= LOW <= HIGH <= 1."""
    low, high = map(float, text.split(":"))
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(text)
    return low, high


SWITCHES: Mapping[str, Switch] = {
    # The decoder's matrices and its head are kept in 8 bits, with a scale per row.
    AR_WEIGHTS: Switch(
        accepted="int8 or fp8",
        parse=one_of(INT8, FP8),
        devices={INT8: ("cpu", "cuda"), FP8: ("cuda",)},
        kernels={FP8: {"row_linear_w8": "cuda"}},
        weights=True,
        default=INT8,
    ),
    # The transformer's matrices and the activations they are multiplied with take 8 bits, a scale per row.
    DIT_WEIGHTS: Switch(
        accepted="int8 or fp8",
        parse=one_of(INT8, FP8),
        devices={INT8: ("cpu",), FP8: ("cuda",)},
        kernels={FP8: {"linear_fp8": "scaled_mm", "quantize_rows": "triton"}},
        weights=True,
        default=INT8,
    ),
    # No guidance, and half the work of a step, where the noise level is outside of an interval.
    GUIDANCE_INTERVAL: Switch(
        accepted="LOW:HIGH, noise levels from 0 to 1, as 0:0.9",
        parse=interval,
    ),
    # The predictions of all steps but every Nth and the last are extrapolated.
    STEP_CACHE: Switch(
        accepted=f"a whole number from 1 (all are made) to {MAX_STEP_CACHE}",
        parse=whole_number(1, MAX_STEP_CACHE),
    ),
    # Steps of DPM-Solver++ (2M), of which fewer are needed than of Euler's.
    SOLVER: Switch(
        accepted=DPM,
        parse=one_of(DPM),
    ),
    # Less memory in more time: the autoencoder's fine stages go in that many tiles along a side.
    VAE_TILES: Switch(
        accepted=f"a whole number from 1 (the whole image) to {MAX_VAE_TILES}",
        parse=whole_number(1, MAX_VAE_TILES),
    ),
}


def check_switches(switches: Mapping[str, str] | None) -> dict[str, str]:
    """The switches by name, in one order. Raises ParameterError for an unknown one or an unknown setting."""
    if not isinstance(switches, Mapping | None):
        raise ParameterError(f"switches is {shown(switches)}: accepted is a mapping of names to settings")
    given = switches or {}
    for name, value in given.items():
        if name not in SWITCHES:
            raise ParameterError(f"there is no switch {shown(name)}: accepted are {', '.join(SWITCHES)}")
        try:
            SWITCHES[name].parse(str(value))
        except Exception:  # ValueError; a caller's object raises anything
            accepted = SWITCHES[name].accepted
            raise ParameterError(
                f"switch {name} is {shown(value)}: accepted is {accepted}, or no such switch"
            ) from None
    return {name: str(given[name]) for name in SWITCHES if name in given}


def setting(switches: Mapping[str, str], name: str) -> Any:
    """What the setting of a switch stands for, None where the switch is off."""
    return SWITCHES[name].parse(switches[name]) if name in switches else None


def check_stored(switches: Mapping[str, str] | None) -> dict[str, str]:
    """The switches that weights are converted for. Raises ParameterError for one that is of no weight."""
    found = check_switches(switches)
    for name in found:
        if not SWITCHES[name].weights:
            raise ParameterError(
                f"switch {name} acts while an image is made and changes no weight: give it where images "
                f"are made; accepted for a conversion are {', '.join(weight_switches(SWITCHES))}"
            )
    return found


def weight_switches(switches: Mapping[str, T]) -> dict[str, T]:
    """Those of the switches, by name, that weights are made for."""
    return {name: value for name, value in switches.items() if SWITCHES[name].weights}


def plan_switches(switches: Mapping[str, T]) -> dict[str, T]:
    """Those of the switches, by name, that act while a plan is made."""
    return {name: value for name, value in switches.items() if name.startswith("ar_")}


def render_switches(switches: Mapping[str, T]) -> dict[str, T]:
    """Those of the switches, by name, that act while a plan is rendered."""
    return {name: value for name, value in switches.items() if name not in plan_switches(switches)}


def check_tier(
    tier: str, switches: Mapping[str, str] | None = None, device_type: str | None = None
) -> dict[str, str]:
    """The switches that a tier turns on, on a type of device where that is known.

    Raises ParameterError where tier and switches do not go together.
    """
    found = check_switches(switches)
    if not isinstance(tier, str) or tier not in (EXACT, FAST):
        raise ParameterError(
            f"tier is {shown(tier)}: accepted is 'exact', the published mathematics, or 'fast', whose "
            f"switches are {', '.join(SWITCHES)}"
        )
    if tier == EXACT:
        if found:
            raise ParameterError(
                f"switch {next(iter(found))} is lossy and tier is 'exact': choose tier 'fast', or no switch"
            )
        return {}
    return found or {
        name: switch.default
        for name, switch in SWITCHES.items()
        if switch.default and (device_type is None or switch.runs_on(switch.default, device_type))
    }


def check_device(switches: Mapping[str, str], device_type: str) -> None:
    """Raise ParameterError where a switch gains nothing on a device of this machine: no kernel runs there."""
    from blip3o_rt import ops  # with torch, which nothing else here needs

    for name, text in switches.items():
        if not SWITCHES[name].runs_on(text, device_type):
            having = " or ".join(map(repr, SWITCHES[name].devices[text]))
            raise ParameterError(
                f"switch {name}={text} has no kernel for device {device_type!r} and would be slower there "
                f"than tier 'exact': accepted is device {having}, or tier 'exact'"
            )
        for op_name, implementation in SWITCHES[name].kernels.get(text, {}).items():
            reason = ops.all_ops()[op_name].named(implementation).available()
            if reason is not None:
                raise ParameterError(
                    f"switch {name}={text} has no kernel of op {op_name} here and would be slower than tier "
                    f"'exact': {reason}; or choose tier 'exact'"
                )


def parse_switches(texts: list[str] | None) -> dict[str, str]:
    """Switches from "name=setting" texts. Raises ParameterError."""
    found: dict[str, str] = {}
    for text in texts or []:
        name, equals, chosen = text.partition("=")
        if not equals:
            raise ParameterError(f"switch {text!r} is not of the form name=setting, as ar_weights=int8")
        name, chosen = name.strip(), chosen.strip()
        if name in found:
            raise ParameterError(f"switch {name} is given as {found[name]!r} and {chosen!r}: give it once")
        found[name] = chosen
    return check_switches(found)
