"""Thin shells around the plain PyTorch of `longtake/`: a training step, a validation step, what is logged."""
