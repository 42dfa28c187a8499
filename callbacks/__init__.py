"""What happens beside the training: Lightning callbacks, one concern a file."""
