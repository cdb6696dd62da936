"""Token-level finetuning: what a job is, how its examples become packs, and the windowed, layer-major
backward.

Knows nothing of requests, HTTP or stores: a job gets bytes (dataset, checkpoint, adapter) and gives bytes.
"""
