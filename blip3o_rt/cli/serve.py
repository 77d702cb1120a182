"""blip3o-rt serve: the engine behind OpenAI's images API, with a page to try it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from blip3o_rt.cli.options import MODEL, add_options, model_arguments
from blip3o_rt.errors import ParameterError

DESCRIPTION = (
    "Serve text-to-image and image editing over HTTP by OpenAI's images API, with a page to try it at /. The "
    "engine runs in a process of its own, which is started again where it ends."
)
DEFAULT_MAX_BATCH = 4


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to the result of ArgumentParser.add_subparsers."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "serve", help="serve images over HTTP by OpenAI's API", description=DESCRIPTION
    )
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    http.add_argument("--port", type=int, default=8000, help="port, 0: a free one (%(default)s)")
    http.add_argument("--keys", type=Path, metavar="FILE", help="bearer keys, one a line; without: everybody")
    http.add_argument("--admin-keys", type=Path, metavar="FILE", help="who may replace the weights (nobody)")
    http.add_argument("--data", type=Path, metavar="DIR", help="keep jobs and their images here (temporary)")
    model = parser.add_argument_group("model")
    add_options(model, *MODEL)
    model.add_argument(
        "--max-batch",
        type=int,
        metavar="N",
        default=DEFAULT_MAX_BATCH,
        help="images whose tokens are drawn together (%(default)s)",
    )
    model.add_argument(
        "--max-prompt-tokens", type=int, metavar="N", help="longest prompt, with its reference images"
    )
    limits = parser.add_argument_group("limits")
    for name, metavar, default, text in (
        ("--max-queue", "N", 64, "images that wait or run"),
        ("--max-queue-per-client", "N", 64, "images of one client that wait or run"),
        ("--max-images", "N", 10, "images of a request"),
        ("--max-steps", "N", 100, "denoising steps of an image"),
        ("--max-body", "MIB", 64, "size of a request"),
        ("--max-pixels", "MEGAPIXELS", 32, "size of an uploaded image"),
        ("--timeout", "SECONDS", 600, "how long a request may take"),
        ("--stall-timeout", "SECONDS", 300, "how long a step may take before the engine is restarted"),
        ("--drain", "SECONDS", 30, "how long requests may go on after SIGTERM"),
        ("--keep-hours", "HOURS", 168, "how long jobs and linked images are kept"),
        ("--keep-gib", "GIB", 10, "how much of them is kept"),
        ("--memory-reserve", "MIB", 256, "free memory below which requests are refused"),
    ):
        limits.add_argument(name, type=int, metavar=metavar, default=default, help=f"{text} (%(default)s)")
    ray = parser.add_argument_group("Ray")
    ray.add_argument("--ray", metavar="ADDRESS", help="serve on a cluster: auto, local or ray://HOST:PORT")
    for kind in ("planners", "renderers"):
        ray.add_argument(
            f"--{kind}", default="1", metavar="MIN[:MAX]", help=f"{kind} there are (%(default)s)"
        )
    ray.add_argument(
        "--gpus-per-replica", type=float, default=0.0, metavar="X", help="1 or a fraction (%(default)s)"
    )
    logs = parser.add_argument_group("logs")
    logs.add_argument(
        "--log-level", default="info", choices=("debug", "info", "warning", "error"), help="(%(default)s)"
    )
    logs.add_argument("--log-prompts", action="store_true", help="name prompts in the log")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    model_arguments(arguments)
    if not 0 <= arguments.port <= 65535:
        raise ParameterError(f"--port is {arguments.port}: accepted is 0 to 65535")
    for name, value in vars(arguments).items():
        if name.startswith(("max_", "keep_", "timeout", "stall_")) and isinstance(value, int) and value < 1:
            raise ParameterError(f"--{name.replace('_', '-')} is {value}: accepted is 1 or more")
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

    gpus, options = arguments.gpus_per_replica, server_options(arguments)
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    serve.run(
        application(options, Scale(*planners, gpus=gpus), Scale(*renderers, 2.0, gpus=gpus)), blocking=False
    )
    print(f"blip3o-rt: http://{arguments.host}:{arguments.port}/ (Ctrl-C ends it)", flush=True)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        ended.wait()
    except KeyboardInterrupt:
        return 0
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


def server_options(arguments: argparse.Namespace) -> Any:
    """The arguments as a server takes them."""
    from blip3o_rt.serve.client import Limits
    from blip3o_rt.serve.messages import EngineOptions
    from blip3o_rt.serve.server import ServerOptions

    return ServerOptions(
        EngineOptions(model_arguments(arguments), memory_reserve=arguments.memory_reserve * 2**20),
        host=arguments.host,
        port=arguments.port,
        data=arguments.data,
        keys=arguments.keys,
        admin_keys=arguments.admin_keys,
        limits=Limits(
            arguments.max_queue,
            arguments.max_queue_per_client,
            seconds=arguments.timeout,
            stall_seconds=arguments.stall_timeout,
        ),
        max_images=arguments.max_images,
        max_steps=arguments.max_steps,
        max_body=arguments.max_body * 2**20,
        max_pixels=arguments.max_pixels * 10**6,
        keep_seconds=3600.0 * arguments.keep_hours,
        keep_bytes=arguments.keep_gib * 2**30,
        drain_seconds=arguments.drain,
        log_prompts=arguments.log_prompts,
    )


def _say(listener: Any) -> None:
    print(f"blip3o-rt: {listener.url}/ (Ctrl-C ends it)", flush=True)
