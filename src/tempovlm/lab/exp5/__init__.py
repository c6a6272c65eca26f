"""Exp 5: all three knobs at once."""
