"""Benchmark of a policy over questions and budgets: runs, summaries and the page that shows them."""
