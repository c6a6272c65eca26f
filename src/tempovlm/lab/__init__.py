"""The experiments, a folder each, and the modules that they share. The code that answers imports none of it."""
