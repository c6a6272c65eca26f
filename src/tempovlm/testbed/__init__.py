"""The generated test bed: pictures and questions, drawn from a seed, that stand in for some of the data sets."""

EDITION = 1
"""Edition of the questions that are drawn unless a caller names one: the one that the shipped pocket has learned.

1 asks about one thing at a time. 2 adds questions whose answer costs something else each: several steps, rare
facts, small print, or nothing of all; and a fixed share of yes or no. With a pocket that was trained on the second
edition comes 2 here, and then nothing of the first is left.
"""

EDITIONS = (1, 2)

NOTICE = "SYNTHETIC.md"
"""File that marks a folder as generated."""
