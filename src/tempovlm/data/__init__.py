"""What a right answer is: samples, scores, the catalog of data sets and the generated test bed.

It does not know which model answers, how long that takes or who chose the setting.
"""
