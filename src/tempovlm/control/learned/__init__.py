"""Learned policies: the networks, what they look at, and their arithmetic on the host."""
