"""The Molmo architecture with a plan as an argument: crops in, logits out."""
