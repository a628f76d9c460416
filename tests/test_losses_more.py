"""Losses by ranking and by correlation as the package exports them: against SMP where it is right, else against dense formulas."""
import math
from itertools import permutations

import numpy as np
import pytest
import segmentation_models_pytorch.losses as smp
import torch
from losses_helper import data, gradient
from torch.testing import assert_close

from segkit import losses
from segkit.core.task import MODES
from segkit.losses.ranking import lovasz_weights

# --- against SMP --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("void", [None, 255])
@pytest.mark.parametrize("shape", [(17, 13), (4, 6, 5)])
def test_lovasz_equals_smp(mode, per_image, void, shape):
    logits, target = data(mode, shape, b=3, c=6)
    logits = logits / 3
    if mode == "multiclass": target[target == 4] = 1  # an absent class
    if void: target[..., :2] = void
    ours, theirs = (gradient(library.LovaszLoss(mode, per_image, void, True), logits, target) for library in (losses, smp))
    assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-5, .5])
@pytest.mark.parametrize("values", [(0, 1), (0,), (1,)])
def test_mcc_equals_smp(eps, values):
    p, target = torch.rand(2, 1, 17, 13), torch.tensor(values)[torch.randint(len(values), (2, 17, 13))]
    for x, y in ((p, target), (p[:, 0], target), (p, target[:, None])):
        ours, theirs = (gradient(library.MCCLoss(eps), x, y) for library in (losses, smp))
        assert_close(ours, theirs, rtol=0, atol=1e-5)


# --- against dense formulas ---------------------------------------------------------------------------------------

def jaccard_of(wrong, labels):
    predicted, actual = labels ^ wrong, labels
    return 1 - (predicted & actual).sum()/(predicted | actual).sum() if (predicted | actual).any() else 0.


def dearest_order(errors, labels):
    """The Lovász extension as a maximum over all orders (Edmonds), in float64, without a sort."""
    best = 0
    for order in permutations(range(len(errors))):
        wrong, before, total = np.zeros(len(errors), bool), 0., 0.
        for i in order:
            wrong[i] = True
            now = jaccard_of(wrong, labels)
            total, before = total + errors[i]*(now - before), now
        best = max(best, total)
    return best


@pytest.mark.parametrize("labels", [0b00000, 0b00001, 0b01010, 0b10111, 0b11111])
@pytest.mark.parametrize("errors", [[.3, .9, .2, .5, .7], [.5, .5, .5, .5, .5], [.5, .2, .5, .2, 0], [2.5, 0, 1.5, 1.5, 0]])
def test_extension_is_the_dearest_order_ties_included(labels, errors):
    labels = np.array([labels >> i & 1 for i in range(5)], bool)
    e = torch.tensor(errors, dtype=torch.float64)
    weights = lovasz_weights(e, torch.tensor(labels))
    assert math.isclose((weights @ e).item(), dearest_order(errors, labels), abs_tol=1e-14)
    for other in np.random.default_rng(0).random((20, 5))*3:  # a subgradient: the plane lies below
        assert dearest_order(other, labels) >= weights.numpy() @ other - 1e-12


def test_no_weight_where_nothing_counts():
    errors, labels = torch.tensor([[-1, .5, -1], [-1, -1, -1]]), torch.zeros(2, 3).bool()
    for e in (errors, errors.double()): assert lovasz_weights(e, labels).tolist() == [[0, 1, 0], [0, 0, 0]]


def test_ties_are_ranked_misses_first_then_by_place():
    weights = lovasz_weights(torch.full((5,), .5), torch.tensor([0, 1, 0, 1, 0]).bool())
    assert_close(weights, torch.tensor([0, 1/2, 0, 1/2, 0]))
    weights = lovasz_weights(torch.tensor([.5, .5, .5, .5, .2]), torch.tensor([0, 1, 0, 0, 1]).bool())
    assert_close(weights, torch.tensor([1/6, 1/2, 1/12, 1/20, 1/5]))
    big = lovasz_weights(torch.full((2, 100_000), .5), torch.zeros(2, 100_000).bool())
    assert (big[:, 0] == 1).all() and (big[:, 1:] == 0).all()


@pytest.mark.parametrize("per_image", [False, True])
def test_lovasz_softmax_from_sets(per_image):
    logits, target = data("multiclass", (2, 2), b=2, c=3, dtype=torch.float64)
    target[1] = target[1].clamp(max=1)
    target[0, 0, 0] = 255
    p, values = logits.softmax(1), []
    for images in ([[0], [1]] if per_image else [[0, 1]]):
        keep = target[images] != 255
        present = [c for c in range(3) if (target[images][keep] == c).any()]
        rows = [((target[images] == c)[keep].numpy(), p[images][:, c][keep].numpy()) for c in present]
        values.append(np.mean([dearest_order(abs(t - q), t) for t, q in rows]))
    assert math.isclose(losses.LovaszLoss("multiclass", per_image, 255)(logits, target).item(), np.mean(values), abs_tol=1e-12)


