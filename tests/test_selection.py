from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualprune.selection import keep_largest, kth_largest_magnitude, memory_order

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGE = 200_000  # well above the size from which a sample brackets the answer


def by_sorting(parts: list[Tensor], k: int) -> list[Tensor]:
    """Return the masks the slow way: a stable sort of all magnitudes, parts in order, each row-major."""
    flat = torch.cat([p.detach().contiguous().flatten() for p in parts]).abs()
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    return [m.view(p.shape) for m, p in zip(keep.split([p.numel() for p in parts]), parts, strict=True)]


def assert_exact(parts: list[Tensor], k: int) -> None:
    masks, expected = keep_largest(parts, k), by_sorting(parts, k)
    assert sum(int(m.sum()) for m in masks) == k
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))


values = st.floats(width=16, allow_nan=False)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.lists(st.lists(values, max_size=6), min_size=1, max_size=4), st.sampled_from(DTYPES))
def test_every_k_on_tiny_parts_matches_sorting(rows: list[list[float]], dtype: torch.dtype) -> None:
    parts = [torch.tensor(row, dtype=dtype) for row in rows]
    for k in range(sum(len(row) for row in rows) + 1):
        assert_exact(parts, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 7, 3000, 59_999, 60_000])
def test_shapes_and_dtypes(dtype: torch.dtype, k: int) -> None:
    random = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=random).to(dtype) for shape in ((200, 100), (1,), (50, 10, 8, 8), (7999,), ())]
    total = sum(p.numel() for p in parts)
    assert total == 60_001
    masks = keep_largest(parts, k)
    assert [m.dtype for m in masks] == [torch.bool] * 5
    assert [m.shape for m in masks] == [p.shape for p in parts]
    assert_exact(parts, k)


def test_ties_go_to_the_lowest_index_of_the_first_part() -> None:
    ones = torch.ones(2, 3)
    assert [m.tolist() for m in keep_largest([ones, -ones], 8)] == [[[True] * 3] * 2, [[True, True, False], [False] * 3]]
    assert keep_largest([torch.tensor([1.0, 2.0, -1.0, 2.0, 1.0])], 3)[0].tolist() == [True, True, False, True, False]


def test_ties_are_row_major_in_every_layout() -> None:
    x = torch.ones(2, 3, 4, 5)
    for same in (x.contiguous(memory_format=torch.channels_last), torch.ones(5, 4, 3, 2).permute(3, 2, 1, 0)):
        assert_exact([same], 31)


