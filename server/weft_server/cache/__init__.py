"""Key/value cache tensors."""
