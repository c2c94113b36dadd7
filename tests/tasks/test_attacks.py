"""Attacks: inside the ball and the box, harmful, equal to foolbox and to plain twins, and gone without a trace."""

import os
import signal
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import helpers
from dualprune.errors import DualpruneError
from dualprune.loop import Interrupted
from dualprune.progress import Silent
from dualprune.recipe import parse_recipe
from dualprune.tasks import build_task
from dualprune.tasks.classification.attacks import FGSM, PGD, Pixels, Square, robustness
from dualprune.tasks.classification.metrics import accuracy
from dualprune.train import run

PLAIN = Pixels((0.0,), (1.0,))
DIGITS = Pixels((0.2873,), (0.3539,))
RGB = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ATTACKS = {
    "fgsm": FGSM(0.1),
    "pgd": PGD(0.1, 0.03, 5),
    "pgd-restarts": PGD(0.3, 0.3, 3, restarts=3),
    "square": Square(0.1, queries=30),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def shaped(values):
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)


def normalise(x, pixels):
    return (x - shaped(pixels.mean).to(x)) / shaped(pixels.std).to(x)


def denormalise(u, pixels):
    return u * shaped(pixels.std).to(u) + shaped(pixels.mean).to(u)


class OnPixels(nn.Module):
    """A model of [0, 1] pixels as one of normalised images."""

    def __init__(self, model, pixels):
        super().__init__()
        self.model, self.pixels = model, pixels

    def forward(self, u):
        return self.model(denormalise(u, self.pixels))


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("a gradient was asked for")


def loss_of(model, x, y):
    with torch.no_grad():
        return F.cross_entropy(model(x), y).item()


def margins(model, x, y):
    with torch.no_grad():
        scores = model(x)
    return torch.tensor([max(row[:label].tolist() + row[label + 1 :].tolist()) - row[label].item()
                         for row, label in zip(scores, y, strict=True)])  # fmt: skip


@pytest.fixture
def model(trained):
    return trained().eval()


@pytest.fixture
def held_out():
    x, y = helpers.digits()
    return x[1400:1500], y[1400:1500]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_stays_in_the_ball_and_in_the_box(attack):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    pixel = torch.rand(16, 3, 8, 8).mul(1.5).sub(0.25).clamp(0, 1)  # many on the border of the box
    y = torch.randint(10, (16,))
    adv = denormalise(attack(net, normalise(pixel, RGB), y, RGB, seeded()), RGB)
    assert adv.min() >= -1e-6 and adv.max() <= 1 + 1e-6
    assert (adv - pixel).abs().max() <= attack.eps + 1e-6
    assert (adv - pixel).abs().max() > 0.9 * attack.eps, "the ball should be used"


@pytest.mark.parametrize("attack", [FGSM(0.0), PGD(0.0, 0.1, 3), Square(0.0, 5)], ids=["fgsm", "pgd", "square"])
def test_a_ball_of_nothing_gives_the_images_back(attack, model, held_out):
    u = normalise(held_out[0], DIGITS)
    assert torch.equal(attack(OnPixels(model, DIGITS), u, held_out[1], DIGITS, seeded()), u)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_does_harm(attack, model, held_out):
    x, y = held_out
    adv = attack(model, x, y, PLAIN, seeded())
    assert loss_of(model, adv, y) > 1.5 * loss_of(model, x, y)
    assert (margins(model, adv, y) > 0).sum() > (margins(model, x, y) > 0).sum()


def test_more_steps_do_more_harm(model, held_out):
    x, y = held_out
    losses = [loss_of(model, PGD(0.1, 0.1 / 4, steps, random_start=False)(model, x, y, PLAIN), y) for steps in (1, 2, 4, 8, 30)]
    assert losses == sorted(losses) and losses[-1] > 1.5 * losses[1]


