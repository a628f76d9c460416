"""Each test states a defect of fastai that segkit works around, and fails when fastai has repaired it: then the workaround can go"""
import inspect
import subprocess
import sys

import fastai.callback.all  # adds the progress bar and `fit_one_cycle` to every learner
import fastai.vision.learner
import numpy as np
import pytest
import torch
from fastai.callback.mixup import MixUp
from fastai.data.block import DataBlock
from fastai.data.transforms import IndexSplitter, ItemGetter, Normalize, get_c
from fastai.interpret import ClassificationInterpretation, SegmentationInterpretation
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import JaccardCoeffMulti
from fastai.vision.augment import Flip
from fastai.vision.data import ImageBlock, MaskBlock
from fastai.vision.learner import _timm_norm
from torch import nn

from segkit.data import shims
from segkit.data.shapes import shapes_dataloaders
from segkit.losses import MultiTaskLoss

pytestmark = [pytest.mark.filterwarnings(f"ignore:{hidden.message}") for hidden in shims.HIDDEN.values()]
torch.set_num_threads(1)

class Pair(nn.Module):
    "A mask and a label from two convolutions"
    def __init__(self, two=True):
        super().__init__()
        self.mask, self.label, self.two = nn.Conv2d(3, 4, 1), nn.Linear(3, 3), two
    def forward(self, x): return (self.mask(x), self.label(x.mean((2, 3)))) if self.two else self.mask(x)

def learner(two=True, **kwargs):
    torch.manual_seed(0)
    dls = shapes_dataloaders(n=4, n_valid=4, size=16, labels="largest" if two else None, bs=2, **kwargs)
    loss = MultiTaskLoss(nn.CrossEntropyLoss(), nn.CrossEntropyLoss()) if two else CrossEntropyLossFlat(axis=1)
    learn = Learner(dls, Pair(two), loss)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn

def test_show_results_4092():
    assert "show_results[object]" in inspect.getsource(fastai.vision.learner)
    from fastai.data.core import show_results
    with pytest.raises(TypeError, match="not subscriptable"): show_results[object]

class Oracle(nn.Module):
    "Reads the class off a picture that holds 60 times the class"
    def __init__(self): super().__init__(); self.one = nn.Parameter(torch.ones(1))
    def forward(self, x): return -(x[:, :1]*255 - 60*torch.arange(4.)[:, None, None]).abs()*self.one

def test_tta_646():
    masks = [mask for _, mask in shapes_dataloaders(n=4, n_valid=2, size=16, labels=None, bs=2).items]
    items = [(np.stack([60*mask]*3, -1).astype(np.uint8), mask) for mask in masks]
    block = DataBlock([ImageBlock, MaskBlock(list("abcd"))], n_inp=1, get_x=ItemGetter(0), get_y=ItemGetter(1), splitter=IndexSplitter([0, 1]),
                      batch_tfms=Flip(p=1.))
    learn = Learner(block.dataloaders(items, bs=2, num_workers=0, device="cpu"), Oracle(), CrossEntropyLossFlat(axis=1))
    learn.remove_cb(learn.progress)
    probs, true = learn.get_preds()
    assert torch.equal(probs.argmax(1), true)
    probs, true = learn.tta(n=1)
    assert not torch.equal(probs.argmax(1), true)

def test_predict_keeps_the_batch():
    learn = learner()
    _, classes, probs = learn.predict(learn.dls.valid.items[0])
    assert classes.shape == (1, 16, 16) and probs.shape == (1, 4, 16, 16)

def test_order_of_pictures_goes_through_a_gpu():
    import fastai.distributed
    assert "LongTensor(t).cuda()" in inspect.getsource(fastai.distributed)

def test_repeated_pictures_are_scored_twice():
    from fastai.distributed import DistributedDL
    loaders = [DistributedDL(shapes_dataloaders(n=4, n_valid=3, size=16, bs=2, device="cpu").valid, rank=r, world_size=2) for r in range(2)]
    for dl in loaders: dl._broadcast = lambda t, rank: list(t)
    assert sum(len(mask) for dl in loaders for _, mask, _ in dl) == 4  # of three pictures

def test_get_c_counts_labels():
    assert get_c(shapes_dataloaders(n=4, n_valid=2, size=16, bs=2)) == 3  # the mask has four classes

def test_metrics_count_void_pixels():
    from types import SimpleNamespace
    true = torch.randint(0, 3, (1, 8, 8))
    pred = nn.functional.one_hot(true, 3).movedim(-1, 1).float()
    true[:, :4] = 255
    metric = JaccardCoeffMulti()
    metric.reset()
    metric.accumulate(SimpleNamespace(pred=pred, y=true, yb=(true,)))
    assert metric.value < .9

def test_mixup_leaves_its_loss_behind():
    learn = learner(two=False)
    with pytest.raises(RuntimeError): learn.fit(1, cbs=MixUp())
    with pytest.raises(AttributeError): learn.fit(1)

def test_normalize_is_kept():
    dls = shapes_dataloaders(n=4, n_valid=2, size=16, bs=2, batch_tfms=Normalize.from_stats([.5]*3, [.5]*3, cuda=False))
    _timm_norm(dls, dict(mean=(.4, .4, .4), std=(.2, .2, .2)), True)
    assert [t.mean.flatten().tolist() for t in dls.after_batch.fs if isinstance(t, Normalize)] == [[.5]*3]

def test_compiled_checkpoints_do_not_load(tmp_path):
    learn = learner()
    learn.path, model = tmp_path, learn.model
    learn.model = torch.compile(model, backend="eager")
    learn.save("compiled")
    learn.model = model
    with pytest.raises(RuntimeError, match="_orig_mod"): learn.load("compiled")

def test_predicting_empties_the_recorder():
    learn = learner()
    learn.fit(2)
    assert len(learn.recorder.losses) == 4
    learn.get_preds()
    assert len(learn.recorder.losses) == 0

def test_interpretation_of_masks():
    learn = learner(two=False)
    with pytest.raises(AttributeError): ClassificationInterpretation.from_learner(learn).confusion_matrix()
    assert not hasattr(SegmentationInterpretation, "per_class_iou") and not hasattr(SegmentationInterpretation, "confusion_matrix")


def test_warnings_of_the_import_are_still_needed():
    code = "import warnings; seen = []; warnings.showwarning = lambda m, *a, **k: seen.append(str(m)); import fastai.vision.all; print(seen)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "torch.jit.script" in said

def test_two_patches_are_still_needed():
    "fastai's crops let a picture of another type pass, and its bytes-to-float divides floats, too"
    from fastai.data.transforms import IntToFloatTensor
    from fastai.torch_core import TensorImage
    from fastai.vision.augment import Resize
    class Other(TensorImage): pass
    picture = Other(torch.rand(3, 6, 8))
    assert Resize(4)(picture, split_idx=1).shape == (3, 6, 8)
    assert IntToFloatTensor()(picture.clone()).max() < 1/200
