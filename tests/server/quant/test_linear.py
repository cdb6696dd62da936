"""QuantizedLinear: the same products in every form, and fusion."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.prepacked import can_prepack
from weft_kernels.product import MAX_PLANNED_ROWS
from weft_server.quant import nf4
from weft_server.quant.encoding import encode
from weft_server.quant.linear import Format, QuantizedLinear, fuse

FORMATS: list[Format] = ["none", "nf4", "int8"]
K = 128


def make_linear(
    format: Format = "nf4",  # noqa: A002
    num_out: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    expanded: bool = False,
    seed: int = 0,
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_out, K, generator=generator, dtype=dtype) * 0.05
    bias_values = torch.randn(num_out, generator=generator, dtype=dtype) if bias else None
    return encode(weight, format=format, dtype=dtype, bias=bias_values, expanded=expanded)


def rows(num_rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(9), dtype=dtype)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("expanded", [False, True], ids=["packed", "expanded"])
@pytest.mark.parametrize("num_rows", [0, 1, 5, MAX_PLANNED_ROWS + 1])
def test_products_are_those_of_the_decoded_weight(
    format: Format,  # noqa: A002
    expanded: bool,
    num_rows: int,
) -> None:
    layer = make_linear(format, bias=True, expanded=expanded)
    x, dy = rows(num_rows, K), rows(num_rows, 64)
    weight = layer.weight_dense().double()
    assert layer.bias is not None
    expected = F.linear(x.double(), weight, layer.bias.double())
    torch.testing.assert_close(layer.forward(x).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.input_grad(dy).double(), dy.double() @ weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_expansion_changes_no_value_and_may_be_released(format: Format) -> None:  # noqa: A002
    packed, expanded = make_linear(format), make_linear(format, expanded=True)
    assert torch.equal(packed.weight_dense(), expanded.weight_dense())
    assert expanded.format == packed.format == format
    size = packed.nbytes
    packed.expand()
    assert packed.is_expanded
    assert packed.nbytes == (size if format == "none" else size + 64 * K * 4)
    assert torch.equal(packed.forward(rows(3, K)), expanded.forward(rows(3, K)))
    packed.release_expansion()
    assert packed.nbytes == size
    assert packed.is_expanded == (format == "none")
    expanded.release_expansion()
    assert expanded.is_expanded


def test_packed_formats_are_small() -> None:
    dense = make_linear("none", 1024).nbytes
    assert make_linear("int8", 1024).nbytes < dense * 0.26
    assert make_linear("nf4", 1024).nbytes < dense * 0.14


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_differentiable_in_float64(format: Format) -> None:  # noqa: A002
    layer = make_linear(format, dtype=torch.float64, bias=True)
    x = rows(4, K, torch.float64).requires_grad_()
    (dx,) = torch.autograd.grad(layer.forward(x), x, rows(4, 64, torch.float64))
    torch.testing.assert_close(dx, layer.input_grad(rows(4, 64, torch.float64)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("expanded", [False, True], ids=["packed", "expanded"])
@pytest.mark.parametrize("sizes", [(64, 32, 32), (256, 128), (5, 3)], ids=str)
def test_a_fused_layer_computes_its_parts_side_by_side(
    format: Format,  # noqa: A002
    expanded: bool,
    sizes: tuple[int, ...],
) -> None:
    parts = [make_linear(format, size, expanded=expanded, seed=i) for i, size in enumerate(sizes)]
    fused = fuse(parts)
    assert torch.equal(fused.weight_dense(), torch.cat([part.weight_dense() for part in parts]))
    assert (fused.in_features, fused.out_features, fused.format) == (K, sum(sizes), format)
    assert fused.is_expanded == (expanded or format == "none")
    expected = torch.cat([part.forward(rows(3, K)) for part in parts], dim=1)
    torch.testing.assert_close(fused.forward(rows(3, K)), expected, rtol=1e-5, atol=1e-6)


def test_parts_without_a_bias_contribute_zeros() -> None:
    with_bias, without = make_linear(bias=True), make_linear(num_out=32, seed=1)
    fused = fuse([with_bias, without])
    assert fused.bias is not None
    assert with_bias.bias is not None
    assert torch.equal(fused.bias, torch.cat([with_bias.bias, torch.zeros(32)]))
    assert fuse([without, without]).bias is None


def test_parts_of_different_formats_fuse_to_their_dense_values() -> None:
    parts = [make_linear("nf4"), make_linear("none", seed=1), make_linear("int8", seed=2)]
    fused = fuse(parts)
    assert fused.packed is None
    assert torch.equal(fused.weight_dense(), torch.cat([part.weight_dense() for part in parts]))


def test_nf4_parts_whose_blocks_straddle_rows_fuse_to_their_dense_values() -> None:
    weights = [torch.randn(3, 50), torch.randn(5, 50)]
    parts = [QuantizedLinear(nf4.quantize(weight), dtype=torch.float32) for weight in weights]
    assert torch.equal(fuse(parts).weight_dense(), torch.cat([part.weight_dense() for part in parts]))


def test_what_cannot_be_fused_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        fuse([])
    with pytest.raises(ValueError, match="cannot be fused"):
        fuse([make_linear(), QuantizedLinear(torch.zeros(4, K + 1), dtype=torch.float32)])
    with pytest.raises(ValueError, match="cannot be fused"):
        fuse([make_linear(), make_linear("none", dtype=torch.float64)])


def test_a_bias_or_weight_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        QuantizedLinear(torch.zeros(4, 5), dtype=torch.float32, bias=torch.zeros(5))
    with pytest.raises(ValueError, match="matrix"):
        QuantizedLinear(torch.zeros(4), dtype=torch.float32)


@pytest.fixture
def laid_out() -> QuantizedLinear:
    if not can_prepack(torch.device("cpu"), torch.bfloat16):
        pytest.skip("this machine's library lays no weights out")
    layer = make_linear("nf4", dtype=torch.bfloat16, bias=True, expanded=True)
    layer.prepack()
    return layer


def test_a_prepacked_layer_has_the_values_and_products_of_its_dense_form(laid_out: QuantizedLinear) -> None:
    dense = make_linear("nf4", dtype=torch.bfloat16, bias=True, expanded=True)
    x, dy = rows(5, K, torch.bfloat16), rows(5, 64, torch.bfloat16)
    assert torch.equal(laid_out.weight_dense(), dense.weight_dense())
    assert laid_out.is_expanded
    assert laid_out.format == "nf4"
    torch.testing.assert_close(laid_out.forward(x), dense.forward(x), rtol=1e-2, atol=1e-2)
    for _ in range(2):
        torch.testing.assert_close(laid_out.input_grad(dy), dense.input_grad(dy), rtol=1e-2, atol=1e-2)


def test_the_layout_for_gradients_is_made_by_the_first_of_them(laid_out: QuantizedLinear) -> None:
    size, dy = laid_out.nbytes, rows(5, 64, torch.bfloat16)
    assert size == make_linear("nf4", dtype=torch.bfloat16, bias=True, expanded=True).nbytes
    laid_out.forward(rows(5, K, torch.bfloat16))
    assert (laid_out.nbytes, laid_out.deferred_nbytes) == (size, 64 * K * 2)
    laid_out.input_grad(dy)
    assert (laid_out.nbytes, laid_out.deferred_nbytes) == (size + 64 * K * 2, 0)


def test_a_layout_for_gradients_may_be_forgone(laid_out: QuantizedLinear) -> None:
    size, dy = laid_out.nbytes, rows(5, 64, torch.bfloat16)
    laid_out.forgo_grad_layout()
    torch.testing.assert_close(laid_out.input_grad(dy), dy @ laid_out.weight_dense())
    assert (laid_out.nbytes, laid_out.deferred_nbytes) == (size, 0)


def test_a_prepacked_layer_is_differentiable_in_its_input(laid_out: QuantizedLinear) -> None:
    x = rows(5, K, torch.bfloat16).requires_grad_()
    dy = rows(5, 64, torch.bfloat16)
    laid_out.forward(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ laid_out.weight_dense())


def test_packed_weights_and_other_dtypes_are_not_prepacked() -> None:
    for layer in (make_linear("nf4", dtype=torch.bfloat16), make_linear("none")):
        size, form = layer.nbytes, repr(layer)
        layer.prepack()
        assert (layer.nbytes, repr(layer)) == (size, form)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_rows", [0, 1, 16, 100, MAX_PLANNED_ROWS + 1])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_products_on_a_gpu_are_those_of_the_decoded_weight(format: Format, num_rows: int) -> None:  # noqa: A002
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(384, 256, device="cuda", generator=generator).bfloat16() * 0.05
    layer = encode(weight, format=format, dtype=torch.bfloat16)
    x = torch.randn(num_rows, 256, device="cuda", generator=generator).bfloat16()
    dy = torch.randn(num_rows, 384, device="cuda", generator=generator).bfloat16()
    decoded = layer.weight_dense().float()
    torch.testing.assert_close(layer.forward(x).float(), x.float() @ decoded.T, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.input_grad(dy).float(), dy.float() @ decoded, rtol=1e-2, atol=1e-2)
