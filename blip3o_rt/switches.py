"""The tiers, and the named switches of the fast one: what each changes, and the settings it takes.

Tier "exact" computes the published mathematics and takes no switch. Tier "fast" turns on the switches it is
given, or every one where none is given; a report names those that were on.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from blip3o_rt.errors import ParameterError

EXACT, FAST = "exact", "fast"
AR_WEIGHTS = "ar_weights"  # the decoder's matrices and its head: 8 bits per element, a scale per row
INT8 = "int8"

SETTINGS: Mapping[str, tuple[str, ...]] = MappingProxyType({AR_WEIGHTS: (INT8,)})
"""Settings of every switch; the first is what tier "fast" takes where no switch is named."""

NO_SWITCHES: Mapping[str, str] = MappingProxyType({})


def check_switches(switches: Mapping[str, str] | None) -> dict[str, str]:
    """The switches by name, in one order. Raises ParameterError for an unknown one or an unknown setting."""
    given = dict(switches or {})
    for name, setting in given.items():
        if name not in SETTINGS:
            raise ParameterError(f"there is no switch {name!r}: accepted are {', '.join(SETTINGS)}")
        if setting not in SETTINGS[name]:
            accepted = ", ".join(SETTINGS[name])
            raise ParameterError(f"switch {name} is {setting!r}: accepted is {accepted}, or no such switch")
    return {name: given[name] for name in SETTINGS if name in given}


def check_tier(tier: str, switches: Mapping[str, str] | None = None) -> dict[str, str]:
    """The switches that a tier turns on. Raises ParameterError where tier and switches do not go together."""
    found = check_switches(switches)
    if tier == EXACT:
        if found:
            raise ParameterError(
                f"switch {next(iter(found))} is lossy and tier is 'exact': choose tier 'fast', or no switch"
            )
        return {}
    if tier != FAST:
        raise ParameterError(
            f"tier is {tier!r}: accepted is 'exact', the published mathematics, or 'fast', whose switches "
            f"are {', '.join(SETTINGS)}"
        )
    return found or {name: settings[0] for name, settings in SETTINGS.items()}


def check_device(switches: Mapping[str, str], device_type: str) -> None:
    """Raise ParameterError where a switch gains nothing on a device: its op has no kernel there."""
    if AR_WEIGHTS in switches and device_type != "cpu":
        raise ParameterError(
            f"switch {AR_WEIGHTS} has no kernel for device {device_type!r} and would be slower there than "
            f"tier 'exact': accepted is device 'cpu', or tier 'exact'"
        )


def parse_switches(texts: list[str] | None) -> dict[str, str]:
    """Switches from "name=setting" texts. Raises ParameterError."""
    found: dict[str, str] = {}
    for text in texts or []:
        name, equals, setting = text.partition("=")
        if not equals:
            raise ParameterError(f"switch {text!r} is not of the form name=setting, as ar_weights=int8")
        found[name.strip()] = setting.strip()
    return check_switches(found)
