"""The service on a Ray cluster: one HTTP ingress, planner replicas and renderer replicas that scale apart.

A planner replica runs the first stage of many requests in one batch, a renderer replica the second stage of
one image at a time. A plan goes from one to the other through Ray's object store. The seed decides the image,
so a request whose replica is lost is drawn again by others, with the same pixels.

    serve run blip3o_rt.scale.ray_serve:app device=cuda max_renderers=8
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from blip3o_rt.errors import Blip3oError, ParameterError
from blip3o_rt.params import SamplingParams
from blip3o_rt.pipeline import ImageRequest, Pipeline
from blip3o_rt.result import Plan
from blip3o_rt.serve.client import COMPLETED, EngineClient, Handle, RequestError
from blip3o_rt.serve.messages import (
    Accepted,
    EngineOptions,
    Failed,
    Finished,
    ModelInfo,
    RawImage,
    Started,
    Submit,
)
from blip3o_rt.serve.server import Server, ServerOptions
from blip3o_rt.serve.stages import EMBEDDED, Stages

LOST = (RayError, RayServeException)  # what a handle raises for a replica that is not there
ATTEMPTS = 10  # of one image, whose replicas may be lost
PAUSE_SECONDS = 0.5  # before the next one
BATCH_WAIT_SECONDS = 0.02  # for further requests of a batch


@dataclass(frozen=True)
class Scale:
    """How many replicas of a kind there are, and what each takes.

    Attributes:
        least: Replicas that are always there.
        most: Replicas at most.
        requests: In flight for a replica, above which another one is started.
        gpus: Of a replica; a fraction shares a GPU.
        cpus: Of a replica.
        grow_seconds: How long there must be too many requests before a replica is started.
        shrink_seconds: How long there must be too few before one is ended.
    """

    least: int = 1
    most: int = 1
    requests: float = 4.0
    gpus: float = 0.0
    cpus: float = 1.0
    grow_seconds: float = 30.0
    shrink_seconds: float = 600.0

    def options(self, in_flight: int) -> dict[str, Any]:
        """Options of a deployment that takes so many requests a replica at once."""
        if not 1 <= self.least <= self.most:
            raise ParameterError(f"replicas are {self.least} to {self.most}: accepted is 1 or more, in order")
        return {
            "max_ongoing_requests": in_flight,
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
            "autoscaling_config": {
                "min_replicas": self.least,
                "max_replicas": self.most,
                "initial_replicas": self.least,
                "target_ongoing_requests": self.requests,
                "upscale_delay_s": self.grow_seconds,
                "downscale_delay_s": self.shrink_seconds,
            },
        }


@dataclass(frozen=True)
class Planned:
    """A plan in Ray's object store, or the kind and the line of its error.

    The reference is in a list, so that Ray does not resolve it on the way: where its planner is lost, the
    renderer says so.
    """

    plan: list[Any] = field(default_factory=list)
    seconds: Mapping[str, float] = field(default_factory=dict)
    weights: str = ""
    error: tuple[str, str] | None = None


@dataclass(frozen=True)
class Drawn:
    """An image, or the kind and line of its error; neither where its plan was lost or of other weights."""

    image: RawImage | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: tuple[str, str] | None = None


class Planner:
    """A replica of the first stage."""

    def __init__(self, model: Mapping[str, Any], max_batch: int) -> None:
        self._model = dict(model)
        self._pipeline = Pipeline.load(**model)
        self._stages = Stages(self._pipeline, _name(model))
        self._weights = self._pipeline.weights_checksum()
        self.plan.set_max_batch_size(max_batch)

    async def info(self) -> tuple[ModelInfo, dict[str, Any]]:
        """What the model is and takes, and the arguments that it was loaded with."""
        return self._stages.info, self._model

    async def check(self, submit: Submit) -> int | tuple[str, str]:
        """Tokens of a request's prompt, or the kind and the line of why it cannot be drawn."""
        try:
            return await asyncio.to_thread(self._stages.check, submit)
        except Exception as error:
            return self._stages.failure(error)

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=BATCH_WAIT_SECONDS)
    async def plan(self, tasks: list[tuple[Submit, int]]) -> list[Planned]:
        """The plans of requests, each with a seed of its own."""
        return await asyncio.to_thread(self._plan, tasks)

    def _plan(self, tasks: list[tuple[Submit, int]]) -> list[Planned]:
        begin, pipeline = time.monotonic(), self._pipeline
        found: dict[int, Planned] = {}
        asked = {}
        with pipeline._run() as run:
            for number, (submit, seed) in enumerate(tasks):
                references = [image.pil() for image in submit.references]
                request = ImageRequest(submit.prompt, seed, references or None)
                try:
                    sampling = SamplingParams(**submit.sampling)
                    asked[number] = pipeline._plan_request(request, sampling, run)
                except Exception as error:
                    found[number] = Planned(error=self._stages.failure(error))
            encoded = time.monotonic()
            for number, plan in zip(asked, pipeline._planner.plans([*asked.values()], run), strict=True):
                seconds = {"reference": encoded - begin, "tokens": time.monotonic() - encoded}
                failure = None if plan.error is None else self._stages.failure(plan.error)
                found[number] = Planned([ray.put(plan)], seconds, self._weights, failure)
        return [found[number] for number in range(len(tasks))]


