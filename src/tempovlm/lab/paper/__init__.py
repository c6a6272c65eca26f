"""Results as papers need them: tidy tables, LaTeX tabulars and vector figures."""
