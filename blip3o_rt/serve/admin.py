"""Routes for who trains the model: pause, new weights, sleep. Without keys for them there are none."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict

from blip3o_rt.serve.api_error import ApiError
from blip3o_rt.serve.client import EngineClient
from blip3o_rt.serve.keys import Keys


class Pause(BaseModel):
    """Body of /admin/pause: what becomes of images that are being drawn."""

    model_config = ConfigDict(extra="forbid")
    mode: Literal["abort", "wait", "keep"] = "wait"


class NewWeights(BaseModel):
    """Body of /admin/weights: a folder that the engine's machine has."""

    model_config = ConfigDict(extra="forbid")
    path: str


class Weights(BaseModel):
    """Which weights the engine has."""

    version: int
    checksum: str


def admin_routes(client: EngineClient, keys: Keys) -> APIRouter:
    """The routes, which ask for one of the keys."""

    def authorized(request: Request) -> None:
        if keys.name(request.headers.get("authorization")) is None:
            raise ApiError(401, "the admin key is missing or wrong", code="invalid_api_key")

    router = APIRouter(prefix="/admin", include_in_schema=False, dependencies=[Depends(authorized)])

    async def done(action: str, value: str = "") -> Weights:
        answer = await client.control(action, value)
        return Weights(version=answer.weights_version, checksum=answer.weights_checksum)

    @router.post("/pause")
    async def pause(body: Pause) -> Weights:
        """Let no image begin; answers once none is being drawn. Requests go on to be taken, and wait."""
        return await done("pause", body.mode)

    @router.post("/resume")
    async def resume() -> Weights:
        """Go on."""
        return await done("resume")

    @router.get("/weights")
    async def weights() -> Weights:
        """Which weights there are."""
        return await done("weights")

    @router.post("/weights")
    async def update(body: NewWeights) -> Weights:
        """Replace the weights of a paused engine by those of a folder, all or none."""
        return await done("update", body.path)

    @router.post("/sleep")
    async def sleep() -> Weights:
        """Release the memory of a paused engine."""
        return await done("sleep")

    @router.post("/wake")
    async def wake() -> Weights:
        """Take the memory back."""
        return await done("wake")

    return router
