"""Captured CUDA graphs of the vision side, the prompt and the decode steps."""
