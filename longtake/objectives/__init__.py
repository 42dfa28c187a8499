"""Training objectives: from clean latents to a loss, every draw keyed by the sample."""
