"""What of the service on Ray needs no cluster: its arguments, and how requests outlive what draws them."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import pytest

from blip3o_rt.cli import main
from blip3o_rt.cli.serve import replicas
from blip3o_rt.errors import ParameterError
from blip3o_rt.serve.client import RequestError
from blip3o_rt.serve.messages import EngineOptions, Finished, ModelInfo, RawImage, Submit

pytest.importorskip("ray")
from ray.exceptions import RayError

from blip3o_rt.scale import ray_serve
from blip3o_rt.scale.ray_serve import ClusterClient, Drawn, Planned, Scale

OLD, INFO = (ModelInfo(name, 8, 8, True, 1, 4, 4, 64, "cpu", "fp32", "exact") for name in ("old", "fake"))


class Lost(RayError):
    pass


class Replicas:
    """Deployment handles that lose the first calls of every kind."""

    def __init__(self, losses: int) -> None:
        self.losses = {"check": losses, "plan": losses, "render": losses}
        self.drawn = self.asked = 0

    def __getattr__(self, method: str) -> Any:
        async def remote(*arguments: Any) -> Any:
            if self.losses.get(method, 0):
                self.losses[method] -= 1
                raise Lost("gone")
            if method == "info":
                self.asked += 1
                return (OLD, {"path": "old"}) if self.asked == 1 else (INFO, {})
            if method == "check":
                return ("PromptError", "no") if arguments[0].prompt == "wrong" else 3
            if method == "plan":
                return Planned([arguments[0]])
            self.drawn += 1
            if self.drawn == 1:
                return Drawn()  # of other weights
            return Drawn(RawImage(1, 1, bytes([arguments[0].plan[0][1]] * 3)), {"tokens": 1.0})

        return argparse.Namespace(remote=remote)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_serve, "PAUSE_SECONDS", 0.0)


def served(submit: Submit, losses: int) -> list[Any]:
    async def serve() -> list[Any]:
        handles = Replicas(losses)
        client = ClusterClient(handles, handles, EngineOptions())
        client.start()
        assert (await client.wait_ready()).name == "old"  # a planner that is not replaced yet
        assert client.ready
        while client.info.name == "old":
            await asyncio.sleep(0)
        events = [event async for event in client.submit(submit)]
        await client.close()
        return events

    return asyncio.run(serve())


@pytest.mark.parametrize("losses", [0, 3])
def test_a_request_outlives_the_replicas_that_draw_it(losses: int) -> None:
    events = served(Submit("", "a", seeds=((0, 7), (1, 8))), losses)
    images = {event.index: event.image.samples for event in events if isinstance(event, Finished)}
    assert images == {0: bytes([7] * 3), 1: bytes([8] * 3)}


def test_a_request_that_no_replica_finishes_fails() -> None:
    with pytest.raises(RequestError, match="replicas were lost") as error:
        served(Submit("", "a"), 1000)
    assert error.value.kind == "EngineLost"


def test_what_cannot_be_drawn_is_refused_as_it_is_on_one_machine() -> None:
    with pytest.raises(RequestError, match="no") as error:
        served(Submit("", "wrong"), 0)
    assert error.value.kind == "PromptError"


def test_numbers_of_replicas() -> None:
    assert replicas("--planners", argparse.Namespace(planners="2")) == (2, 2)
    assert replicas("--planners", argparse.Namespace(planners="1:4")) == (1, 4)
    for text in ("0", "3:2", "x", ":"):
        with pytest.raises(ParameterError, match="--planners"):
            replicas("--planners", argparse.Namespace(planners=text))
    options = Scale(1, 3, 2.0, 0.5).options(8)
    assert options["autoscaling_config"]["max_replicas"] == 3
    assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.5}
    with pytest.raises(ParameterError):
        Scale(2, 1).options(8)


def test_wrong_numbers_end_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--ray", "auto", "--planners", "none"]) == 2
    assert "--planners" in capsys.readouterr().err
