from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dualprune.chunks
from dualprune.chunks import chunks
from dualprune.scratch import Scratch
from dualprune.selection import keep_largest
from dualprune.solvers.vector import (
    Shifted,
    all_finite,
    ascend_,
    follow_,
    lagrangian_terms,
    pull_,
    pull_outside_,
    replace_,
)  # fmt: skip

CHUNK = 1 << 17  # a quarter of the real one, for the time of these tests
BIG = 3 * CHUNK + 5  # several chunks and a rest


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(dualprune.chunks, "_CHUNK", CHUNK)


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
@DTYPES
@pytest.mark.parametrize("state", [None, torch.float32])
@pytest.mark.parametrize("scale", [None, 8.0])
def test_pulls_are_those_of_one_long_vector(
    layout: str, dtype: torch.dtype, state: torch.dtype | None, scale: float | None
) -> None:
    room, factor = Scratch(), None if scale is None else torch.tensor(scale)
    for outside, add_ in ((False, pull_), (True, pull_outside_)):
        grad, W, Z, lam = (tensors(dtype if i < 2 else state or dtype, layout, i) for i in range(4))
        for z in Z:
            z.mul_(torch.rand(z.shape, generator=torch.Generator().manual_seed(5)) < 0.5)
        pull = in_double(lam) + 0.25 * (in_double(W) - in_double(Z))
        expected = in_double(grad) + (scale or 1.0) * (torch.where(in_double(Z) == 0, pull, 0) if outside else pull)
        for piece in chunks(grad, W, Z, lam):
            add_(*piece, 0.25, factor, room)
        close = 8 * (scale or 1.0) * max(torch.finfo(t).eps for t in (dtype, state or dtype))
        torch.testing.assert_close(in_double(grad), expected, rtol=close, atol=close)


@LAYOUTS
@DTYPES
def test_a_pull_that_cancels_takes_nothing_from_the_gradient(layout: str, dtype: torch.dtype) -> None:
    """The weights are a million times the gradients, as on the support late in a run."""
    W, lam, room = tensors(dtype, layout, 0), tensors(dtype, layout, 1), Scratch()
    for multiplier, w in zip(lam, W, strict=True):
        multiplier.copy_(-w)
    zeros, grad = [torch.zeros_like(w) for w in W], tensors(dtype, layout, 2)
    for g in grad:
        g.mul_(2.0**-20)
    before = [g.clone() for g in grad]
    for g, w, z, multiplier in chunks(grad, W, zeros, lam):
        pull_(g, w, w, z, 1.0, None, room)  # W = Z, Λ = 0
        pull_(g, w, z, multiplier, 1.0, None, room)  # Λ = −ρW, Z = 0
        pull_outside_(g, w, z, multiplier, 1.0, None, room)
    assert all(torch.equal(g, b) for g, b in zip(grad, before, strict=True))


@LAYOUTS
def test_replace_moves_z_and_takes_the_sums(layout: str) -> None:
    Z, V, W, lam = (tensors(torch.float64, layout, seed) for seed in (0, 1, 3, 4))
    random = torch.Generator().manual_seed(2)
    for z in Z:
        z.mul_(torch.rand(z.shape, generator=random) < 0.5)
    masks = [torch.rand(v.shape, generator=random) < 0.5 for v in V]
    new = [torch.where(m, v, 0) for m, v in zip(masks, V, strict=True)]
    change = float((in_double(new) - in_double(Z)).norm())
    flips = sum(int(((z != 0) ^ m).sum()) for z, m in zip(Z, masks, strict=True)) / sum(z.numel() for z in Z)
    moved = replace_(Z, Shifted(W, lam, 0.1), list(zip(V, masks, strict=True)))
    assert moved[:2] == (pytest.approx(change, rel=1e-12), flips)
    assert all(torch.equal(z, n) for z, n in zip(Z, new, strict=True))
    assert moved[2:] == pytest.approx(lagrangian_terms(W, Z, lam), rel=1e-12)


def test_replace_takes_broadcast_masks() -> None:
    Z, V = [torch.zeros(400, 400)], [torch.randn(400, 400)]
    expected = V[0].clone()
    expected[200:] = 0
    mask = (torch.arange(400) < 200)[:, None].expand(400, 400)
    replace_(Z, Shifted(V, V, 0.1), [(V[0], mask)])
    assert torch.equal(Z[0], expected)


@LAYOUTS
def test_z_follows_on_its_support_and_the_terms_are_those_where_it_comes_to(layout: str) -> None:
    W, Z, lam = (tensors(torch.float32, layout, seed) for seed in (0, 1, 2))
    for z in Z:
        z[z.abs() < 1] = 0
    follows = [True] + [False] * (len(Z) - 1)
    expected = [torch.where(Z[0] != 0, W[0] + lam[0] / 0.7, 0), *(z.clone() for z in Z[1:])]
    terms = follow_(Z, W, lam, 0.7, follows)
    for z, e in zip(Z, expected, strict=True):
        torch.testing.assert_close(z, e)
    assert terms == lagrangian_terms(W, Z, lam)


