"""Training: objectives, steps, checkpoints and the loop."""
