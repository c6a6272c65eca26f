"""Policies for a shared lane: accuracies learned by regression, and what GRPO over its queue changes in them."""
