"""The eight experiments: scripts, recipes, and the table of targets and measured figures."""