class Renderer:
    """A replica of the second stage."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._pipeline = Pipeline.load(**model)
        self._weights = self._pipeline.weights_checksum()

    async def render(self, planned: Planned, diffusion: Mapping[str, Any]) -> Drawn:
        """The image of a plan."""
        return await asyncio.to_thread(self._render, planned, diffusion)

    def _render(self, planned: Planned, diffusion: Mapping[str, Any]) -> Drawn:
        if planned.error is not None:
            return Drawn(error=planned.error)
        if planned.weights != self._weights:
            return Drawn()
        begin = time.monotonic()
        try:
            plan: Plan = ray.get(planned.plan[0])
            image = self._pipeline.render(plan, **diffusion)
        except RayError:
            return Drawn()
        except Exception as error:
            return Drawn(error=Stages.failure(error))
        seconds = {**planned.seconds, "denoise": time.monotonic() - begin}
        return Drawn(RawImage.of(image), seconds)  # type: ignore[arg-type]


class ClusterClient(EngineClient):
    """Takes requests as an EngineClient does, and has replicas draw them; there are no previews."""

    def __init__(self, planners: Any, renderers: Any, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._planners, self._renderers = planners, renderers
        self._drawing: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Ask the first planner what the model is."""
        self._loop = asyncio.get_running_loop()
        self._tasks = [self._loop.create_task(self._greet())]

    @property
    def status(self) -> str:
        """ "ok" or "loading"."""
        return "ok" if self._ready.is_set() else "loading"

    async def _greet(self) -> None:
        """Learn what the model is; while it is replaced that of any planner, at last of a new one."""
        model = None
        while model != dict(self.options.model):
            try:
                info, model = await self._planners.info.remote()
            except LOST:
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            if self._ready.is_set():
                self.info = info
            else:
                self._became_ready(info)
            await asyncio.sleep(PAUSE_SECONDS)

    def _give(self, handle: Handle) -> None:
        task = self._loop.create_task(self._serve(handle))
        self._drawing[handle.submit.id] = task
        task.add_done_callback(lambda _: self._drawing.pop(handle.submit.id, None))
        handle.in_engine = True

    def _end(self, handle: Handle, state: str, error: RequestError | None = None) -> None:
        super()._end(handle, state, error)
        task = self._drawing.get(handle.submit.id)
        if task is not None and state != COMPLETED:
            task.cancel()

    async def _serve(self, handle: Handle) -> None:
        submit = handle.submit
        try:
            checked = await self._patiently(lambda: self._planners.check.remote(submit))
            if not isinstance(checked, int):
                self._event(Failed(submit.id, *checked))
                return
            self._event(Accepted(submit.id, checked))
            await asyncio.gather(*(self._draw(submit, index, seed) for index, seed in handle.missing))
        except Blip3oError as error:
            self._event(Failed(submit.id, "EngineLost", str(error)))

    async def _draw(self, submit: Submit, index: int, seed: int) -> None:
        """One image of a request. Raises Blip3oError where no replica could draw it."""
        self._event(Started(submit.id, index))
        diffusion = dict(submit.diffusion)

        async def ask() -> Any:
            planned = await self._planners.plan.remote((submit, seed))
            return await self._renderers.render.remote(planned, diffusion)

        drawn: Drawn = await self._patiently(ask)
        if drawn.error is not None:
            self._event(Failed(submit.id, *drawn.error))
        elif drawn.image is not None:
            self._event(Finished(submit.id, index, drawn.image, drawn.seconds, 1.0))

    async def _patiently(self, ask: Any) -> Any:
        """What replicas answer.

        Where one is lost, others are asked; while weights are being replaced, until planner and renderer have
        the same.
        """
        losses = 0
        while losses < ATTEMPTS:
            try:
                found = await ask()
            except LOST:
                losses += 1
                self.restarts += 1
            else:
                if found != Drawn():
                    return found
            await asyncio.sleep(PAUSE_SECONDS)
        raise Blip3oError(f"{losses} replicas were lost while they drew the request: try again later")


