"""Batched LoRA, quantized linear and attention operators: one folder per operator."""