def foolbox_attacks():
    """The library, or a skip; its import warns of SciPy's renamed modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("foolbox", exc_type=ImportError)


@pytest.mark.parametrize("pixels", [PLAIN, DIGITS], ids=["pixels", "normalised"])
@pytest.mark.parametrize("eps", [8 / 255, 0.3])
@pytest.mark.parametrize("name", ["fgsm", "pgd", "pgd-start"])
def test_same_as_foolbox(name, eps, pixels, model, held_out):
    foolbox = foolbox_attacks()
    from foolbox.attacks import LinfFastGradientAttack, LinfProjectedGradientDescentAttack

    # in float64, where two orders of the same sums have the same signs
    net, (x, y) = OnPixels(model.double(), pixels), (held_out[0].double(), held_out[1])
    start, steps = name == "pgd-start", 10
    settings = {"abs_stepsize": eps / 4, "steps": steps, "random_start": start}
    theirs = LinfFastGradientAttack() if name == "fgsm" else LinfProjectedGradientDescentAttack(**settings)
    ours = FGSM(eps) if name == "fgsm" else PGD(eps, eps / 4, steps, random_start=start)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # eagerpy draws in float32; so that both start alike, its uniform is given our draws
        if start:
            draw = torch.empty_like(x).uniform_(-1, 1, generator=seeded())
            theirs.get_random_start = lambda x0, epsilon: x0 + type(x0)(draw * epsilon)
        _, expected, _ = theirs(wrapped, x, y, epsilons=eps)
    got = denormalise(ours(net, normalise(x, pixels), y, pixels, seeded()), pixels)
    assert (got - x).abs().max() > 0.9 * eps
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)


def softmax_twin(weight, x, y, low, high, step, steps, start):
    """PGD on softmax(Wx) by the formulas in NumPy: ∂L/∂x = Wᵀ(p − e_y), pixel by pixel."""
    out = np.empty_like(x)
    for i in range(len(x)):
        z = start[i].copy()
        for _ in range(steps):
            scores = weight @ z
            p = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            p[y[i]] -= 1
            gradient = weight.T @ p
            for j in range(len(z)):
                z[j] = min(max(z[j] + step[j] * np.sign(gradient[j]), low[i, j]), high[i, j])
        out[i] = z
    return out


@pytest.mark.parametrize("random_start", [False, True])
def test_same_as_the_formula_in_plain_loops(random_start):
    generator, eps, alpha = seeded(3), 0.2, 0.07
    pixel = torch.rand(6, 3, 2, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (6,), generator=generator)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False)).double()
    std = np.repeat(RGB.std, 4)
    u = normalise(pixel, RGB)
    flat = u.flatten(1).numpy()
    low = np.maximum(flat - eps / std, -np.repeat(RGB.mean, 4) / std)
    high = np.minimum(flat + eps / std, (1 - np.repeat(RGB.mean, 4)) / std)
    start = flat
    if random_start:
        noise = torch.empty_like(u).uniform_(-1, 1, generator=seeded()).flatten(1).numpy()
        start = np.clip(flat + eps / std * noise, low, high)
    expected = softmax_twin(net[1].weight.detach().numpy(), flat, y.numpy(), low, high, alpha / std, 7, start)
    got = PGD(eps, alpha, 7, random_start)(net, u, y, RGB, seeded())
    np.testing.assert_allclose(got.flatten(1).numpy(), expected, atol=1e-7)


def test_restarts_keep_the_worst_of_each_image(model, held_out):
    x, y = held_out
    one, generator = PGD(0.08, 0.04, 2), seeded(5)
    runs = [one(model, x, y, PLAIN, generator) for _ in range(4)]
    harm = torch.stack([margins(model, run, y) for run in runs])
    best = harm.argmax(0)
    assert len(best.unique()) == 4, "each start should be the worst for some image"
    got = PGD(0.08, 0.04, 2, restarts=4)(model, x, y, PLAIN, seeded(5))
    assert torch.equal(got, torch.stack([runs[k][i] for i, k in enumerate(best.tolist())]))


def square_twin(model, x, y, eps, queries, p, generator):
    """Algorithms 1 and 2, one image after the other within a query, pixel by pixel."""
    n, channels, height, width = x.shape
    coins = torch.rand((n, channels, 1, width), generator=generator) < 0.5
    best = x.clone()
    for i, c, r, w in np.ndindex(*x.shape):
        best[i, c, r, w] = min(max(x[i, c, r, w] + (eps if coins[i, c, 0, w] else -eps), 0), 1)
    marks = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    for query in range(1, queries):
        harm = margins(model, best, y)
        left = [i for i in range(n) if harm[i] <= 0]
        if not left:
            break
        share = p
        for mark in marks:
            share /= 2 if query / queries * 10_000 > mark else 1
        side = max(1, round((share * height * width) ** 0.5))
        place = torch.rand((2, len(left), 1, 1), generator=generator)
        coins = torch.rand((len(left), channels, 1, 1), generator=generator) < 0.5
        trial = best.clone()
        for number, i in enumerate(left):
            top, start = int(place[0, number] * (height - side + 1)), int(place[1, number] * (width - side + 1))
            for c, r, w in np.ndindex(channels, side, side):
                pixel = x[i, c, top + r, start + w] + (eps if coins[number, c] else -eps)
                trial[i, c, top + r, start + w] = min(max(pixel, 0), 1)
        margin = margins(model, trial, y)
        for i in left:
            if margin[i] > harm[i]:
                best[i] = trial[i]
    return best


def test_square_is_the_papers_random_search(model, held_out):
    x, y = held_out[0][:12], held_out[1][:12]
    expected = square_twin(model, x, y, 0.1, 25, 0.8, seeded(2))
    got = Square(0.1, queries=25)(model, x, y, PLAIN, seeded(2))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_square_gains_by_asking_more(model, held_out):
    x, y = held_out
    wrong = [(margins(model, Square(0.1, queries=q)(model, x, y, PLAIN, seeded()), y) > 0).sum() for q in (1, 20, 200)]
    assert wrong[0] < wrong[1] < wrong[2]


def test_square_asks_for_no_gradient(model, held_out):
    class Guarded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return NoBackward.apply(self.inner(x))

    x, y = held_out
    adv = Square(0.2, 20)(Guarded(), x, y, PLAIN, seeded())
    assert not adv.requires_grad
    assert (margins(model, adv, y) > 0).sum() > (margins(model, x, y) > 0).sum()
    with pytest.raises(RuntimeError, match="a gradient was asked for"):
        FGSM(0.2)(Guarded(), x, y, PLAIN)


def test_masked_gradients_show(model, held_out):
    """Images rounded to 16 levels have no gradient: PGD finds nothing, the random search is not deceived."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x.mul(16).round().div(16) + 0 * x)

    attacks = {"pgd": PGD(0.15, 0.05, 10, random_start=False), "square": Square(0.15, 100)}
    found = robustness(Masked(), [held_out], attacks, PLAIN)
    assert found["pgd"] == found["clean"] > 80
    assert found["square"] == found["worst"] < found["clean"] - 30


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", [FGSM, PGD])
def test_leaves_the_model_as_it_was(kind, mode, trained, held_out):
    x, y = held_out
    model = trained().train()
    model[1].eval()  # a mode of its own
    before, modes = helpers.snapshot(model), [m.training for m in model.modules()]
    attack = FGSM(0.1, crafting=mode) if kind is FGSM else PGD(0.1, 0.05, 2, crafting=mode)
    asked = x.clone()
    adv = attack(model, asked, y, PLAIN, seeded())
    assert helpers.same_bits(before, model.state_dict())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not adv.requires_grad and torch.equal(asked, x)


