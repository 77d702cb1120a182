"""Checkpoints: the published layout, the runtime layout, and the conversion of one to the other."""
