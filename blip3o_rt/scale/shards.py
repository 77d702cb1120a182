"""The folder of a batch: what is to be done, what is done, and the files that come of it.

    DIR/batch.json            what the batch is; a run with other settings is refused
    DIR/00000/ .tar .parquet  a finished shard of rows, in the format that was asked for
    DIR/failures/00000.jsonl  the rows of a shard that failed, with why
    DIR/.work/rows/           the rows of shards that are not finished
    DIR/.work/00000/          the images of a shard that is not finished
    DIR/.work/00000.failed/   and its failures

A row is done once its image or its failure is renamed to its place, and a shard once its file is. What a kill
interrupts is at most the rows that were being drawn.
"""

from __future__ import annotations

import fcntl
import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from blip3o_rt.errors import ParameterError
from blip3o_rt.files import replacing
from blip3o_rt.metadata import read_metadata, save_png
from blip3o_rt.scale.rows import Row, file_digest, read_rows

FOLDER, TAR, PARQUET = FORMATS = ("folder", "tar", "parquet")


@dataclass(frozen=True)
class Batch:
    """What a batch is made of; the same values make the same files.

    Attributes:
        prompts: The file of rows.
        seed: Of row 0; row i has seed + i.
        format: One of FORMATS.
        shard_rows: Rows of a file or folder.
        sampling: Arguments of SamplingParams but the seed.
        diffusion: Arguments of DiffusionParams.
        model: What decides the weights and the arithmetic, of the arguments of Pipeline.load.
    """

    prompts: str
    seed: int = 0
    format: str = FOLDER
    shard_rows: int = 1000
    sampling: dict[str, Any] = field(default_factory=dict)
    diffusion: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


