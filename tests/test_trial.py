"""Losses and numbers that would train on nonsense: a loss is tried before the training, and what is not finite stops it with a name"""
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.learner import Metric
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat
from fastai.vision.data import ImageBlock, MaskBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

import segkit.losses as losses
from segkit.data import shims
from segkit.data.targets import Targets
from segkit.learner import Checkpoint, MaskMixUp, MaskScore, MeanLoss, SegmentationLearner, read_checkpoint, segmentation_learner, try_loss
from segkit.losses import DiceLoss, MultiTaskLoss, SoftBCEWithLogitsLoss, SumLoss

torch.set_num_threads(1)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{hidden.message}") for hidden in shims.HIDDEN.values()]

class Pair(nn.Module):
    def __init__(self, classes, pair):
        super().__init__()
        self.mask, self.label = nn.Conv2d(3, classes, 1), nn.Linear(3, 2) if pair else None
    def forward(self, x): return self.mask(x) if self.label is None else (self.mask(x), self.label(x.mean((2, 3))))

def files(folder, masks):
    "A picture for each mask; the mask beside it"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i, mask in enumerate(masks):
        Image.fromarray(rng.integers(0, 255, (*mask.shape, 3), np.uint8)).save(folder/f"{i}.bmp")
        Image.fromarray(mask).save(folder/f"{i}.png")
    return sorted(folder.glob("*.bmp"))

