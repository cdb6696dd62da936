"""Batched LoRA in plain PyTorch: the definition of the op, and the CPU path.

Loops over the adapters present in the batch, never over tokens. Where that is mostly the cost of calling
products, adapters are multiplied together: those of few rows in stacks (`stacks.py`), those of equally many
rows as one batched product. Differentiable by autograd through `x`, `y` and the arena, in any float dtype
(float64 serves as an oracle). Arguments are checked by the package's entry points.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from weft_kernels.exact_products import bf16_valued
from weft_kernels.lora.batch import EvenRun, LoraBatch
from weft_kernels.lora.dropout import LoraDropout, dropout_mask
from weft_kernels.lora.stacks import Stacked
from weft_kernels.lora.table import LoraGroup, LoraTable
from weft_kernels.lora.widening import Widener


def lora_forward(
    x: Tensor,
    y: Tensor,
    table: LoraTable,
    layer: int,
    modules: tuple[int, ...],
    widths: Sequence[int],
    batch: LoraBatch,
    dropout: LoraDropout | None = None,
) -> None:
    """`y[:, columns of m] += s_m (drop_m(x) A_mᵀ) B_m`; see `weft_kernels.lora.lora_forward`."""
    columns = _columns(widths)
    if dropout is not None and dropout.active:
        segments: Iterable[tuple[int, slice | Tensor]] = _segments(batch)
    else:
        segments = _add_together(x, y, table, layer, modules, columns, batch)
    for slot, rows in segments:
        group = table.group(slot, layer, modules)
        if group is None:
            continue
        x_rows = _take(x, rows)
        v = _shrink(x_rows, group, _masks(dropout, rows, layer, modules, group))
        for member, entry, first, last in group.members:
            start, end = columns[member]
            _add_product(y, rows, start, end, v[:, first:last], _as(entry.b, x), entry.scale)


def _add_together(
    x: Tensor,
    y: Tensor,
    table: LoraTable,
    layer: int,
    modules: tuple[int, ...],
    columns: Sequence[tuple[int, int]],
    batch: LoraBatch,
) -> Iterable[tuple[int, slice | Tensor]]:
    """Add the updates of segments that are multiplied together; the segments that remain."""
    few, many, even = batch.groups.few, batch.groups.many, batch.groups.even
    alone = () if few is None else few.segments
    if few is not None and _may_stack(x, y, table):
        stacked = table.stacks.find(batch, few, table, layer, modules)
        if stacked is not None:
            _add_stacked(x, y, stacked, columns)
            alone = stacked.rest
    if even is not None:
        groups = [table.group(slot, layer, modules) for slot, _ in many]
        if _are_alike(groups, x):
            _add_even(x, y, [group for group in groups if group is not None], even, columns)
            many = ()
    return (*alone, *many)


def _may_stack(x: Tensor, y: Tensor, table: LoraTable) -> bool:
    needs_autograd = torch.is_grad_enabled() and (x.requires_grad or table.weights.requires_grad)
    return not needs_autograd and x.dtype == y.dtype == table.weights.dtype


def _add_stacked(x: Tensor, y: Tensor, stacked: Stacked, columns: Sequence[tuple[int, int]]) -> None:
    v = stacked.group.a.product(_take(x, stacked.rows)).masked_fill_(stacked.foreign, 0.0)
    for block in stacked.group.blocks:
        start, end = columns[block.first_member][0], columns[block.end_member - 1][1]
        delta = block.b.product(v[:, block.rank_start : block.rank_end])
        _add_rows(y, stacked.rows, start, end, delta, 1.0)


def _are_alike(groups: Sequence[LoraGroup | None], x: Tensor) -> bool:
    """Whether the adapters have the same modules, ranks and scales, so that one batched product serves
    all."""
    first = groups[0]
    if first is None or any(group is None or group.stacked_a is None for group in groups):
        return False
    shape = [(member, entry.rank, entry.scale) for member, entry, _, _ in first.members]
    return first.members[0][1].a.dtype == x.dtype and all(
        group is not None
        and [(member, entry.rank, entry.scale) for member, entry, _, _ in group.members] == shape
        for group in groups
    )


def _add_even(
    x: Tensor,
    y: Tensor,
    groups: Sequence[LoraGroup],
    run: EvenRun,
    columns: Sequence[tuple[int, int]],
) -> None:
    """Segments of equal length as one batch: `[adapters, rows, ...]`."""
    end = run.first + len(groups) * run.length
    x_rows = x[run.first : end].view(len(groups), run.length, -1)
    y_rows = y[run.first : end].view(len(groups), run.length, -1)
    stacked_a = _side_by_side([group.stacked_a for group in groups if group.stacked_a is not None])
    v = torch.bmm(x_rows, stacked_a.mT)
    for i, (member, entry, first, last) in enumerate(groups[0].members):
        start, stop = columns[member]
        stacked_b = _side_by_side([group.members[i][1].b for group in groups])
        y_rows[:, :, start:stop].baddbmm_(v[:, :, first:last], stacked_b, alpha=entry.scale)


def _side_by_side(matrices: Sequence[Tensor]) -> Tensor:
    """Equal views of one arena as `[adapters, ...]`: without a copy where they lie at even distances, as
    adapters that were loaded one after the other do."""
    first, second = matrices[0], matrices[1]
    step = second.storage_offset() - first.storage_offset()
    offsets = [matrix.storage_offset() for matrix in matrices]
    if step <= 0 or offsets != list(range(offsets[0], offsets[0] + step * len(matrices), step)):
        return torch.stack(list(matrices))
    return first.as_strided((len(matrices), *first.shape), (step, *first.stride()))


def _segments(batch: LoraBatch) -> list[tuple[int, slice | Tensor]]:
    return [(slot, rows) for (slot, _, _), rows in zip(batch.segments, batch.rows, strict=True)]


@torch.no_grad()
def lora_backward(
    x: Tensor,
    dy: Tensor,
    dx: Tensor,
    grads: Mapping[int, Tensor],
    table: LoraTable,
    layer: int,
    modules: tuple[int, ...],
    widths: Sequence[int],
    batch: LoraBatch,
    dropout: LoraDropout | None = None,
) -> None:
    """Adds to `dx` and to the flat gradients; see `weft_kernels.lora.lora_backward`."""
    columns = _columns(widths)
    for slot, rows in _segments(batch):
        group = table.group(slot, layer, modules)
        if group is None:
            continue
        dy_rows = _take(dy, rows)
        masks = _masks(dropout, rows, layer, modules, group)
        u = dy_rows.new_empty(dy_rows.shape[0], group.num_ranks)
        for member, entry, first, last in group.members:
            start, end = columns[member]
            u[:, first:last].addmm_(dy_rows[:, start:end], _as(entry.b, dy).mT, beta=0, alpha=entry.scale)
        _add_input_grad(dx, rows, u, group, masks)
        if slot in grads:
            x_rows, widener = _take(x, rows), table.widener
            v = _shrink(x_rows, group, masks)
            with bf16_valued(torch.promote_types(x.dtype, dy.dtype)):
                _add_a_grads(grads[slot], x_rows, u, group, masks, widener)
                _add_b_grads(grads[slot], v, dy_rows, group, columns, widener)


def _shrink(x: Tensor, group: LoraGroup, masks: list[Tensor] | None) -> Tensor:
    """`drop(x) Aᵀ` of all members side by side: [rows, sum of ranks]."""
    if masks is None and group.stacked_a is not None:
        return torch.mm(x, _as(group.stacked_a, x).mT)
    parts = [
        (x if masks is None else _drop(x, masks[i])) @ _as(entry.a, x).mT
        for i, (_, entry, _, _) in enumerate(group.members)
    ]
    return torch.cat(parts, dim=1)


def _add_input_grad(
    dx: Tensor, rows: slice | Tensor, u: Tensor, group: LoraGroup, masks: list[Tensor] | None
) -> None:
    """`dx[rows] += Σ_m mask_m · (u_m A_m)`."""
    if masks is None and group.stacked_a is not None:
        _add_product(dx, rows, 0, dx.shape[1], u, _as(group.stacked_a, u), 1.0)
        return
    for i, (_, entry, first, last) in enumerate(group.members):
        if masks is None:
            _add_product(dx, rows, 0, dx.shape[1], u[:, first:last], _as(entry.a, u), 1.0)
        else:
            _add_rows(dx, rows, 0, dx.shape[1], _drop(u[:, first:last] @ _as(entry.a, u), masks[i]), 1.0)


def _add_a_grads(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    group: LoraGroup,
    masks: list[Tensor] | None,
    widener: Widener,
) -> None:
    """`dA += uᵀ drop(x)`, products and sums in the gradient's dtype."""
    u_t = _transposed(u, grad.dtype)
    if masks is None and group.stacked_a is not None:
        d_a = _matrix(grad, group.members[0][1].a_offset, group.num_ranks, group.in_features)
        for rows, x_wide in widener.chunks(x, grad.dtype):
            d_a.addmm_(u_t[:, rows], x_wide)
        return
    for i, (_, entry, first, last) in enumerate(group.members):
        d_a = _matrix(grad, entry.a_offset, entry.rank, group.in_features)
        dropped = x if masks is None else _drop(x, masks[i])
        for rows, x_wide in widener.chunks(dropped, grad.dtype):
            d_a.addmm_(u_t[first:last, rows], x_wide)


