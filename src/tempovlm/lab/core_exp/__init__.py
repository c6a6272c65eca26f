"""The core experiment: every question at every setting, for accuracy in batches, then for latency alone."""
