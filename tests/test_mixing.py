"""MixUp, CutMix and ClassMix in a `Learner`: where fastai's fail, what they leave behind, and what else divides or repeats a loss"""
import random

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner
from fastai.torch_core import TensorMultiCategory
from torch import nn
from torch.nn import functional as F

from segkit.data import shapes_dataloaders, shims
from segkit.learner import ClassMix, MaskCutMix, MaskMixUp, segmentation_learner
from segkit.losses import DiceLoss, MultiTaskLoss

torch.set_num_threads(1)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{hidden.message}") for hidden in shims.HIDDEN.values()]
OURS = [MaskMixUp, MaskCutMix, ClassMix]

def seed(n=0): random.seed(n); np.random.seed(n); torch.manual_seed(n)

def learner(labels="largest", bs=4, loss=None, n=8):
    seed()
    dls = shapes_dataloaders(n=n, n_valid=4, size=32, labels=labels, bs=bs, device="cpu")
    learn = segmentation_learner(dls, "Unet", "resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8),
                                 aux_params={} if labels else None, loss_func=loss)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn

@pytest.mark.parametrize("stock", [MixUp, CutMix])
def test_stock_mixing_fails_on_masks_and_ours_does_not(stock):
    ours, theirs = learner(), learner()
    theirs = Learner(theirs.dls, theirs.model, loss_func=MultiTaskLoss(nn.CrossEntropyLoss(), nn.CrossEntropyLoss()), cbs=stock())
    theirs.remove_cb(theirs.progress)
    theirs.logger = lambda *_: None
    with pytest.raises(Exception): theirs.fit(1)  # noqa: B017  which error depends on the version
    for ours_callback in (MaskMixUp(), MaskCutMix()): ours.fit(1, cbs=ours_callback)
    assert np.isfinite(ours.recorder.values[-1]).all()

class Crash(Callback):
    order = 50
    def after_loss(self):
        if self.training: raise KeyboardInterrupt

@pytest.mark.parametrize("mixing", OURS)
def test_a_run_that_fails_leaves_nothing_behind(mixing):
    learn, clean = learner(None), learner(None)
    loss, state = learn.loss_func, {k: v.clone() for k, v in learn.model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[mixing(), Crash()])
    assert learn.loss_func is loss and not any(isinstance(cb, mixing) for cb in learn.cbs)
    learn.model.load_state_dict(state)
    learn.create_opt()
    for each in (learn, clean): seed(1); each.dls.train.rng.seed(0); each.fit(1)
    assert [v.item() for v in learn.recorder.losses] == [v.item() for v in clean.recorder.losses]

class Keep(Callback):
    "The batch as it came (before mixing), as it was trained on, and the loss"
    order = 0
    def before_batch(self):
        if self.training: self.came = [t.clone() for t in (*self.learn.xb, *self.learn.yb)]
    def before_backward(self):
        if self.training: self.trained, self.answer, self.value = [t.clone() for t in (*self.learn.xb, *self.learn.yb)], self.learn.pred, self.learn.loss.item()

def plain(tensors): return [t.as_subclass(torch.Tensor) for t in tensors]

def test_mixup_of_dice_and_several_labels_is_the_weighted_sum_of_two_losses():
    loss = MultiTaskLoss(DiceLoss("multiclass"), nn.BCEWithLogitsLoss(), .5)
    learn, mixup, keep = learner("present", bs=8, loss=loss), MaskMixUp(2.), Keep()
    learn.fit(1, cbs=[mixup, keep])
    x, mask, label = plain(keep.came)
    mixed, share = keep.trained[0].as_subclass(torch.Tensor), mixup.share
    order = torch.stack([(share*x + (1 - share)*other - mixed).abs().amax((1, 2, 3)) for other in x]).argmin(0)
    assert order.tolist() != list(range(8))
    logits, answer = keep.answer
    values = [DiceLoss("multiclass")(logits, m).item() + .5*F.binary_cross_entropy_with_logits(answer, y).item() for m, y in ((mask, label), (mask[order], label[order]))]
    assert keep.value == pytest.approx(share*values[0] + (1 - share)*values[1], rel=1e-5)

def test_the_parts_of_the_loss_are_mixed_too():
    class Parts(Callback):
        order = 50
        def after_loss(self):
            if self.training: self.terms, self.value = dict(self.learn.loss_func.values), self.learn.loss.item()
    learn, parts = learner(), Parts()
    learn.fit(1, cbs=[MaskMixUp(2.), parts])
    assert parts.value == pytest.approx((parts.terms["mask_loss"] + .3*parts.terms["label_loss"]).item(), rel=1e-5)

def test_the_second_term_comes_before_the_loss_is_divided():
    "Gradient accumulation divides the loss by the number of steps; both terms must be divided"
    class Gradient(Callback):
        order = 60
        def after_backward(self):
            if not hasattr(self, "norm"): self.norm = next(p for p in self.learn.model.segmentation_head.parameters()).grad.clone()
    seen = []
    for extra in ([], [GradientAccumulation(16)]):
        learn, gradient = learner(bs=8, n=8), Gradient()
        learn.fit(1, cbs=[MaskMixUp(2.), gradient, *extra])
        seen.append(gradient.norm)
    ratio = seen[0]/seen[1]
    assert torch.allclose(ratio, torch.full_like(ratio, ratio.median().item()), rtol=1e-3) and ratio.median().item() != pytest.approx(1)

def test_void_pixels_stay_void():
    learn, keep = learner(None, bs=8), Keep()
    class Void(Callback):
        order = -1
        run_valid = False
        def before_batch(self):
            self.learn.yb = (self.learn.yb[0].clone(),)
            self.learn.yb[0][:4, :8] = 255
    learn.loss_func = MultiTaskLoss(nn.CrossEntropyLoss(ignore_index=255))
    learn.cbs.remove(next(cb for cb in learn.cbs if cb.name == "check_targets"))
    learn.fit(1, cbs=[Void(), MaskCutMix(), keep])
    came, mask = (t[1].as_subclass(torch.Tensor) for t in (keep.came, keep.trained))
    assert set(mask.unique().tolist()) <= {0, 1, 2, 3, 255} and (mask == 255).any() and (came != mask).any()
    assert keep.value == pytest.approx(F.cross_entropy(keep.answer, mask, ignore_index=255).item(), rel=1e-5)

def test_mixing_is_repeatable():
    losses = []
    for _ in range(2):
        learn = learner()
        learn.fit(1, cbs=MaskCutMix())
        losses.append([v.item() for v in learn.recorder.losses])
    assert losses[0] == losses[1]

def test_classmix_of_labels_that_are_not_in_the_mask_is_refused():
    with pytest.raises(TypeError, match="read it off the mask"): learner().fit(1, cbs=ClassMix())
    learn = learner("present")
    assert isinstance(learn.dls.one_batch()[2], TensorMultiCategory)
    with pytest.raises(TypeError, match="read it off the mask"): learn.fit(1, cbs=ClassMix())
