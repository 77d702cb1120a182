"""The earlier name of `open_published`, for one release."""

from __future__ import annotations

import warnings

from blip3o_rt.checkpoint.published import PublishedCheckpoint, open_published
from blip3o_rt.checkpoint.source import PathName, Source


def read_original(
    path: PathName, *, diffusion: PathName | None = None, ta_tok: PathName | None = None
) -> PublishedCheckpoint:
    """`open_published(Source(path, diffusion, ta_tok))`."""
    warnings.warn("read_original is open_published now", DeprecationWarning, stacklevel=2)
    return open_published(Source(path, diffusion, ta_tok))
