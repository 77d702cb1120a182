"""Where a command writes: the names of image files, and what may not be written over."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from blip3o_rt import trace
from blip3o_rt.cli.options import user_path
from blip3o_rt.errors import ParameterError

if TYPE_CHECKING:
    from PIL import Image

OTHER_IMAGE_SUFFIXES = re.compile(
    r"\.(apng|avifs?|bmp|cr[23w]|cur|dcm|dds|dib|djvu?|dng|emf|eps|exr|fits?|gif|hdp|hdr|hei[cf]s?|hif|icb|icns|"
    r"ico|j2[ck]|jfif|jif|jls|jp[2cefghx]|jpeg|jxl|jxr|mpo|nef|p[abgnfp]m|pcx|pdf|psb|psd|ps|qoi|ras|sgi|svgz?|tga|"
    r"tiff?|vda|vst|wbmp|wdp|webp|wmf|xbm|xcf|xpm)",
    re.IGNORECASE,
)
INPUTS = ("like", "ta_tok", "model", "diffusion")  # options of files and folders that are read
MAX_NAME_LENGTH = 48  # characters of the prompt in a file name; file systems take 255 bytes


class ImageFiles:
    """The image files of one command, whose folders are made and whose names are checked before any work.

    `--out` with a `.png` takes exactly one image and is replaced. Anything else is a folder, in which images
    are named after prompt and seed. A file that is there is only replaced by the same request, or with
    --overwrite; else the new name has a number.
    """

    def __init__(
        self, arguments: argparse.Namespace, prompts: Sequence[str], references: Iterable[str] = ()
    ) -> None:
        """Check every file that the arguments name, and make their folders.

        Raises:
            ParameterError: Several images and one `.png`; another image format; a folder that is a file or
                cannot be written; a name that the file system does not hold; a report or a trace that would
                replace an image, the other or an input.
        """
        seeds = range(arguments.seed, arguments.seed + arguments.n)
        self._wanted = image_paths(arguments.out, prompts, seeds)
        self._replaces = arguments.overwrite or self._wanted == [arguments.out]
        self._written: set[Path] = set()
        check_output_files(arguments, self._wanted, references)

    def save(self, index: int, image: Image.Image) -> Path:
        """Write the image of an index with its metadata; returns where."""
        from blip3o_rt.metadata import save_free, save_png  # PyTorch takes seconds: not for --help

        paths = (path for path in numbered(self._wanted[index]) if path not in self._written)
        if self._replaces:
            path = next(paths)
            save_png(image, path, image.info)
        else:
            path = save_free(image, paths, image.info)
        self._written.add(path)
        return path


def numbered(path: Path) -> Iterator[Path]:
    """The path NAME-SEED.png, then NAME-2-SEED.png and so on."""
    yield path
    name, _, seed = path.stem.rpartition("-")
    for number in itertools.count(2):
        yield path.with_name(f"{name}-{number}-{seed}.png")


def image_paths(out: Path, prompts: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """Where each image goes if nothing is there, all seeds of the first prompt first; makes the folder."""
    count = len(prompts) * len(seeds)
    other_format = OTHER_IMAGE_SUFFIXES.fullmatch(out.suffix) is not None
    check_name("--out", out)
    if out.suffix.lower() == ".png" and not out.is_dir():
        if count > 1:
            raise ParameterError(f"--out is {out} but there are {count} images to write: give a folder")
        make_folder("--out", out.parent)
        return [out]
    if (other_format or out.exists()) and not out.is_dir():
        kind = "" if other_format else ", a file"
        raise ParameterError(f"--out is {out}{kind}: accepted is a .png for one image, or a folder")
    make_folder("--out", out)
    paths = [out / f"{file_name(prompt)}-{seed}.png" for prompt in prompts for seed in seeds]
    for path in paths:
        check_name("--out", path)
    return paths


def check_output_files(
    arguments: argparse.Namespace, images: Iterable[Path], references: Iterable[str]
) -> None:
    """Make the folders of the report and of the trace, where they are wanted.

    Raises:
        ParameterError: One cannot be written there, or would replace an image, the other or an input.
    """
    if arguments.trace is not None:
        trace.check_path(arguments.trace)
    if arguments.trace_tokens < 0:
        raise ParameterError(f"--trace-tokens is {arguments.trace_tokens}: accepted is 0 (all) or more")
    inputs = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in INPUTS}
    inputs |= {f"the reference {name}": user_path(name) for name in references}
    taken = [(path, "an image goes") for path in images]
    taken += [(path, f"{name} is read from") for name, path in inputs.items() if path is not None]
    for option, file in (("--report", arguments.report), ("--trace", arguments.trace)):
        if file is None:
            continue
        check_file(option, file)
        for path, place in taken:
            if replaces(file, path):
                raise ParameterError(f"{option} is {file}, where {place}: accepted is another file's path")
        make_folder(option, file.parent)
        taken.append((file, "the report goes"))


def check_file(option: str, file: Path) -> None:
    """Raise ParameterError for a path at which no file can be written, once its folder is there."""
    check_name(option, file)
    if file.is_dir():
        raise ParameterError(f"{option} is {file}, a folder: accepted is a file's path")
    if file.exists() and not os.access(file, os.W_OK):
        raise ParameterError(f"{option} is {file}, a file that may not be written: choose another")


def replaces(file: Path, place: Path) -> bool:
    """Whether a file is another, also by a link, or will be; or is there already, below a folder."""
    with suppress(OSError, ValueError):  # of what is not there
        if file.samefile(place):
            return True
    below = file.exists() and file.resolve().is_relative_to(place.resolve())
    return below or file.resolve() == place.resolve()


def check_name(option: str, path: Path) -> None:
    """Raise ParameterError for a name that the file system does not hold, a link to no place, or a device."""
    try:
        os.lstat(path)
        special = path.exists() and not (path.is_file() or path.is_dir())
        lost = path.is_symlink() and not path.resolve().parent.is_dir()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # free, or refused by make_folder
    except (OSError, ValueError, RuntimeError) as error:  # the last of links in a circle
        reason = getattr(error, "strerror", None) or str(error)
        raise ParameterError(f"{option} cannot be {str(path)[:60]!r}...: {reason}") from None
    if special:
        raise ParameterError(f"{option} is {path}, no regular file, which is not replaced: choose another")
    if lost:
        raise ParameterError(f"{option} is {path}, a link into a folder that is not there: choose another")


def make_folder(option: str, folder: Path) -> None:
    """Make a folder if missing. Raises ParameterError where no file can be made in it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()  # what the system says of a folder is not all it asks for
    except OSError as error:
        reason = f"which may not be written ({error.strerror})"
        raise ParameterError(f"{option} needs the folder {folder}, {reason}: choose another") from None


def file_name(prompt: str) -> str:
    """A prompt's letters with their marks, and digits, words joined by hyphens; "image" without any."""
    text = unicodedata.normalize("NFC", prompt.lower())
    kept = "".join(
        "" if (kind := unicodedata.category(character)) == "Cf" else character if kind[0] in "LMN" else " "
        for character in text
    )
    name = "-".join(kept.split())
    end = MAX_NAME_LENGTH
    while end < len(name) and unicodedata.category(name[end])[0] == "M":
        end -= 1  # a letter is kept with its marks, or not at all
    return name[: max(end, 1)].strip("-") or "image"
