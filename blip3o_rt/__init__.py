"""blip3o_rt: a runtime for BLIP3o-NEXT, which draws and edits images in two stages."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, which takes longer to import than the rest of this module
if TYPE_CHECKING:
    from blip3o_rt.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str) -> object:
    """Import Pipeline, and PyTorch with it, when it is first asked for: `blip3o-rt --help` does without."""
    if name != "Pipeline":
        raise AttributeError(f"module 'blip3o_rt' has no attribute {name!r}")
    from blip3o_rt.pipeline import Pipeline

    return Pipeline
