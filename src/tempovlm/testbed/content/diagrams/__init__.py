"""Diagrams: what they show is large, what stands under it is small."""
