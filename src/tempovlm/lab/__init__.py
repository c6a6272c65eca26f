"""The experiments: a room for each, and beside them what they share. The product imports nothing from here."""
