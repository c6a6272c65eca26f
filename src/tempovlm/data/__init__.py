"""Data sets: one module of `sets` for each, shared code, and the metrics that score answers."""
