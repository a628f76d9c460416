"""Losses as the package exports them: against SMP where it is right, against dense float64 formulas where it is not."""
import math
import subprocess
import sys
from pathlib import Path

import pytest
import segmentation_models_pytorch.losses as smp
import torch
import torch.nn.functional as F
from losses_helper import data, gradient
from torch.testing import assert_close

from segkit import losses
from segkit.core.task import MODES, Task
from segkit.losses.base import prepare

REGION = {"DiceLoss": (.5, .5), "JaccardLoss": (1., 1.), "TverskyLoss": (.5, .5), "FocalTverskyLoss": (.3, .7)}


def make(name, mode, **options):
    return getattr(losses, name)(mode, **options)


# --- against SMP --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["DiceLoss", "JaccardLoss", "TverskyLoss", "FocalLoss"])
@pytest.mark.parametrize("shape", [(17, 13), (40,), (4, 6, 5)])
def test_equals_smp_in_single_precision(name, mode, shape):
    logits, target = data(mode, shape)
    ours, theirs = (gradient(getattr(library, name)(mode), logits, target) for library in (losses, smp))
    assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, options", [
    ("DiceLoss", dict(classes=[1, 3], log_loss=True, smooth=.5)),
    ("DiceLoss", dict(class_weights=[1., 2., 0., 3.], classes=[0, 1])),
    ("JaccardLoss", dict(log_loss=True, ignore_index=0)),
    ("TverskyLoss", dict(alpha=.25, beta=.75, gamma=2., class_weights=[1., 2., 3., 4.])),
    ("FocalLoss", dict(alpha=.25, gamma=3., ignore_index=2)),
    ("FocalLoss", dict(normalized=True, reduced_threshold=.5, class_weights=[1., 2., 3., 4.])),
])
def test_equals_smp_with_options(name, options):
    logits, target = data("multiclass", dtype=torch.float64)
    ours, theirs = (gradient(getattr(library, name)("multiclass", **options), logits, target) for library in (losses, smp))
    assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_positional_arguments_have_smps_order():
    logits, target = data("multiclass")
    region = ("multiclass", [0, 1], True, True, .5, 2, 1e-3)
    for name, arguments in {"DiceLoss": (*region, [1., 2., 3., 4.]), "JaccardLoss": (*region, [1., 2., 3., 4.]),
                            "TverskyLoss": (*region, .25, .5, 2., [1., 2., 3., 4.]),
                            "FocalLoss": ("multiclass", .25, 1.5, 2, True, 1e-3, "sum", True, .5, [1., 2., 3., 4.])}.items():
        assert_close(*(getattr(library, name)(*arguments)(logits, target) for library in (losses, smp)), rtol=1e-5, atol=1e-5)
    assert_close(*(library.SoftCrossEntropyLoss("sum", .1, None, 1)(logits, target) for library in (losses, smp)))
    logits, target = data("multilabel")
    weight, pos_weight = torch.rand(4, 1, 1), torch.rand(4, 1, 1)
    assert_close(*(library.SoftBCEWithLogitsLoss(weight, None, "sum", .1, pos_weight)(logits, target.float()) for library in (losses, smp)))


def test_sums_of_single_precision_are_closer_to_the_exact_value_than_smps():
    logits, target = data("multiclass", (256, 256), c=21)
    exact = smp.DiceLoss("multiclass")(logits.double(), target)
    error = [abs(library.DiceLoss("multiclass")(logits, target) - exact).item() for library in (losses, smp)]
    assert error[0] < 1e-6 < error[1]


# --- against dense formulas ---------------------------------------------------------------------------------------

def dense_region(logits, target, mode, alpha, beta, void, power=1.):
    """Value of a region loss in float64, from dense tensors; soft targets allowed."""
    logits = logits.double()
    p = logits.softmax(1) if mode == "multiclass" else logits.sigmoid()
    counted = target != void
    t = target.masked_fill(~counted, 0)
    if mode == "multiclass" and target.ndim < logits.ndim:
        t, counted = F.one_hot(t, logits.shape[1]).movedim(-1, 1), counted.unsqueeze(1)
    axes = (0, *range(2, logits.ndim))
    p, t = p * counted, t.double() * counted
    overlap = torch.minimum(p, t).sum(axes)
    score = overlap / (overlap + alpha*(p.sum(axes) - overlap) + beta*(t.sum(axes) - overlap)).clamp_min(1e-7)
    return ((1 - score).clamp_min(0)**power * (t.sum(axes) > 0)).mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REGION)
