"""Tracing and compiling: a function of tensors to one compiled call, or the named reason why not."""
