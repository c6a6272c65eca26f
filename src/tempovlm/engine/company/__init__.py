"""Requests of several callers answered together."""