def test_region_over_many_pieces_with_void(name, mode):
    logits, target = data(mode, (400, 331), c=5, b=3)
    target[:, ..., :30] = 255
    exponent = .75 if name == "FocalTverskyLoss" else 1.
    exact = dense_region(logits, target, mode, *REGION[name], 255, exponent)
    assert_close(make(name, mode, ignore_index=255)(logits, target).double(), exact, rtol=0, atol=2e-7)


@pytest.mark.parametrize("mode", MODES)
def test_soft_targets(mode):
    logits, _ = data(mode)
    soft = torch.rand_like(logits).softmax(1) if mode == "multiclass" else torch.rand_like(logits)
    for name, weights in REGION.items():
        power = .75 if name == "FocalTverskyLoss" else 1.
        assert_close(make(name, mode)(logits, soft).double(), dense_region(logits, soft, mode, *weights, -1, power), rtol=0, atol=1e-6)
    if mode == "multiclass":
        assert_close(losses.SoftCrossEntropyLoss()(logits, soft), F.cross_entropy(logits, soft))
    else:
        assert_close(losses.SoftBCEWithLogitsLoss()(logits, soft), F.binary_cross_entropy_with_logits(logits, soft))
        assert_close(make("FocalLoss", mode)(logits, soft), smp.FocalLoss(mode)(logits, soft))


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_focal_over_many_pieces_with_void(activation):
    logits, target = data("multiclass", (301, 300), c=5, b=2)
    target[:, :40] = 255
    x, keep = logits.double().movedim(1, -1)[target != 255], target[target != 255]
    if activation == "softmax":
        p = x.softmax(1).gather(1, keep[:, None])
        exact = (-(1 - p)**2 * p.log()).mean()
    else:
        yes = F.one_hot(keep, 5).bool()
        p = torch.where(yes, x.sigmoid(), (-x).sigmoid())
        exact = (-(1 - p)**2 * torch.where(yes, F.logsigmoid(x), F.logsigmoid(-x))).mean()
    loss = losses.FocalLoss("multiclass", ignore_index=255, activation=activation)
    assert_close(loss(logits, target).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("threshold, min_kept", [(.7, 1/16), (.01, .3), (.2, .02), (1e-6, 1.)])
def test_hard_examples(threshold, min_kept):
    logits, target = data("multiclass")
    target[:, :9] = 255
    entries = F.cross_entropy(logits, target, ignore_index=255, reduction="none")[target != 255].sort(descending=True).values
    kept = max(math.ceil(min_kept * len(entries)), (entries >= -math.log(threshold)).sum())
    assert_close(losses.OHEMCrossEntropyLoss("multiclass", threshold, min_kept, 255)(logits, target), entries[:kept].mean())


# --- what holds for every loss ------------------------------------------------------------------------------------

def lovasz_by_the_book(logits, target):
    "Algorithm 1 of Berman et al. (2018), class by class"
    values = []
    for c in target.unique():
        errors, order = ((target == c).to(logits) - logits.softmax(1)[:, c]).abs().flatten().sort(descending=True)
        yes = (target == c).flatten().to(logits)[order]
        jaccard = 1 - (yes.sum() - yes.cumsum(0))/(yes.sum() + (1 - yes).cumsum(0))
        values.append(errors @ jaccard.diff(prepend=jaccard.new_zeros(1)))
    return torch.stack(values).mean()

def test_graph_can_be_kept_and_differentiated_again():
    logits, target = data("multiclass", (5, 4), dtype=torch.float64)
    for name in ("DiceLoss", "FocalLoss", "LovaszLoss"):
        x, hessians = logits.clone().requires_grad_(), []
        for library in (losses, smp):
            by_the_book = library is smp and name == "LovaszLoss"  # SMP's mixes single and double precision
            value = lovasz_by_the_book(x, target) if by_the_book else getattr(library, name)("multiclass")(x, target)
            first, = torch.autograd.grad(value, x, retain_graph=True)
            kept = first.clone()
            second, = torch.autograd.grad(value, x, create_graph=True)
            assert_close((first, second), (kept, kept))
            hessians.append(torch.autograd.grad((second**2).sum(), x)[0])
        assert_close(*hessians)


def test_weights_are_buffers():
    loss = losses.DiceLoss("multiclass", class_weights=[1, 2, 3, 4], classes=[1, 2])
    assert loss.state_dict()["class_weights"].tolist() == [1, 2, 3, 4]
    assert {t.device.type for t in loss.to("meta").buffers()} == {"meta"}
    assert losses.FocalLoss("multiclass", alpha=[.1, .2]).to("meta").alpha.device.type == "meta"
    fresh = losses.DiceLoss("multiclass", class_weights=[1, 1, 1, 1], classes=[1, 2])
    fresh.load_state_dict(losses.DiceLoss("multiclass", class_weights=[1, 2, 3, 4]).state_dict())
    assert fresh.class_weights.tolist() == [1, 2, 3, 4]


# --- errors -------------------------------------------------------------------------------------------------------

def test_imports_are_light():
    code = ("import sys, segkit.losses as l; assert 'torch' not in sys.modules; l.DiceLoss; l.FocalLoss; l.LovaszLoss; l.MCCLoss; "
            "assert not {'fastai', 'timm', 'torchvision', 'scipy', 'sklearn', 'matplotlib'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_lazy_names_resolve():
    for name in losses.__all__: assert getattr(losses, name) is not None
    assert not {"base", "region", "distribution"} & set(losses.__all__)


# --- plain and closed forms ---------------------------------------------------------------------------------------

def forms(name):
    """Plain and closed form of a family's sums, as functions of a batch."""
    from segkit.losses import distribution, ranking, region
    if name == "region": return region.plain_sums, region.region_sums
    if name == "lovasz":
        share = torch.ones(1, 1, dtype=torch.float64)
        return [lambda batch, task, f=f: f(batch, share.expand(1, batch.classes), task, ranking.Rows())
                for f in (ranking.plain_lovasz, ranking.lovasz_losses)]
    def plain(batch, task): return torch.stack([x.flatten(2).sum(2) for x in distribution.plain_focal(batch, 1.5, .4)])
    def closed(batch, task): return distribution.focal_sums(batch, 1.5, .4)
    return plain, closed


@pytest.mark.parametrize("void", [None, 255])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["region", "focal", "lovasz"])
def test_closed_forms_equal_the_plain_ones(name, mode, void):
    logits, target = data(mode, (250, 211), b=3, c=5, dtype=torch.float64)  # several chunks
    target[:, ..., :9] = 255 if void else 0
    results = []
    for form in forms(name):
        x = logits.clone().requires_grad_()
        value = form(prepare(x, target, mode, void), Task(mode))
        weights = torch.linspace(.5, 2, value.numel(), dtype=torch.float64).view(value.shape)
        results.append((value.detach(), torch.autograd.grad((value * weights).sum(), x)[0]))
    assert_close(*results, rtol=1e-9, atol=1e-12)

# numbers that make no sense

@pytest.mark.parametrize("build, said", [
    (lambda: losses.TverskyLoss("binary", alpha=-1), "alpha=-1: expected a number from 0 on"), (lambda: losses.TverskyLoss("binary", beta=float("nan")), "beta=nan"),
    (lambda: losses.TverskyLoss("binary", gamma=0), "gamma=0: expected a number above 0"), (lambda: losses.FocalTverskyLoss("binary", gamma=-1), "gamma=-1"),
    (lambda: losses.FocalTverskyLoss("binary", alpha="1"), "alpha='1'"), (lambda: losses.FocalLoss("binary", gamma=-1), "gamma=-1: expected a number from 0 on"),
    (lambda: losses.FocalLoss("binary", gamma=float("inf")), "gamma=inf"), (lambda: losses.FocalLoss("binary", reduced_threshold=2), "reduced_threshold=2: expected a number from 0 to 1"),
    (lambda: losses.FocalLoss("binary", eps=.7), "eps=0.7"), (lambda: losses.SoftCrossEntropyLoss(smooth_factor=2), "smooth_factor=2: expected a number from 0 to 1"),
    (lambda: losses.SoftBCEWithLogitsLoss(smooth_factor=-.1), "smooth_factor=-0.1"), (lambda: losses.DiceLoss("binary", smooth=-1), "smooth=-1"), (lambda: losses.JaccardLoss("binary", eps=0), "eps=0: expected a number above 0"),
    (lambda: losses.MCCLoss(eps=-1), "eps=-1"), (lambda: losses.SoftClDiceLoss("binary", smooth=0), "smooth=0"), (lambda: losses.OHEMCrossEntropyLoss("binary", threshold=2), "threshold=2"),
])
def test_numbers_that_make_no_sense_are_refused(build, said):
    with pytest.raises(ValueError, match=said): build()
