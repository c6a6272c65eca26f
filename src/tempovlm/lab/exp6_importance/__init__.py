"""Exp 6: how important each transformer block is, and whether data sets agree on it."""
