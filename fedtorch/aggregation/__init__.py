"""How what clients send becomes one change of the model."""