def learner(folder, masks, classes=1, pair=False, bs=2, check=32, valid=(4, 5), **kwargs):
    "Binary masks of the values 0, 1 and void; the last two pictures are for validation"
    blocks, get_y = [ImageBlock, MaskBlock(["no", "yes"] if classes == 1 else list("abc"))], [lambda f: f.with_suffix(".png")]
    if pair: blocks.append(CategoryBlock); get_y.append(lambda f: "ab"[int(f.stem) % 2])
    block = DataBlock(blocks, n_inp=1, get_y=get_y, splitter=IndexSplitter(list(valid)))
    dls = block.dataloaders(files(folder, masks), bs=bs, path=folder, device="cpu", num_workers=0)
    torch.manual_seed(0)
    learn = segmentation_learner(dls, Pair(classes, pair), classes=classes, check=check, **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn

def squares(n=6, void=True, size=16):
    mask = np.zeros((size, size), np.uint8)
    mask[4:9, 4:9] = 1
    if void: mask[12:] = 255
    return [mask]*n

VOID, ROAD, THREE = 255, Targets(1, "binary", ignore_index=255), Targets(3, "multiclass", ignore_index=255)
SEVERAL = Targets(3, "multilabel", ignore_index=255)
LABELLED = Targets(3, "multiclass", label="multiclass", vocab=["a", "b"], ignore_index=255)
flat, stacked = torch.zeros(1, 8, 8).long(), torch.zeros(1, 3, 8, 8).long()

# void pixels, row 3

COUNTS_VOID = {  # loss -> targets, mask, what the message advises
    "BCE": (MultiTaskLoss(nn.BCEWithLogitsLoss(), mask_mode="binary"), ROAD, flat, r"SoftBCEWithLogitsLoss\(ignore_index=255\)"),
    "BCE of fastai": (BCEWithLogitsLossFlat(), ROAD, flat, r"SoftBCEWithLogitsLoss\(ignore_index=255\)"),
    "BCE of several classes": (nn.BCEWithLogitsLoss(), SEVERAL, stacked.float(), r"SoftBCEWithLogitsLoss\(ignore_index=255\)"),
    "BCE in a sum": (MultiTaskLoss(SumLoss(bce=nn.BCEWithLogitsLoss(), dice=DiceLoss("binary", ignore_index=VOID))), ROAD, flat, "the loss BCEWithLogitsLoss counts void.*no argument"),
    "a part of ours in a sum": (SumLoss(soft=SoftBCEWithLogitsLoss(ignore_index=VOID), dice=DiceLoss("binary")), ROAD, flat, "Pass `ignore_index=255`"),
    "cross entropy": (nn.CrossEntropyLoss(), THREE, flat, "Pass `ignore_index=255`"),
    "cross entropy of fastai": (CrossEntropyLossFlat(axis=1), THREE, flat, "Pass `ignore_index=255`"),
    "focal of fastai": (FocalLossFlat(axis=1), THREE, flat, "ignore_index=255"),
    "another value": (nn.CrossEntropyLoss(ignore_index=254), THREE, flat, "Pass `ignore_index=255`"),
    "a function": (lambda pred, mask: ((pred - mask[:, None])**2).mean(), ROAD, flat, r"SoftBCEWithLogitsLoss\(ignore_index=255\)"),
    "Dice of one's own": (lambda pred, mask: 1 - (pred.sigmoid()*mask[:, None]).mean(), ROAD, flat, "counts void pixels"),
    "in both heads": (MultiTaskLoss(nn.CrossEntropyLoss(), nn.CrossEntropyLoss()), LABELLED, flat, "Pass `ignore_index=255`"),
    "void as background": (lambda pred, mask: F.cross_entropy(pred, mask.where(mask != VOID, 0)), THREE, flat, "counts void pixels"),
}

@pytest.mark.parametrize("name", COUNTS_VOID)
def test_a_loss_that_counts_void_pixels_is_refused(name):
    loss, targets, mask, advice = COUNTS_VOID[name]
    label = torch.zeros(1).long() if targets.label else None
    with pytest.raises(ValueError, match=f"(?s)void pixels, which have the mask value 255.*{advice}|{advice}"): try_loss(loss, targets, mask, label)

FINE = {
    "soft BCE": (SoftBCEWithLogitsLoss(ignore_index=VOID), ROAD, flat),
    "with a channel": (SoftBCEWithLogitsLoss(ignore_index=VOID), ROAD, flat[:, None].float()),
    "cross entropy": (nn.CrossEntropyLoss(ignore_index=VOID, weight=torch.tensor([1., 2, 3])), THREE, flat),
    "cross entropy of fastai": (CrossEntropyLossFlat(axis=1, ignore_index=VOID), THREE, flat),
    "several classes": (SoftBCEWithLogitsLoss(ignore_index=VOID), SEVERAL, stacked.float()),
    "random": (lambda pred, mask: F.cross_entropy(pred + .1*torch.randn_like(pred)*(mask != VOID)[:, None], mask, ignore_index=VOID), THREE, flat),
    "both heads": (MultiTaskLoss(nn.CrossEntropyLoss(ignore_index=VOID), nn.CrossEntropyLoss(), "uncertainty"), LABELLED, flat),
    "no void in the data": (nn.BCEWithLogitsLoss(), Targets(3, "multilabel"), stacked.float()),
}

@pytest.mark.parametrize("name", FINE)
def test_a_loss_that_leaves_void_out_passes(name):
    loss, targets, mask = FINE[name]
    numbers = torch.get_rng_state()
    try_loss(loss, targets, mask, torch.zeros(1).long() if targets.label else None)
    assert torch.equal(numbers, torch.get_rng_state())

@pytest.mark.parametrize("mode, targets", [("binary", ROAD), ("multiclass", THREE), ("multilabel", SEVERAL)])
def test_every_loss_of_ours_passes_with_ignore_index(mode, targets):
    tried = 0
    for name in losses.__all__ if hasattr(losses, "__all__") else dir(losses):
        kind = getattr(losses, name)
        if not (isinstance(kind, type) and issubclass(kind, losses.SegmentationLoss)): continue
        try: loss = kind(mode, ignore_index=VOID)
        except (TypeError, ValueError, AttributeError): continue  # it is for another mode
        if name in ("SegmentationLoss", "SetLoss", "ChosenClassesLoss", "RegionLoss", "SoftClDiceLoss"): continue  # bases; of the skeleton, void is background
        try_loss(loss, targets, stacked if mode == "multilabel" else flat)
        tried += 1
    assert tried >= 4

def test_what_is_no_loss():
    for loss, said in [(lambda p, m: p, r"one number, it gave \(2, 3, 32, 32\) float32"), (lambda p, m: 3., "it gave a float"), (lambda p, m: torch.tensor(1.), "does not depend"),
                       (lambda p, m: p.sum()*math.nan, "its value is not finite"), (lambda p, m: (p - p.detach()).abs().sqrt().sum(), "its gradient is not finite"),
                       (lambda p: p.sum(), "takes 1 positional argument"), (nn.MSELoss(), "fails on logits")]:
        with pytest.raises(ValueError, match=said): try_loss(loss, Targets(3, "multiclass"), flat)

def test_the_learner_tries_its_loss(tmp_path):
    with pytest.raises(ValueError, match="counts void pixels"): learner(tmp_path, squares(), ignore_index=VOID, loss_func=nn.BCEWithLogitsLoss())
    learn = learner(tmp_path, squares(), ignore_index=VOID, loss_func=SoftBCEWithLogitsLoss(ignore_index=VOID))
    learn.fit(1)
    learn.loss_func = MultiTaskLoss(nn.BCEWithLogitsLoss(), mask_mode="binary")  # set later: tried in the first batch
    before = learn.model.mask.weight.clone()
    with pytest.raises(ValueError, match="counts void pixels"): learn.fit(1)
    assert torch.equal(before, learn.model.mask.weight)
    learn = learner(tmp_path, squares(), ignore_index=VOID, loss_func=nn.BCEWithLogitsLoss(), check=0)  # the caller's word
    learn.fit(1)
    direct = SegmentationLearner(learn.dls, Pair(1, False), loss_func=MultiTaskLoss(nn.BCEWithLogitsLoss(), mask_mode="binary"), task=ROAD)
    with pytest.raises(ValueError, match="counts void pixels"): direct.fit(1)

# a loss of the mask where there is a label too, row 34

def masks_of_three(n=6): return [np.random.default_rng(i).integers(0, 3, (16, 16)).astype(np.uint8) for i in range(n)]

@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(weight=torch.tensor([1., 2, 3])), F.cross_entropy, DiceLoss("multiclass"), CrossEntropyLossFlat(axis=1),
                                  SumLoss(ce=nn.CrossEntropyLoss(), dice=DiceLoss("multiclass")), partial(F.cross_entropy, label_smoothing=.1), lambda pred, mask: F.cross_entropy(pred, mask)])
