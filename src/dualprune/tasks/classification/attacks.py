"""Attacks inside an ℓ∞ ball of [0, 1] pixels: FGSM, PGD, and Square, which sees no gradient.

Models get normalised images u = (pixel − mean) / std. A ball of ε and the box [0, 1] are, in u, a ball of ε/std and the
box [−mean/std, (1 − mean)/std] per channel, and the sign of a gradient is the same in both. So an attack works on u
itself: nothing is un-normalised, and ε = 0 gives the very images back.

An attack is a frozen value, ``attack(model, x, y, pixels, generator)``. While it crafts, the model is in eval mode (or in
training mode, with every buffer put back), and no gradient reaches a parameter.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from dualprune.errors import DualpruneError

if TYPE_CHECKING:
    from dualprune.recipe_tables import AttackSpec

Mode = Literal["eval", "train"]


class Attack(Protocol):
    """What raises a model's loss inside the ball."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, pixels: Pixels, generator: Generator | None = None) -> Tensor:
        """Return the attacked images: the shape, dtype and normalisation of `x`, detached from every graph.

        Args:
            model: gives scores (images, classes); left in its mode, with its buffers and gradients as they were.
            x: normalised images (images, channels, height, width).
            y: int64 labels (images,).
            pixels: how `x` was normalised.
            generator: on x's device, where the attack draws from; None is PyTorch's global one.
        """


