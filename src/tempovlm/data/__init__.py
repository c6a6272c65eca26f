"""Data sets: one module of `sets` for each, what they share, and how answers are scored."""
