"""How good a video is: against the true one, against what needs no model, and by itself. Pure functions of frames."""