@dataclass(frozen=True)
class Pixels:
    """How images of [0, 1] pixels were normalised: (pixel − mean) / std, one number a channel.

    Raises:
        DualpruneError: not as many means as standard deviations, or one of these is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise DualpruneError(f"expected a mean and a std > 0 for each channel, got {self.mean} and {self.std}")

    def units(self, amount: float, x: Tensor) -> Tensor:
        """Return `amount` of [0, 1] pixels in the units of `x`: (channels, 1, 1)."""
        return amount / _per_channel(self.std, x)

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of a pixel of 0 and of a pixel of 1, each (channels, 1, 1)."""
        if x.ndim != 4 or x.shape[1] != len(self.mean):
            raise DualpruneError(f"expected images (n, {len(self.mean)}, height, width), got {tuple(x.shape)}")
        mean, std = _per_channel(self.mean, x), _per_channel(self.std, x)
        return -mean / std, (1 - mean) / std

    def ball(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return the lowest and highest values within `eps` of x and within the box: clamping to them projects."""
        (low, high), reach = self.box(x), self.units(eps, x)
        return torch.maximum(x - reach, low), torch.minimum(x + reach, high)


def _per_channel(values: tuple[float, ...], x: Tensor) -> Tensor:
    return torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, 1, 1)


# --- the attacks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FGSM:
    """One step to the corner of the ball, x + ε·sign ∇ₓL (Goodfellow et al. 2015, section 4).

    Attributes:
        eps: radius in [0, 1] pixels, 8/255 or 0.3.
        crafting: the model's mode while it is attacked.
    """

    eps: float
    crafting: Mode = "eval"

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def __call__(  # noqa: D102
        self, model: nn.Module, x: Tensor, y: Tensor, pixels: Pixels, generator: Generator | None = None
    ) -> Tensor:
        with crafting(model, self.crafting):
            x, y = x.detach().clone(), y.clone()
            low, high = pixels.ball(x, self.eps)
            return (x + pixels.units(self.eps, x) * _ascent(model, x, y)).clamp_(low, high)


@dataclass(frozen=True)
class PGD:
    """Projected steps x ← Π(x + step·sign ∇ₓL) from a random point of the ball (Madry et al. 2018, section 2.1).

    One step of 1.25 ε from a random start is "fast" adversarial training (Wong et al. 2020).

    Attributes:
        eps: radius in [0, 1] pixels.
        step: length of a step in [0, 1] pixels.
        steps: how many.
        random_start: start anywhere in the ball, uniformly, in place of at x.
        restarts: start as often; each image keeps the start that did it the most harm, by the margin of its scores.
        crafting: the model's mode while it is attacked.
    """

    eps: float
    step: float
    steps: int
    random_start: bool = True
    restarts: int = 1
    crafting: Mode = "eval"

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        if not self.step > 0 or self.steps < 1 or self.restarts < 1:
            given = f"step {self.step}, steps {self.steps}, restarts {self.restarts}"
            raise DualpruneError(f"PGD expects step > 0, steps ≥ 1 and restarts ≥ 1, got {given}")
        if self.restarts > 1 and not self.random_start:
            raise DualpruneError(f"{self.restarts} restarts from one point end alike; set random_start, or restarts to 1")

    def __call__(  # noqa: D102
        self, model: nn.Module, x: Tensor, y: Tensor, pixels: Pixels, generator: Generator | None = None
    ) -> Tensor:
        with crafting(model, self.crafting):
            x, y = x.detach().clone(), y.clone()
            worst = self._once(model, x, y, pixels, generator)
            if self.restarts > 1:
                harm = _margin(model, worst, y)
            for _ in range(self.restarts - 1):
                other = self._once(model, x, y, pixels, generator)
                margin = _margin(model, other, y)
                worst = torch.where((margin > harm)[:, None, None, None], other, worst)
                harm = torch.maximum(margin, harm)
            return worst

    def _once(self, model: nn.Module, x: Tensor, y: Tensor, pixels: Pixels, generator: Generator | None) -> Tensor:
        (low, high), step = pixels.ball(x, self.eps), pixels.units(self.step, x)
        z = x
        if self.random_start:
            # uniform in the ball and clamped to the box, as Madry et al. start
            noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
            z = (x + pixels.units(self.eps, x) * noise).clamp_(low, high)
        for _ in range(self.steps):
            z = (z + step * _ascent(model, z, y)).clamp_(low, high)
        return z


@dataclass(frozen=True)
class Square:
    """Random search over squares at the corners of the ball; uses scores only (Andriushchenko et al. 2020, algorithms 1–2).

    A gradient attack that it beats was led astray by masked gradients. An image is left alone once it is misclassified.

    Attributes:
        eps: radius in [0, 1] pixels.
        queries: how often the model may be asked about an image, the first stripes included.
        p: the fraction of the image that the first squares cover; it falls on the paper's schedule.
    """

    eps: float
    queries: int = 1000
    p: float = 0.8

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        if self.queries < 1 or not 0 < self.p <= 1:
            raise DualpruneError(f"Square expects queries ≥ 1 and 0 < p ≤ 1, got {self.queries} and {self.p}")

    def __call__(  # noqa: D102
        self, model: nn.Module, x: Tensor, y: Tensor, pixels: Pixels, generator: Generator | None = None
    ) -> Tensor:
        with crafting(model), torch.no_grad():
            x, y = x.detach().clone(), y.clone()
            low, high = pixels.ball(x, self.eps)
            n, channels, _, width = x.shape
            best = torch.where(_coins((n, channels, 1, width), x, generator), high, low)
            harm = _margin(model, best, y)
            for query in range(1, self.queries):
                left = (harm <= 0).nonzero().flatten()
                if not len(left):
                    break
                square = _squares(x[left], self._fraction(query), generator)
                corner = torch.where(_coins((len(left), channels, 1, 1), x, generator), high[left], low[left])
                trial = torch.where(square, corner, best[left])
                margin = _margin(model, trial, y[left])
                better = margin > harm[left]
                best[left[better]], harm[left[better]] = trial[better], margin[better]
            return best

    def _fraction(self, query: int) -> float:
        """Halve `p` at the paper's queries, given for 10,000 of them (section 5, "Setup")."""
        asked = query * 10_000 / self.queries
        return self.p / 2 ** sum(asked > mark for mark in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))


def _check_eps(eps: float) -> None:
    if not 0 <= eps <= 1:
        hint = f"; did you mean {eps:g}/255?" if 1 < eps <= 255 else ""
        raise DualpruneError(f"eps is a distance between pixels in [0, 1], got {eps}{hint}")


def _coins(shape: tuple[int, ...], x: Tensor, generator: Generator | None) -> Tensor:
    return torch.rand(shape, device=x.device, generator=generator) < 0.5


