"""Layer-wise pruning: every method against enumeration, against each other and against what it becomes in easy cases."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dualprune
from dualprune import NM, SLR, DualpruneError, Filter, Geometric, NonFiniteError, Unstructured
from dualprune.quadratic import METHODS, Quadratic, layer_method, refit, sparsegpt, wanda


def inputs(seed, count, features):
    """Correlated inputs of very different norms, as in a transformer."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=random, dtype=torch.float64) / features**0.5
    low = torch.randn(features, 3, generator=random, dtype=torch.float64)
    shared = low @ torch.randn(3, features, generator=random, dtype=torch.float64) / 3
    scale = torch.rand(features, generator=random, dtype=torch.float64).mul(2).exp()
    return torch.randn(count, features, generator=random, dtype=torch.float64) @ (mix + shared) * scale


def problem(seed, outputs=12, features=24, pattern=None, sparsity=0.6, damping=0.01):
    X = inputs(seed, 4 * features, features)
    W = torch.randn(outputs, features, generator=torch.Generator().manual_seed(seed + 99), dtype=torch.float64)
    return Quadratic.of(W, X.T @ X, pattern or Unstructured(), sparsity, damping)


def solved(name, q, refit=None):
    return layer_method(name, q.pattern, refit)(q)


def mean_error(name, refit=None, seeds=4, **chosen):
    problems = [problem(seed, **chosen) for seed in range(seeds)]
    return sum(q.error(solved(name, q, refit)) for q in problems) / seeds


def mlp(seed=0):
    torch.manual_seed(seed)
    model = nn.Module()
    model.first = nn.Linear(6, 16)
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(3))

    def forward(x):
        x = model.first(x)
        for layer in model.layers:
            x = layer(x)
        return x

    model.forward = forward
    return model