def test_a_loss_of_the_mask_gets_a_loss_of_the_label(loss, tmp_path):
    learn = learner(tmp_path, masks_of_three(), classes=3, pair=True, loss_func=loss)
    image, mask, label = (t.as_subclass(torch.Tensor) for t in learn.dls.valid.one_batch())
    pred = learn.model.eval()(image)
    assert torch.allclose(learn.loss_func(pred, mask, label), loss(pred[0], mask) + .3*F.cross_entropy(pred[1], label), atol=1e-5)
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1]).all()

def test_a_loss_of_both_is_taken_as_it_is(tmp_path):
    def both(pred, mask, label): return F.cross_entropy(pred[0], mask) + F.cross_entropy(pred[1], label)
    assert learner(tmp_path, masks_of_three(), classes=3, pair=True, loss_func=both).loss_func is both
    wrong = lambda pred, mask, label: F.cross_entropy(pred, mask)  # noqa: E731  it takes the pair for the mask
    with pytest.raises(ValueError, match=r"fails on logits \(2, 3, 32, 32\) float32, \(2, 2\) float32 and targets"): learner(tmp_path, masks_of_three(), classes=3, pair=True, loss_func=wrong)

# numbers that are none, row 7

class Spoil(Callback):
    "Put a value into one item's picture, as a damaged file would"
    order = -5
    def __init__(self, item, value, training=True): self.item, self.value, self.where = item, value, training
    def before_batch(self):
        order = self.learn.dl._DataLoader__idxs
        if self.training == self.where and self.item in order[self.iter*self.dl.bs:(self.iter + 1)*self.dl.bs]:
            self.xb[0][order.index(self.item) % self.dl.bs, 1, 2, 3] = self.value

@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_a_picture_that_is_not_finite_is_named(value, training, tmp_path):
    learn = learner(tmp_path, squares(), ignore_index=VOID)
    learn.model.norm = nn.BatchNorm2d(3)
    said = f"not finite.*{2 if training else 5}.bmp"
    with pytest.raises(ValueError, match=said): learn.fit(3, cbs=[Spoil(2 if training else 1, value, training), Checkpoint(), SaveModelCallback(), MaskMixUp()])
    assert all(t.isfinite().all() for t in learn.model.state_dict().values())
    assert not (tmp_path/"models/model.pth").exists()
    assert read_checkpoint(tmp_path/"models/checkpoint.ckpt")["epoch"] == -1
    learn.fit(1)

@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value, tmp_path):
    class Explode(Callback):
        order = -1
        def after_loss(self):
            if self.training and self.epoch == 1 and self.iter == 1: self.learn.loss_grad = self.learn.loss_grad*value
    learn = learner(tmp_path, squares(), ignore_index=VOID)
    with pytest.raises(FloatingPointError, match=r"(?s)the loss is (nan|inf) in training batch 1 of epoch 1.*\d.bmp, .*\d.bmp"): learn.fit(3, 1e-2, cbs=[Explode(), Checkpoint(), SaveModelCallback()])
    state = read_checkpoint(tmp_path/"models/checkpoint.ckpt")
    assert state["epoch"] == 0 and all(t.isfinite().all() for t in [*state["model"].values(), *learn.model.state_dict().values()])
    learn.fit(3, 1e-2, cbs=Checkpoint())
    assert np.isfinite(learn.recorder.values).all()

def test_a_rate_that_is_far_too_large_is_an_error_and_lr_find_may_explode(tmp_path):
    learn = learner(tmp_path, squares(void=False), loss_func=lambda pred, mask: (pred**2).mean().exp())
    with pytest.raises(FloatingPointError, match="smaller learning rate"): learn.fit(20, 1e3)
    learn = learner(tmp_path, squares(void=False), loss_func=lambda pred, mask: (pred**2).mean().exp())
    learn.lr_find(end_lr=1e6, num_it=20, stop_div=False, show_plot=False, suggest_funcs=())
    assert all(p.isfinite().all() for p in learn.model.parameters())