def test_training_mode_attacks_what_training_sees(trained, held_out):
    x, y = held_out
    model = trained()
    for layer in model:
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    adv = FGSM(0.1, crafting="train")(model, x, y, PLAIN)
    copy = trained().train()
    copy[-2].p = 0.0
    u = x.clone().requires_grad_()
    F.cross_entropy(copy(u), y).backward()
    assert torch.equal(adv, (x + 0.1 * u.grad.sign()).clamp(0, 1))
    assert not torch.equal(adv, FGSM(0.1)(model, x, y, PLAIN))


def test_the_mode_comes_back_after_an_error(model, held_out):
    model.train()
    with pytest.raises((IndexError, RuntimeError)):
        FGSM(0.1)(model, held_out[0], held_out[1] + 10, PLAIN)
    assert model.training


def test_under_bfloat16_autocast_and_then_a_step(trained, held_out):
    x, y = held_out
    model = trained()
    with torch.autocast("cpu", torch.bfloat16):
        adv = PGD(0.1, 0.03, 5, restarts=2)(model, x, y, PLAIN, seeded())
        scores = model(adv)
    assert adv.dtype == torch.float32 and (adv - x).abs().max() <= 0.1 + 1e-6
    F.cross_entropy(scores.float(), y).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.ndim > 1)
    assert loss_of(model.eval(), adv, y) > 1.5 * loss_of(model, x, y)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_draws_come_from_the_generator_alone(attack, model, held_out):
    x, y = held_out
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = attack(model, x, y, PLAIN, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.inference_mode():
        assert torch.equal(attack(model, x, y, PLAIN, seeded(1)), first)
    if not isinstance(attack, FGSM):
        assert not torch.equal(attack(model, x, y, PLAIN, seeded(2)), first)


def test_robustness_counts_what_stands(model, held_out):
    x, y = held_out
    batches = [(x[:60], y[:60]), (x[60:], y[60:])]
    attacks = {"fgsm": FGSM(0.05), "pgd": PGD(0.05, 0.02, 4), "square": Square(0.05, 20)}
    found = robustness(model.train(), batches, attacks, PLAIN)
    assert model.training
    assert list(found) == ["clean", "fgsm", "pgd", "square", "worst"]
    assert found["clean"] == accuracy(model, batches)
    assert found["fgsm"] == accuracy(model, [(FGSM(0.05)(model, a, b, PLAIN), b) for a, b in batches])
    assert found["worst"] <= min(found[name] for name in attacks) < found["clean"]
    assert robustness(model, batches, {"square": attacks["square"]}, PLAIN)["square"] == found["square"]
    assert robustness(model, batches, {}, PLAIN) == {"clean": found["clean"], "worst": found["clean"]}


def test_worst_is_of_all_attacks_on_each_image():
    """Two images, two attacks that fool the model on one each: half stands either way, nothing stands both."""

    def darken(which):
        def attack(model, x, y, pixels, generator=None):
            x = x.clone()
            x[which] = 0.0
            return x

        return attack

    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[0.0], [1.0]]))
        net[1].bias.copy_(torch.tensor([0.5, 0.0]))
    batch = torch.ones(2, 1, 1, 1), torch.tensor([1, 1])
    found = robustness(net, [batch], {"first": darken(0), "second": darken(1)}, PLAIN)
    assert found == {"clean": 100, "first": 50, "second": 50, "worst": 0}


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: FGSM(8), "distance between pixels in .0, 1., got 8; did you mean 8/255"),
        (lambda: FGSM(float("nan")), "got nan"),
        (lambda: PGD(0.1, 0.0, 3), "step > 0"),
        (lambda: PGD(0.1, 0.1, 0), "steps ≥ 1"),
        (lambda: PGD(0.1, 0.1, 3, random_start=False, restarts=2), "restarts from one point end alike"),
        (lambda: Square(0.1, 0), "queries ≥ 1"),
        (lambda: Square(-0.1), "got -0.1"),
        (lambda: Pixels((0.5,), (0.0,)), "std > 0"),
        (lambda: Pixels((0.5, 0.5), (1.0,)), "a mean and a std"),
        (lambda: FGSM(0.1)(nn.Flatten(), torch.zeros(2, 3, 2, 2), torch.zeros(2).long(), PLAIN), "expected images"),
        (lambda: robustness(nn.Flatten(), [], {}, PLAIN), "at least one image"),
        (lambda: robustness(nn.Flatten(), [], {"clean": FGSM(0.1)}, PLAIN), "'clean'"),
        (
            lambda: robustness(nn.Flatten(), [(torch.full((1, 1, 2, 2), 3.0), torch.zeros(1).long())], {}, PLAIN),
            "are not .0, 1. pixels",
        ),
    ],
)
def test_impossible_values_are_explained(build, said):
    with pytest.raises(DualpruneError, match=said):
        build()


