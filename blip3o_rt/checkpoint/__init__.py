"""Checkpoints: the published layout, the runtime layout, and the way from one to the other."""
