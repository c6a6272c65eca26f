"""Content of the scenes: charts, companies and their signs, facts, objects that carry text."""