# --- in the task -----------------------------------------------------------------------------------------------------

ROBUST = (
    helpers.TINY_RECIPE
    + """
[training.adversarial]
eps = 0.2
steps = 3
[robust]
attacks = ["training", "pgd-5x2", "square-20"]
images = 100
"""
)


def test_the_training_loss_is_that_of_the_attacked_batch():
    plain, robust = (build_task(parse_recipe(text)) for text in (helpers.TINY_RECIPE, ROBUST))
    model = robust.model()
    batch = next(iter(robust.train_batches(batch_size=256, seed=0, epoch=0)))
    torch.manual_seed(3)
    loss = robust.loss(model, batch, robust.recipe.training)
    pixels = Pixels(tuple(robust.data.mean), tuple(robust.data.std))
    torch.manual_seed(3)
    adv = PGD(0.2, 0.5 / 3, 3)(model, *batch, pixels)
    assert loss.item() == F.cross_entropy(model(adv), batch[1]).item()
    assert loss > 1.05 * plain.loss(model, batch, plain.recipe.training)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_compiled_forward_is_attacked_as_the_plain_model():
    task = build_task(parse_recipe(ROBUST))
    model = task.model()
    batch = next(iter(task.train_batches(batch_size=256, seed=0, epoch=0)))
    compiled = torch.compile(model, backend="eager")
    losses = []
    for forward in (model, compiled):
        torch.manual_seed(3)
        losses.append(task.loss(forward, batch, task.recipe.training).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_final_metrics_are_those_of_the_recipe():
    task = build_task(parse_recipe(ROBUST))
    model = task.model()
    found = task.final_metrics(model)
    assert list(found) == ["clean", "training", "pgd-5x2", "square-20", "worst"]
    assert found == task.final_metrics(model)
    whole = build_task(parse_recipe(ROBUST.replace("images = 100\n", "")))
    assert whole.final_metrics(model)["clean"] == whole.measure(model)["top-1"]
    assert build_task(parse_recipe(helpers.TINY_RECIPE)).final_metrics(model) == {}


def test_adversarial_training_makes_robust():
    """60 steps of the recipe's loss on the digits, attacked and not: the one stands where the other falls."""
    stands = {}
    for name, text in (("plain", helpers.TINY_RECIPE), ("robust", ROBUST)):
        task = build_task(parse_recipe(text, ["training.batch_size=128"]))
        model = task.model()
        helpers.fit(task, model, batch_size=128, epochs=6)
        stands[name] = build_task(parse_recipe(ROBUST)).final_metrics(model)
    assert stands["robust"]["worst"] > stands["plain"]["worst"] + 20


def test_an_interrupted_adversarial_run_ends_as_one_that_was_not(tmp_path):
    """Dense and pruned stages draw random starts; the checkpoint has to hold the state they are drawn from."""
    recipe = parse_recipe(
        ROBUST + "[dense]\nepochs = 1\nlr = 0.05\nbatch_size = 256\n", ["training.epochs=1", "prune.calibrate=0"]
    )

    class CtrlC(Silent):
        steps = 0

        def step(self, loss):
            self.steps += 1
            if self.steps in (2, 8):
                os.kill(os.getpid(), signal.SIGINT)

    run(recipe, "slr", out=tmp_path / "whole", device="cpu")
    interrupting, stops = CtrlC(), 0
    for _ in range(3):
        try:
            run(recipe, "slr", out=tmp_path / "broken", device="cpu", progress=interrupting)
        except Interrupted:
            stops += 1
    assert stops == 2
    whole, broken = (tmp_path / part / "tiny/slr-seed0/pruned.safetensors" for part in ("whole", "broken"))
    assert whole.read_bytes() == broken.read_bytes()
