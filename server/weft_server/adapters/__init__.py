"""Adapters: LoRA configuration, PEFT-format I/O, the packed layout, host images and the device arena."""
