"""Reinforcement learning of the embedded model by a reward that its pixels decide."""
