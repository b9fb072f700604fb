"""What is minimised, step by step, and what a run's state is."""
