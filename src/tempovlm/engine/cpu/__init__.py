"""A CPU's own way to run a model: all stages by kernels in C, compiled once for the processor."""
