"""What a user holds: a pipeline, whose planner makes tokens of words and whose renderer images of tokens."""

from blip3o_rt.pipeline.pipeline import ImageRequest, Pipeline

__all__ = ["ImageRequest", "Pipeline"]
