"""The table of targets and measured figures, made from the repository's result files."""
