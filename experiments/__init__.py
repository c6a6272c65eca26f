"""The eight experiments: scripts, how each was run, and the table of promised against measured figures."""
