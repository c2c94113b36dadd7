"""The penalty over many tensors and the selection by digits, against plain operators and a sort.

Triton's interpreter runs the kernels on CPU tensors, in a process of its own; tests marked gpu run them as they are meant.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dualprune
from dualprune import kernels
from dualprune.kernels import add_penalty_, radix_select
from dualprune.selection import BITS, keep_largest, kth_largest_magnitude

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = [torch.device(d) for d in ("cuda", "cpu") if d != "cuda" or torch.cuda.is_available()]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="test_under_the_interpreter runs it")
SHAPES = ((30, 131), (1,), (7, 3, 5, 5), (0, 4), (33_000,))


def values(device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=random).to(device, dtype) for s in SHAPES]


def rows_of(device: torch.device, dtype: torch.dtype, state: torch.dtype) -> list[tuple[Tensor, ...]]:
    lists = [values(device, dtype, 0), values(device, dtype, 1), values(device, state, 2), values(device, state, 3)]
    rows = list(zip(*lists, strict=True))
    rows[2] = tuple(t.contiguous(memory_format=torch.channels_last) for t in rows[2])
    return rows


def penalised(row: tuple[Tensor, ...], rho: float, scale: float, outside: bool = False) -> Tensor:
    grad, w, z, lam = (t.double() for t in row)
    pull = scale * (lam + rho * (w - z))
    return grad + (torch.where(z == 0, pull, 0) if outside else pull)


def check_penalty(
    device: torch.device, dtype: torch.dtype, state: torch.dtype, scale: Tensor | None, outside: bool = False
) -> None:
    rows = rows_of(device, dtype, state)
    rows.append(tuple(torch.randn(64, 40, device=device).to(t.dtype)[:, ::2] for t in rows[0]))  # has gaps
    factor = 1.0 if scale is None else float(scale)
    for _, _, z, _ in rows:
        z.mul_(torch.rand_like(z, dtype=torch.float32) < 0.5)
    expected = [penalised(row, 0.3, factor, outside) for row in rows]
    left = add_penalty_(rows, 0.3, scale, outside)
    assert [row[0].shape for row in left] == [(0, 4), (64, 20)]
    taken = [i for i in range(len(rows)) if i not in (3, 5)]
    close = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}[dtype]  # the interpreter cuts bfloat16 off
    for i in taken:
        torch.testing.assert_close(rows[i][0].double(), expected[i], rtol=close, atol=close * factor)


def check_radix(device: torch.device, dtype: torch.dtype) -> None:
    parts = [p for p in values(device, dtype) if p.numel()]
    parts[0][:10] = parts[0][10:20]  # ties
    flat = torch.cat([p.flatten() for p in parts]).abs().sort(descending=True).values
    for k in (1, 777, len(flat)):
        bits, counts = radix_select([p.view(BITS[dtype.itemsize]) for p in parts], k)
        assert torch.equal(bits.view(dtype), flat[k - 1])
        equal, above = int((flat == flat[k - 1]).sum()), int((flat > flat[k - 1]).sum())
        assert counts.tolist() == [k - above, equal - (k - above)]


def test_rows_on_the_cpu_are_left_to_the_chunks() -> None:
    if INTERPRETED:
        pytest.skip("the interpreter takes them")
    rows = rows_of(torch.device("cpu"), torch.float32, torch.float32)
    before = [row[0].clone() for row in rows]
    assert add_penalty_(rows, 0.3, None) == rows
    assert all(torch.equal(row[0], b) for row, b in zip(rows, before, strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_selection_by_digits_is_exact(device: torch.device, dtype: torch.dtype) -> None:
    check_radix(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_selection_by_digits_of_what_is_odd(dtype: torch.dtype) -> None:
    """Zeros of both signs, denormals, infinities, one value only: the bits of the k-th, as the sampling selection has them."""
    tiny = torch.finfo(dtype).smallest_normal
    odd = torch.tensor([0.0, -0.0, tiny / 2, -tiny, torch.inf, -torch.inf, 1.0, -1.0, 1.0], dtype=dtype)
    for x in (odd, torch.full((9,), -0.5, dtype=dtype), torch.zeros(9, dtype=dtype)):
        for k in range(1, 10):
            bits, _ = radix_select([x.view(BITS[dtype.itemsize])], k)
            assert torch.equal(bits.view(dtype), kth_largest_magnitude([x], k))


@interpreter
@pytest.mark.parametrize(
    ("dtype", "state", "scale"),
    [
        (torch.float32, torch.float32, None),
        (torch.float32, torch.bfloat16, 1024.0),
        (torch.bfloat16, torch.float32, None),
        (torch.float16, torch.float16, 1024.0),
    ],
)
@pytest.mark.parametrize("outside", [False, True])
def test_fused_penalty_interpreted(dtype: torch.dtype, state: torch.dtype, scale: float | None, outside: bool) -> None:
    check_penalty(torch.device("cpu"), dtype, state, None if scale is None else torch.tensor(scale), outside)


@interpreter
@pytest.mark.parametrize("outside", [False, True])
def test_weights_that_are_pulled_themselves_interpreted(outside: bool) -> None:
    rows = [(w, w, z, lam) for _, w, z, lam in rows_of(torch.device("cpu"), torch.float32, torch.float32)]
    for _, _, z, _ in rows:
        z.mul_(torch.rand_like(z) < 0.5)
    scale = torch.tensor(-0.2 / 0.3)
    expected = [penalised(row, 0.3, float(scale), outside) for row in rows]
    add_penalty_(rows, 0.3, scale, outside)
    for row, wanted in zip(rows, expected, strict=True):
        torch.testing.assert_close(row[1].double(), wanted, rtol=1e-6, atol=1e-6)


def test_penalty_is_traced_by_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The foreach path, in one graph, whatever Triton could do."""
    monkeypatch.setattr(kernels, "_interpreted", lambda: True)
    rows = [row for row in rows_of(torch.device("cpu"), torch.float32, torch.float32) if row[0].numel()]
    expected = [penalised(row, 0.3, 1.0) for row in rows]

    @torch.compile(backend="eager", fullgraph=True)
    def add() -> int:
        return len(add_penalty_(rows, 0.3, None))

    assert add() == 0
    for row, want in zip(rows, expected, strict=True):
        torch.testing.assert_close(row[0].double(), want, rtol=1e-6, atol=1e-6)


