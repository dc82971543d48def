"""Who is in a round, at what rate, and its figures."""
