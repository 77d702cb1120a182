"""The engine for programs that embed it without HTTP: many coroutines, one engine process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from blip3o_rt.errors import ParameterError
from blip3o_rt.images import ReferenceImage, load_reference
from blip3o_rt.params import (
    AUTO,
    DIFFUSION_NAMES,
    SAMPLING_NAMES,
    check_draft_window,
    image_seeds,
    named,
)
from blip3o_rt.serve.client import EngineClient, Handle, Limits
from blip3o_rt.serve.messages import EngineOptions, Event, ModelInfo, RawImage, Submit


class AsyncPipeline:
    """`Pipeline` for asyncio: requests of all coroutines share the batch of one engine process.

    The engine is a process of its own, which is started again where it ends. An image is the one that
    `Pipeline` draws with the same seed, whatever else runs. Cancelling a coroutine cancels its request.
    """

    def __init__(self, client: EngineClient, info: ModelInfo) -> None:
        self._client = client
        self.info = info

    @classmethod
    async def load(
        cls,
        path: str | Path | None = None,
        *,
        limits: Limits | None = None,
        engine: EngineOptions | None = None,
        **options: Any,
    ) -> AsyncPipeline:
        """Start an engine process and wait until its model is loaded.

        Args:
            path: The checkpoint's folder; None is the embedded model.
            limits: What is admitted: images in the queue, seconds of a request.
            engine: Replaces `path` and `options`.
            options: Those of Pipeline.load, for instance device, dtype and max_batch.

        Raises:
            RequestError: The model cannot be loaded; the message says why.
        """
        model = {**({} if path is None else {"path": str(path)}), **options}
        client = EngineClient(engine or EngineOptions(model), limits)
        client.start()
        try:
            info = await client.wait_ready()
        except BaseException:
            await client.close()
            raise
        return cls(client, info)

    async def close(self) -> None:
        """End the engine process; requests that are left are cancelled."""
        await self._client.close()

    async def __aenter__(self) -> AsyncPipeline:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def generate(self, prompt: str, *, n: int = 1, seed: int = 0, **options: Any) -> list[Image.Image]:
        """Draw n images of a prompt; image i uses seed + i.

        Args:
            prompt: What to draw.
            n: How many images.
            seed: Of the first one.
            options: steps, guidance, temperature, top_k, top_p, image_tokens_only, draft_window as in
                Pipeline.generate; client, priority (-1, 0 or 1) and seconds (a deadline).

        Raises:
            Refused: The queue is full or the engine is not there.
            RequestError: The request failed; `kind` names the error and `state` says how it ended.
        """
        async with self._request(prompt, (), n, seed, **options) as handle:
            return await _images(handle)

    async def edit(
        self,
        prompt: str,
        reference: ReferenceImage | Sequence[ReferenceImage],
        *,
        n: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> list[Image.Image]:
        """Draw n images of what the prompt makes of the reference image; otherwise as `generate`.

        Raises ImageError where the reference cannot be used.
        """
        images = reference if isinstance(reference, list | tuple) else [reference]
        raw = tuple(RawImage.of(load_reference(image)) for image in images)  # type: ignore[arg-type]
        async with self._request(prompt, raw, n, seed, **options) as handle:
            return await _images(handle)

    async def stream(
        self, prompt: str, *, n: int = 1, seed: int = 0, partial_images: int = 0, **options: Any
    ) -> AsyncIterator[Event]:
        """Draw as `generate` does, and yield events: Started, Progress, Partial and Finished by image."""
        options = {"progress": True, "partial_images": partial_images, **options}
        async with self._request(prompt, (), n, seed, **options) as handle:
            async for event in handle:
                yield event

    @asynccontextmanager
    async def _request(
        self,
        prompt: str,
        references: tuple[RawImage, ...],
        n: int,
        seed: int,
        *,
        client: str = "",
        priority: int = 0,
        seconds: float | None = None,
        partial_images: int = 0,
        progress: bool = False,
        draft_window: int | str = AUTO,
        **options: Any,
    ) -> AsyncIterator[Handle]:
        unknown = set(options) - {*SAMPLING_NAMES, *DIFFUSION_NAMES}
        if unknown:
            accepted = ", ".join((*SAMPLING_NAMES, *DIFFUSION_NAMES))
            raise ParameterError(f"{', '.join(sorted(unknown))} is not an option: accepted are {accepted}")
        submit = Submit(
            "",
            prompt,
            references,
            tuple(enumerate(image_seeds(seed, n))),
            named(options, SAMPLING_NAMES),
            named(options, DIFFUSION_NAMES),
            client,
            priority,
            partial_images,
            progress,
            check_draft_window(draft_window),
        )
        handle = self._client.submit(submit, seconds=seconds)
        try:
            yield handle
        finally:
            self._client.cancel(handle)  # for one that has ended, nothing


async def _images(handle: Handle) -> list[Image.Image]:
    async for _ in handle:
        pass
    return [handle.images[index].image.pil() for index, _ in handle.submit.seeds]
