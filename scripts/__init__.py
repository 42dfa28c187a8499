"""Commands beside training and prediction: `python -m scripts.<name> key=value ...`."""
