"""A run: its settings, its folder, what stops it and what it logs."""
