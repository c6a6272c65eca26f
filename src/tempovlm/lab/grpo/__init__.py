"""Group-relative policy optimisation: the algorithm, the policies that it trains, their inputs and reports."""
