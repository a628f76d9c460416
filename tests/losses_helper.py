"""What the tests of losses share: logits with a target, a value with its gradient, a table of losses."""
from functools import partial
from typing import Callable, NamedTuple

import torch

from segkit import losses as L
from segkit.core.task import MODES


class Spec(NamedTuple):
    build: Callable  # called with a mode and options
    modes: tuple = MODES
    pixel: bool = False  # offers a value for each pixel
    soft: bool = True  # takes targets between 0 and 1
    weights: tuple = ("multiclass", "multilabel")  # modes with class weights
    probabilities: bool = True  # can take probabilities in place of logits
    loops: bool = False  # works mask by mask


def cross_entropy(mode, **options): return L.SoftCrossEntropyLoss(**options)
def binary_cross_entropy(mode, **options): return L.SoftBCEWithLogitsLoss(**options)
def mcc(mode, from_logits=True, **options): return L.MCCLoss(mode=mode, from_logits=from_logits, **options)
def total(mode, reduction="mean", **options):
    return L.SumLoss(dice=L.DiceLoss(mode, **options), focal=L.FocalLoss(mode, **options), weights={"focal": .5}, reduction=reduction)


SPECS = {
    **{name: Spec(getattr(L, name)) for name in ("DiceLoss", "JaccardLoss", "TverskyLoss", "FocalTverskyLoss")},
    "FocalLoss": Spec(L.FocalLoss, pixel=True),
    "FocalLoss softmax": Spec(partial(L.FocalLoss, activation="softmax"), ("multiclass",), pixel=True),
    "SoftCrossEntropyLoss": Spec(cross_entropy, ("multiclass",), pixel=True, probabilities=False),
    "SoftBCEWithLogitsLoss": Spec(binary_cross_entropy, ("binary", "multilabel"), pixel=True, weights=(), probabilities=False),
    "OHEMCrossEntropyLoss": Spec(L.OHEMCrossEntropyLoss, weights=("multiclass",)),
    "LovaszLoss": Spec(L.LovaszLoss, soft=False, weights=("multiclass",)),
    "LovaszLoss per image": Spec(partial(L.LovaszLoss, per_image=True), soft=False, weights=("multiclass",)),
    "LovaszLoss per class": Spec(partial(L.LovaszLoss, per_class=True), ("multilabel",), soft=False),
    "MCCLoss": Spec(mcc),
    "BoundaryLoss": Spec(L.BoundaryLoss, pixel=True, soft=False, loops=True),
    "SoftClDiceLoss": Spec(partial(L.SoftClDiceLoss, iterations=3)),
    "SumLoss": Spec(total),
}
CASES = [(name, mode) for name, spec in SPECS.items() for mode in spec.modes]


def make(name, mode, **options):
    return SPECS[name].build(mode, **options)


def data(mode, shape=(17, 13), b=2, c=4, dtype=torch.float32, seed=0):
    """Logits and a hard target; one class in binary mode."""
    torch.manual_seed(seed)
    c = 1 if mode == "binary" else c
    target = torch.randint(c, (b, *shape)) if mode == "multiclass" else torch.randint(2, (b, c, *shape))
    return torch.randn(b, c, *shape, dtype=dtype) * 3, target


def gradient(loss, logits, target):
    """The loss, and the gradient of its sum."""
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, target)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]
