"""Files of a model's folder: weights, the fields of `config.json`, the card."""