class Ingress:
    """The HTTP surface of `blip3o-rt serve`, in front of the replicas."""

    def __init__(self, options: ServerOptions, planners: Any, renderers: Any) -> None:
        self._server = Server(options, partial(ClusterClient, planners, renderers))

    def __serve_build_asgi_app__(self) -> Any:
        return ServerApp(self._server)


class ServerApp:
    """A server's ASGI application, which runs the server from startup to shutdown."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self._server.app(scope, receive, send)
            return
        async with AsyncExitStack() as running:
            async for event in _lifespan(receive):
                if event == "startup":
                    await running.enter_async_context(self._server.running())
                    await self._server.client.wait_ready()
                else:
                    await running.aclose()
                await send({"type": f"lifespan.{event}.complete"})


async def _lifespan(receive: Any) -> AsyncIterator[str]:
    """ "startup", then "shutdown"."""
    for _ in range(2):
        yield (await receive())["type"].removeprefix("lifespan.")


def _name(model: Mapping[str, Any]) -> str:
    return Path(model["path"]).resolve().name if model.get("path") else EMBEDDED


def application(options: ServerOptions, planners: Scale, renderers: Scale) -> Any:
    """The application for serve.run: an ingress before planner and renderer replicas.

    Args:
        options: Of the server; `engine.model` says what the replicas load.
        planners: How many planner replicas there are.
        renderers: How many renderer replicas there are.
    """
    model = dict(options.engine.model)
    max_batch = int(model.get("max_batch", 4))
    planner = serve.deployment(Planner, name="planner", **planners.options(4 * max_batch))
    renderer = serve.deployment(Renderer, name="renderer", **renderers.options(2))
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=options.limits.seconds,  # its requests end before it is replaced
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(options, planner.bind(model, max_batch), renderer.bind(model))


def app(arguments: dict[str, str]) -> Any:
    """The application of `serve run` and of a configuration file (blip3o_rt/scale/serve.yaml).

    Args:
        arguments: Those of Pipeline.load by name; and of both kinds of replicas min_planners, max_planners,
            planner_requests, planner_gpus, planner_cpus, planner_grow_seconds, planner_shrink_seconds, and
            the same of renderers.
    """
    left = dict(arguments)

    def scale(kind: str) -> Scale:
        return Scale(
            int(left.pop(f"min_{kind}s", 1)),
            int(left.pop(f"max_{kind}s", 1)),
            float(left.pop(f"{kind}_requests", 4 if kind == "planner" else 2)),
            float(left.pop(f"{kind}_gpus", 0)),
            float(left.pop(f"{kind}_cpus", 1)),
            float(left.pop(f"{kind}_grow_seconds", 30)),
            float(left.pop(f"{kind}_shrink_seconds", 600)),
        )

    planners, renderers = scale("planner"), scale("renderer")
    model: dict[str, Any] = {
        name: int(value) if name.startswith("max_") else value for name, value in left.items()
    }
    return application(ServerOptions(EngineOptions(model)), planners, renderers)
