"""Where the tensors of an adapter lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft_scheduler import extents
from weft_server.adapters.layout import ALIGNMENT, MODULES, AdapterLayout

WIDTHS = st.integers(1, 200)


@st.composite
def layouts(draw: st.DrawFn) -> AdapterLayout:
    num_layers = draw(st.integers(1, 4))
    shapes = {module: (draw(WIDTHS), draw(WIDTHS)) for module in MODULES}
    places = st.tuples(st.integers(0, num_layers - 1), st.sampled_from(MODULES))
    ranks = draw(st.dictionaries(places, st.integers(1, 256), min_size=1))
    return AdapterLayout.build(num_layers, shapes, ranks)


@given(layouts())
def test_tensors_are_aligned_and_never_overlap(layout):
    spans = []
    for entry in layout:
        spans.append((entry.a_offset, entry.rank * entry.in_features))
        spans.append((entry.b_offset, entry.rank * entry.out_features))
    end = 0
    for offset, size in sorted(spans):
        assert offset % ALIGNMENT == 0
        assert end <= offset < end + ALIGNMENT
        end = offset + size
    assert end <= layout.num_elements < end + ALIGNMENT
    assert layout.num_elements % ALIGNMENT == 0
    assert layout.num_parameters == sum(size for _, size in spans)


@given(layouts())
def test_views_cover_the_vector_except_its_padding(layout):
    flat = torch.zeros(layout.num_elements)
    for entry in layout:
        layout.a(flat, entry.layer, entry.module_name).add_(1)
        layout.b(flat, entry.layer, entry.module).add_(1)
    assert flat.max() == 1
    assert int(flat.sum()) == layout.num_parameters


def test_inputs_that_are_shared_have_neighbouring_a_tensors():
    shapes = dict.fromkeys(MODULES, (64, 128))
    ranks = {(0, "q_proj"): 4, (0, "k_proj"): 2, (0, "v_proj"): 3, (0, "gate_proj"): 1, (0, "up_proj"): 5}
    layout = AdapterLayout.build(1, shapes, ranks)
    q, k, v, gate, up = (
        layout.lookup(0, name) for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    )
    assert (k.a_offset, v.a_offset) == (q.a_offset + 4 * 64, q.a_offset + 6 * 64)
    assert up.a_offset == gate.a_offset + 64
    assert [entry.module for entry in layout] == [0, 1, 2, 4, 5]


def test_absent_modules_take_no_space_and_are_not_found():
    layout = AdapterLayout.build(3, {"q_proj": (64, 64), "v_proj": (64, 64)}, {(1, "q_proj"): 2})
    assert layout.num_elements == 2 * 2 * 64
    assert layout.lookup(0, "q_proj") is None
    assert layout.lookup(1, "v_proj") is None
    assert layout.lookup(1, "q_proj").rank == 2
    assert (layout.max_rank, layout.module_names) == (2, ("q_proj",))
    with pytest.raises(KeyError, match="v_proj in layer 1"):
        layout.a(torch.zeros(256), 1, "v_proj")


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ({}, "at least one"),
        ({(2, "q_proj"): 4}, "layer 2"),
        ({(0, "k_proj"): 4}, "'k_proj'"),
        ({(0, "lm_head"): 4}, "'lm_head'"),
        ({(0, "q_proj"): 0}, "rank 0"),
        ({(0, "q_proj"): 257}, "rank 257"),
    ],
)
def test_an_impossible_layout_is_refused(ranks, named):
    with pytest.raises(ValueError, match=named):
        AdapterLayout.build(2, {"q_proj": (8, 8)}, ranks)


def test_scheduler_and_kernels_agree_on_the_alignment():
    assert extents.ALIGNMENT == ALIGNMENT
