"""Adapter loads: from host memory into the arena, table entries included."""

from __future__ import annotations

from collections.abc import Iterator

from weft_server.adapters.arena import AdapterArena
from weft_server.adapters.image import HostImage
from weft_server.bench.kernels.case import OpCase, Subject, relative_error
from weft_server.bench.models import RandomModel
from weft_server.bench.shapes import Shape


def cases(subject: Subject, shape: Shape) -> Iterator[OpCase]:
    """A rank-16 adapter of all linears of the whole model."""
    model = RandomModel(shape, dtype=subject.dtype, device=subject.device, seed=subject.seed)
    adapter = model.adapter(0)
    image = HostImage.build(adapter, subject.dtype, pin_memory=subject.on_gpu)
    arena = AdapterArena(
        image.num_elements, 1, model.config.num_layers, dtype=subject.dtype, device=subject.device
    )

    def load() -> None:
        arena.load(0, 0, image)
        arena.clear(0)

    def error() -> float:
        arena.weights.zero_()
        load()
        return relative_error(arena.weights[: image.num_elements].cpu(), image.weights)

    yield OpCase(
        op="adapter load",
        shape=f"rank 16, all linears of {shape.name}",
        # On a CPU the copy reads and writes the same memory.
        num_bytes=image.nbytes if subject.on_gpu else 2 * image.nbytes,
        flops=0.0,
        run=load,
        error=error,
        crosses_link=subject.on_gpu,
    )