def _squares(x: Tensor, fraction: float, generator: Generator | None) -> Tensor:
    """A mask (n, 1, height, width) of one square an image, of about `fraction` of its area, anywhere inside."""
    n, _, height, width = x.shape
    side = min(max(round((fraction * height * width) ** 0.5), 1), height, width)
    draw = torch.rand((2, n, 1, 1), device=x.device, generator=generator)
    top, left = (draw[0] * (height - side + 1)).floor(), (draw[1] * (width - side + 1)).floor()
    rows = torch.arange(height, device=x.device).view(1, -1, 1)
    columns = torch.arange(width, device=x.device).view(1, 1, -1)
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return inside[:, None]


def _ascent(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Sign of the loss's gradient by the images; asking for this one gradient leaves those of the parameters alone."""
    x = x.detach().requires_grad_()
    # a sum, so that an image's gradient does not shrink with the batch
    loss = F.cross_entropy(_scores(model, x), y, reduction="sum")
    return torch.autograd.grad(loss, x)[0].sign()


def _margin(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The best wrong score less the right one: above 0 where the model is wrong."""
    with torch.no_grad():
        scores = _scores(model, x)
    right = scores.gather(1, y[:, None]).squeeze(1)
    return scores.scatter(1, y[:, None], -torch.inf).amax(1) - right


def _scores(model: nn.Module, x: Tensor) -> Tensor:
    """The scores in float32 at least: what autocast leaves in half precision has too few bits for small differences."""
    scores: Tensor = model(x)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


@contextmanager
def crafting(model: nn.Module, mode: Mode = "eval") -> Iterator[None]:
    """A place to attack `model` in: gradients on, the mode chosen; afterwards every mode and buffer is as it was."""
    modes = {module: module.training for module in model.modules()}
    # in eval mode no layer moves its buffers
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if mode == "train" else []
    model.train(mode == "train")
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


# --- evaluation ------------------------------------------------------------------------------------------------------


def build_attack(spec: AttackSpec) -> Attack:
    """Return the attack that a recipe's text was parsed to."""
    if spec.kind == "fgsm":
        return FGSM(spec.eps, spec.crafting)
    if spec.kind == "square":
        return Square(spec.eps, spec.queries)
    return PGD(spec.eps, spec.step, spec.steps, spec.random_start, spec.restarts, spec.crafting)


def robustness(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attacks: Mapping[str, Attack],
    pixels: Pixels,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Percentage of images classified rightly: clean, under each attack, and under all of these ("worst").

    An image counts for "worst" only if nothing fooled the model. What an attack draws depends on (seed, its name, the
    batch), not on the other attacks of the list.

    Args:
        model: returns scores (images, classes); attacked and measured in eval mode, left as it was found.
        batches: (normalised images, labels) on the model's device.
        attacks: by the names they are reported under; "clean" and "worst" are taken.
        pixels: how the images were normalised.
        seed: of the attacks' draws.

    Raises:
        DualpruneError: there is no image, the images do not lie in the box of `pixels`, or a name is taken.
    """
    if taken := {"clean", "worst"} & set(attacks):
        raise DualpruneError(f"an attack cannot be called {taken.pop()!r}: that is a figure of its own")
    hits: dict[str, Tensor | int] = dict.fromkeys(("clean", *attacks, "worst"), 0)
    total = 0
    with crafting(model):
        for number, (x, y) in enumerate(batches):
            _check_box(x, pixels)
            standing = _right(model, x, y)
            hits["clean"] += standing.sum()
            for name, attack in attacks.items():
                generator = Generator(x.device).manual_seed(zlib.crc32(f"{seed}/{name}/{number}".encode()))
                right = _right(model, attack(model, x, y, pixels, generator), y)
                hits[name] += right.sum()
                standing = standing & right
            hits["worst"] += standing.sum()
            total += len(y)
    if not total:
        raise DualpruneError("robustness needs at least one image, got none; was the iterator used up before?")
    return {name: 100 * int(count) / total for name, count in hits.items()}


def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which images are classified rightly; a row with a NaN score is not."""
    with torch.no_grad():
        scores = model(x)
    return (scores.argmax(1) == y) & ~scores.isnan().any(1)


def _check_box(x: Tensor, pixels: Pixels) -> None:
    low, high = pixels.box(x)
    if bool(((x < low - 1e-4) | (x > high + 1e-4)).any()):
        span = f"{float(x.min()):.3g}…{float(x.max()):.3g}"
        raise DualpruneError(f"images of {span} are not [0, 1] pixels normalised by {pixels.mean} and {pixels.std}")
