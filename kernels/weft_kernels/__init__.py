"""Batched LoRA, quantized linear and attention operators: one folder per op, each with a reference that defines it."""