@LAYOUTS
@DTYPES
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.1, 0.9, 1.0])
def test_cut_of_what_is_formed_is_the_mask_of_what_is_held(layout: str, dtype: torch.dtype, share: float) -> None:
    """With ties in plenty at 16 bits; each tensor by itself, and all in one pool."""
    W, lam = tensors(dtype, layout, 0), tensors(dtype, layout, 1)
    V = Shifted(W, lam, 0.7)
    held, everything = list(V), list(range(len(W)))
    for pools in ([[i] for i in everything], [everything]):
        Z, expected = [torch.empty_like(w).zero_() for w in W], dict[int, Tensor]()
        cuts = {}
        for members in pools:
            k = round(share * sum(W[i].numel() for i in members))
            cuts |= dict.fromkeys(members, V.cut(members, k))
            masks = keep_largest([held[i] for i in members], k)
            expected |= {i: torch.where(m, held[i], 0) for i, m in zip(members, masks, strict=True)}
        if any(cut is None for cut in cuts.values()):
            assert not all(w.is_contiguous() for w in W)
            assert 0 < share < 1
            continue
        replace_(Z, V, [cuts[i] for i in everything])
        assert all(torch.equal(z, expected[i]) for i, z in enumerate(Z))


@pytest.mark.parametrize("kept", range(10))
def test_cut_keeps_the_first_of_equals(kept: int) -> None:
    """Zeros tie as well; both signs of them are kept as they are."""
    W = [torch.tensor([[1.0, -2.0, 2.0], [0.0, 2.0, -1.0]]), torch.tensor([-2.0, 0.0, 1.0])]
    zero = [torch.zeros_like(w) for w in W]
    Z, V = [torch.full_like(w, 5.0) for w in W], Shifted(W, zero, 1.0)
    cut = V.cut([0, 1], kept)
    assert cut is not None
    replace_(Z, V, [cut, cut])
    masks = keep_largest(W, kept)
    assert all(torch.equal(z, torch.where(m, w, 0)) for z, m, w in zip(Z, masks, W, strict=True))


def test_ties_are_kept_from_the_first_one_on_whatever_piece_they_lie_in() -> None:
    """The search for ties ends with the last that stays: what comes after it is cut by a strict threshold."""
    W = [torch.zeros(BIG), torch.zeros(BIG)]
    places = [(0, 3), (0, 2 * CHUNK + 1), (1, 0), (1, CHUNK), (1, 3 * CHUNK + 4)]
    for i, j in places:
        W[i][j] = 2.0
    W[0][7], W[1][-2] = 3.0, -3.0  # above the ties, before and behind the last that stays
    zero = [torch.zeros_like(w) for w in W]
    for kept in range(2, 2 + len(places)):
        Z, V = [torch.full_like(w, 5.0) for w in W], Shifted(W, zero, 1.0)
        cut = V.cut([0, 1], kept)
        assert cut is not None
        replace_(Z, V, [cut, cut])
        expected = [torch.zeros_like(w) for w in W]
        expected[0][7], expected[1][-2] = 3.0, -3.0
        for i, j in places[: kept - 2]:
            expected[i][j] = 2.0
        assert all(torch.equal(z, e) for z, e in zip(Z, expected, strict=True))


def test_scratch_is_one_memory_a_role_that_grows() -> None:
    room = Scratch()
    small, large = torch.zeros(4), torch.zeros(2, 6)
    first = room.like(small, "a")
    assert room.like(small, "a") is first
    assert room.like(small, "b").data_ptr() != first.data_ptr()
    assert room.like(small, "a", torch.float64).dtype is torch.float64
    grown = room.like(large, "a")
    assert (grown.shape, grown.is_contiguous()) == (large.shape, True)
    assert room.like(small, "a").data_ptr() == grown.data_ptr() == room.like(torch.zeros(12), "a").data_ptr()


def test_an_update_holds_neither_v_nor_a_mask() -> None:
    """Unstructured fp32 layers: no tensor of W's size is made by projecting."""
    W, lam = [torch.randn(BIG)], [torch.randn(BIG)]
    Z, V = [torch.zeros(BIG)], Shifted(W, lam, 0.1)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
            if isinstance(out, Tensor) and out.device.type == "cpu" and out.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, out.numel())
            return out

    with Largest() as largest:
        cut = V.cut([0], BIG // 10)
        assert cut is not None
        replace_(Z, V, [cut])
    assert 0 < largest.elements < BIG / 2


def test_state_of_another_precision() -> None:
    """Z and Λ may be stored narrower than the weights; sums are taken in the wider of the two."""
    for wide in (torch.float64, torch.float32):
        W = [torch.full((3, 3), 2.0, dtype=wide)]
        Z, lam = [torch.ones(3, 3).bfloat16()], [torch.full((3, 3), 0.5).bfloat16()]
        assert lagrangian_terms(W, Z, lam) == (4.5, 9.0)
        ascend_(lam, 0.5, W, Z)
        assert lam[0].dtype == torch.bfloat16
        assert lam[0].unique().tolist() == [1.0]
        V = list(Shifted(W, lam, rho=0.5))
        assert (V[0].dtype, V[0].unique().tolist()) == (wide, [4.0])


def test_what_is_formed_is_new() -> None:
    W, lam = [torch.ones(3)], [torch.zeros(3)]
    next(iter(Shifted(W, lam, 0.1))).fill_(9)
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


def test_float16_is_shifted_by_multipliers_over_a_penalty_that_float16_cannot_invert() -> None:
    w, multiplier = torch.ones(4, dtype=torch.float16), torch.full((4,), 6e-8, dtype=torch.float16)
    shifted = Shifted([w], [multiplier], 1e-5).form(w, multiplier)
    assert shifted.tolist() == pytest.approx([1 + float(multiplier[0]) * 1e5] * 4, rel=1e-3)
