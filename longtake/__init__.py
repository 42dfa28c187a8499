"""Everything of Longtake that is plain PyTorch: no module in here imports Lightning or Hydra."""
