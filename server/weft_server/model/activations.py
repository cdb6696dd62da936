"""What a layer computes on the way to its output, and what of it a finetuning pack may keep for its
backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from weft_server.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """For `T` rows, all contiguous, in the compute dtype but for `stats`; given them and the layer's input,
    the backward multiplies by no base weight forward.

    `qkv` `[T, (H + 2 Hkv) D]` is the projection before head norms and rotation, `context` `[T, H, D]`
    attention's output and `stats` `[T, H]` fp32 its statistics, `mid` `[T, hidden]` the residual after
    attention, `gate_up` `[T, 2 intermediate]`.
    """

    qkv: Tensor
    context: Tensor
    stats: Tensor
    mid: Tensor
    gate_up: Tensor

    @staticmethod
    def empty(
        config: ModelConfig, leading: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> LayerActivations:
        """Uninitialized, with `leading` in place of `T`."""
        num_heads, head_dim = config.num_heads, config.head_dim
        qkv_size = (num_heads + 2 * config.num_kv_heads) * head_dim

        def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty((*leading, *shape), dtype=dtype, device=device)

        return LayerActivations(
            qkv=make(qkv_size),
            context=make(num_heads, head_dim),
            stats=make(num_heads, dtype=torch.float32),
            mid=make(config.hidden_size),
            gate_up=make(2 * config.intermediate_size),
        )

    @staticmethod
    def bytes_per_row(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes of one row."""
        return LayerActivations.empty(config, (1,), dtype, torch.device("meta")).nbytes

    @staticmethod
    def cat(parts: Sequence[LayerActivations]) -> LayerActivations:
        """The rows of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(part.tensors for part in parts), strict=True)
        return LayerActivations(*(torch.cat(column) for column in columns))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of their fields."""
        return tuple(getattr(self, each.name) for each in fields(self))

    @property
    def num_rows(self) -> int:
        """`T`."""
        return self.mid.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def __getitem__(self, idx: slice | int | tuple[int, slice]) -> LayerActivations:
        """Views of the same part of all of them."""
        return self.map(lambda tensor: tensor[idx])

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerActivations:
        """A function of each of them."""
        return LayerActivations(*map(function, self.tensors))

    def copy_(self, source: LayerActivations) -> None:
        """Overwrite them."""
        for own, other in zip(self.tensors, source.tensors, strict=True):
            own.copy_(other)
