"""Data sets: tensors with one leading dimension, and where they come from."""
