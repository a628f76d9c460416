"""`Task`: one answer to what a prediction is, and when it is a yes; and who gives it."""
import copy
import pickle
import re
from functools import partial

import pytest
import segmentation_models_pytorch.losses as smp
import torch
import torch.nn.functional as F
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from torch import nn
from torch.testing import assert_close

from segkit import losses
from segkit.core.task import MODES, Task
from segkit.losses.multitask import MultiTaskLoss, SumLoss, task_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIGMOID = ("binary", "multilabel", None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", SIGMOID)
def test_one_half_is_a_yes(mode, dtype):
    half = torch.full((1, 1, 2), .5, dtype=dtype)
    for answer in (Task(mode).decision(half - .5), Task(mode).decodes(half), Task(mode, from_logits=False).decision(half)):
        assert (answer == 1).all()
    assert Task(mode).is_yes(half).all()
    less = torch.nextafter(half.float(), torch.tensor(0.))  # in float16 there is no such number so near
    assert not Task(mode).is_yes(less).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [.5, .25, .3, .7, 1e-3, .999])
def test_logits_are_decided_as_their_probabilities(threshold, dtype):
    torch.manual_seed(0)
    cut = torch.tensor(threshold).logit()
    near = cut + torch.randn(4000).mul(10.**-torch.randint(0, 9, (4000,)))
    logits = torch.cat([near, torch.randn(2000)*5, torch.tensor([0., -0., torch.inf, -torch.inf])]).to(dtype).view(-1, 1)
    for mode in SIGMOID:
        task = Task(mode, threshold=threshold)
        probs = task.activation(logits)
        assert torch.equal(task.decision(logits), task.decodes(probs))
        assert torch.equal(task.decision(logits).bool().view(-1, 1), task.is_yes(probs))
        assert torch.equal(task.is_yes(probs), probs >= threshold)


def test_the_largest_wins_and_the_first_of_equals():
    logits = torch.tensor([[0., 0, 0], [1, 3, 3], [-5, -7, -6]])
    assert Task("multiclass").decision(logits).tolist() == [0, 1, 0]
    assert Task("multiclass").decodes(Task("multiclass").activation(logits)).tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_there_and_back(mode, dtype):
    torch.manual_seed(0)
    probs = Task(mode).activation(torch.randn(3, 1 if mode == "binary" else 4, 5, 6).mul(5).to(dtype))
    assert probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(Task(mode).activation(Task(mode).to_logits(probs)), probs)
    ends = torch.tensor([[0., 1.], [1., 0.]], dtype=probs.dtype)
    assert Task(mode).to_logits(ends).isfinite().all()
    assert_close(Task(mode).activation(Task(mode).to_logits(ends)), ends)


@pytest.mark.parametrize("build, message", [
    (lambda: Task("multi"), "mode='multi': expected 'binary' or 'multiclass' or 'multilabel'"),
    (lambda: Task("multi-label"), "did you mean 'multilabel'"),
    (lambda: Task("binary", threshold=0), "threshold=0: expected a number between 0 and 1"),
    (lambda: Task("binary", threshold=1.), "threshold=1.0: expected a number between 0 and 1"),
    (lambda: Task("binary", threshold=float("nan")), "between 0 and 1"),
    (lambda: Task("binary", threshold="half"), "between 0 and 1"),
    (lambda: MultiTaskLoss(nn.BCEWithLogitsLoss(), threshold=2), "threshold=2"),
    (lambda: losses.DiceLoss("multi-label"), "did you mean 'multilabel'"),
    (lambda: Task("binary").decision(torch.zeros(2, 3, 4, 4)), "1 channel, this one has 3"),
    (lambda: Task("multiclass", names=["sky", "road"]).decision(torch.zeros(2, 3, 4, 4)), "3 channels, but 2 names"),
])
def test_errors_say_what_is_allowed(build, message):
    with pytest.raises(ValueError, match=message): build()


def test_a_task_is_a_value():
    task = Task("multilabel", threshold=.3, names=["cat", "dog"])
    assert {task, copy.deepcopy(task), pickle.loads(pickle.dumps(task))} == {Task("multilabel", threshold=.3, names=("cat", "dog"))}
    with pytest.raises(AttributeError): task.mode = "binary"


class Mine(nn.CrossEntropyLoss): pass
class CrossEntropyLoss:  # another library's; its name says nothing
    def __call__(self, pred, target): return pred.mean()


@pytest.mark.parametrize("loss, task", [
    (nn.CrossEntropyLoss(), Task("multiclass")), (Mine(), Task("multiclass")), (F.cross_entropy, Task("multiclass")),
    (partial(F.cross_entropy, label_smoothing=.1), Task("multiclass")), (CrossEntropyLossFlat(axis=1), Task("multiclass")),
    (smp.SoftCrossEntropyLoss(), Task("multiclass")), (smp.DiceLoss("multiclass"), Task("multiclass")),
    (nn.BCEWithLogitsLoss(), Task(None)), (BCEWithLogitsLossFlat(), Task(None)), (smp.SoftBCEWithLogitsLoss(), Task(None)),
    (losses.SoftBCEWithLogitsLoss(), Task(None)), (nn.BCELoss(), Task(None, from_logits=False)),
    (smp.MCCLoss(), Task("binary", from_logits=False)), (losses.MCCLoss(), Task("binary", from_logits=False)),
    (smp.DiceLoss("binary", from_logits=False), Task("binary", from_logits=False)), (losses.FocalLoss("multilabel"), Task("multilabel")),
    (SumLoss(a=nn.BCEWithLogitsLoss(), b=losses.DiceLoss("binary")), Task("binary")), (SumLoss(a=nn.BCEWithLogitsLoss()), Task(None)),
    (CrossEntropyLoss(), None), (SumLoss(a=CrossEntropyLoss()), None), (lambda pred, target: pred.mean(), None),
], ids=lambda value: re.sub(r' at 0x\w+', '', str(value)))
def test_who_says_what(loss, task):
    assert task_of(loss) == task


def test_the_threshold_reaches_both_answers():
    loss = MultiTaskLoss(nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss(), threshold=.75)
    probs = torch.tensor([.74, .75, .76]).view(3, 1)
    mask, label = loss.decodes((probs.view(3, 1, 1, 1), probs.expand(3, 2)))
    assert mask.flatten().tolist() == [0, 1, 1] and label.tolist() == [[0, 0], [1, 1], [1, 1]]
