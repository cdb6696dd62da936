"""What all contenders share: the model's shape, adapters and training examples, made from seeds.

Every process makes them again instead of passing gigabytes around; equal settings give equal tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from weft_server.adapters.packed import PackedAdapter
from weft_server.bench.models import RandomModel
from weft_server.bench.shapes import Shape
from weft_server.engine.sizing import choose_device, choose_dtype


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings of a run, the same for every contender.

    `hf_config` is the content of the model's `config.json`. An optimizer step is `examples_per_step` examples
    of `example_tokens` tokens, of which the peer takes `peer_micro_batch` at a time. `max_batch` bounds the
    sequences that generate at a time.
    """

    shape_name: str
    hf_config: Mapping[str, Any]
    device: str = "cpu"
    dtype: str = "bfloat16"
    quantization: str = "none"
    max_model_len: int = 2048
    num_adapters: int = 4
    rank: int = 16
    example_tokens: int = 512
    examples_per_step: int = 4
    learning_rate: float = 1e-4
    max_batch: int = 32
    peer_micro_batch: int = 1
    seed: int = 0

    @property
    def shape(self) -> Shape:
        """The model's shape."""
        return Shape(self.shape_name, self.hf_config)

    def random_model(self) -> RandomModel:
        """The weights, on the device of the setup."""
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        return RandomModel(self.shape, dtype=dtype, device=device, seed=self.seed)


def make_adapters(setup: Setup, model: RandomModel) -> list[PackedAdapter]:
    """The adapters, fp32, all of the setup's rank; training continues the first of them."""
    return [model.adapter(setup.seed + idx, setup.rank) for idx in range(setup.num_adapters)]


def make_examples(setup: Setup) -> npt.NDArray[np.int64]:
    """The examples of a step, `[examples_per_step, example_tokens]`: every step is all of them, whatever the
    order in which they are drawn.
    """
    rng = np.random.default_rng(setup.seed)
    size = (setup.examples_per_step, setup.example_tokens)
    return rng.integers(0, int(setup.hf_config["vocab_size"]), size)


def make_dataset(setup: Setup) -> bytes:
    """The same examples as Weft's tokenized dataset; every token is a target."""
    tokens = make_examples(setup)
    tensors = {
        "tokens": tokens.reshape(-1).astype(np.int32),
        "targets": np.ones(tokens.size, dtype=np.uint8),
        "offsets": np.arange(0, tokens.size + 1, setup.example_tokens, dtype=np.int64),
        "lines": np.arange(1, len(tokens) + 1, dtype=np.int32),
    }
    data: bytes = safetensors.numpy.save(tensors)
    return data
