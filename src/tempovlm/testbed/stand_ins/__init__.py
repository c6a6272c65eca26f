"""The stand-ins, one module for each data set that has one, under the data set's name."""
