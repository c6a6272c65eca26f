"""Values that every layer shares: knobs, plans, requests, costs. Imports neither torch nor NumPy."""
