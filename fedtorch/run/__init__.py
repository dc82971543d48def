"""A run from its options to its results: what stands around the rounds."""
