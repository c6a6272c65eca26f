"""Policies compared offline on the core experiment's rows: inputs, trials, statistics and the report."""