def batches(count=4, rows=64):
    return [torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


# --- the quadratic problem --------------------------------------------------------------------------------------


def test_the_objective_is_half_the_squared_change_of_the_outputs():
    X = inputs(0, 50, 8)
    W0, W = torch.randn(2, 5, 8, dtype=torch.float64)
    q = Quadratic.of(W0, X.T @ X, Unstructured(), 0.5, damping=0.0)
    assert q.objective(W * q.scale) == pytest.approx(float((X @ (W - W0).T).square().sum()) / 2)
    assert q.error(torch.zeros_like(W)) == pytest.approx(1)
    assert torch.allclose(q.H.diagonal(), torch.ones(8, dtype=torch.float64))


def test_the_closed_form_solves_the_equations_of_its_minimum():
    q = problem(1)
    Z, lam = torch.randn(2, 12, 24, dtype=torch.float64)
    W, f = q.nearest(0.3, Z, lam)
    gradient = (W - q.W0) @ q.H + lam + 0.3 * (W - Z)
    assert gradient.abs().max() < 1e-10
    assert f == pytest.approx(q.objective(W))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sparsity", (0.0, 0.37, 0.6, 1.0))
def test_exactly_as_many_are_kept_as_asked(name, sparsity):
    q = problem(2, sparsity=sparsity)
    per_row = 12 * (24 - round(24 * sparsity))
    kept = per_row if name == "wanda" else 288 - round(288 * sparsity)
    assert int(torch.count_nonzero(solved(name, q))) == kept


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", (NM(2, 4), NM(1, 8)))
def test_nm_keeps_exactly_n_of_every_m(name, pattern):
    W = solved(name, problem(3, pattern=pattern, sparsity=pattern.snap(0.0)))
    assert (W.reshape(12, -1, pattern.m).count_nonzero(-1) == pattern.n).all()


@pytest.mark.parametrize("name", METHODS)
def test_no_method_is_worse_than_magnitude_and_refitting_never_hurts(name):
    for seed in range(5):
        q = problem(seed)
        plain, fitted = q.error(solved(name, q, False)), q.error(solved(name, q, True))
        assert plain <= q.error(solved("magnitude", q)) * (1 + 1e-9)
        assert fitted <= plain * (1 + 1e-9)


def test_refit_is_least_squares_on_the_support():
    q = problem(4, outputs=3)
    W = refit(q, wanda(q), iterations=200)
    for row, (w, w0) in enumerate(zip(W, q.W0, strict=True)):
        S = wanda(q)[row].nonzero().flatten()
        best = torch.linalg.solve(q.H[S][:, S], q.H[S] @ w0)
        assert torch.allclose(w[S], best, rtol=1e-4, atol=1e-6)
        assert int(torch.count_nonzero(w)) == len(S)


@pytest.mark.parametrize("name", ["slr", "admm", "alps", "wanda"])
@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_refit_stops_where_fewer_inputs_than_weights_leave_h_flat(name, damping):
    for seed in range(10):
        torch.manual_seed(seed)
        x, w = torch.randn(8, 16), torch.randn(16, 16)
        q = Quadratic.of(w, x.T @ x, Unstructured(), 0.5, damping)
        W, plain = layer_method(name, q.pattern)(q), layer_method(name, q.pattern, False)(q)
        rounding = torch.finfo(W.dtype).eps  # of the layer's energy, by which errors are divided
        assert bool(torch.isfinite(W).all()) and q.error(W) <= q.error(plain) * (1 + 1e-4) + rounding


def test_sparsegpt_on_uncorrelated_inputs_keeps_the_largest_weight_times_norm_and_changes_nothing():
    X = torch.diag(torch.rand(24, dtype=torch.float64) * 5 + 0.1)
    W = torch.randn(12, 24, dtype=torch.float64)
    q = Quadratic.of(W, X.T @ X, Unstructured(), 0.6, damping=0.0)
    score = W.abs() * X.diagonal()
    kept = score >= score.flatten().sort(descending=True).values[12 * 24 - round(12 * 24 * 0.6) - 1]
    assert torch.allclose(sparsegpt(q) / q.scale, torch.where(kept, W, 0))


def test_sparsegpt_is_optimal_brain_surgery_column_by_column():
    """Twin: after each column, solve for the columns to come with those before fixed."""
    q = problem(5, outputs=4, features=10, pattern=NM(1, 2), sparsity=0.5)
    W, keep = q.W0.clone(), torch.zeros(4, 10, dtype=torch.bool)
    for j in range(10):
        inverse = torch.linalg.inv(q.H[j:, j:])
        if j % 2 == 0:
            later = torch.linalg.inv(q.H[j + 1 :, j + 1 :])
            cost = torch.stack([W[:, j] ** 2 / inverse[0, 0], W[:, j + 1] ** 2 / later[0, 0]], 1)
            keep[:, j : j + 2] = cost == cost.max(1, keepdim=True).values
        error = torch.where(keep[:, j], 0, W[:, j]) / inverse[0, 0]
        W[:, j:] -= error[:, None] * inverse[0]
    assert torch.allclose(sparsegpt(q, block=4), torch.where(keep, W, 0), atol=1e-10)


def test_wanda_compares_within_rows():
    X = torch.diag(torch.tensor([1.0, 10.0, 1.0, 1.0]))
    W = torch.tensor([[3.0, 1.0, 2.0, 4.0], [30.0, 10.0, 20.0, 40.0]])
    q = Quadratic.of(W, X.T @ X, Unstructured(), 0.5)
    assert torch.equal(wanda(q) != 0, torch.tensor([[False, True, False, True]] * 2))


def test_the_splitting_methods_find_the_best_support_more_often_than_wanda():
    found = dict.fromkeys(("wanda", "alps", "admm", "slr"), 0)
    S = torch.tensor(list(combinations(range(10), 4)))
    for seed in range(12):
        q = problem(seed, outputs=1, features=10, sparsity=0.6)
        target = (q.W0 @ q.H)[0]
        fits = torch.linalg.solve(q.H[S[:, :, None], S[:, None, :]], target[S])
        best = float((target @ q.W0[0] - (target[S] * fits).sum(1)).min()) / 2
        for name in found:
            reached = q.objective(solved(name, q, True))
            assert reached >= best * (1 - 1e-9)
            found[name] += reached <= best * (1 + 1e-6)
    assert min(found["alps"], found["admm"], found["slr"]) > found["wanda"]


@pytest.mark.parametrize("pattern", (Unstructured(), NM(2, 4)))
def test_the_ranking_of_the_methods_on_correlated_inputs(pattern):
    chosen = {"pattern": pattern, "sparsity": 0.5}
    error = {name: mean_error(name, **chosen) for name in METHODS}
    fitted_wanda = mean_error("wanda", refit=True, **chosen)
    assert error["wanda"] < error["magnitude"] and error["sparsegpt"] < error["wanda"]
    for name in ("alps", "admm", "slr"):
        assert error[name] < fitted_wanda
    assert error["slr"] < error["alps"]


def test_inputs_that_are_never_there_cost_nothing_and_go_first():
    X = inputs(0, 40, 8)
    X[:, 3] = 0
    W = torch.ones(2, 8, dtype=torch.float64)
    for name in METHODS[1:]:
        q = Quadratic.of(W, X.T @ X, Unstructured(), 1 / 8)
        assert (solved(name, q)[:, 3] == 0).all() and q.error(solved(name, q)) < 1e-9


@pytest.mark.parametrize("refit", (False, True))
def test_magnitude_and_wanda_do_not_touch_what_they_keep(refit):
    """Also where no input was ever seen: magnitude looks at weights only, wanda takes such inputs last."""
    X = inputs(0, 40, 8)
    X[:, 3:6] = 0
    W = torch.randn(2, 8, dtype=torch.float64)
    W[:, 3] = 9
    q = Quadratic.of(W, X.T @ X, Unstructured(), 0.25)
    assert torch.equal(solved("magnitude", q, refit)[:, 3] / q.scale[3], W[:, 3])
    for name in ("magnitude", "wanda"):
        assert int(torch.count_nonzero(solved(name, q, refit))) == 12
    assert q.error(solved("wanda", q, refit)) < 1e-9


def test_a_layer_whose_weight_is_computed_is_refused():
    from torch.nn.utils import parametrizations, prune

    for compute in (parametrizations.weight_norm, lambda layer: prune.identity(layer, "weight")):
        model = mlp()
        compute(model.layers[1][2])
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(DualpruneError, match=r"layers\.1\.2\.weight is computed from other tensors.* permanent first"):
            dualprune.prune_layerwise(model, batches(), "wanda", sparsity=0.5)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert dualprune.prune_layerwise(model, batches(), "wanda", sparsity=0.5, ignore="layers.1.2").kept == 5 * 256


class Caching(nn.Module):
    """A block that sees more with every call, through a cache that the model hands on."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, past_key_values=None, use_cache=False):
        if use_cache:
            past_key_values.append(x)
        return self.linear(x) + len(past_key_values or ())


@pytest.mark.parametrize("nested", (False, True))
def test_caches_are_off_wherever_the_switch_is(nested):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Caching() for _ in range(2))
            text = SimpleNamespace(use_cache=True)
            self.config = SimpleNamespace(text_config=text) if nested else text

        def forward(self, x):
            config = self.config.text_config if nested else self.config
            cache = [] if config.use_cache else None
            for layer in self.layers:
                x = layer(x, past_key_values=cache, use_cache=config.use_cache)
            return x

    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model = Outer(Inner())
    seen = []
    model.inner.layers[1].register_forward_pre_hook(lambda module, args, named: seen.append(named), with_kwargs=True)
    dualprune.prune_layerwise(model, batches(), "wanda", sparsity=0.5)
    config = model.inner.config.text_config if nested else model.inner.config
    assert config.use_cache and all(named == {"past_key_values": None, "use_cache": False} for named in seen)


# --- the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_model_is_pruned_in_its_blocks_only(name):
    model = mlp().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = dualprune.prune_layerwise(model, batches(), name, sparsity=0.5)
    assert (report.method, report.kept, report.total) == (name, 3 * 512, 3 * 1024) and model.training
    for key, value in model.state_dict().items():
        pruned = key.startswith("layers") and key.endswith("weight")
        assert torch.equal(value, before[key]) != pruned
        assert not pruned or value.count_nonzero() == value.numel() // 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "layers.2.2.weight" in str(report)


def test_each_block_sees_the_network_pruned_so_far():
    model, twin = mlp(), mlp()
    report = dualprune.prune_layerwise(model, batches(), "sparsegpt", sparsity=0.7)
    x = twin.first(torch.cat(batches()))
    for block, pruned in zip(twin.layers, model.layers, strict=True):
        hidden = x
        for part, other in zip(block, pruned, strict=True):
            if isinstance(part, nn.Linear):
                seen = hidden.detach().float()
                q = Quadratic.of(part.weight.detach(), seen.T @ seen, Unstructured(), 0.7)
                assert torch.allclose(other.weight, sparsegpt(q) / q.scale, atol=1e-4)
            hidden = part(hidden)
        x = pruned(x)
    assert [layer.name for layer in report.layers][:2] == ["layers.0.0.weight", "layers.0.2.weight"]


def test_slr_keeps_more_of_the_function_than_wanda_and_wanda_more_than_magnitude():
    x, loss = torch.randn(256, 6), {}
    dense = mlp()(x).detach()
    for name in ("magnitude", "wanda", "slr"):
        model = mlp()
        dualprune.prune_layerwise(model, batches(8), name, sparsity=0.6)
        loss[name] = float((model(x).detach() - dense).square().mean())
    assert loss["slr"] < loss["wanda"] < loss["magnitude"]


def test_blocks_by_glob_bfloat16_values_of_ones_own_and_ignored_layers():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).bfloat16()
    method = SLR(rho=Geometric(0.1, 1.0), s0=0.1)
    data = [batch.bfloat16() for batch in batches()]
    report = dualprune.prune_layerwise(model, data, method, pattern="2:4", blocks="*", ignore=["0", "4.weight"])
    assert [layer.name for layer in report.layers] == ["2.weight"] and report.method == "slr"
    assert model[2].weight.dtype == torch.bfloat16
    assert (model[2].weight.view(8, 2, 4).count_nonzero(-1) == 2).all() and model[0].weight.all()


def test_mappings_tuples_and_blocks_that_return_tuples():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x, shift, *, scale):
            return self.linear(x) * scale + shift, None

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x, shift=1.0):
            for layer in self.layers:
                x, _ = layer(x, shift, scale=2.0)
            return x

    for data in ([{"x": batch, "shift": 0.5} for batch in batches()], [(batch, None) for batch in batches()]):
        assert dualprune.prune_layerwise(Net(), data, "wanda", sparsity=0.5).kept == 36


class Expert(nn.Module):
    """A block of a linear layer of 36 weights and `experts` bare matrices of 36, as mixtures of experts keep theirs."""

    def __init__(self, experts):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.experts = nn.Parameter(torch.randn(experts, 6, 6) / 6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.linear(x) + self.scale * torch.einsum("bi,eoi->bo", x, self.experts)


def mixture(experts):
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(Expert(experts) for _ in range(2))
    model.forward = nn.Sequential(*model.layers).forward
    return model


def zeros(model):
    weights = [p for p in model.parameters() if p.ndim > 1]
    return 1 - sum(int(p.count_nonzero()) for p in weights) / sum(p.numel() for p in weights)


def test_weights_in_no_linear_layer_are_named_and_counted(caplog):
    model = mixture(1)
    report = dualprune.prune_layerwise(model, batches(), "wanda", sparsity=0.5)
    assert report.sparsity == 0.5 and report.block_sparsity == pytest.approx(zeros(model)) == pytest.approx(0.25)
    assert [(x.name, x.kept, x.total) for x in report.untouched] == [(f"layers.{i}.experts", 36, 36) for i in (0, 1)]
    assert "72 of the 144 weights to prune in the blocks (50%) are in no linear layer" in caplog.text
    assert "layers.*.experts" in caplog.text
    assert str(report).endswith("sparsity 0.5000 of these layers, 0.2500 of all weights of the blocks")


def test_blocks_that_are_mostly_something_else_are_refused_until_it_is_ignored(caplog):
    model = mixture(3)
    with pytest.raises(DualpruneError, match=r"216 of the 288 .* \(75%\) .* say so: ignore=\['layers.\*.experts'\]"):
        dualprune.prune_layerwise(model, batches(), "wanda", sparsity=0.5)
    assert zeros(model) == 0
    report = dualprune.prune_layerwise(model, batches(), "wanda", sparsity=0.5, ignore=["layers.*.experts"])
    assert report.sparsity == 0.5 and report.block_sparsity == pytest.approx(zeros(model)) == pytest.approx(0.125)
    assert "in no linear layer" not in caplog.text


def test_ignored_layers_count_in_the_sparsity_of_the_blocks():
    model = mlp()
    model.layers[0][0].weight.data[:8] = 0
    report = dualprune.prune_layerwise(model, batches(), "wanda", sparsity=0.5, ignore="layers.*.0")
    assert [(x.name, x.kept) for x in report.untouched] == [(f"layers.{i}.0.weight", 512 - 128 * (i == 0)) for i in range(3)]
    blocks = nn.ModuleList(model.layers)
    assert report.sparsity == 0.5 and report.block_sparsity == pytest.approx(zeros(blocks))
    assert dualprune.prune_layerwise(mlp(), batches(), "wanda", sparsity=0.5).untouched == ()


def test_filters_can_go_too():
    model = mlp()
    dualprune.prune_layerwise(model, batches(), "slr", sparsity=0.5, pattern=Filter())
    assert int(model.layers[0][0].weight.any(1).sum()) == 16


class Parallel(nn.Module):
    """Two blocks that both read the input: no chain."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        return self.layers[0](x) + self.layers[1](x)


class Twice(Parallel):
    def forward(self, x):
        return self.layers[1](self.layers[0](self.layers[0](x)))


class Unused(Parallel):
    def forward(self, x):
        return self.layers[0](x)


@pytest.mark.parametrize(
    ("model", "chosen", "said"),
    [
        (mlp, {"sparsity": 50}, r"fraction in \[0, 1\], got 50; did you mean 0.5"),
        (mlp, {}, "needs sparsity="),
        (mlp, {"sparsity": 0.5, "method": "sparsgpt"}, "did you mean 'sparsegpt'"),
        (mlp, {"sparsity": 0.5, "method": "sparsegpt", "pattern": "filter"}, "sparsegpt .* cannot do filter"),
        (
            mlp,
            {"sparsity": 0.5, "blocks": "layer.*"},
            "found no blocks: blocks='layer.*' matches no module, did you mean 'layers",
        ),
        (mlp, {"sparsity": 0.5, "ignore": "head"}, "ignore: 'head' matches no linear layer or weight of the blocks"),
        (mlp, {"sparsity": 0.5, "ignore": "*"}, "every linear layer of the blocks is ignored"),
        (mlp, {"pattern": "2:3"}, "layers.0.0.weight: 2:3 needs axis 1 to be a multiple of 3"),
        (lambda: nn.Sequential(nn.Linear(6, 6)), {"sparsity": 0.5}, "found no blocks: .* name them with blocks="),
        (Parallel, {"sparsity": 0.5}, "layers.1 is not fed by layers.0"),
        (Twice, {"sparsity": 0.5}, "layers.0 runs twice"),
        (Unused, {"sparsity": 0.5}, "never runs its block layers.1"),
        (lambda: mlp().to("meta"), {"sparsity": 0.5}, "layers.0.0.weight is on the meta device"),
    ],
)
def test_what_cannot_be_done_says_so_and_changes_nothing(model, chosen, said):
    model = model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DualpruneError, match=said):
        dualprune.prune_layerwise(model, batches(), **chosen)
    assert all(value.is_meta or torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ([], DualpruneError, "no calibration data"),
        (torch.zeros(3, 6), DualpruneError, "put it into a list"),
        ([object()], DualpruneError, "calibration expects batches that are a tensor"),
        ([torch.full((3, 6), torch.nan)], NonFiniteError, "layers.0.0.weight: an input is NaN or infinite"),
    ],
)
def test_bad_data_are_refused(data, error, said):
    with pytest.raises(error, match=said):
        dualprune.prune_layerwise(mlp(), data, sparsity=0.5)


def test_shared_weights_and_layers_that_are_never_called_are_refused():
    shared = mlp()
    shared.layers[1][0].weight = shared.layers[0][0].weight
    with pytest.raises(DualpruneError, match="one weight with the inputs of two layers"):
        dualprune.prune_layerwise(shared, batches(), sparsity=0.5)
    idle = mlp()
    idle.layers[1].register_module("extra", nn.Linear(2, 2))
    idle.layers[1].forward = lambda x: idle.layers[1][2](idle.layers[1][1](idle.layers[1][0](x)))
    with pytest.raises(DualpruneError, match=r"layers.1.extra.weight saw no calibration data"):
        dualprune.prune_layerwise(idle, batches(), sparsity=0.5)


def test_sparsegpt_needs_a_matrix_it_can_invert():
    X = inputs(0, 3, 8)
    with pytest.raises(DualpruneError, match="raise damping"):
        sparsegpt(Quadratic.of(torch.randn(2, 8, dtype=torch.float64), X.T @ X, Unstructured(), 0.5, damping=0.0))
