"""blip3o-rt bench serve: load on a server of OpenAI's images API, ours or any other."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from blip3o_rt.cli.options import add_options, count, flag, number, option, pathname
from blip3o_rt.cli.outputs import make_folder
from blip3o_rt.errors import ParameterError
from blip3o_rt.params import named

SUMMARY = "what clients of an images server see: latency, queue, first preview, images/s"
DESCRIPTION = f"Measure {SUMMARY}."
PROMPTS = (
    "a red circle on a blue background",
    "a green square",
    "a yellow triangle on a black background",
    "a small white circle",
    "a large blue square on a red background",
    "a purple triangle",
    "an orange circle on a green background",
    "a black square on a white background",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    add_options(
        parser.add_argument_group("server"),
        option("--url", help="a server's address; without: one of ours is started"),
        option("--key", help="bearer key"),
        pathname("--model", "DIR", "checkpoint of the server that is started"),
        number("--max-batch", "N", "of the server that is started", 4),
    )
    add_options(
        parser.add_argument_group("load"),
        count("--requests", "N", "requests in all", 32),
        count("--concurrency", "N", "closed loop: in flight", 8),
        number("--rate", "R", "open loop: requests a second; inf: all at once", kind=float),
        pathname("--prompts", "FILE", "a prompt a line (eight of shapes)"),
        number("--steps", "N", "denoising steps (the server's)"),
        option("--size", help="size of the images, for servers that need it"),
        number("--previews", "N", "partial images, 0: no stream", 1),
        flag("--no-seed", "send no seed, for servers that know none"),
        number("--warm-up", "N", "requests before", 8),
        count("--rounds", "N", "how often the load is sent (5 with --one-call, else 1)"),
        number("--timeout", "SECONDS", "of a request", 600.0, float),
    )
    add_options(
        parser.add_argument_group("result"),
        number("--deadline", "SECONDS", "say which share was done within it", kind=float),
        flag("--one-call", "in turns, draw the same images in one call of `generate`"),
    )
    add_options(parser, pathname("--out", "DIR", "folder of the record (out/serve-DATE-TIME)"))


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the record; 0 done, 1 where a request failed."""
    if arguments.rate is not None and not arguments.rate > 0:
        raise ParameterError(f"--rate is {arguments.rate:g}: accepted is a number above 0")
    prompts: tuple[str, ...] = PROMPTS
    if arguments.prompts is not None:
        prompts = tuple(filter(None, arguments.prompts.read_text(encoding="utf-8").splitlines()))
    prompts = prompts[: arguments.requests]
    if not prompts:
        raise ParameterError(f"{arguments.prompts} has no prompts: accepted is a prompt a line")
    if arguments.one_call and (arguments.url is not None or arguments.no_seed):
        raise ParameterError("--one-call needs seeds, and a server of ours: leave --url and --no-seed out")
    if arguments.one_call and arguments.requests % len(prompts):
        raise ParameterError(f"--one-call: accepted is a multiple of {len(prompts)} requests, one a prompt")
    try:
        from blip3o_rt.measure.serve import record
        from blip3o_rt.measure.serve.load import Load
        from blip3o_rt.measure.serve.subject import local_server, measure, one_call
    except ModuleNotFoundError as error:
        raise ParameterError(f"bench serve needs {error.name}: pip install 'blip3o_rt[bench]'") from None

    body = {name: value for name in ("steps", "size") if (value := getattr(arguments, name)) is not None}
    out = arguments.out or Path("out") / f"serve-{datetime.now():%Y%m%d-%H%M%S}"
    make_folder("--out", out)
    with ExitStack() as stack:
        call = None
        if arguments.url is not None:
            url = arguments.url.rstrip("/")
        else:
            model = {} if arguments.model is None else {"path": str(arguments.model)}
            queue = max(64, arguments.requests)
            words = ["--max-batch", arguments.max_batch, "--max-queue", queue]
            words += ["--max-queue-per-client", queue, *(["--model", arguments.model] if model else [])]
            url = stack.enter_context(local_server(list(map(str, words))))
            if arguments.one_call:
                n = arguments.requests // len(prompts)
                call = one_call({**model, "max_batch": arguments.max_batch}, prompts, n, 0, body)
        load = Load(
            url,
            prompts,
            concurrency=None if arguments.rate is not None else arguments.concurrency,
            rate=arguments.rate or 1.0,
            body=body,
            seed=None if arguments.no_seed else 0,
            **named(vars(arguments), ("requests", "previews", "timeout", "key")),
        )
        samples, calls = measure(load, arguments.warm_up, arguments.rounds or (5 if call else 1), call)
    found = record.summary(load, samples, arguments.deadline, calls)
    print(record.table(found))
    for path in record.write(out, found, samples):
        print(path)
    return 1 if found["failed"] else 0
