"""Without a CUDA device, Triton kernels run in its interpreter, which must be chosen before the first import of triton
(transformers, peft and bitsandbytes import it too)."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
