"""blip3o_rt: a runtime for BLIP3o-NEXT, which draws and edits images in two stages."""

__version__ = "0.1.0"
