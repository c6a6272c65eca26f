"""Exp 1: trains the latency estimator and compares it with simpler models."""
