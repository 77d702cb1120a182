"""Reinforcement learning: rollouts with log-probabilities, weights updated in place, adapters of trainers."""
