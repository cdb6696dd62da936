"""QuantizedLinear: one frozen linear layer, whatever format its weight is kept in.

Owns the choice between products with the packed weight and with a dense one, and the fusion of several layers
that read the same input. Knows nothing of LoRA, of model architectures or of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels import int8, nf4
from weft_kernels.int8 import Int8Weight
from weft_kernels.nf4 import Nf4Weight
from weft_kernels.prepacked import PrepackedWeight, lay_out
from weft_kernels.product import PlanTable

Format = Literal["none", "nf4", "int8"]


class QuantizedLinear:
    """y = x Wᵀ + bias for a frozen W [N, K].

    The weight is held packed (nf4, int8), dense in the compute dtype, or both: then the dense copy is an
    expansion that may be released. On a CPU a dense weight may instead be laid out for the library's GEMM
    (`prepack`). Products of all forms differ in the order of summation only.

    Attributes:
        in_features, out_features: K and N.
        bias: [N] in the compute dtype, or None.
        dtype: the compute dtype; inputs must have it.
        format: the format that defines the weight's values, also after expansion.
        plans: how a GPU computes products with the packed weight, as measured; None: as documented defaults
            say.
    """

    __slots__ = (
        "_dense",
        "_laid_out",
        "_laid_out_for_grad",
        "_packed",
        "_wants_grad_layout",
        "bias",
        "dtype",
        "format",
        "in_features",
        "out_features",
        "plans",
    )

    def __init__(
        self,
        weight: Tensor | Nf4Weight | Int8Weight,
        *,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        expanded: bool = False,
    ) -> None:
        """Wraps a weight, which is not copied when it already has the wanted form.

        Args:
            weight: dense [N, K], or packed.
            dtype: the compute dtype.
            bias: [N] or None.
            expanded: replace a packed weight by its dense values now, and drop the packed form.

        Raises:
            ValueError: the weight is not a matrix, or the bias does not fit it.
        """
        self.dtype = dtype
        self.plans: PlanTable | None = None
        self._packed: Nf4Weight | Int8Weight | None = None
        self._dense: Tensor | None = None
        self._laid_out: PrepackedWeight | None = None
        self._laid_out_for_grad: PrepackedWeight | None = None
        self._wants_grad_layout = False
        self.format: Format = "none"
        if isinstance(weight, Tensor):
            if weight.ndim != 2:
                raise ValueError(f"a linear weight is a matrix, not of shape {tuple(weight.shape)}")
            self._dense = weight.to(dtype)
            self.out_features, self.in_features = weight.shape
        else:
            self._packed = weight
            self.format = "nf4" if isinstance(weight, Nf4Weight) else "int8"
            self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias of shape {tuple(bias.shape)} does not fit {self.out_features} outputs")
        self.bias = None if bias is None else bias.to(dtype)
        if expanded and self._packed is not None:
            self._dense = self.weight_dense()
            self._packed = None

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] in the compute dtype -> [T, N]; differentiable by autograd where x requires it."""
        if self._laid_out is not None and not _needs_autograd(x):
            return self._laid_out.product(x, self.bias)
        if self._wants_dense(x):
            return F.linear(x, self.weight_dense(), self.bias)
        plan = None if self.plans is None else self.plans.plan("forward", x.shape[0])
        if isinstance(self._packed, Nf4Weight):
            return nf4.nf4_linear(x, self._packed, self.bias, plan)
        assert self._packed is not None
        return int8.int8_linear(x, self._packed, self.bias, plan)

    def input_grad(self, dy: Tensor) -> Tensor:
        """dy [T, N] in the compute dtype -> dx = dy W [T, K]. The bias has no part in it."""
        if self._wants_grad_layout:
            self._laid_out_for_grad = lay_out(self.weight_dense().mT)
            self._wants_grad_layout = False
        if self._laid_out_for_grad is not None and not _needs_autograd(dy):
            return self._laid_out_for_grad.product(dy)
        if self._wants_dense(dy):
            return dy @ self.weight_dense()
        plan = None if self.plans is None else self.plans.plan("input_grad", dy.shape[0])
        if isinstance(self._packed, Nf4Weight):
            return nf4.nf4_input_grad(dy, self._packed, plan)
        assert self._packed is not None
        return int8.int8_input_grad(dy, self._packed, plan)

    def _wants_dense(self, rows: Tensor) -> bool:
        if self._packed is None or self._dense is not None:
            return True
        return _needs_autograd(rows)

    def prepack(self) -> None:
        """Lays a dense weight out for the library's GEMM, in place of the dense copy.

        No effect where the library offers none, or the weight is kept packed. The first `input_grad` adds a
        second layout, for the product in the other direction, unless `forgo_grad_layout` came before it.
        """
        if self._dense is None:
            return
        self._laid_out = lay_out(self._dense)
        if self._laid_out is not None:
            self._dense = None
            self._wants_grad_layout = True

    def forgo_grad_layout(self) -> None:
        """Gradients are computed on a dense copy that is made at each use: half the memory of a prepacked
        weight."""
        self._wants_grad_layout = False

    @property
    def deferred_nbytes(self) -> int:
        """Bytes that the first `input_grad` is going to take for good."""
        return self._laid_out.nbytes if self._laid_out is not None and self._wants_grad_layout else 0

    def weight_dense(self) -> Tensor:
        """W [N, K] in the compute dtype: the dense copy itself if there is one, else freshly made."""
        if self._dense is not None:
            return self._dense
        if self._laid_out is not None:
            return self._laid_out.dense()
        if isinstance(self._packed, Nf4Weight):
            return nf4.dequantize(self._packed, self.dtype)
        assert self._packed is not None
        return int8.dequantize(self._packed, self.dtype)

    def expand(self) -> None:
        """Keeps a dense copy beside the packed weight, for speed. No effect when there is one."""
        if self._laid_out is None:
            self._dense = self.weight_dense()

    def release_expansion(self) -> None:
        """Drops the dense copy that `expand` made. No effect on a weight that exists only dense."""
        if self._packed is not None:
            self._dense = None

    @property
    def packed(self) -> Nf4Weight | Int8Weight | None:
        """The packed weight, or None when the layer exists only dense."""
        return self._packed

    @property
    def is_expanded(self) -> bool:
        """Whether products run on a dense weight."""
        return self._dense is not None or self._laid_out is not None

    @property
    def nbytes(self) -> int:
        """Bytes held: packed form, dense form, layouts and bias."""
        parts = (self._packed, self._dense, self._laid_out, self._laid_out_for_grad, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    def __repr__(self) -> str:
        kinds = (("packed", self._packed), ("dense", self._dense), ("prepacked", self._laid_out))
        form = "+".join(name for name, weight in kinds if weight is not None)
        return (
            f"QuantizedLinear({self.in_features} -> {self.out_features}, {self.format}, {form},"
            f" {self.dtype}, bias={self.bias is not None})"
        )


def _needs_autograd(rows: Tensor) -> bool:
    return rows.requires_grad and torch.is_grad_enabled()


def fuse(parts: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """One layer that computes all `parts` (which read the same input) side by side, in order, along N.

    Packed weights of one format stay packed where their layouts can be joined; otherwise the result is dense,
    with the same values. Where only some parts have a bias, the others contribute zeros.

    Raises:
        ValueError: no parts, or parts that differ in in_features or compute dtype.
    """
    if not parts:
        raise ValueError("nothing to fuse")
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(part.in_features != first.in_features or part.dtype != first.dtype for part in parts):
        raise ValueError(f"layers that differ in input or dtype cannot be fused: {list(parts)}")
    bias = _fuse_biases(parts)
    nf4_parts = [part.packed for part in parts if isinstance(part.packed, Nf4Weight)]
    if len(nf4_parts) == len(parts) and nf4.can_concatenate(nf4_parts):
        return QuantizedLinear(nf4.concatenate(nf4_parts), dtype=first.dtype, bias=bias)
    int8_parts = [part.packed for part in parts if isinstance(part.packed, Int8Weight)]
    if len(int8_parts) == len(parts):
        codes = torch.cat([weight.codes for weight in int8_parts])
        scales = torch.cat([weight.scales for weight in int8_parts])
        return QuantizedLinear(Int8Weight(codes=codes, scales=scales), dtype=first.dtype, bias=bias)
    dense = torch.cat([part.weight_dense() for part in parts])
    fused = QuantizedLinear(dense, dtype=first.dtype, bias=bias)
    if len({part.format for part in parts}) == 1:
        fused.format = first.format
    return fused


def _fuse_biases(parts: Sequence[QuantizedLinear]) -> Tensor | None:
    given = [part.bias for part in parts if part.bias is not None]
    if not given:
        return None
    return torch.cat(
        [given[0].new_zeros(part.out_features) if part.bias is None else part.bias for part in parts]
    )
