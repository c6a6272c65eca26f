"""Exp 3: the first stage of the two-stage controller, trained on labels."""
