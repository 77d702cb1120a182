"""The engine as a service: a process that draws for many clients at once, an async client of it, and HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip3o_rt.serve.async_pipeline import AsyncPipeline

__all__ = ["AsyncPipeline"]


def __getattr__(name: str) -> Any:
    """Import AsyncPipeline when it is first asked for."""
    if name != "AsyncPipeline":
        raise AttributeError(f"module 'blip3o_rt.serve' has no attribute {name!r}")
    from blip3o_rt.serve.async_pipeline import AsyncPipeline

    return AsyncPipeline
