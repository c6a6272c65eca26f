"""A CPU's own way to run a model: its stages as graphs that OpenVINO compiles for the processor."""
