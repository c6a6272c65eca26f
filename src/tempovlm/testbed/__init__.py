"""The generated test bed: pictures and questions, drawn from a seed, that stand in for some of the data sets."""

NOTICE = "SYNTHETIC.md"
"""File that marks a folder as generated."""