class BatchFolder:
    """The folder of one batch.

    Args:
        folder: Made where it is missing.
        batch: What it is made of.
    """

    def __init__(self, folder: Path, batch: Batch) -> None:
        self.folder, self.batch = folder, batch
        self._work = folder / ".work"
        self._rows = self._work / "rows"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block no other process works on the folder. Raises ParameterError where one does."""
        self._work.mkdir(parents=True, exist_ok=True)
        with (self._work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ParameterError(f"--out {self.folder} is in use by another batch") from None
            yield

    def open(self) -> int:
        """Divide the rows into shards, or go on with those of an earlier run.

        Returns how many rows there are. Raises ParameterError where the folder holds another batch.
        """
        prompts = Path(self.batch.prompts)
        description = self.folder / "batch.json"
        self._sweep(self.folder)
        if not description.is_file():
            if any(path.name != ".work" for path in self.folder.iterdir()):
                raise ParameterError(
                    f"--out {self.folder} is not empty: give a new folder, or that of a batch"
                )
            rows = self._divide(prompts)
            fields = {**asdict(self.batch), "rows": rows, "sha256": file_digest(prompts)}
            with replacing(description) as temporary:
                temporary.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            return rows
        fields = json.loads(description.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps({**asdict(self.batch), "sha256": file_digest(prompts)}))
        for name, value in wanted.items():
            if fields.get(name) != value and name != "prompts":  # it may have been moved
                raise ParameterError(
                    f"--out {self.folder} holds a batch whose {name} is {fields.get(name)!r}, not {value!r}: "
                    "give another folder, or the same settings"
                )
        return int(fields["rows"])

    def unfinished(self) -> list[int]:
        """The numbers of the shards that are not finished."""
        return sorted(int(path.stem) for path in self._rows.glob("*.jsonl"))

    def missing(self, shard: int) -> list[Row]:
        """The rows of a shard that are neither drawn nor failed."""
        return [
            row
            for row in self.rows(shard)
            if not (self.image(row).is_file() or self._failure(row).is_file() or self._target(shard).exists())
        ]

    def rows(self, shard: int) -> list[Row]:
        """All rows of a shard that is not finished."""
        with self._rows_file(shard).open(encoding="utf-8") as file:
            return [Row.from_json(line) for line in file]

    def image(self, row: Row) -> Path:
        """Where a row's image is until its shard is finished."""
        return self._work / self._name(row.index // self.batch.shard_rows) / f"{row.index:09d}.png"

    def done(self, row: Row, found: Image.Image | Exception) -> None:
        """Keep a row's image or its failure."""
        place = self.image(row) if isinstance(found, Image.Image) else self._failure(row)
        place.parent.mkdir(exist_ok=True)
        if isinstance(found, Image.Image):
            save_png(found, place, found.info)
            return
        failure = {"row": row.index, "prompt": row.prompt, "error": type(found).__name__}
        fields = {**failure, "message": str(found), **row.extra}
        with replacing(place) as temporary:
            temporary.write_text(json.dumps(fields, default=str) + "\n", encoding="utf-8")

    def finish(self, shard: int) -> None:
        """Put the files of a shard whose rows are all done where they belong."""
        target, images = self._target(shard), self._work / self._name(shard)
        failed = self._work / f"{self._name(shard)}.failed"
        self._sweep(self.folder, target.name)
        self._sweep(self.folder / "failures", self._rows_file(shard).name)
        if not target.exists():
            images.mkdir(exist_ok=True)
            self._sweep(images)
            self._sweep(failed)
            self._write_failures(shard, failed)
            drawn = [row for row in self.rows(shard) if self.image(row).is_file()]
            if self.batch.format == FOLDER:
                self._write_metadata(images / "metadata.jsonl", drawn)
                images.replace(target)
            elif self.batch.format == TAR:
                self._write_tar(target, drawn)
            else:
                self._write_parquet(target, drawn)
        self._rows_file(shard).unlink(missing_ok=True)
        shutil.rmtree(images, ignore_errors=True)
        shutil.rmtree(failed, ignore_errors=True)

    def check_weights(self, checksum: str) -> None:
        """Refuse to go on with other weights than those of the rows that are done. Raises ParameterError."""
        path = self._work / "weights"
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_text(checksum)
        if path.read_text() != checksum:
            raise ParameterError(
                f"--out {self.folder} holds images of other weights: give another folder, or the same model"
            )

    @property
    def failures(self) -> int:
        """Rows that failed, of finished shards."""
        return sum(sum(1 for _ in path.open("rb")) for path in (self.folder / "failures").glob("*.jsonl"))

    def _divide(self, prompts: Path) -> int:
        """Write the rows of every shard."""
        shutil.rmtree(self._rows, ignore_errors=True)
        self._rows.mkdir(parents=True)
        rows, count, shard = read_rows(prompts), 0, 0
        while some := list(islice(rows, self.batch.shard_rows)):
            text = "".join(f"{row.to_json()}\n" for row in some)
            self._rows_file(shard).write_text(text, encoding="utf-8")
            count, shard = count + len(some), shard + 1
        if not count:
            raise ParameterError(f"{prompts} has no rows")
        return count

    def _sweep(self, folder: Path, name: str = "*") -> None:
        """Remove what a writer that was killed has left of a file."""
        for left in folder.glob(f".????????.{name}"):
            left.unlink(missing_ok=True)

    def _name(self, shard: int) -> str:
        return f"{shard:05d}"

    def _rows_file(self, shard: int) -> Path:
        return self._rows / f"{self._name(shard)}.jsonl"

    def _target(self, shard: int) -> Path:
        suffix = "" if self.batch.format == FOLDER else f".{self.batch.format}"
        return self.folder / f"{self._name(shard)}{suffix}"

    def _failure(self, row: Row) -> Path:
        return self.image(row).parent.with_suffix(".failed") / f"{row.index:09d}.json"

    def _write_failures(self, shard: int, failed: Path) -> None:
        lines = [path.read_text(encoding="utf-8") for path in sorted(failed.glob("*.json"))]
        if lines:
            (self.folder / "failures").mkdir(exist_ok=True)
            with replacing(self.folder / "failures" / f"{self._name(shard)}.jsonl") as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")

    def _fields(self, row: Row) -> dict[str, Any]:
        """What is said of an image beside it."""
        image = self.image(row)
        return {**row.extra, "file_name": image.name, "row": row.index, **read_metadata(image)}

    def _write_metadata(self, path: Path, rows: list[Row]) -> None:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(self._fields(row), default=str)}\n" for row in rows)

    def _write_tar(self, path: Path, rows: list[Row]) -> None:
        """A WebDataset: of every row the image, its prompt and its fields, under one key."""
        with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as archive:
            for row in rows:
                fields = json.dumps(self._fields(row), default=str).encode()
                contents = {"png": self.image(row).read_bytes(), "txt": row.prompt.encode(), "json": fields}
                for suffix, data in contents.items():
                    member = tarfile.TarInfo(f"{row.index:09d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))

    def _write_parquet(self, path: Path, rows: list[Row]) -> None:
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.schema(
            {
                "row": pyarrow.int64(),
                "prompt": pyarrow.string(),
                "seed": pyarrow.int64(),
                "image": pyarrow.binary(),
                "metadata": pyarrow.string(),
            }
        )
        with replacing(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
            for row in rows:
                fields = self._fields(row)
                columns: Mapping[str, Any] = {
                    "row": row.index,
                    "prompt": row.prompt,
                    "seed": fields["seed"],
                    "image": self.image(row).read_bytes(),
                    "metadata": json.dumps(fields, default=str),
                }
                writer.write_table(pyarrow.Table.from_pylist([columns], schema))
