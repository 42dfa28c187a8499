"""Released weights: the names of their tensors and ours, in both directions."""
