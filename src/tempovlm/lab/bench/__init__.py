"""A policy asked question after question under budgets: runs, summaries and the page that shows them."""
