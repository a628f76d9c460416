"""Composite losses against torch's and SMP's losses, called by hand."""
import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from segkit.losses.distribution import SoftBCEWithLogitsLoss
from segkit.losses.multitask import CompositeLoss, DeepSupervisionLoss, MultiTaskLoss, SumLoss, task_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import segmentation_models_pytorch as smp

@pytest.fixture
def batch():
    torch.manual_seed(0)
    return ((torch.randn(4, 3, 8, 8), torch.randn(4, 5)), torch.randint(3, (4, 8, 8)), torch.randint(5, (4,)))

def test_values_are_those_of_the_parts(batch):
    pred, mask, label = batch
    loss = MultiTaskLoss(SumLoss(ce=nn.CrossEntropyLoss(), dice=smp.losses.DiceLoss("multiclass"), weights={"dice": 2}),
                         nn.CrossEntropyLoss(), label_weight=.25)
    m = F.cross_entropy(pred[0], mask) + 2*smp.losses.DiceLoss("multiclass")(pred[0], mask)
    l = F.cross_entropy(pred[1], label)
    assert_close(loss(pred, mask, label), m + .25*l)
    assert_close(loss.mask_loss_value, m)
    assert_close(loss.label_loss_value, l)
    assert_close(loss.mask_loss.dice_value, smp.losses.DiceLoss("multiclass")(pred[0], mask))
    assert_close(loss(pred[0], mask), m)
    assert not hasattr(loss, "label_loss_value")  # nothing stale from the call before
    loss.label_weight = 0
    assert_close(loss(pred, mask, label), m)

SMP = [smp.losses.DiceLoss("multiclass"), smp.losses.JaccardLoss("multiclass"), smp.losses.FocalLoss("multiclass"),
       smp.losses.LovaszLoss("multiclass"), smp.losses.TverskyLoss("multiclass"), smp.losses.SoftCrossEntropyLoss(smooth_factor=.1)]

@pytest.mark.parametrize("mask_loss", [nn.CrossEntropyLoss(weight=torch.tensor([1., 2, 3])), *SMP], ids=lambda x: type(x).__name__)
def test_one_value_an_item(batch, mask_loss):
    pred, mask, label = batch
    loss = MultiTaskLoss(mask_loss, nn.CrossEntropyLoss(), reduction="none")
    got = loss(pred, mask, label)
    alone = [mask_loss(pred[0][i:i+1], mask[i:i+1]) + .3*F.cross_entropy(pred[1][i:i+1], label[i:i+1]) for i in range(4)]
    assert_close(got, torch.stack(alone))
    assert loss.mask_loss_value.shape == (4,)
    assert_close(loss(pred, mask, label, reduction="sum"), sum(alone))
    loss.reduction = "mean"
    assert loss(pred, mask, label).shape == ()

def test_binary_and_multilabel_targets_of_torch_losses():
    torch.manual_seed(0)
    pred, mask, label = (torch.randn(2, 1, 4, 4), torch.randn(2, 1)), torch.randint(2, (2, 4, 4)), torch.tensor([0, 1])
    loss = MultiTaskLoss(nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss(), label_weight=1)
    want = F.binary_cross_entropy_with_logits(pred[0][:, 0], mask.float()) + F.binary_cross_entropy_with_logits(pred[1][:, 0], label.float())
    assert_close(loss(pred, mask, label), want)
    assert loss(pred, mask, label, reduction="none").shape == (2,)
    shown = loss.decodes(loss.activation(pred))
    assert [t.shape for t in shown] == [mask.shape, label.shape]
    assert torch.equal(shown[0], (pred[0][:, 0] >= 0).long())
    many = MultiTaskLoss(nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss())
    pred = torch.randn(2, 3, 4, 4), torch.randn(2, 7)
    targets = torch.randint(2, (2, 3, 4, 4)), torch.randint(2, (2, 7))
    assert many(pred, *targets).isfinite()
    assert [t.shape for t in many.decodes(many.activation(pred))] == [t.shape for t in targets]

@pytest.mark.parametrize("loss, mode", [(smp.losses.DiceLoss("binary"), "binary"), (smp.losses.DiceLoss("multilabel"), "multilabel"),
                                        (nn.CrossEntropyLoss(), "multiclass"), (smp.losses.LovaszLoss("multiclass"), "multiclass")])
def test_activation_follows_the_loss(loss, mode):
    channels = 1 if mode == "binary" else 3
    x = torch.randn(2, channels, 4, 4)*3
    got = MultiTaskLoss(loss).activation(x)
    assert_close(got, x.softmax(1) if mode == "multiclass" else x.sigmoid())
    assert_close(MultiTaskLoss(lambda p, t: p.mean(), mask_mode=mode).activation(x), got)

