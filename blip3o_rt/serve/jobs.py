"""Jobs: requests that are answered at once and finished later, by this server or the next one."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid
from typing import Any

from blip3o_rt.errors import Blip3oError
from blip3o_rt.serve.api_error import ApiError, api_error
from blip3o_rt.serve.client import COMPLETED, FAILED, EngineClient, Handle, RequestError
from blip3o_rt.serve.images import ImageWorkers, from_base64
from blip3o_rt.serve.messages import Finished, RawImage
from blip3o_rt.serve.schema import Job, JobImage, JobRequest
from blip3o_rt.serve.store import QUEUED, StorageError, Store, StoredImage, StoredJob

JOB_SECONDS = 7 * 86_400.0  # how long a job may take where it says nothing
EXPIRE_SECONDS = 60.0  # between two looks at what is too old

log = logging.getLogger("blip3o_rt.serve")


class Jobs:
    """The jobs of a server: accepts, runs, cancels and shows them."""

    def __init__(self, store: Store, client: EngineClient, workers: ImageWorkers) -> None:
        self._store, self._client, self._workers = store, client, workers
        self._handles: dict[str, Handle] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closing = False

    async def start(self) -> None:
        """Go on with the jobs that an earlier server accepted."""
        for job in await self._store.unfinished():
            log.info("job resumed", extra={"fields": {"job": job.id}})
            self._begin(job)

    async def close(self) -> None:
        """Leave jobs that are not finished to the next server."""
        self._closing = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def expire(self) -> None:
        """Delete old jobs, for ever."""
        while True:
            try:
                await self._store.expire()
            except StorageError as error:
                log.error("%s", error)
            await asyncio.sleep(EXPIRE_SECONDS)

    async def accept(self, request: JobRequest, client: str) -> Job:
        """Check a job and put it on disk; what comes later is only its drawing.

        Raises ApiError where it is refused.
        """
        files = []
        for number, text in enumerate(request.images):
            name = f"images[{number}]"
            files.append(await asyncio.to_thread(from_base64, text, name))
            await self._workers.decode(files[-1], name)
        submit = request.submit((), client)
        self._client.admit(submit, durable=True)
        seed = submit.seeds[0][1]
        body = {**request.model_dump(exclude={"images"}, exclude_unset=True), "seed": seed}
        job = StoredJob(uuid.uuid4().hex, client, time.time(), body, seed, request.n)
        await self._store.add(job, files)
        self._begin(job)
        return self.show(job)

    async def find(self, id: str, client: str | None) -> StoredJob:
        """A job of a client; None is any client's. Raises ApiError where there is none."""
        job = await self._store.get(id)
        if job is None or (client is not None and job.client.partition("/")[0] != client):
            raise ApiError(404, f"there is no job {id!r}", param="id", code="job_not_found")
        return job

    async def cancel(self, job: StoredJob) -> StoredJob:
        """End a job that has not ended; images that are done stay."""
        if job.status == QUEUED:
            await self._store.end(job.id, "cancelled")
            if job.id in self._handles:
                self._client.cancel(self._handles[job.id])
            if job.id in self._tasks:
                self._tasks[job.id].cancel()
        return await self._store.get(job.id) or job

    def show(self, job: StoredJob) -> Job:
        """A job as HTTP answers it."""
        handle = self._handles.get(job.id)
        queued = job.status == QUEUED
        running = queued and handle is not None and (handle.started is not None or bool(job.images))
        return Job(
            id=job.id,
            status="running" if running else job.status,  # type: ignore[arg-type]
            created_at=int(job.created),
            finished_at=None if job.finished is None else int(job.finished),
            queue_position=self._client.position(handle) if queued and handle and not running else None,
            prompt=job.request["prompt"],
            seed=job.seed,
            n=job.n,
            size=job.size,
            data=[
                JobImage(
                    index=image.number,
                    seed=image.seed,
                    url=f"/v1/jobs/{job.id}/images/{image.number}",
                    seconds=image.seconds,
                    tokens_per_pass=image.tokens_per_pass,
                )
                for image in job.images.values()
            ],
            error=job.error,  # type: ignore[arg-type]
        )

    def _begin(self, job: StoredJob) -> None:
        task = asyncio.get_running_loop().create_task(self._run(job))
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._forget(job.id))

    def _forget(self, id: str) -> None:
        self._tasks.pop(id, None)
        self._handles.pop(id, None)

    async def _run(self, job: StoredJob) -> None:
        """Draw what is missing of a job, and write how it ended."""
        status, error, size = COMPLETED, None, None
        try:
            size = await self._draw(job)
        except RequestError as found:
            if self._closing:
                return
            status, error = found.state, api_error(found).body
        except Blip3oError as found:  # StorageError too
            status, error = FAILED, api_error(found).body
        except asyncio.CancelledError:
            return  # who cancelled has written it, or the next server goes on
        except Exception as found:
            log.exception("job failed", extra={"fields": {"job": job.id}})
            status, error = (
                FAILED,
                ApiError(500, f"the job failed: {type(found).__name__}", "server_error").body,
            )
        if error is not None and job.id in self._handles:
            self._client.cancel(self._handles[job.id])
        await self._store.end(job.id, status, error, size)

    async def _draw(self, job: StoredJob) -> str | None:
        request = JobRequest.model_validate(job.request)
        references: list[RawImage] = []
        for number, data in enumerate(await self._store.references(job.id)):
            references.append(await self._workers.decode(data, f"images[{number}]"))
        submit = request.submit(tuple(references), job.client)
        missing = tuple(pair for pair in submit.seeds if pair[0] not in job.images)
        if not missing:
            return job.size
        left = (request.timeout or JOB_SECONDS) - (time.time() - job.created)
        handle = self._client.submit(
            dataclasses.replace(submit, seeds=missing), seconds=max(left, 0.001), durable=True, admitted=True
        )
        self._handles[job.id] = handle
        size = None
        async for event in handle:
            if isinstance(event, Finished):
                size = event.image.size
                await self._keep(job, request, event, dict(submit.seeds))
        return size

    async def _keep(
        self, job: StoredJob, request: JobRequest, event: Finished, seeds: dict[int, int]
    ) -> None:
        seconds: dict[str, Any] = {name: round(value, 4) for name, value in event.seconds.items()}
        data = await self._workers.encode(event.image, request.output_format, request.output_compression)
        image = StoredImage(
            event.index,
            seeds[event.index],
            f"{event.index}.{request.output_format}",
            len(data),
            seconds,
            round(event.tokens_per_pass, 3),
        )
        await self._store.add_image(job.id, image, data)
