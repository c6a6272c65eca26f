"""How answers are scored: open answers, multiple choice and captions, each as its owners compute it."""