def test_binary_cross_entropy_stands_beside_a_binary_dice():
    loss = MultiTaskLoss(SumLoss(bce=SoftBCEWithLogitsLoss(), dice=smp.losses.DiceLoss("binary")))
    pred, mask = torch.randn(2, 1, 4, 4), torch.randint(2, (2, 4, 4))
    assert_close(loss(pred, mask), F.binary_cross_entropy_with_logits(pred[:, 0], mask.float()) + smp.losses.DiceLoss("binary")(pred, mask))
    assert loss.decodes(loss.activation(pred)).shape == mask.shape

def test_probabilities_are_left_alone():
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(MultiTaskLoss(smp.losses.DiceLoss("binary", from_logits=False)).activation(x), x)
    assert torch.equal(MultiTaskLoss(nn.BCELoss()).activation(x), x)
    assert MultiTaskLoss(nn.BCELoss(), threshold=.9).decodes(x).sum() < MultiTaskLoss(nn.BCELoss()).decodes(x).sum()

def test_uncertainty_is_the_formula_and_learns(batch):
    pred, mask, label = batch
    loss = MultiTaskLoss(nn.CrossEntropyLoss(), nn.CrossEntropyLoss(), label_weight="uncertainty").double()
    with torch.no_grad(): loss.log_variances.copy_(torch.tensor([.4, -.7]))
    pred = [p.double() for p in pred]
    m, l = F.cross_entropy(pred[0], mask), F.cross_entropy(pred[1], label)
    s = torch.tensor([.4, -.7], dtype=torch.float64)
    assert_close(loss(pred, mask, label), (-s[0]).exp()*m + s[0]/2 + (-s[1]).exp()*l + s[1]/2)
    optimizer = torch.optim.SGD(loss.parameters(), .3)
    for _ in range(300):
        optimizer.zero_grad()
        loss(pred, mask, label).backward()
        optimizer.step()
    assert_close(torch.tensor(list(loss.weights.values())).double(), 1/(2*torch.stack([m, l])), rtol=1e-4, atol=0)
    assert [n for n, _ in loss.named_parameters()] == ["log_variances"]

def test_gradients_reach_both_heads(batch):
    pred = [p.clone().requires_grad_() for p in batch[0]]
    for reduction in ("mean", "sum", "none"):
        for p in pred: p.grad = None
        MultiTaskLoss(nn.CrossEntropyLoss(), nn.CrossEntropyLoss())(pred, *batch[1:], reduction=reduction).sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in pred)

def test_deep_supervision_inside_multitask(batch):
    (mask_pred, label_pred), mask, label = batch
    levels = [mask_pred, torch.randn(4, 3, 4, 4)]
    deep = DeepSupervisionLoss(nn.CrossEntropyLoss(), weights=(1, .4))
    loss = MultiTaskLoss(deep, nn.CrossEntropyLoss(), label_weight=1)
    up = F.interpolate(levels[1], size=(8, 8), mode="bilinear")
    want = F.cross_entropy(mask_pred, mask) + .4*F.cross_entropy(up, mask) + F.cross_entropy(label_pred, label)
    assert_close(loss((levels, label_pred), mask, label), want)
    assert loss((levels, label_pred), mask, label, reduction="none").shape == (4,)
    assert_close(loss.activation((levels, label_pred))[0], mask_pred.softmax(1))
    alone = MultiTaskLoss(deep)
    assert_close(alone(levels, mask), F.cross_entropy(mask_pred, mask) + .4*F.cross_entropy(up, mask))
    assert_close(alone.activation(levels), mask_pred.softmax(1))

