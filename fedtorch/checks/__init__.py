"""What is tried before the first round."""
