"""Exp 6: the importance of each transformer block, and whether data sets agree on it."""
