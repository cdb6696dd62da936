"""The base model: configuration, weights, decoder."""
