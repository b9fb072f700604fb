"""Data sets: named tensors with a common leading dimension, built in or your own."""
