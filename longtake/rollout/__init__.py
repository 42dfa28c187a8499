"""Rollouts: from a start, conditions and keyed noise to chunks of latents, one after the other."""
