"""blip3o-rt bench serve: load on a server of OpenAI's images API, ours or any other."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from blip3o_rt.cli.outputs import make_folder
from blip3o_rt.errors import ParameterError

SUMMARY = "what clients of an images server see: latency, queue, first preview, images/s"
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


def add_parser(commands: Any) -> None:
    """Add the command's parser to those of bench."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve", help=SUMMARY, description=f"Measure {SUMMARY}."
    )
    where = parser.add_argument_group("server")
    where.add_argument("--url", help="a server's address; without: one of ours is started")
    where.add_argument("--key", help="bearer key")
    where.add_argument("--model", type=Path, metavar="DIR", help="checkpoint of the server that is started")
    where.add_argument(
        "--max-batch", type=int, default=4, metavar="N", help="of the server that is started (%(default)s)"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--requests", type=int, default=32, metavar="N", help="requests in all (%(default)s)")
    load.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="closed loop: in flight (%(default)s)"
    )
    load.add_argument(
        "--rate", type=float, metavar="R", help="open loop: requests a second; inf: all at once"
    )
    load.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line (eight of shapes)")
    load.add_argument("--steps", type=int, help="denoising steps (the server's)")
    load.add_argument("--size", help="size of the images, for servers that need it")
    load.add_argument("--previews", type=int, default=1, help="partial images, 0: no stream (%(default)s)")
    load.add_argument("--no-seed", action="store_true", help="send no seed, for servers that know none")
    load.add_argument("--warm-up", type=int, default=8, metavar="N", help="requests before (%(default)s)")
    load.add_argument(
        "--rounds", type=int, metavar="N", help="how often the load is sent (5 with --one-call, else 1)"
    )
    load.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="of a request (%(default)g)"
    )
    result = parser.add_argument_group("result")
    result.add_argument(
        "--deadline", type=float, metavar="SECONDS", help="say which share was done within it"
    )
    result.add_argument(
        "--one-call", action="store_true", help="in turns, draw the same images in one call of `generate`"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the record (out/serve-DATE-TIME)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the record; 0 done, 1 where a request failed."""
    numbers = (arguments.requests, arguments.concurrency, arguments.rate, arguments.rounds)
    if any(number is not None and number <= 0 for number in numbers):
        raise ParameterError("requests, concurrency, rate and rounds: accepted is a number above 0")
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

    def load_on(url: str) -> Load:
        return Load(
            url,
            prompts,
            arguments.requests,
            None if arguments.rate is not None else arguments.concurrency,
            arguments.rate or 1.0,
            body,
            None if arguments.no_seed else 0,
            arguments.previews,
            arguments.timeout,
            arguments.key,
        )

    out = arguments.out or Path("out") / f"serve-{datetime.now():%Y%m%d-%H%M%S}"
    make_folder("--out", out)
    with ExitStack() as stack:
        call = None
        if arguments.url is not None:
            url = arguments.url.rstrip("/")
        else:
            model = {} if arguments.model is None else {"path": str(arguments.model)}
            options = {
                "--max-batch": arguments.max_batch,
                "--max-queue": max(64, arguments.requests),
                "--max-queue-per-client": max(64, arguments.requests),
                **({"--model": arguments.model} if model else {}),
            }
            url = stack.enter_context(local_server([str(word) for pair in options.items() for word in pair]))
            if arguments.one_call:
                n = arguments.requests // len(prompts)
                call = one_call({**model, "max_batch": arguments.max_batch}, prompts, n, 0, body)
        load = load_on(url)
        samples, calls = measure(load, arguments.warm_up, arguments.rounds or (5 if call else 1), call)
    found = record.summary(load, samples, arguments.deadline, calls)
    print(record.table(found))
    for path in record.write(out, found, samples):
        print(path)
    return 1 if found["failed"] else 0