def _add_b_grads(
    grad: Tensor,
    v: Tensor,
    dy: Tensor,
    group: LoraGroup,
    columns: Sequence[tuple[int, int]],
    widener: Widener,
) -> None:
    """`dB += s vᵀ dy` for `v = drop(x) Aᵀ`, products and sums in the gradient's dtype."""
    v_t = _transposed(v, grad.dtype)
    for rows, dy_wide in widener.chunks(dy, grad.dtype):
        for member, entry, first, last in group.members:
            start, end = columns[member]
            d_b = _matrix(grad, entry.b_offset, entry.rank, end - start)
            d_b.addmm_(v_t[first:last, rows], dy_wide[:, start:end], alpha=entry.scale)


def _transposed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy of the transpose: the library reads it faster than a view."""
    return matrix.new_empty(matrix.shape[::-1], dtype=dtype).copy_(matrix.mT)


def _masks(
    dropout: LoraDropout | None, rows: slice | Tensor, layer: int, modules: tuple[int, ...], group: LoraGroup
) -> list[Tensor] | None:
    """One multiplier [rows, K] per member, or None where no row of the segment drops anything."""
    if dropout is None or not dropout.active:
        return None
    selected = dropout.select(rows)
    if not bool((selected.p > 0).any()):
        return None
    return [dropout_mask(selected, layer, modules[i], group.in_features) for i, _, _, _ in group.members]


def _drop(x: Tensor, mask: Tensor) -> Tensor:
    # Rounded once; a non-finite value in a dropped place vanishes, as it does in the kernels.
    return torch.where(mask != 0, x * mask, 0.0).to(x.dtype)


def _take(x: Tensor, rows: slice | Tensor) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _add_product(
    out: Tensor, rows: slice | Tensor, start: int, end: int, left: Tensor, right: Tensor, scale: float
) -> None:
    """`out[rows, start:end] += scale · left @ right`, in place."""
    if isinstance(rows, slice) and out.dtype == left.dtype:
        out[rows, start:end].addmm_(left, right, alpha=scale)
    else:
        _add_rows(out, rows, start, end, left @ right, scale)


def _add_rows(out: Tensor, rows: slice | Tensor, start: int, end: int, delta: Tensor, scale: float) -> None:
    if isinstance(rows, slice):
        out[rows, start:end].add_(delta, alpha=scale)
    else:
        out[:, start:end].index_add_(0, rows, delta.to(out.dtype), alpha=scale)


def _columns(widths: Sequence[int]) -> list[tuple[int, int]]:
    columns, start = [], 0
    for width in widths:
        columns.append((start, start + width))
        start += width
    return columns


def _matrix(flat: Tensor, offset: int, num_rows: int, num_columns: int) -> Tensor:
    return flat.narrow(0, offset, num_rows * num_columns).view(num_rows, num_columns)


def _as(weight: Tensor, like: Tensor) -> Tensor:
    return weight if weight.dtype == like.dtype else weight.to(like.dtype)