def test_negative_zero_is_zero() -> None:
    assert keep_largest([torch.tensor([-0.0, 0.0, 1.0, -0.0])], 2)[0].tolist() == [True, False, True, False]
    assert float(kth_largest_magnitude([torch.tensor([-0.0, -0.0])], 1)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(6, 8, 5, 5, generator=random).to(dtype)
    layouts = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 2),
        "gappy": x[:, ::2, 1:4],
        "a row of a wider tensor": x.view(6, -1)[2:3],
        "every third": x.flatten()[::3],
        "expanded": x[:, :1].expand(6, 4, 5, 5),
        "one element": x[1, 2, 3, 4],
        "empty": x[:0],
    }
    for name, t in layouts.items():
        for k in {0, min(1, t.numel()), t.numel() // 3, t.numel()}:
            mask = keep_largest([t], k)[0]
            assert torch.equal(mask, by_sorting([t], k)[0]), (name, k)
    assert torch.equal(keep_largest([layouts["channels_last"]], 300)[0], keep_largest([x], 300)[0])


def test_mask_has_the_layout_of_its_tensor() -> None:
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    for k in (0, 17, x.numel()):
        assert keep_largest([x], k)[0].is_contiguous(memory_format=torch.channels_last)


def test_memory_order_views_dense_tensors_and_copies_gappy_ones() -> None:
    x = torch.randn(4, 3, 5, 5)
    for dense in (x, x.contiguous(memory_format=torch.channels_last), x.permute(2, 0, 3, 1), x[:1], x[1, 2, 3, 4]):
        flat = memory_order(dense)
        assert flat.data_ptr() == dense.data_ptr()
        assert flat.shape == (dense.numel(),)
    gappy = x[:, ::2]
    assert memory_order(gappy).data_ptr() != gappy.data_ptr()
    assert torch.equal(memory_order(gappy).sort().values, gappy.flatten().sort().values)


@pytest.mark.parametrize("share", [1e-6, 0.001, 0.1, 0.5, 0.9, 0.999999])
def test_five_million_elements_against_topk(share: float) -> None:
    x = torch.randn(5_000_000, generator=torch.Generator().manual_seed(2))
    k = max(1, round(share * len(x)))
    kth = x.abs().topk(k).values[-1] if share <= 0.1 else x.abs().kthvalue(len(x) - k + 1).values
    assert torch.equal(kth_largest_magnitude([x[:3_000_000].view(3000, 1000), x[3_000_000:]], k), kth)
    mask = keep_largest([x], k)[0]
    assert int(mask.sum()) == k
    assert x.abs()[mask].min() == kth


def _pathological() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    normal = torch.randn(LARGE, generator=random)
    stride = LARGE // (1 << 15)  # the sample sees every stride-th element
    seen = torch.arange(LARGE) % stride == 0
    return {
        "constant": torch.full((LARGE,), -0.5),
        "zeros": torch.zeros(LARGE),
        "half zeros": torch.where(torch.rand(LARGE, generator=random) < 0.5, 0.0, normal),
        "almost all zeros": torch.where(torch.arange(LARGE) % 997 == 0, normal, 0.0),
        "two values": torch.where(normal > 0, 1.0, -2.0),
        "rising": torch.arange(LARGE, dtype=torch.float32),
        "falling": -torch.arange(LARGE, dtype=torch.float32).flip(0),
        "denormals": normal * 1e-42,
        "denormals and one": torch.cat([normal[1:] * 1e-42, torch.ones(1)]),
        "infinities": torch.where(normal.abs() > 2, math.inf * normal.sign(), normal),
        "huge and tiny": normal.exp().pow(20),
        "sample sees only the large": torch.where(seen, normal + 100, normal),
        "sample sees only the small": torch.where(seen, normal / 100, normal),
        "sample sees zeros only": torch.where(seen, 0.0, normal),
        "neighbouring floats": 1 + torch.arange(LARGE) % 7 * torch.finfo(torch.float32).eps,
    }


PATHOLOGICAL = _pathological()


@pytest.mark.parametrize("name", PATHOLOGICAL)
@pytest.mark.parametrize("k", [1, LARGE // 3, LARGE - 1])
def test_pathological_distributions(name: str, k: int) -> None:
    assert_exact([PATHOLOGICAL[name].view(400, -1)], k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_large_parts_of_other_dtypes_are_full_of_ties(dtype: torch.dtype) -> None:
    x = torch.randn(LARGE, generator=torch.Generator().manual_seed(4)).to(dtype)
    for k in (5, LARGE // 10, LARGE - 5):
        assert_exact([x[: LARGE // 4], x[LARGE // 4 :].view(-1, 100)], k)


def test_many_small_parts_are_one_pool() -> None:
    random = torch.Generator().manual_seed(5)
    parts = [torch.randn(20 + i % 9, generator=random) * (1 + i % 3) for i in range(3_000)]
    assert_exact(parts, 20_000)


def test_inputs_are_left_alone_and_need_no_graph() -> None:
    x = torch.randn(50, requires_grad=True)
    before = x.detach().clone()
    mask = keep_largest([x], 10)[0]
    assert not kth_largest_magnitude([x], 10).requires_grad
    assert mask.grad_fn is None
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("k", [-1, 4])
def test_k_out_of_range_is_an_error(k: int) -> None:
    with pytest.raises(ValueError, match=rf"expected 0 <= k <= 3 .*got k = {k}"):
        keep_largest([torch.ones(3)], k)
    with pytest.raises(ValueError, match=rf"expected 1 <= k <= 3 .*got k = {k}"):
        kth_largest_magnitude([torch.ones(3)], k)


def test_kth_counts_from_one_and_keeps_the_dtype() -> None:
    for dtype in DTYPES:
        x = torch.tensor([3.0, -5.0, 1.0], dtype=dtype)
        kth = [kth_largest_magnitude([x], k) for k in (1, 2, 3)]
        assert [float(v) for v in kth] == [5, 3, 1]
        assert all(v.dtype == dtype and v.shape == () for v in kth)
