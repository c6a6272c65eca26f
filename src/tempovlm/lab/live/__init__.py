"""Starts `tempovlm serve` and asks it over HTTP, as clients do, by the client's clock."""
