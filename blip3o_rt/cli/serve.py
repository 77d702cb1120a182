"""blip3o-rt serve: the engine behind OpenAI's images API, with a page to try it."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Any

from blip3o_rt.cli import options
from blip3o_rt.cli.options import add_options, count, flag, number, option, pathname
from blip3o_rt.errors import ParameterError
from blip3o_rt.params import named

SUMMARY = "serve images over HTTP by OpenAI's API"
DESCRIPTION = (
    "Serve text-to-image and image editing over HTTP by OpenAI's images API, with a page to try it at /. The "
    "engine runs in a process of its own, which is started again where it ends."
)
DEFAULT_MAX_BATCH = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    add_options(
        parser.add_argument_group("HTTP"),
        option("--host", default="127.0.0.1", help="address to listen on (%(default)s)"),
        number("--port", "PORT", "port, 0: a free one", 8000),
        pathname("--keys", "FILE", "bearer keys, one a line; without: everybody"),
        pathname("--admin-keys", "FILE", "who may replace the weights (nobody)"),
        pathname("--data", "DIR", "keep jobs and their images here (temporary)"),
    )
    add_options(
        parser.add_argument_group("model"),
        *options.MODEL,
        number("--max-batch", "N", "images whose tokens are drawn together", DEFAULT_MAX_BATCH),
        options.MAX_PROMPT_TOKENS,
    )
    add_options(
        parser.add_argument_group("limits"),
        count("--max-queue", "N", "images that wait or run", 64),
        count("--max-queue-per-client", "N", "images of one client that wait or run", 64),
        count("--max-images", "N", "images of a request", 10),
        count("--max-steps", "N", "denoising steps of an image", 100),
        count("--max-body", "MIB", "size of a request", 64),
        count("--max-pixels", "MEGAPIXELS", "size of an uploaded image", 32),
        count("--timeout", "SECONDS", "how long a request may take", 600),
        count("--stall-timeout", "SECONDS", "how long a step may take before the engine is restarted", 300),
        number("--drain", "SECONDS", "how long requests may go on after SIGTERM", 30),
        count("--keep-hours", "HOURS", "how long jobs and linked images are kept", 168),
        count("--keep-gib", "GIB", "how much of them is kept", 10),
        number("--memory-reserve", "MIB", "free memory below which requests are refused", 256),
    )
    add_options(
        parser.add_argument_group("Ray"),
        option("--ray", metavar="ADDRESS", help="serve on a cluster: auto, local or ray://HOST:PORT"),
        option("--planners", default="1", metavar="MIN[:MAX]", help="planners there are (%(default)s)"),
        option("--renderers", default="1", metavar="MIN[:MAX]", help="renderers there are (%(default)s)"),
        number("--gpus-per-replica", "X", "1 or a fraction", 0.0, float),
    )
    levels = ("debug", "info", "warning", "error")
    add_options(
        parser.add_argument_group("logs"),
        option("--log-level", default="info", choices=levels, help="(%(default)s)"),
        flag("--log-prompts", "name prompts in the log"),
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    options.model_arguments(arguments)
    if not 0 <= arguments.port <= 65535:
        raise ParameterError(f"--port is {arguments.port}: accepted is 0 to 65535")
    try:
        import asyncio

        from blip3o_rt.serve.log import log_to_stderr
        from blip3o_rt.serve.server import serve
    except ModuleNotFoundError as error:
        raise ParameterError(f"serve needs {error.name}: pip install 'blip3o_rt[serve]'") from None

    log_to_stderr(arguments.log_level)
    if arguments.ray is not None:
        return serve_on_ray(arguments)
    asyncio.run(serve(server_options(arguments), _say))
    return 0


def serve_on_ray(arguments: argparse.Namespace) -> int:
    """Serve on a cluster until SIGTERM or SIGINT; returns the exit code."""
    import signal
    import threading

    from blip3o_rt.scale.cluster import connected

    planners, renderers = replicas("--planners", arguments), replicas("--renderers", arguments)
    connected(arguments.ray)
    from ray import serve

    from blip3o_rt.scale.ray_serve import Scale, application

    gpus, served = arguments.gpus_per_replica, server_options(arguments)
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    serve.run(
        application(served, Scale(*planners, gpus=gpus), Scale(*renderers, 2.0, gpus=gpus)), blocking=False
    )
    print(f"blip3o-rt: http://{arguments.host}:{arguments.port}/ (Ctrl-C ends it)", flush=True)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        with suppress(KeyboardInterrupt):
            ended.wait()
    finally:
        serve.shutdown()
    return 0


def replicas(option: str, arguments: argparse.Namespace) -> tuple[int, int]:
    """Least and most replicas of an option. Raises ParameterError."""
    text = getattr(arguments, option[2:])
    least, _, most = text.partition(":")
    try:
        found = int(least), int(most or least)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise ParameterError(f"{option} is {text}: accepted is a number from 1, or MIN:MAX")
    return found


def server_options(given: argparse.Namespace) -> Any:
    """The arguments as a server takes them."""
    from blip3o_rt.serve.client import Limits
    from blip3o_rt.serve.messages import EngineOptions
    from blip3o_rt.serve.server import ServerOptions

    as_given = ("host", "port", "data", "keys", "admin_keys", "max_images", "max_steps", "log_prompts")
    admitted = (given.max_queue, given.max_queue_per_client)
    return ServerOptions(
        EngineOptions(options.model_arguments(given), memory_reserve=given.memory_reserve * 2**20),
        limits=Limits(*admitted, seconds=given.timeout, stall_seconds=given.stall_timeout),
        max_body=given.max_body * 2**20,
        max_pixels=given.max_pixels * 10**6,
        keep_seconds=3600.0 * given.keep_hours,
        keep_bytes=given.keep_gib * 2**30,
        drain_seconds=given.drain,
        **named(vars(given), as_given),
    )


def _say(listener: Any) -> None:
    print(f"blip3o-rt: {listener.url}/ (Ctrl-C ends it)", flush=True)
