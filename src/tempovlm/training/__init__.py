"""The recipe of the pocket model and its tokenizer; not imported to answer."""
