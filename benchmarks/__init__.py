"""Measurements, one file each; `python -m benchmarks` lists and runs them."""
