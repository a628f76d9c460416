"""Boundary loss and clDice against brute force and against scipy's grey morphology."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch.testing import assert_close

from segkit import losses
from segkit.losses.shape import signed_distance, soft_skeleton


def dense_distance(mask, counted):
    """Signed distance of one mask, from the distances between all pixels."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in mask.shape)).double().view(-1, mask.ndim)
    far, inside, outside = torch.cdist(places, places), (mask & counted).flatten(), (~mask & counted).flatten()
    if not (inside.any() and outside.any()): return torch.zeros(mask.shape, dtype=torch.float64)
    return ((far[:, inside].min(1).values - .5)*outside - (far[:, outside].min(1).values - .5)*inside).view(mask.shape)


@pytest.mark.parametrize("shape", [(11,), (9, 7), (4, 5, 3)])
@pytest.mark.parametrize("mode", ["multiclass", "multilabel"])
def test_boundary_loss_is_the_sum_of_distances(mode, shape):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, *shape, dtype=torch.float64)
    target = torch.randint(3, (2, *shape)) if mode == "multiclass" else torch.randint(2, (2, 4, *shape))  # a class is absent
    target[..., :2] = 255
    p, classes = (logits.softmax(1), range(4)) if mode == "multiclass" else (logits.sigmoid(), range(4))
    means, weights = [], torch.tensor([1., 0, 2, 3]).double()
    for c in classes:
        label = target if mode == "multiclass" else target[:, c]
        yes, counted = (label == c) if mode == "multiclass" else (label == 1), label != 255
        total = sum((dense_distance(m, k) * q[c]).sum() for m, k, q in zip(yes, counted, p))
        means.append(total / counted.sum())
    loss = losses.BoundaryLoss(mode, ignore_index=255)
    assert_close(loss(logits, target), torch.stack(means).mean())
    loss = losses.BoundaryLoss(mode, ignore_index=255, class_weights=weights)
    assert_close(loss(logits, target), (torch.stack(means) * weights).sum() / weights.sum())


def test_no_outline_no_map():
    masks = torch.stack([torch.zeros(5, 6), torch.ones(5, 6)]).bool()
    assert (signed_distance(masks) == 0).all()
    assert signed_distance(masks[:, None], torch.ones_like(masks[:, None])).shape == (2, 1, 5, 6)


def grey_skeleton(x, iterations):
    """The same with scipy's filters, whose edge repeats the last value: what a missing neighbour comes to."""
    cross = ndimage.generate_binary_structure(x.ndim, 1)
    skeleton = np.zeros_like(x)
    for _ in range(iterations + 1):
        eroded = ndimage.minimum_filter(x, footprint=cross, mode="nearest")
        ridge = np.maximum(x - ndimage.maximum_filter(eroded, size=3, mode="nearest"), 0)
        skeleton += np.maximum(ridge - skeleton*ridge, 0)
        x = eroded
    return skeleton


@pytest.mark.parametrize("shape", [(20,), (16, 19), (8, 9, 7)])
def test_soft_skeleton_is_grey_morphology(shape):
    torch.manual_seed(0)
    smooth = torch.rand(2, 3, *shape, dtype=torch.float64)
    for iterations in (0, 1, 4):
        exact = np.stack([[grey_skeleton(c.numpy(), iterations) for c in image] for image in smooth])
        assert_close(soft_skeleton(smooth, iterations), torch.from_numpy(exact))


def test_cldice_from_its_definition():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 12, 13, dtype=torch.float64), torch.randint(3, (2, 12, 13))
    p, t = logits.softmax(1), F.one_hot(target, 3).movedim(-1, 1).double()
    values = []
    for c in range(3):
        line_p, line_t = (torch.from_numpy(np.stack([grey_skeleton(i[c].numpy(), 2) for i in x])) for x in (p, t))
        precision, sensitivity = ((line_p*t[:, c]).sum() + 1)/(line_p.sum() + 1), ((line_t*p[:, c]).sum() + 1)/(line_t.sum() + 1)
        values.append(1 - 2*precision*sensitivity/(precision + sensitivity))
    values = torch.stack(values)
    assert_close(losses.SoftClDiceLoss("multiclass", iterations=2)(logits, target), values.mean())
    assert_close(losses.SoftClDiceLoss("multiclass", [2, 1], iterations=2)(logits, target), values[1:].mean())
    weighted = losses.SoftClDiceLoss("multiclass", [2, 1], class_weights=[1, 2, 3], iterations=2)
    assert_close(weighted(logits, target), (2*values[1] + 3*values[2])/5)
    with pytest.raises(ValueError, match="3 classes"): losses.SoftClDiceLoss("multiclass", [3])(logits, target)


def test_a_gap_costs_more_than_a_rim():
    truth = torch.zeros(1, 1, 32, 32)
    truth[..., 14:19, :] = 1
    gap, rim = truth.clone(), truth.clone()
    gap[..., 10:13], rim[..., 14, :15] = 0, 0
    assert (gap != truth).sum() == (rim != truth).sum()
    loss = losses.SoftClDiceLoss("binary", from_logits=False)
    assert loss(gap, truth[:, 0].long()) > 2*loss(rim, truth[:, 0].long())
