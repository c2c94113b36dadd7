from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dualprune.solvers.vector import all_finite, ascend_, chunks, lagrangian_terms, replace_, shifted

BIG = 3 * (1 << 17) + 5  # several chunks and a rest


def tensors(dtype: torch.dtype, layout: str, seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    if layout == "small":
        return [draw(3, 4), draw(5), draw(0, 2)]
    if layout == "big":
        return [draw(BIG), draw(600, 500)]
    if layout == "channels_last":
        return [draw(300, 60, 3, 3).contiguous(memory_format=torch.channels_last), draw(4, 3, 2, 2)]
    return [draw(800, 500).T[::2], draw(6, 8)[:, ::2]]  # with gaps


def in_double(values: list[Tensor]) -> Tensor:
    return torch.cat([v.double().flatten() for v in values])


LAYOUTS = pytest.mark.parametrize("layout", ["small", "big", "channels_last", "gaps"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


@LAYOUTS
@DTYPES
def test_terms_and_ascent_are_those_of_one_long_vector(layout: str, dtype: torch.dtype) -> None:
    W, Z, lam = (tensors(dtype, layout, seed) for seed in (0, 1, 2))
    gap = in_double([w - z for w, z in zip(W, Z, strict=True)])  # W − Z itself is rounded to the dtype
    inner, square = lagrangian_terms(W, Z, lam)
    tight = 1e-12 if dtype is torch.float64 else 1e-4
    size = float(gap.norm() * in_double(lam).norm())
    assert inner == pytest.approx(float(in_double(lam) @ gap), abs=tight * size)
    assert square == pytest.approx(float(gap @ gap), rel=tight)
    expected = in_double(lam) + 0.25 * gap
    ascend_(lam, 0.25, W, Z)
    torch.testing.assert_close(in_double(lam), expected, rtol=1.01 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@LAYOUTS
def test_replace_moves_z_and_counts(layout: str) -> None:
    Z, V = tensors(torch.float64, layout, 0), tensors(torch.float64, layout, 1)
    random = torch.Generator().manual_seed(2)
    for z in Z:
        z.mul_(torch.rand(z.shape, generator=random) < 0.5)
    masks = [torch.rand(v.shape, generator=random) < 0.5 for v in V]
    new = [torch.where(m, v, 0) for m, v in zip(masks, V, strict=True)]
    change = float((in_double(new) - in_double(Z)).norm())
    flips = sum(int(((z != 0) ^ m).sum()) for z, m in zip(Z, masks, strict=True)) / sum(z.numel() for z in Z)
    assert replace_(Z, V, masks) == (pytest.approx(change, rel=1e-12), flips)
    assert all(torch.equal(z, n) for z, n in zip(Z, new, strict=True))


def test_replace_takes_broadcast_masks() -> None:
    Z, V = [torch.zeros(400, 400)], [torch.randn(400, 400)]
    expected = V[0].clone()
    expected[200:] = 0
    replace_(Z, V, [(torch.arange(400) < 200)[:, None].expand(400, 400)])
    assert torch.equal(Z[0], expected)


def test_state_of_another_precision() -> None:
    """Z and Λ may be stored narrower than the weights; sums are taken in the wider of the two."""
    for wide in (torch.float64, torch.float32):
        W = [torch.full((3, 3), 2.0, dtype=wide)]
        Z, lam = [torch.ones(3, 3).bfloat16()], [torch.full((3, 3), 0.5).bfloat16()]
        assert lagrangian_terms(W, Z, lam) == (4.5, 9.0)
        ascend_(lam, 0.5, W, Z)
        assert lam[0].dtype == torch.bfloat16
        assert lam[0].unique().tolist() == [1.0]
        V = shifted(W, lam, rho=0.5)
        assert (V[0].dtype, V[0].unique().tolist()) == (wide, [4.0])


def test_shifted_is_a_new_tensor() -> None:
    W, lam = [torch.ones(3)], [torch.zeros(3)]
    V = shifted(W, lam, 0.1)
    V[0].fill_(9)
    assert W[0].tolist() == [1, 1, 1]


@LAYOUTS
def test_chunks_cover_everything_once(layout: str) -> None:
    lists = [tensors(torch.float32, layout, seed) for seed in (0, 1)]
    assert sum(a.numel() for a, _ in chunks(*lists)) == sum(t.numel() for t in lists[0])
    for a, b in chunks(*lists):
        assert a.shape == b.shape
        a.copy_(b)  # pieces are views
    assert all(torch.equal(a, b) for a, b in zip(*lists, strict=True))


def test_chunks_never_pair_different_layouts() -> None:
    x = torch.randn(64, 300, 3, 3)
    y = x.clone(memory_format=torch.channels_last)
    assert sum(float((a - b).abs().sum()) for a, b in chunks([x], [y])) == 0


@DTYPES
@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found(dtype: torch.dtype, spoil: float) -> None:
    good, bad = torch.ones(1000, dtype=dtype), torch.ones(40, 50, dtype=dtype)
    assert all_finite([good, bad])
    bad[17, 3] = spoil
    assert not all_finite([good, bad])


@pytest.mark.parametrize(("value", "dtype"), [(3e38, torch.float32), (6e4, torch.float16), (1e300, torch.float64)])
def test_huge_is_not_infinite(value: float, dtype: torch.dtype) -> None:
    assert all_finite([torch.full((9,), value, dtype=dtype), torch.empty(0)])
    assert all_finite([])
