"""Metrics for open answers, multiple choice and captions, as the data sets' owners compute them."""
