"""Options that count something refuse anything below 1, by one line that names the option."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from blip3o_rt.cli.commands import Parser, build_parser
from blip3o_rt.cli.options import Count
from blip3o_rt.errors import ParameterError

COUNTS = {
    "batch": {"--shard-rows", "--workers"},
    "bench serve": {"--requests", "--concurrency", "--rounds"},
    "bench windows": {"--rounds"},
    "serve": {
        *("--max-queue", "--max-queue-per-client", "--max-images", "--max-steps", "--max-body"),
        *("--max-pixels", "--timeout", "--stall-timeout", "--keep-hours", "--keep-gib"),
    },
    "validate": {"--tokens", "--latent", "--steps"},
}
NEEDED = {"batch": ["rows.txt", "--out", "out"]}


def parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """A parser and those of its commands, by their names."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, below in action.choices.items():
                yield from parsers(below, f"{name} {command}".strip())


@pytest.fixture(scope="module")
def parser() -> Parser:
    return build_parser()


def test_these_options_are_counts(parser: Parser) -> None:
    found = {
        name: {action.option_strings[0] for action in below._actions if isinstance(action, Count)}
        for name, below in parsers(parser)
    }
    assert {name: options for name, options in found.items() if options} == COUNTS


@pytest.mark.parametrize(("command", "option"), [(name, o) for name in COUNTS for o in sorted(COUNTS[name])])
def test_a_count_is_a_whole_number_from_1(parser: Parser, command: str, option: str) -> None:
    words = [*command.split(), *NEEDED.get(command, [])]
    for value in ("0", "-3"):
        with pytest.raises(ParameterError) as error:
            parser.parse_args([*words, option, value])
        assert str(error.value) == f"{option} is {value}: accepted is a whole number from 1"
    given = parser.parse_args([*words, option, "1"])
    assert getattr(given, option[2:].replace("-", "_")) == 1