@pytest.fixture
def foreach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU without Triton, on the CPU."""
    monkeypatch.setattr(kernels, "_interpreted", lambda: True)
    monkeypatch.setattr(kernels, "_triton_installed", lambda: False)


@pytest.mark.usefixtures("foreach")
@pytest.mark.parametrize("size", [1, 1000, 40_000])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_penalty_by_foreach_operators(dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BATCH", size)
    rows = [row for row in rows_of(torch.device("cpu"), dtype, dtype) if row[0].numel()]
    runs = kernels._batches(rows)
    assert [row for run in runs for row in run] == rows
    assert all(len(run) == 1 or sum(row[0].numel() for row in run) <= size for run in runs)
    expected = [penalised(row, 0.3, 1.0) for row in rows]
    assert add_penalty_(rows, 0.3, None) == []
    close = 4 * torch.finfo(dtype).eps
    for row, want in zip(rows, expected, strict=True):
        torch.testing.assert_close(row[0].double(), want, rtol=close, atol=close)


@pytest.mark.usefixtures("foreach")
@pytest.mark.parametrize("dtype", DTYPES)
def test_foreach_operators_take_nothing_from_a_gradient_where_the_copy_is_the_weight(dtype: torch.dtype) -> None:
    rows = [(g * 2.0**-12, w, w.clone(), torch.zeros_like(w)) for g, w, *_ in rows_of(torch.device("cpu"), dtype, dtype)]
    rows = [row for row in rows if row[0].numel()]
    before = [row[0].clone() for row in rows]
    assert add_penalty_(rows, 1.0, None) == []
    assert all(torch.equal(row[0], b) for row, b in zip(rows, before, strict=True))


@interpreter
def test_tables_follow_the_addresses() -> None:
    """New gradients at new places, as after zero_grad(set_to_none=True)."""
    kept = []
    for seed in range(3):
        row = tuple(torch.randn(70_000, generator=torch.Generator().manual_seed(seed + i)) for i in range(4))
        expected = penalised(row, 0.5, 1.0)
        assert add_penalty_([row], 0.5, None) == []
        torch.testing.assert_close(row[0].double(), expected, rtol=1e-6, atol=1e-6)
        kept.append(row)


def test_under_the_interpreter() -> None:
    """The kernels themselves, on CPU tensors."""
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("already there")
    which = "interpreted or is_exact or tables"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=", "-x", "-p", "no:cacheprovider", "-k", which, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "failed" not in run.stdout
    assert "skipped" not in run.stdout


def test_triton_is_not_imported_for_nothing() -> None:
    code = "import sys, dualprune, dualprune.kernels; dualprune.attach; assert 'triton' not in sys.modules, 'triton'"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty_on_a_gpu(dtype: torch.dtype, scale: float | None, triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    if triton:
        check_penalty(device, dtype, torch.float32, None if scale is None else torch.tensor(scale, device=device))
        return
    monkeypatch.setattr(kernels, "_triton_installed", lambda: False)
    rows = [row for row in rows_of(device, dtype, dtype) if row[0].numel()]
    expected = [penalised(row, 0.3, 1.0) for row in rows]
    assert add_penalty_(rows, 0.3, None) == []
    close = 4 * torch.finfo(dtype).eps
    for row, want in zip(rows, expected, strict=True):
        torch.testing.assert_close(row[0].double(), want, rtol=close, atol=close)


@pytest.mark.gpu
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_selection_on_a_gpu(dtype: torch.dtype, triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton:
        monkeypatch.setattr(kernels, "_triton_installed", lambda: False)
    check_radix(torch.device("cuda"), dtype)
    parts = values(torch.device("cuda"), dtype)
    masks = keep_largest(parts, 5000)
    expected = keep_largest([p.cpu() for p in parts], 5000)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(masks, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.filterwarnings("error")
def test_nothing_waits_for_the_gpu() -> None:
    """With synchronisation made an error, after everything has been compiled once."""
    device = torch.device("cuda")
    rows = [row for row in rows_of(device, torch.float32, torch.float32) if row[0].numel()]
    bits = [row[1].contiguous().view(torch.int32) for row in rows]
    for _ in range(2):
        add_penalty_(rows, 0.1, None)
        radix_select(bits, 1000)
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_both_can_be_recorded_in_a_graph() -> None:
    device = torch.device("cuda")
    rows = [row for row in rows_of(device, torch.float32, torch.float32) if row[0].numel()]
    bits = [row[1].contiguous().view(torch.int32) for row in rows]
    add_penalty_(rows, 0.1, None)
    radix_select(bits, 1000)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_penalty_(rows, 0.1, None)
        kth, _ = radix_select(bits, 1000)
    for row in rows:
        row[0].zero_()
    expected = [penalised(row, 0.1, 1.0) for row in rows]
    graph.replay()
    for row, want in zip(rows, expected, strict=True):
        torch.testing.assert_close(row[0].double(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(kth.view(torch.float32), kth_largest_magnitude([row[1] for row in rows], 1000))


@pytest.mark.gpu
def test_training_on_a_gpu_follows_the_cpu() -> None:
    """Ten steps and five updates: the same masks, the same weights but for rounding."""

    def train(device: str) -> dualprune.Pruner:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 40, bias=False), nn.Linear(40, 5, bias=False)).double().to(device)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        pruner = dualprune.attach(model, optimizer, dualprune.SLR.paper(), rate=4, ignore=(), every=2)
        x = torch.randn(64, 20, dtype=torch.float64).to(device)
        for _ in range(10):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            pruner.observe(loss)
            optimizer.step()
        return pruner

    for a, b in zip(train("cuda").solver.tensors["Z"], train("cpu").solver.tensors["Z"], strict=True):
        torch.testing.assert_close(a.cpu(), b)
