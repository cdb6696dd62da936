"""Weights laid out for the CPU library: the same products and values, and nothing where it offers none."""

from collections.abc import Iterator

import pytest
import torch

from weft_kernels import prepacked

CPU = torch.device("cpu")


@pytest.fixture
def offered() -> None:
    if not prepacked.can_prepack(CPU, torch.bfloat16):
        pytest.skip("this machine's library lays no weights out")


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found out about the library is forgotten, before and after."""
    prepacked.can_prepack.cache_clear()
    yield
    prepacked.can_prepack.cache_clear()


@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize("num_rows", [0, 1, 8, 65])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_those_of_the_weight_in_float64(num_rows: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 130, generator=generator).bfloat16()
    wide = torch.randn(num_rows, 200, generator=generator).bfloat16()
    bias = torch.randn(70, generator=generator).bfloat16() if has_bias else None
    laid_out = prepacked.lay_out(weight)
    assert laid_out is not None
    for x in (wide[:, :130], wide[:, 30:160].contiguous()):
        expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
        torch.testing.assert_close(laid_out.product(x, bias).double(), expected, rtol=1e-2, atol=2e-2)


@pytest.mark.usefixtures("offered")
def test_the_weight_comes_back_bit_for_bit() -> None:
    weight = torch.randn(33, 47).bfloat16()
    laid_out, transposed = prepacked.lay_out(weight), prepacked.lay_out(weight.mT)
    assert laid_out is not None
    assert transposed is not None
    assert torch.equal(laid_out.dense(), weight)
    assert torch.equal(transposed.dense(), weight.mT)
    assert laid_out.nbytes == weight.nbytes


def test_other_dtypes_and_devices_are_not_laid_out() -> None:
    assert prepacked.lay_out(torch.zeros(4, 4)) is None
    assert not prepacked.can_prepack(torch.device("cuda"), torch.bfloat16)


@pytest.mark.usefixtures("forgotten")
def test_a_library_without_the_private_names_lays_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: torch.Tensor) -> torch.Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(prepacked, "_reorder", missing)
    assert prepacked.lay_out(torch.zeros(4, 4, dtype=torch.bfloat16)) is None


@pytest.mark.usefixtures("forgotten")
def test_a_library_that_multiplies_wrongly_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    product = prepacked._product
    monkeypatch.setattr(prepacked, "_product", lambda *given: product(*given) + 1)
    assert prepacked.lay_out(torch.zeros(4, 4, dtype=torch.bfloat16)) is None
