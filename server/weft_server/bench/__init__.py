"""`weft bench`: correctness first, then times against hardware ceilings, peers and targets.

Parts: `kernels` (each operator), `decode`, `prefill`, `train` (the engine in this process), and those that
measure servers over HTTP. The engine-level parts run with torch, triton, safetensors, tokenizers and numpy
alone; peers are imported where they are installed, and otherwise reported as not measured.
"""
