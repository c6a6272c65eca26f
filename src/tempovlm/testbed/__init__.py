"""The generated test bed: pictures and questions, drawn from a seed, that stand in for some of the data sets."""

EDITION = 2
"""Edition of the questions that are drawn, the one that the shipped pocket has learned.

Results name it, since other questions about the same pictures give other results.
"""

NOTICE = "SYNTHETIC.md"
"""File that marks a folder as generated."""
