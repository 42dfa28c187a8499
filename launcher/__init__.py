"""Between the command line and the training code: composing, checking, the run folder, resuming, logging."""
