"""Jobs and their images on disk: SQLite for what is known of them, files for images.

A job is on disk before it is accepted, and an image before it is told of, so a server that is killed finishes
its jobs when it is started again. All of it runs in one thread of its own.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from blip3o_rt.errors import Blip3oError, ParameterError
from blip3o_rt.files import replacing

T = TypeVar("T")
QUEUED = "queued"
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, client TEXT NOT NULL, created REAL NOT NULL, finished REAL, status TEXT NOT NULL,
    request TEXT NOT NULL, seed INTEGER NOT NULL, n INTEGER NOT NULL, size TEXT, error TEXT
);
CREATE TABLE IF NOT EXISTS images (
    job TEXT NOT NULL, number INTEGER NOT NULL, seed INTEGER NOT NULL, file TEXT NOT NULL,
    bytes INTEGER NOT NULL, seconds TEXT NOT NULL, tokens_per_pass REAL NOT NULL, PRIMARY KEY (job, number)
);
CREATE INDEX IF NOT EXISTS jobs_by_time ON jobs (created);
"""


class StorageError(Blip3oError):
    """The data folder takes no more, or cannot be written."""


@dataclass(frozen=True)
class StoredImage:
    """An image of a job: its file's name and how long each stage took."""

    number: int
    seed: int
    file: str
    bytes: int
    seconds: dict[str, float]
    tokens_per_pass: float


@dataclass
class StoredJob:
    """A job as it is on disk. `request` is its body, with the seed that was drawn for it."""

    id: str
    client: str
    created: float
    request: dict[str, Any]
    seed: int
    n: int
    status: str = QUEUED
    finished: float | None = None
    size: str | None = None
    error: dict[str, Any] | None = None
    images: dict[int, StoredImage] = field(default_factory=dict)


