"""PointPillars: sizes, pillars against a loop, anchors, targets and losses against cases worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from dualprune.errors import DualpruneError
from dualprune.tasks.points.boxes import iou_upright
from dualprune.tasks.points.loss import focal, point_losses, sine_angles
from dualprune.tasks.points.model import Pillars, PointPillars, Predictions, build_points_model
from dualprune.tasks.points.targets import Decoding, assign, decode, detect, direction, encode, thresholds

TINY = {
    "extent": (0.0, -10.24, -3.0, 20.48, 10.24, 1.0), "cell": 0.64, "pillar_channels": 8,
    "layers": (1, 1, 1), "filters": (8, 8, 16), "up_filters": (8, 8, 8),
}  # fmt: skip


@pytest.fixture
def tiny():
    return PointPillars(**TINY)


def cloud(*shape, seed=0):
    draw = torch.rand(*shape, 4, generator=torch.Generator().manual_seed(seed))
    return draw * torch.tensor([24.0, 24.0, 4.5, 1.0]) - torch.tensor([1.0, 12.0, 3.2, 0.0])


# --- the network -------------------------------------------------------------------------------------------------------


def test_the_papers_sizes():
    model = PointPillars()
    assert sum(p.numel() for p in model.parameters()) == 4_834_888
    assert model.anchors.shape == (248 * 216 * 6, 7)
    parts = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()}
    assert parts == {"vfe": 640 + 128, "backbone_2d": 4_806_400, "dense_head": 27_720}


def test_pillars_equal_a_loop():
    pillars = Pillars((0.0, -4.0, -3.0, 8.0, 4.0, 1.0), 2.0, (4, 4), 5)
    points = cloud(2, 40)
    points[1, 30:] = math.nan
    canvas = pillars(points)
    pillars.eval()  # the statistics do not matter to the comparison, but must be the same for both
    canvas, net = pillars(points), pillars.pfn_layers[0]
    assert canvas.shape == (2, 5, 4, 4)
    for b in range(2):
        for row in range(4):
            for column in range(4):
                low = torch.tensor([2.0 * column, 2.0 * row - 4, -3.0])
                inside = ((points[b, :, :3] >= low) & (points[b, :, :3] < low + torch.tensor([2.0, 2.0, 4.0]))).all(1)
                mine = points[b, inside]
                if not len(mine):
                    assert canvas[b, :, row, column].abs().sum() == 0
                    continue
                xyz, middle = mine[:, :3], low + torch.tensor([1.0, 1.0, 2.0])
                described = torch.cat([mine, xyz - xyz.mean(0), xyz - middle], 1)
                expected = net(described).amax(0)
                assert torch.allclose(canvas[b, :, row, column], expected, atol=1e-5)


def test_points_outside_and_nan_change_nothing(tiny):
    tiny.eval()
    points = cloud(1, 200)
    more = torch.cat([points, torch.full((1, 9, 4), math.nan), torch.tensor([[[99.0, 0, 0, 1], [5, 5, 9, 1]]])], 1)
    for a, b in zip(tiny(points), tiny(more), strict=True):
        assert torch.equal(a, b)
    nothing = tiny(points[:, :0])
    assert all(part.isfinite().all() for part in nothing)


def test_gradients_reach_every_weight(tiny):
    out = tiny(cloud(2, 300))
    sum(part.square().sum() for part in out).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tiny.parameters())
    assert (out.scores.sigmoid() < 0.1).float().mean() > 0.9  # the head starts out seeing nothing


def test_anchors_follow_the_head(tiny):
    """The anchors' order is that of the head's channels: by row, column, class, rotation."""
    rows = columns = 16
    anchors = tiny.anchors.view(rows, columns, 3, 2, 7)
    assert anchors[0, 0, 0, 0].tolist() == pytest.approx([0, -10.24, -1.78 + 0.78, 3.9, 1.6, 1.56, 0])
    assert anchors[-1, -1, 2, 1].tolist() == pytest.approx([20.48, 10.24, -0.6 + 0.865, 1.76, 0.6, 1.73, math.pi / 2])
    assert (anchors[3, :, 1, 0, 0].diff() > 0).all() and (anchors[:, 3, 1, 0, 1].diff() > 0).all()
    assert tiny.anchor_class.view(rows, columns, 3, 2)[5, 5].tolist() == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("pointpilars", {}, "did you mean 'pointpillars'"),
        ("pointpillars", {"cel": 0.1}, "no option 'cel', did you mean 'cell'"),
        ("pointpillars", {"classes": ["Van"]}, "no anchors for 'Van'"),
        ("pointpillars", {"layers": [1, 1]}, r"each block has one number of each.* layers \[1, 1\], strides \[2, 2, 2\]"),
        ("pointpillars", {"filters": [64, 0, 64]}, "but layers are at least 1"),
        ("pointpillars", {"cell": 0.17}, "the strides want a multiple of 8"),
        ("pointpillars", {"extent": [0, 0, 0, 1, 1]}, "extent is x, y, z at least and x, y, z at most"),
    ],
)
def test_refusals(name, options, said):
    with pytest.raises(DualpruneError, match=said):
        build_points_model(name, options)


# --- targets -----------------------------------------------------------------------------------------------------------


def test_codes_there_and_back():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(200, 7, generator=generator) * torch.tensor([40.0, 40, 3, 4, 2, 2, 6]) + 0.2
    boxes[:, 6] -= math.pi
    anchors = torch.rand(200, 7, generator=generator) + 0.5
    again = decode(encode(boxes, anchors), anchors, direction(boxes[:, 6]))
    assert torch.allclose(again[:, :6], boxes[:, :6], atol=1e-4)
    assert torch.allclose((again[:, 6] - boxes[:, 6]).cos(), torch.ones(200), atol=1e-5)
    turned = decode(encode(boxes, anchors), anchors, 1 - direction(boxes[:, 6]))
    assert torch.allclose((turned[:, 6] - boxes[:, 6]).cos(), -torch.ones(200), atol=1e-5)


def test_codes_by_hand():
    anchor = torch.tensor([[1.0, 2, 0, 3, 4, 2, 0]])
    code = encode(torch.tensor([[6.0, 2, 1, 3 * math.e, 4, 2, 0.5]]), anchor)
    assert code[0].tolist() == pytest.approx([1, 0, 0.5, 1, 0, 0, 0.5])
    assert direction(torch.tensor([0.0, 1.0, math.pi, -2.0, -3.0])).tolist() == [1, 0, 0, 1, 0]


def test_assignment_equals_a_loop(tiny):
    boxes = torch.tensor(
        [[9.557, -0.683, -1, 3.9, 1.6, 1.5, 0.1, 0], [5, 5, -1, 0.8, 0.6, 1.7, 0, 1], [6, -6, -1, 1.7, 0.6, 1.7, 1.5, 2],
         [90.0, 0, -1, 3.9, 1.6, 1.5, 0, 0]]
    )  # fmt: skip
    limits = thresholds(tiny.classes, torch.device("cpu"))
    assert limits[0].tolist() == pytest.approx([0.6, 0.5, 0.5]) and limits[1].tolist() == pytest.approx([0.45, 0.35, 0.35])
    role, match = assign(tiny.anchors, tiny.anchor_class, boxes, *limits)
    overlap = iou_upright(tiny.anchors, boxes[:, :7])
    overlap[tiny.anchor_class[:, None] != boxes[:, 7].long()] = 0
    best_of = [overlap[:, j].max().item() for j in range(4)]
    for i in range(len(tiny.anchors)):
        kind, most = tiny.anchor_class[i], overlap[i].max().item()
        forced = any(overlap[i, j].item() == best_of[j] > 0 for j in range(4))
        expected = 1 if forced or most >= limits[0][kind] else 0 if most < limits[1][kind] else -1
        assert role[i] == expected
    assert set(match[role == 1].tolist()) == {0, 1, 2}  # each object has an anchor; the one out of range has none
    assert set(role.tolist()) == {-1, 0, 1}
    assert (assign(tiny.anchors, tiny.anchor_class, boxes[:0], *limits).role == 0).all()


def perfect(model, targets, sure=8.0):
    """Predictions that say the targets, at every positive anchor."""
    limits = thresholds(model.classes, torch.device("cpu"))
    parts = []
    for boxes in targets:
        role, match = assign(model.anchors, model.anchor_class, boxes, *limits)
        scores = torch.full((len(role), len(model.classes)), -sure)
        codes, turns = torch.zeros(len(role), 7), torch.zeros(len(role), 2)
        chosen = role > 0
        if chosen.any():
            scores[chosen, model.anchor_class[chosen]] = sure
            codes[chosen] = encode(boxes[match[chosen], :7], model.anchors[chosen])
            turns[chosen, direction(boxes[match[chosen], 6])] = 2 * sure
        parts.append((scores, codes, turns))
    return Predictions(*map(torch.stack, zip(*parts, strict=True)))


TARGETS = [
    torch.tensor([[10.0, 0, -1, 3.9, 1.6, 1.5, 2.5, 0], [5, 5, -0.5, 0.8, 0.6, 1.7, -3, 1]]),
    torch.zeros(0, 8),
]


def test_perfect_predictions_lose_nothing_and_are_found(tiny):
    predictions = perfect(tiny, TARGETS)
    losses = point_losses(tiny, predictions, TARGETS)
    assert [part.item() for part in losses] == pytest.approx([0, 0, 0], abs=1e-4)
    first, second = detect(tiny, predictions)
    order = first.classes.argsort()
    assert torch.allclose(first.boxes[order], TARGETS[0][:, :7], atol=1e-4) and first.classes[order].tolist() == [0, 1]
    assert len(second.boxes) == 0
    assert len(detect(tiny, predictions, Decoding(most=1))[0].boxes) == 1


def test_half_a_turn_costs_direction_only(tiny):
    turned = [TARGETS[0] + torch.tensor([0, 0, 0, 0, 0, 0, math.pi, 0]), TARGETS[1]]
    losses = point_losses(tiny, perfect(tiny, turned), TARGETS)
    assert losses.boxes.item() == pytest.approx(0, abs=1e-4)
    assert losses.directions.item() == pytest.approx(0.2 * 16 / 2, rel=1e-3)  # of one of the two frames


def test_losses_by_hand():
    logits, wanted = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 1.0])
    p = 1 / (1 + math.exp(-2))
    expected = [0.25 * 0.25 * math.log(2), 0.75 * 0.25 * math.log(2), -0.25 * (1 - p) ** 2 * math.log(p)]
    assert focal(logits, wanted).tolist() == pytest.approx(expected)
    a, b = torch.zeros(1, 7), torch.zeros(1, 7)
    a[0, 6], b[0, 6] = 0.7, 0.2
    u, v = sine_angles(a, b)
    assert (u - v)[0, 6].item() == pytest.approx(math.sin(0.5))


def test_loss_parts_of_one_moved_box(tiny):
    target = [TARGETS[0][:1]]
    predictions = perfect(tiny, target)
    positive = (predictions.scores > 0).any(-1)
    predictions.codes[positive] += torch.tensor([0.5, 0, 0, 0, 0, 0, 0])
    losses = point_losses(tiny, predictions, target)
    assert losses.boxes.item() == pytest.approx(2 * (0.5 - 1 / 18), rel=1e-4)  # divided by the positive anchors
    slack = predictions._replace(scores=torch.zeros_like(predictions.scores))
    role = assign(tiny.anchors, tiny.anchor_class, target[0], *thresholds(tiny.classes, torch.device("cpu"))).role
    goal = F.one_hot(tiny.anchor_class, 3) * (role > 0)[:, None]
    expected = focal(torch.zeros_like(goal).float(), goal.float())[role >= 0].sum() / (role > 0).sum()
    assert point_losses(tiny, slack, target).scores.item() == pytest.approx(expected.item(), rel=1e-5)


def test_frames_without_objects_train(tiny):
    losses = point_losses(tiny, tiny(cloud(2, 100)), [torch.zeros(0, 8)] * 2)
    sum(losses).backward()
    assert losses.scores > 0 and losses.boxes == losses.directions == 0
    assert all(p.grad is not None for p in tiny.parameters())
