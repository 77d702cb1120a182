"""TA-Tok: a SigLIP vision tower and a cosine codebook that turn an image into discrete tokens."""
