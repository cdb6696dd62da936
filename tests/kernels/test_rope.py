"""The rotary embedding against transformers and autograd; the Triton kernels where they can run."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weft_kernels.rope import HeadNorms, KvSlots, Rotation, fused, reference, write_rotated

transformers_llama = pytest.importorskip("transformers.models.llama.modeling_llama")

PATHS = pytest.mark.parametrize("path", [reference, fused], ids=["reference", "fused"])
SHAPES = pytest.mark.parametrize("heads", [(4, 2, 16), (3, 1, 12), (8, 8, 64)])
NORMS = pytest.mark.parametrize("has_norms", [False, True])
EPS = 1e-5


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_rotation(num_rows: int, head_dim: int) -> Rotation:
    angles = random(num_rows, 1, head_dim // 2, seed=9) * 3
    angles = torch.cat((angles, angles), dim=-1)
    return Rotation(angles.cos() * 1.1, angles.sin() * 1.1)


def make_norms(head_dim: int) -> HeadNorms:
    return HeadNorms(random(head_dim, seed=7), random(head_dim, seed=8), EPS)


def expected_heads(
    qkv: Tensor, rotation: Rotation, norms: HeadNorms | None, heads: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values `[T, heads, D]` as transformers computes them."""
    num_heads, num_kv_heads, head_dim = heads
    q, k, v = qkv.view(len(qkv), -1, head_dim).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norms is not None:
        q = F.rms_norm(q, (head_dim,), norms.query.to(qkv.dtype), EPS)
        k = F.rms_norm(k, (head_dim,), norms.key.to(qkv.dtype), EPS)
    cos, sin = (part.to(qkv.dtype).squeeze(1) for part in rotation)
    q, k = transformers_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)
    return q, k, v


@PATHS
@SHAPES
@NORMS
def test_queries_are_rotated_and_keys_and_values_reach_their_slots_and_no_other(
    path: ModuleType, heads: tuple[int, int, int], has_norms: bool, device: torch.device
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    qkv = random(5, (num_heads + 2 * num_kv_heads) * head_dim, seed=1)
    rotation, norms = make_rotation(5, head_dim), make_norms(head_dim) if has_norms else None
    slots = torch.tensor([7, 0, 23, 12, 13])
    on_device = Rotation(*(part.to(device) for part in rotation))
    norms_there = HeadNorms(norms.query.to(device), norms.key.to(device), EPS) if norms else None
    caches = [torch.full((6, 4, num_kv_heads, head_dim), torch.nan, device=device) for _ in range(2)]
    q = path.write_rotated(qkv.to(device), on_device, norms_there, *caches, slots.to(device))
    expected_q, k, v = expected_heads(qkv, rotation, norms, heads)
    torch.testing.assert_close(q.cpu(), expected_q, rtol=1e-4, atol=1e-5)
    for cache, written in zip(caches, (k, v), strict=True):
        rows = cache.cpu().flatten(0, 1)
        torch.testing.assert_close(rows[slots], written, rtol=1e-4, atol=1e-5)
        assert int(rows.isnan().all(dim=(1, 2)).sum()) == 24 - 5
    alone = path.rotate_queries(qkv.to(device), on_device, norms_there, num_kv_heads)
    torch.testing.assert_close(alone, q)


@PATHS
def test_a_row_with_a_negative_slot_is_not_written_and_its_neighbours_are(
    path: ModuleType, device: torch.device
) -> None:
    qkv, rotation = random(4, 8 * 16, seed=1).to(device), make_rotation(4, 16)
    rotation = Rotation(*(part.to(device) for part in rotation))
    written = []
    for slots in ([5, 9, 2, 11], [5, -1, 2, -1], [-1, -1, -1, -1]):
        caches = [torch.full((3, 4, 2, 16), torch.nan, device=device) for _ in range(2)]
        path.write_rotated(qkv, rotation, None, *caches, torch.tensor(slots, device=device))
        written.append([cache.flatten(0, 1) for cache in caches])
    for every, some, none in zip(*written, strict=True):
        assert torch.equal(some[[5, 2]], every[[5, 2]])
        assert int(some.isfinite().all(dim=(1, 2)).sum()) == 2
        assert none.isnan().all()


@PATHS
@SHAPES
@NORMS
def test_the_backward_is_autograds(
    path: ModuleType, heads: tuple[int, int, int], has_norms: bool, device: torch.device
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    qkv = random(5, (num_heads + 2 * num_kv_heads) * head_dim, seed=1)
    rotation, norms = make_rotation(5, head_dim), make_norms(head_dim) if has_norms else None
    grads = [
        random(5, count, head_dim, seed=2 + i) for i, count in enumerate((num_heads, *[num_kv_heads] * 2))
    ]
    leaf = qkv.double().requires_grad_()
    outs = expected_heads(leaf, rotation, norms, heads)
    torch.autograd.backward(outs, [grad.double() for grad in grads])
    assert leaf.grad is not None
    on_device = Rotation(*(part.to(device) for part in rotation))
    norms_there = HeadNorms(norms.query.to(device), norms.key.to(device), EPS) if norms else None
    d_qkv = path.rotate_backward(qkv.to(device), on_device, norms_there, *(g.to(device) for g in grads))
    torch.testing.assert_close(d_qkv.cpu(), leaf.grad.float(), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    rotation, cache = make_rotation(2, 8), torch.zeros(2, 4, 1, 8)
    slots = KvSlots(cache, cache.clone(), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="no contiguous row of heads"):
        write_rotated(torch.zeros(2, 30), rotation, None, slots)
    with pytest.raises(ValueError, match="leaves no query heads"):
        write_rotated(torch.zeros(2, 16), rotation, None, slots)
    with pytest.raises(ValueError, match="is not of 3 rows"):
        write_rotated(torch.zeros(3, 24), rotation, None, slots)
    with pytest.raises(ValueError, match="cannot take rows"):
        write_rotated(torch.zeros(2, 24).half(), rotation, None, slots)


@pytest.mark.gpu
@NORMS
def test_kernels_equal_the_reference_in_bfloat16(has_norms: bool) -> None:
    def there(tensor: Tensor) -> Tensor:
        return tensor.bfloat16().cuda()

    qkv = there(random(300, 48 * 128, seed=1))
    rotation = Rotation(*(there(part) for part in make_rotation(300, 128)))
    norms = HeadNorms(*(there(w) for w in make_norms(128)[:2]), EPS) if has_norms else None
    slots, results = torch.randperm(512, device="cuda")[:300], []
    for path in (reference, fused):
        caches = [torch.zeros(32, 16, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        q = path.write_rotated(qkv, rotation, norms, *caches, slots)
        d_qkv = path.rotate_backward(qkv, rotation, norms, q, q[:, :8].float(), q[:, 8:16].float())
        results.append((q, *caches, d_qkv))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.03, atol=0.05)
