"""Decoding, suppression, the loss and average precision, against slow twins and hand-worked cases."""

import math

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou, complete_box_iou_loss

from dualprune.errors import DualpruneError
from dualprune.tasks.detection import Boxes, Gains, average_precision, decode, detect, detection_loss
from dualprune.tasks.detection.darknet import Head

HEADS = (Head(((20.0, 30.0), (40.0, 24.0)), 3, 16), Head(((8.0, 8.0),), 3, 8, 1.2, 0.3, 0.5))


def maps(n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    sides = [(48 // h.stride, 64 // h.stride) for h in HEADS]
    return [torch.randn(n, len(h.anchors) * 8, *s, generator=g) for h, s in zip(HEADS, sides, strict=True)]


def boxes(rows, scores=None, crowd=None):
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    ones = torch.ones(len(rows))
    return Boxes(rows[:, 1:], rows[:, 0].long(), ones if scores is None else torch.tensor(scores),
                 torch.zeros(len(rows), dtype=torch.bool) if crowd is None else torch.tensor(crowd))  # fmt: skip


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def slow_cell(head, raw, i, a, y, x):
    """One box of one cell, in plain numbers."""
    t = raw[i, a * 8 : (a + 1) * 8, y, x].tolist()
    cx = (sigmoid(t[0]) * head.scale_xy - (head.scale_xy - 1) / 2 + x) * head.stride
    cy = (sigmoid(t[1]) * head.scale_xy - (head.scale_xy - 1) / 2 + y) * head.stride
    w, h = math.exp(t[2]) * head.anchors[a][0], math.exp(t[3]) * head.anchors[a][1]
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], t[4], t[5:]


def test_decoding_equals_plain_numbers():
    raw = maps()
    corners, scores = decode(HEADS, raw)
    row = 0
    for head, m in zip(HEADS, raw, strict=True):
        for a in range(len(head.anchors)):
            for y in range(m.shape[2]):
                for x in range(m.shape[3]):
                    box, objectness, classes = slow_cell(head, m, 1, a, y, x)
                    torch.testing.assert_close(corners[1, row], torch.tensor(box), rtol=1e-4, atol=1e-4)
                    wanted = [sigmoid(objectness) * sigmoid(c) for c in classes]
                    torch.testing.assert_close(scores[1, row], torch.tensor(wanted), rtol=1e-4, atol=1e-5)
                    row += 1
    assert row == corners.shape[1]


def test_suppression_keeps_the_best_of_a_class():
    found = detect(HEADS, maps(), confidence=0.2, overlap=0.5, most=7)[0]
    assert 0 < len(found) <= 7 and torch.equal(found.scores, found.scores.sort(descending=True).values)
    same = found.classes[:, None] == found.classes
    overlap = box_iou(found.corners, found.corners).fill_diagonal_(0)
    assert (overlap[same] <= 0.5).all()
    assert len(detect(HEADS, maps(), confidence=0.999)[0]) == 0


def slow_loss(raw, targets, gains):
    """The loss by loops over every cell."""
    total, pairs = 0.0, 0
    anchors = [(h, a) for h in range(len(HEADS)) for a in range(len(HEADS[h].anchors))]

    def shape_iou(row, h, a):
        w, k = row[4] * 64, row[5] * 48
        aw, ak = HEADS[h].anchors[a]
        inner = min(w, aw) * min(k, ak)
        return inner / (w * k + aw * ak - inner)

    def bce(logit, wanted):
        return max(logit, 0) - logit * wanted + math.log1p(math.exp(-abs(logit)))

    positives = {}
    for row in targets.tolist():
        fits = [shape_iou(row, h, a) for h, a in anchors]
        for fit, (h, a) in zip(fits, anchors, strict=True):
            if fit > HEADS[h].assign_above or fit == max(fits):
                stride = HEADS[h].stride
                y, x = int(row[3] * 48 / stride), int(row[2] * 64 / stride)
                positives.setdefault((h, int(row[0]), a, y, x), []).append(row)
    for h, head in enumerate(HEADS):
        for i in range(len(raw[h])):
            true = torch.tensor([corner(row) for row in targets.tolist() if row[0] == i]).reshape(-1, 4)
            for a in range(len(head.anchors)):
                for y in range(raw[h].shape[2]):
                    for x in range(raw[h].shape[3]):
                        box, objectness, classes = slow_cell(head, raw[h], i, a, y, x)
                        here = positives.get((h, i, a, y, x), [])
                        for row in here:
                            ciou = complete_box_iou_loss(torch.tensor([box]), torch.tensor([corner(row)])).item()
                            cls = sum(bce(c, float(k == row[1])) for k, c in enumerate(classes))
                            total += gains.box * ciou + gains.classes * cls
                            pairs += 1
                        near = len(true) and bool((box_iou(torch.tensor([box]), true) > head.ignore_above).any())
                        if here or not near:
                            total += gains.objectness * bce(objectness, float(bool(here)))
    return total / max(len(raw[0]), pairs)


def corner(row):
    x, y, w, h = row[2] * 64, row[3] * 48, row[4] * 64, row[5] * 48
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


TARGETS = torch.tensor(
    [[0, 1, 0.5, 0.5, 0.35, 0.6], [0, 2, 0.2, 0.3, 0.1, 0.15], [1, 0, 0.999, 1.0, 0.3, 0.2], [1, 0, 0.52, 0.5, 2.0, 0.02]]
)


@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_its_slow_twin(seed):
    targets = TARGETS.clone()
    targets[2, 3] = 0.99
    gains = Gains(2.0, 0.7, 1.3)
    raw = maps(seed=seed)
    assert detection_loss(HEADS, raw, targets, gains).item() == pytest.approx(slow_loss(raw, targets, gains), rel=1e-4)


def test_loss_of_images_without_boxes_teaches_background():
    raw = [m.requires_grad_() for m in maps()]
    loss = detection_loss(HEADS, raw, torch.zeros(0, 6))
    loss.backward()
    values = raw[0].grad.view(2, 2, 8, 3, 4)
    assert (values[:, :, 4] > 0).all() and (values[:, :, :4] == 0).all() and (values[:, :, 5:] == 0).all()


def test_background_weighs_the_same_however_many_images():
    one, nothing = maps(1), torch.zeros(0, 6)
    many = [m.repeat(5, 1, 1, 1) for m in one]
    assert torch.allclose(detection_loss(HEADS, many, nothing), detection_loss(HEADS, one, nothing))
    # one pair in five images counts as five
    box = torch.tensor([[0, 2, 0.5, 0.5, 8 / 64, 8 / 48]])
    assert detection_loss(HEADS, many, box).item() == pytest.approx(slow_loss(many, box, Gains()), rel=1e-4)


def test_a_centre_on_the_border_stays_inside():
    assert torch.isfinite(detection_loss(HEADS, maps(), TARGETS))


def test_the_loss_can_be_brought_down_to_the_boxes():
    raw = [torch.zeros_like(m).requires_grad_() for m in maps()]
    targets = TARGETS[:2]
    optimizer = torch.optim.Adam(raw, 0.1)
    for _ in range(250):
        loss = detection_loss(HEADS, raw, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = detect(HEADS, raw, confidence=0.5)
    assert found[0].classes.tolist() in ([1, 2], [2, 1]) and len(found[1]) == 0
    true = torch.tensor([corner(row) for row in targets.tolist()])
    assert box_iou(found[0].corners, true).max(0).values.min() > 0.95


def test_label_smoothing_and_wrong_targets():
    raw = maps()
    assert detection_loss(HEADS, raw, TARGETS, smoothing=0.2) != detection_loss(HEADS, raw, TARGETS)
    with pytest.raises(DualpruneError, match="0…2, got 0…3"):
        detection_loss(HEADS, raw, torch.tensor([[0, 3, 0.5, 0.5, 0.1, 0.1], [0, 0, 0.5, 0.5, 0.1, 0.1]]))
    with pytest.raises(DualpruneError, match="targets are"):
        detection_loss(HEADS, raw, torch.zeros(2, 5))


# --- average precision -----------------------------------------------------------------------------------------------


def slow_ap(truths, found, threshold):
    """COCO's AP in plain Python (no crowds): greedy by score, the best free true box, 101 recall points."""
    values = []
    for c in sorted({int(k) for t in truths for k in t.classes}):
        hits, total = [], 0
        for t, f in zip(truths, found, strict=True):
            true, guesses = t.corners[t.classes == c].double(), f.corners[f.classes == c].double()
            total += len(true)
            overlap, used = box_iou(guesses, true), set()
            for i, score in enumerate(f.scores[f.classes == c].tolist()):
                free = [(float(overlap[i, j]), j) for j in range(len(true)) if j not in used and overlap[i, j] >= threshold]
                used |= {max(free)[1]} if free else set()
                hits.append((score, bool(free)))
        hits.sort(key=lambda hit: -hit[0])
        right, points = 0, []
        for rank, (_, hit) in enumerate(hits, 1):
            right += hit
            points.append((right / total, right / rank))
        values.append(sum(max((p for r, p in points if r >= level), default=0.0) for level in np.linspace(0, 1, 101)) / 101)
    return 100 * sum(values) / len(values)


def scene(seed):
    g = torch.Generator().manual_seed(seed)
    truths, found = [], []
    for _ in range(6):
        n = int(torch.randint(1, 8, (), generator=g))
        start, size = torch.rand(n, 2, generator=g) * 60, torch.rand(n, 2, generator=g) * 30 + 20
        corners, classes = torch.cat([start, start + size], 1), torch.randint(0, 3, (n,), generator=g)
        none = torch.zeros(n, dtype=torch.bool)
        truths.append(Boxes(corners, classes, torch.ones(n), none))
        moved = corners.repeat(2, 1) + torch.randn(2 * n, 4, generator=g) * 3
        wrong = torch.rand(2 * n, generator=g) < 0.2
        guessed = torch.where(wrong, (classes.repeat(2) + 1) % 3, classes.repeat(2))
        scores, order = torch.rand(2 * n, generator=g).sort(descending=True)
        found.append(Boxes(moved[order], guessed[order], scores, none.repeat(2)))
    return truths, found


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_equals_a_plain_one(seed):
    truths, found = scene(seed)
    result = average_precision(truths, found)
    assert result["AP50"] == pytest.approx(slow_ap(truths, found, 0.5), abs=1e-6)
    mean = sum(slow_ap(truths, found, 0.5 + 0.05 * k) for k in range(10)) / 10
    assert result["AP50-95"] == pytest.approx(mean, abs=1e-6)


def test_perfect_is_100_and_nothing_is_0():
    truths, _ = scene(0)
    assert average_precision(truths, truths) == pytest.approx({"AP50": 100, "AP50-95": 100})
    assert average_precision(truths, [boxes([]) for _ in truths]) == {"AP50": 0, "AP50-95": 0}


def test_average_precision_by_hand():
    # two true boxes; a hit, a miss, then a hit: precision 1 up to recall 1/2, 2/3 beyond
    truth = boxes([[0, 0, 0, 10, 10], [0, 20, 0, 30, 10]])
    found = boxes([[0, 0, 0, 10, 10], [0, 50, 50, 60, 60], [0, 20, 0, 30, 10]], [0.9, 0.8, 0.7])
    assert average_precision([truth], [found])["AP50"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)


def test_boxes_in_a_crowd_count_neither_way():
    truth = boxes([[0, 0, 0, 10, 10], [0, 40, 40, 90, 90]], crowd=[False, True])
    found = boxes([[0, 45, 45, 60, 60], [0, 50, 50, 70, 70], [0, 0, 0, 10, 10]], [0.9, 0.8, 0.7])
    assert average_precision([truth], [found])["AP50"] == pytest.approx(100)


def test_wrong_inputs_are_explained():
    truths, found = scene(0)
    with pytest.raises(DualpruneError, match="in 6 images, got those of 5"):
        average_precision(truths, found[1:])
    with pytest.raises(DualpruneError, match="needs true boxes"):
        average_precision([boxes([])], [boxes([])])