class Store:
    """The data folder of one server.

    Args:
        folder: Made where it is missing.
        keep_seconds: Jobs and linked images that ended longer ago are deleted.
        keep_bytes: The oldest that ended are deleted while images are larger than this.

    Raises:
        ParameterError: Another server uses the folder, or it cannot be written.
    """

    def __init__(self, folder: Path, keep_seconds: float, keep_bytes: int) -> None:
        self._keep_seconds, self._keep_bytes = keep_seconds, keep_bytes
        self._jobs, self._links = folder / "jobs", folder / "images"
        self._unsaved: dict[
            str, tuple[str, dict[str, Any] | None, float]
        ] = {}  # ends the disk had no room for
        try:
            for path in (folder, self._jobs, self._links):
                path.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ParameterError(
                f"--data {folder} is in use by another server: choose another folder"
            ) from None
        except OSError as error:
            raise ParameterError(f"--data {folder} cannot be used: {error.strerror}") from None
        self._thread = ThreadPoolExecutor(1, "store")
        self._database = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.executescript(SCHEMA)

    def close(self) -> None:
        """Finish what was begun, and give the folder back."""
        self._thread.shutdown(wait=True)
        self._database.close()
        self._lock.close()

    async def add(self, job: StoredJob, references: list[bytes]) -> None:
        """Put a new job and its reference images on disk. Raises StorageError."""
        await self._run(self._add, job, references)

    async def references(self, id: str) -> list[bytes]:
        """The reference images of a job."""
        return await self._run(self._read_references, id)

    async def add_image(self, id: str, image: StoredImage, data: bytes) -> None:
        """Put an image of a job on disk. Raises StorageError."""
        await self._run(self._add_image, id, image, data)

    async def end(
        self, id: str, status: str, error: dict[str, Any] | None = None, size: str | None = None
    ) -> None:
        """Write how a job ended; where the disk is full it is kept in mind and written later."""
        await self._run(self._end, id, status, error, size, time.time())

    async def get(self, id: str) -> StoredJob | None:
        """A job by its id."""
        return await self._run(self._get, id)

    async def newest(self, owner: str | None, limit: int) -> list[StoredJob]:
        """The newest jobs, of a key with all its users or of all keys."""
        return await self._run(self._newest, owner, limit)

    async def unfinished(self) -> list[StoredJob]:
        """Jobs that were accepted and have not ended, the oldest first."""
        return await self._run(self._unfinished)

    async def image(self, id: str, number: int) -> tuple[bytes, str] | None:
        """An image of a job, and its file's suffix."""
        return await self._run(self._image, id, number)

    async def link(self, data: bytes, suffix: str) -> str:
        """Keep an image for a while under a name that cannot be guessed. Raises StorageError."""
        return await self._run(self._link, data, suffix)

    async def linked(self, name: str) -> bytes | None:
        """The image of a name."""
        return await self._run(self._linked, name)

    async def expire(self) -> None:
        """Delete what is too old or too much, and write what there was no room for."""
        await self._run(self._expire)

    async def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        def work() -> T:
            try:
                return function(*arguments)
            except (OSError, sqlite3.Error) as error:
                self._database.rollback()
                reason = getattr(error, "strerror", None) or str(error)
                raise StorageError(f"the server's data folder cannot be written: {reason}") from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # In the thread

    def _add(self, job: StoredJob, references: list[bytes]) -> None:
        folder = self._jobs / job.id
        try:
            folder.mkdir()
            for number, data in enumerate(references):
                _write(folder / f"reference-{number}", data)
            with self._database as database:
                database.execute(
                    "INSERT INTO jobs (id, client, created, status, request, seed, n) VALUES (?,?,?,?,?,?,?)",
                    (job.id, job.client, job.created, QUEUED, json.dumps(job.request), job.seed, job.n),
                )
        except (OSError, sqlite3.Error):
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _read_references(self, id: str) -> list[bytes]:
        files = sorted(
            (self._jobs / id).glob("reference-*"), key=lambda path: int(path.name.rpartition("-")[2])
        )
        return [path.read_bytes() for path in files]

    def _add_image(self, id: str, image: StoredImage, data: bytes) -> None:
        _write(self._jobs / id / image.file, data)
        row = (id, image.number, image.seed, image.file, image.bytes, json.dumps(image.seconds))
        with self._database as database:
            database.execute(
                "INSERT OR REPLACE INTO images VALUES (?,?,?,?,?,?,?)", (*row, image.tokens_per_pass)
            )

    def _end(self, id: str, status: str, error: dict[str, Any] | None, size: str | None, now: float) -> None:
        try:
            with self._database as database:
                database.execute(
                    "UPDATE jobs SET status=?, error=?, size=?, finished=? WHERE id=? AND status=?",
                    (status, json.dumps(error) if error else None, size, now, id, QUEUED),
                )
            self._unsaved.pop(id, None)
        except sqlite3.Error:
            self._unsaved.setdefault(id, (status, error, now))  # the first end is the end

    def _get(self, id: str) -> StoredJob | None:
        found = self._select("WHERE id=?", id)
        return found[0] if found else None

    def _newest(self, owner: str | None, limit: int) -> list[StoredJob]:
        if owner is None:
            return self._select("ORDER BY created DESC LIMIT ?", limit)
        of_owner = "substr(client, 1, instr(client || '/', '/') - 1) = ?"
        return self._select(f"WHERE {of_owner} ORDER BY created DESC LIMIT ?", owner, limit)

    def _unfinished(self) -> list[StoredJob]:
        return [
            job
            for job in self._select("WHERE status=? ORDER BY created", QUEUED)
            if job.id not in self._unsaved
        ]

    def _select(self, where: str, *arguments: Any) -> list[StoredJob]:
        columns = "id, client, created, request, seed, n, status, finished, size, error"
        rows = self._database.execute(f"SELECT {columns} FROM jobs {where}", arguments).fetchall()
        jobs = []
        for id, client, created, request, seed, n, status, finished, size, error in rows:
            job = StoredJob(id, client, created, json.loads(request), seed, n, status, finished, size)
            job.error = json.loads(error) if error else None
            if id in self._unsaved:
                job.status, job.error, job.finished = self._unsaved[id]
            columns = "number, seed, file, bytes, seconds, tokens_per_pass"
            for number, image_seed, file, size_, seconds, per_pass in self._database.execute(
                f"SELECT {columns} FROM images WHERE job=? ORDER BY number", (id,)
            ):
                job.images[number] = StoredImage(
                    number, image_seed, file, size_, json.loads(seconds), per_pass
                )
            jobs.append(job)
        return jobs

    def _image(self, id: str, number: int) -> tuple[bytes, str] | None:
        row = self._database.execute(
            "SELECT file FROM images WHERE job=? AND number=?", (id, number)
        ).fetchone()
        if row is None or not (path := self._jobs / id / row[0]).is_file():
            return None
        return path.read_bytes(), path.suffix[1:]

    def _link(self, data: bytes, suffix: str) -> str:
        name = f"{secrets.token_urlsafe(24)}.{suffix}"
        _write(self._links / name, data)
        return name

    def _linked(self, name: str) -> bytes | None:
        path = self._links / name
        return path.read_bytes() if path.is_file() else None

    def _expire(self) -> None:
        for id, (status, error, when) in list(self._unsaved.items()):
            self._end(id, status, error, None, when)
        now = time.time()
        ended = self._database.execute(
            "SELECT id, finished, (SELECT COALESCE(SUM(bytes), 0) FROM images WHERE job = jobs.id) FROM jobs "
            "WHERE finished IS NOT NULL"
        ).fetchall()
        kept = [(when, size, self._jobs / id) for id, when, size in ended]
        for path in self._links.iterdir():
            kept.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in kept)
        for when, size, path in sorted(kept, key=lambda entry: entry[0]):
            if now - when > self._keep_seconds or total > self._keep_bytes:
                self._delete(path)
                total -= size

    def _delete(self, path: Path) -> None:
        if path.parent == self._links:
            path.unlink(missing_ok=True)
            return
        with self._database as database:
            database.execute("DELETE FROM images WHERE job=?", (path.name,))
            database.execute("DELETE FROM jobs WHERE id=?", (path.name,))
        shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
