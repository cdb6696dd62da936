"""Without a CUDA device, Triton runs in its interpreter, which must be chosen before the first import of
triton (transformers, peft and bitsandbytes import it too)."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The models of these tests are tiny: one thread is fastest, and does not spin beside the tests' servers.
torch.set_num_threads(1)
