"""Diagrams of the second edition: what they show is large, what stands under it is small."""
