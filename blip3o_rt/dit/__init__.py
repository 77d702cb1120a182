"""The diffusion stage: a SANA transformer that turns noise and a condition into a latent."""
