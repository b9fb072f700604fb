"""Tracing and compilation of functions of tensors, with guards, verification and fall-back to eager execution."""
