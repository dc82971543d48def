"""Real sites: data that stays at different organisations, one process each, and a server among them."""
