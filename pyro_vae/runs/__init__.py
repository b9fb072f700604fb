"""Runs: settings, folders, signals and loggers."""
