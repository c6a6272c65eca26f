"""What is drawn and asked about: charts, companies and their signs, facts, objects that carry text."""
