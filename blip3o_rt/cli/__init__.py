"""The blip3o-rt command."""
