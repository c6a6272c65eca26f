"""The table of promised against measured figures, made from the repository's result files."""
