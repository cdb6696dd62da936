"""The dropout mask is a function of the row's key, layer, module and element, and of nothing else."""

from collections.abc import Callable

import torch

from weft_kernels.lora import LoraDropout, dropout_mask


def test_a_row_keeps_its_mask_wherever_it_stands(make_dropout: Callable[..., LoraDropout]) -> None:
    dropout = make_dropout(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    shuffled = dropout.select(order)
    assert torch.equal(dropout_mask(shuffled, 1, 2, 33), dropout_mask(dropout, 1, 2, 33)[order])


def test_masks_differ_between_layers_modules_and_keys() -> None:
    same_p = torch.full((4,), 0.5)
    keys = torch.tensor([5, 6, 5 + 2**32, -5])
    masks = [
        dropout_mask(LoraDropout(same_p, keys), layer, module, 256) for layer in (0, 1) for module in (0, 1)
    ]
    rows = torch.cat(masks)
    agreement = (rows[:, None, :] == rows[None, :, :]).float().mean(dim=2)
    others = agreement[~torch.eye(16, dtype=torch.bool)]
    assert others.min() > 0.3
    assert others.max() < 0.7


def test_a_row_without_dropout_is_multiplied_by_one() -> None:
    mask = dropout_mask(LoraDropout(torch.zeros(8), torch.arange(8)), 3, 1, 100)
    assert torch.equal(mask, torch.ones(8, 100))


def test_certain_dropout_drops_everything() -> None:
    mask = dropout_mask(LoraDropout(torch.ones(8), torch.arange(8)), 3, 1, 100)
    assert torch.equal(mask, torch.zeros(8, 100))


def test_dropped_share_and_scale_are_those_of_dropout() -> None:
    mask = dropout_mask(LoraDropout(torch.full((400,), 0.3), torch.arange(400)), 0, 0, 4096)
    kept = mask > 0
    assert torch.equal(mask[kept], torch.full_like(mask[kept], 1 / 0.7))
    share = kept.float()
    num_rows, num_columns = mask.shape
    deviation = (0.3 * 0.7) ** 0.5
    assert abs(share.mean() - 0.7) < 4 * deviation / (num_rows * num_columns) ** 0.5
    assert abs(share.mean(0).std() / (deviation / num_rows**0.5) - 1) < 0.1
    assert abs(share.mean(1).std() / (deviation / num_columns**0.5) - 1) < 0.15


def test_neighbouring_elements_and_rows_are_uncorrelated() -> None:
    mask = dropout_mask(LoraDropout(torch.full((512,), 0.5), torch.arange(512)), 2, 5, 1024)
    kept = (mask > 0).double() - 0.5
    bound = 5 * 0.25 / kept.numel() ** 0.5
    for shift in (1, 2, 3, 16, 64):
        assert abs((kept * kept.roll(shift, 1)).mean()) < bound
        assert abs((kept * kept.roll(shift, 0)).mean()) < bound