def test_hinge_for_each_class_is_the_mean_of_binary_hinges():
    logits, target = data("multilabel")
    target[:, :, :3] = 255
    alone = torch.stack([losses.LovaszLoss("binary", ignore_index=255)(logits[:, c], target[:, c]) for c in range(4)])
    assert_close(losses.LovaszLoss("multilabel", ignore_index=255, per_class=True)(logits, target), alone.mean())
    weighted = losses.LovaszLoss("multilabel", ignore_index=255, per_class=True, class_weights=[1, 0, 2, 1])
    assert_close(weighted(logits, target), (alone * torch.tensor([1, 0, 2, 1])).sum()/4)
    weighted = losses.LovaszLoss("multiclass", class_weights=[0, 1, 0, 0])(logits, target := target.argmax(1))
    errors = (logits.softmax(1)[:, 1] - (target == 1).float()).abs().flatten()
    assert_close(weighted, errors @ lovasz_weights(errors, (target == 1).flatten()))


def test_weights_keep_their_digits():
    torch.manual_seed(0)
    errors, labels = torch.rand(2**20), torch.rand(2**20) < .01
    exact = lovasz_weights(errors.double(), labels)
    assert_close(lovasz_weights(errors, labels).double(), exact, rtol=1e-6, atol=0)
    assert_close(exact.sum().item(), 1., rtol=1e-12, atol=0)  # all errors at 1 are the whole Jaccard loss


@pytest.mark.parametrize("mode", MODES)
def test_mcc_of_hard_masks_is_pearsons(mode):
    logits, target = data(mode)
    target[:, ..., :3] = 255
    keep = target != 255
    if mode == "multiclass":
        guess = torch.nn.functional.one_hot(logits.argmax(1), 4).movedim(-1, 1).double()
        pairs = [(guess[:, c][keep], target[keep] == c) for c in range(4)]
    else:
        guess = (logits > 0).double()
        pairs = [(guess[:, c][keep[:, c]], target[:, c][keep[:, c]]) for c in range(logits.shape[1])]
    exact = np.mean([1 - np.corrcoef(a.numpy(), b.numpy())[0, 1] for a, b in pairs])
    assert math.isclose(losses.MCCLoss(1e-12, mode=mode, ignore_index=255)(guess, target).item(), exact, rel_tol=1e-9)


def test_mcc_means_over_classes_with_two_sides():
    logits, target = data("multiclass")
    target[target == 3] = 0
    alone = torch.stack([losses.MCCLoss()(logits.softmax(1)[:, c], target == c) for c in range(3)])
    assert_close(losses.MCCLoss(mode="multiclass", from_logits=True)(logits, target), alone.mean())
    weighted = losses.MCCLoss(mode="multiclass", from_logits=True, class_weights=[1, 0, 3, 9])
    assert_close(weighted(logits, target), (alone[0] + 3*alone[2])/4)


def test_mcc_refuses_logits_as_probabilities():
    logits, target = data("binary")
    with pytest.raises(ValueError, match="from_logits=False: y_pred must hold probabilities"): losses.MCCLoss()(logits, target)


@pytest.mark.parametrize("margin", [-20, 9])
@pytest.mark.parametrize("void", [None, 255])
def test_long_rows_equal_the_plain_form(margin, void):
    """Rows of 16,384 pixels and more are ranked one by one, and where that is more than half, without the alarms below the smallest miss."""
    logits, target = data("multiclass", (128, 128), b=2, c=5, dtype=torch.float64)
    target[target == 3] = 1
    logits = logits.scatter_add(1, target[:, None], torch.full_like(logits[:, :1], margin))
    if void: target[:, :9] = void
    plain, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    values = []
    for c in [0, 1, 2, 4]:  # the definition, by differences of Jaccard losses
        keep = target != 255
        yes, errors = (target == c)[keep], (plain.softmax(1)[:, c] - (target == c).double()).abs()[keep]
        assert ((errors >= errors[yes].min()).sum() <= target.numel()//2) == (margin < 0)  # whether alarms are left out
        order = errors.detach().argsort(descending=True)
        hit = yes[order].double()
        jaccard = 1 - (hit.sum() - hit.cumsum(0)) / (hit.sum() + (1 - hit).cumsum(0))
        values.append(errors[order] @ jaccard.diff(prepend=jaccard.new_zeros(1)))
    exact = torch.stack(values).mean()
    value = losses.LovaszLoss("multiclass", ignore_index=void)(ours, target)
    assert_close(value, exact)
    assert_close(torch.autograd.grad(value, ours), torch.autograd.grad(exact, plain), rtol=1e-8, atol=1e-14)


# --- what holds for every loss ------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", MODES)
def test_a_void_image_has_no_part_in_the_mean_of_images(mode):
    loss, (logits, target) = losses.LovaszLoss(mode, per_image=True, ignore_index=255), data(mode, b=3)
    target[0] = 255
    assert_close(loss(logits, target), loss(logits[1:], target[1:]))
    alone = torch.stack([loss(a[None], b[None]) for a, b in zip(logits, target)])
    assert_close(loss(logits, target), alone[1:].mean())


# --- errors -------------------------------------------------------------------------------------------------------

def test_errors_in_words():
    with pytest.raises(ValueError, match="need per_class=True"): losses.LovaszLoss("multilabel", class_weights=[1., 2.])
    with pytest.raises(ValueError, match="target of 0 or 1"): losses.LovaszLoss("binary")(torch.randn(1, 1, 4, 4), torch.full((1, 4, 4), .3))
    with pytest.raises(ValueError, match="eps=0"): losses.MCCLoss(0)
