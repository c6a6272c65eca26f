"""Exp 7: accuracy and latency of every setting, as a table and figures."""