# void alone, row 12

def test_a_void_batch_adds_nothing_to_the_validation_loss(tmp_path):
    "Nor does a void picture within a batch; whatever the batch size"
    masks = squares(7)
    for i in (5, 6): masks[i] = np.full((16, 16), VOID, np.uint8)
    for loss in (None, SumLoss(bce=SoftBCEWithLogitsLoss(ignore_index=VOID)), SoftBCEWithLogitsLoss(ignore_index=VOID)):
        values = [learner(tmp_path/f"{bs}{len(valid)}", masks, bs=bs, valid=valid, ignore_index=VOID, loss_func=loss).evaluate()["loss"]
                  for bs, valid in ((1, (3, 4, 5, 6)), (1, (3, 4)), (2, (3, 5, 4, 6)), (3, (3, 4)))]
        assert np.isfinite(values).all() and values == pytest.approx([values[0]]*4, rel=.02)
        assert values[0] == pytest.approx(values[1], rel=1e-6)

def test_a_validation_set_of_void_alone_has_no_score(tmp_path):
    masks = [*squares(4), *[np.full((16, 16), VOID, np.uint8)]*2]
    for loss in (None, nn.CrossEntropyLoss(ignore_index=VOID)):
        learn = learner(tmp_path, masks, classes=3, ignore_index=VOID, loss_func=loss)
        learn.fit(1)
        assert learn.recorder.values[-1][1] is None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            learn.fit(1, cbs=SaveModelCallback())
        assert any("watches valid_loss, which has no value in epoch 0" in str(w.message) for w in said)

@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_mean_loss_does_not_know_batches_of_one_kind(void, bs, rng):
    "Law: whatever void pictures are added, and where, the mean over batches of one picture stays"
    logits = torch.randn(len(void), 3, 4, 4, generator=torch.Generator().manual_seed(rng.randrange(1000)))
    masks = torch.stack([torch.full((4, 4), 255 if v else i % 3) for i, v in enumerate(void)])
    def value(items):
        metric, learn = MeanLoss(255), type("Learn", (), {"dl": None, "loss_func": nn.CrossEntropyLoss(ignore_index=255)})
        metric.reset()
        for i in items:
            learn.pred, learn.yb = logits[[i]], (masks[[i]],)
            learn.loss = learn.loss_func(learn.pred, masks[[i]])
            metric.accumulate(learn)
        return metric.value
    counted = [i for i, v in enumerate(void) if not v]
    if not counted: assert value(range(len(void))) is None
    else: assert value(range(len(void))) == pytest.approx(np.mean([F.cross_entropy(logits[[i]], masks[[i]]).item() for i in counted]))

# values that are watched, row 33

def test_nothing_there_and_nothing_found_is_perfect(tmp_path):
    learn = learner(tmp_path, [np.zeros((16, 16), np.uint8)]*6)
    learn.model.mask.bias.data.fill_(-100)
    values = learn.evaluate(metrics=[MaskScore(name, learn.task) for name in ("miou", "dice", "recall", "precision", "accuracy")])
    assert [v for name, v in values.items() if name != "loss"] == [1]*5
    assert learn.evaluate(metrics=MaskScore("dice", learn.task, empty=.25))["mask_dice"] == .25
    assert math.isnan(learn.evaluate(metrics=MaskScore("dice", learn.task, empty=math.nan))["mask_dice"])
    learn.fit(2, 1e-6, cbs=[SaveModelCallback("mask_dice"), EarlyStoppingCallback("mask_dice", patience=5)])
    assert len(learn.recorder.values) == 2 and (tmp_path/"models/model.pth").exists()
    learn.model.mask.bias.data.fill_(100)
    assert learn.evaluate()["mask_dice"] == 0  # an object that is not there

class Odd(Metric):
    name = "odd"
    def __init__(self, values): self.values = iter(values)
    @property
    def value(self): return next(self.values)

@pytest.mark.parametrize("values, said, saved", [([math.nan]*3, 4, False), ([None]*3, 4, False), ([math.nan, .5, math.nan], 2, True), ([.1, .2, .3], 0, True)])
def test_a_watched_value_that_is_no_number_is_told(values, said, saved, tmp_path):
    learn = learner(tmp_path, squares(), ignore_index=VOID, metrics=[])
    (tmp_path/"models").mkdir()
    (tmp_path/"models/model.pth").write_bytes(b"of another run")
    learn.metrics = Odd(values)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learn.fit(3, 1e-2, cbs=SaveModelCallback("odd"))
    told = [str(w.message) for w in caught if "odd" in str(w.message)]
    assert len(told) == said and ((tmp_path/"models/model.pth").read_bytes() != b"of another run") == saved
    assert len(learn.recorder.values) == 3
