"""The embedded model and its world: scenes of flat shapes, words for them, and a judge of pixels."""