class Mask(torch.Tensor): pass
class Label(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if Mask in types: return NotImplemented
        return super().__torch_function__(func, types, args, kwargs)

def test_tensor_subclasses_do_not_meet(batch):
    pred, mask, label = batch
    loss = MultiTaskLoss(nn.CrossEntropyLoss(), nn.CrossEntropyLoss())
    got = loss(pred, mask.as_subclass(Mask), label.as_subclass(Label))
    assert type(got) is torch.Tensor
    assert_close(got, loss(pred, mask, label))

def test_errors(batch):
    pred, mask, label = batch
    ce = nn.CrossEntropyLoss()
    both = MultiTaskLoss(ce, ce)
    with pytest.raises(ValueError, match="batch has none"): both(pred, mask)
    with pytest.raises(ValueError, match="mask only"): both(pred[0], mask, label)
    with pytest.raises(ValueError, match="no `label_loss`"): MultiTaskLoss(ce)(pred, mask, label)
    with pytest.raises(ValueError, match="no `label_loss`"): MultiTaskLoss(ce).activation(pred)
    for bad in (-1, float("nan"), float("inf"), True, "learned", None):
        with pytest.raises(ValueError, match="label_weight"): MultiTaskLoss(ce, ce, label_weight=bad)
    with pytest.raises(ValueError, match="no `label_loss`"): MultiTaskLoss(ce, label_weight="uncertainty")
    with pytest.raises(ValueError, match="learned"): MultiTaskLoss(ce, ce, "uncertainty").label_weight = .5
    for build in (lambda: MultiTaskLoss(ce, reduction="avg"), lambda: both(pred, mask, label, reduction="pixel")):
        with pytest.raises(ValueError, match="reduction"): build()
    with pytest.raises(ValueError, match="not one number"): MultiTaskLoss(nn.CrossEntropyLoss(reduction="none"))(pred[0], mask)
    with pytest.raises(ValueError, match="does not say"): MultiTaskLoss(lambda p, t: p.mean()).activation(pred[0])
    with pytest.raises(ValueError, match="'multilabel' was given"): MultiTaskLoss(ce, mask_mode="multilabel")
    with pytest.raises(ValueError, match="expected"): MultiTaskLoss(ce, mask_mode="multi")
    with pytest.raises(ValueError, match="1 channel"): MultiTaskLoss(smp.losses.DiceLoss("binary")).activation(pred[0])
    with pytest.raises(ValueError, match="disagree"): SumLoss(ce=ce, dice=smp.losses.DiceLoss("binary"))
    with pytest.raises(ValueError, match="disagree"): SumLoss(ce=ce, dice=smp.losses.DiceLoss("multiclass", from_logits=False))
    with pytest.raises(ValueError, match="weights for"): SumLoss(ce=ce, weights={"dice": 1})
    with pytest.raises(ValueError, match="attribute"): SumLoss(forward=ce)
    with pytest.raises(ValueError, match="at least one"): SumLoss()

def test_is_a_well_behaved_module(batch):
    pred, mask, label = batch
    loss = MultiTaskLoss(SumLoss(ce=nn.CrossEntropyLoss(weight=torch.ones(3))), nn.CrossEntropyLoss(), "uncertainty")
    want = loss(pred, mask, label)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))): assert_close(twin(pred, mask, label), want)
    assert set(loss.state_dict()) == {"log_variances", "mask_loss.ce.weight"}
    assert loss.y_int is False and isinstance(loss, CompositeLoss)
    assert task_of(loss.mask_loss).mode == "multiclass"

class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.mask, self.label = nn.Conv2d(1, 3, 1), nn.Linear(64, 5)
    def forward(self, x): return self.mask(x), self.label(x.flatten(1))

def test_a_real_fastai_learner(batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fastai.callback.progress import ProgressCallback
        from fastai.data.core import DataLoaders
        from fastai.data.load import DataLoader
        from fastai.learner import Learner
        from fastai.metrics import LossMetrics
    _, mask, label = batch
    data = [(torch.randn(1, 8, 8), m, l) for m, l in zip(mask, label, strict=True)]
    dls = DataLoaders(*(DataLoader(data, bs=2, num_workers=0) for _ in range(2)), device="cpu")
    dls.n_inp = dls.train.n_inp = dls.valid.n_inp = 1
    loss = MultiTaskLoss(nn.CrossEntropyLoss(), nn.CrossEntropyLoss())
    model = TwoHeads()
    learner = Learner(dls, model, loss, metrics=LossMetrics("mask_loss_value,label_loss_value", "mask_loss,label_loss"),
                      splitter=lambda m: list(m.parameters()))
    learner.remove_cb(ProgressCallback)
    with learner.no_logging(): learner.fit(1, 1e-2)
    total, m, l = learner.validate(dl=dls.valid)
    assert_close(total, m + .3*l)
    with learner.no_bar():
        probs, targets, decoded, losses = learner.get_preds(dl=dls.valid, with_loss=True, with_decoded=True)
    with torch.no_grad(): pred = model.eval()(torch.stack([x for x, *_ in data]))
    assert_close(losses, loss(pred, mask, label, reduction="none"))
    assert_close(probs[0], pred[0].softmax(1))
    assert torch.equal(decoded[0], pred[0].argmax(1)) and torch.equal(decoded[1], pred[1].argmax(1))
    assert torch.equal(targets[1], label)
    assert loss.reduction == "mean"
