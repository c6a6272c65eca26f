"""The data sets: a module for each, named after it, that declares `DATA_SET`."""
