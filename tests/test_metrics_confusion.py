"""The streaming confusion matrix against torchmetrics and against counting by hand."""
import copy
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.testing import assert_close
from torchmetrics.functional import classification as tm

from segkit.metrics.confusion import ConfusionMatrix, count_pairs

root = Path(__file__).parents[1]

def labels(c, void=None, shape=(3, 16, 16), seed=0):
    "Targets and predictions with labels below `c`, every class present"
    g = torch.Generator().manual_seed(seed)
    target, pred = torch.randint(c, shape, generator=g), torch.randint(c, shape, generator=g)
    pred = torch.where(torch.rand(shape, generator=g) < .5, target, pred)
    if void is not None: target[torch.rand(shape, generator=g) < .2] = void
    return pred, target

def by_hand(pred, target, c):
    return torch.tensor([[int(((target == t) & (pred == p)).sum()) for p in range(c)] for t in range(c)])

@pytest.mark.parametrize("void", [None, 255, -1, -100, 7, 65535])
@pytest.mark.parametrize("c", [2, 5])
def test_counts(c, void):
    pred, target = labels(c, void)
    cm = ConfusionMatrix(c, void).update(pred, target)
    assert cm.matrix.dtype == torch.int64 and torch.equal(cm.matrix, by_hand(pred, target, c))
    if void is not None: assert torch.equal(cm.matrix, ConfusionMatrix(c, void).update(pred.where(target != void, void), target).matrix)

@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_any_integer_dtype(dtype):
    pred, target = labels(5)
    want = ConfusionMatrix(5).update(pred, target).matrix
    assert torch.equal(ConfusionMatrix(5).update(pred.to(dtype), target.to(dtype)).matrix, want)
    assert torch.equal(ConfusionMatrix(5).update(pred, target.to(dtype)).matrix, want)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits(dtype):
    _, target = labels(5)
    logits = torch.randn(3, 5, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    cm = ConfusionMatrix(5).update(logits, target)
    assert torch.equal(cm.matrix, by_hand(logits.argmax(1), target, 5)) and not cm.counts.requires_grad

@pytest.mark.parametrize("void", [None, 255, -1])
def test_multiclass_scores_equal_torchmetrics(void):
    pred, target = labels(5, void)
    cm, options = ConfusionMatrix(5, void).update(pred, target), dict(num_classes=5, ignore_index=void)
    for mine, theirs in ((cm.iou, tm.multiclass_jaccard_index), (cm.dice, tm.multiclass_f1_score), (cm.precision, tm.multiclass_precision),
                         (cm.recall, tm.multiclass_recall), (cm.recall, tm.multiclass_accuracy)):
        for average in (None, "macro", "micro", "weighted"):
            want = theirs(pred, target, average=average or "none", **options)
            assert_close(mine(average).float(), want, rtol=0, atol=1e-6)
    assert_close(cm.accuracy().float(), tm.multiclass_accuracy(pred, target, average="micro", **options), rtol=0, atol=1e-6)

@pytest.mark.parametrize("threshold", [.5, .2, .9])
def test_binary_and_multilabel_equal_torchmetrics(threshold):
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(4, 3, 16, 16, generator=g)*2, torch.randint(-1, 2, (4, 3, 16, 16), generator=g)
    many = ConfusionMatrix(3, ignore_index=-1, mode="multilabel", threshold=threshold).update(logits, target)
    options = dict(num_labels=3, ignore_index=-1, threshold=threshold)
    assert torch.equal(many.matrix, tm.multilabel_confusion_matrix(logits.sigmoid(), target, **options))
    assert_close(many.iou().float(), tm.multilabel_jaccard_index(logits.sigmoid(), target, average="none", **options), rtol=0, atol=1e-6)
    assert_close(many.accuracy().float(), tm.multilabel_accuracy(logits.sigmoid(), target, average="micro", **options), rtol=0, atol=1e-6)
    for mine, theirs in ((many.precision, tm.multilabel_precision), (many.recall, tm.multilabel_recall), (many.dice, tm.multilabel_f1_score)):
        for average in (None, "macro", "micro", "weighted"):
            assert_close(mine(average).float(), theirs(logits.sigmoid(), target, average=average or "none", **options), rtol=0, atol=1e-6)
    assert torch.equal(many.stats()[3], many.matrix[:, 0, 0])
    probs = ConfusionMatrix(3, -1, mode="multilabel", threshold=threshold, from_logits=False).update(logits.sigmoid(), target)
    assert torch.equal(probs.matrix, many.matrix)
    one = ConfusionMatrix(1, ignore_index=-1, threshold=threshold)
    options = dict(ignore_index=-1, threshold=threshold)
    want = tm.binary_confusion_matrix(logits[:, 0].sigmoid(), target[:, 0], **options)
    for x in (logits[:, :1], logits[:, 0]):
        for t in (target[:, :1], target[:, 0]): assert torch.equal(one.reset().update(x, t).matrix, want)
    assert_close(one.dice()[0].float(), tm.binary_f1_score(logits[:, 0].sigmoid(), target[:, 0], **options), rtol=0, atol=1e-6)

def test_exact_past_float32():
    target = torch.zeros(1, 4200, 4200, dtype=torch.uint8)
    cm = ConfusionMatrix(2).update(target, target)
    assert cm.matrix.tolist() == [[17_640_000, 0], [0, 0]]
    cm.counts += 2**40 - 17_640_000
    assert cm.update(target[:, :1, :1], target[:, :1, :1]).matrix[0, 0] == 2**40 + 1

def test_streaming_and_merging():
    pred, target = labels(4, 255, (8, 8, 8))
    whole = ConfusionMatrix(4, 255).update(pred, target)
    parts = [ConfusionMatrix(4, 255).update(p, t) for p, t in zip(pred.split(3), target.split(3), strict=True)]
    assert torch.equal(parts[0].merge(parts[1]).merge(parts[2]).matrix, whole.matrix)
    assert torch.equal(pickle.loads(pickle.dumps(whole)).matrix, whole.matrix)
    twin = copy.deepcopy(whole)
    twin.update(pred, target)
    assert torch.equal(twin.matrix, 2*whole.matrix)
    alone = whole.all_reduce()
    alone.update(pred, target)
    assert whole.matrix.sum() == (target != 255).sum()
    assert whole.reset().matrix.sum() == 0
    for other in (ConfusionMatrix(3, 255), ConfusionMatrix(4), ConfusionMatrix(4, 255, mode="multilabel")):
        with pytest.raises(ValueError, match="cannot merge"): whole.merge(other)
    empty = ConfusionMatrix(4).update(pred[:0], target[:0])
    assert empty.matrix.sum() == 0 and empty.iou("macro").isnan()

def process(rank, file, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    pred, target = labels(4, 255, (6, 8, 8))
    part = slice(0, 2) if rank == 0 else slice(2, 6)
    cm = ConfusionMatrix(4, 255).update(pred[part], target[part])
    for _ in range(2): total = cm.all_reduce()  # a second call must not count twice
    results[rank] = total.matrix.tolist(), cm.matrix.sum().item()
    torch.distributed.destroy_process_group()

def test_two_processes(tmp_path):
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(process, (str(tmp_path/"rendezvous"), results), nprocs=2)
    pred, target = labels(4, 255, (6, 8, 8))
    want = ConfusionMatrix(4, 255).update(pred, target).matrix
    assert results[0][0] == results[1][0] == want.tolist()
    assert results[0][1] + results[1][1] == want.sum()

def test_absent_classes():
    target, pred = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 2]])  # 2 is claimed but not there, 3 in neither
    cm = ConfusionMatrix(4).update(pred, target)
    nan = math.nan
    assert_close(cm.iou(), torch.tensor([1, 1/2, 0, nan]).double(), equal_nan=True)
    assert_close(cm.precision(), torch.tensor([1, 1, 0, nan]).double(), equal_nan=True)
    assert_close(cm.recall(), torch.tensor([1, 1/2, nan, nan]).double(), equal_nan=True)
    assert_close(cm.iou("macro").item(), 1.5/3)
    assert_close(cm.recall("macro").item(), 1.5/2)
    assert_close(cm.iou("weighted").item(), .75)
    for absent in (0., 1.):
        cm = ConfusionMatrix(4, absent=absent).update(pred, target)
        assert_close(cm.iou("macro").item(), (1.5 + absent)/4)
        assert_close(cm.recall("macro").item(), (1.5 + 2*absent)/4)
    void = ConfusionMatrix(2, 255).update(torch.zeros(1, 4).long(), torch.full((1, 4), 255))
    assert void.iou().isnan().all() and void.accuracy().isnan() and void.iou("micro").isnan()

def test_errors():
    pred, target = labels(3)
    logits = torch.randn(3, 3, 16, 16)
    cm = ConfusionMatrix(3, 255)
    bad = target.clone()
    for value in (3, 254, 256, -1, 2**31, 2**40):
        bad[0, 0, 0] = value
        with pytest.raises(ValueError, match=f"target holds the label {value};"): cm.update(pred, bad)
    for value in (3, 255, -1):
        bad[0, 0, 0] = value
        with pytest.raises(ValueError, match=f"prediction holds the label {value};"): cm.update(bad, target)
    for p, t in ((logits[:, :2], target), (logits, target[:, :8]), (logits[:, 0], target), (pred[:2], target), (logits, target[:, None])):
        with pytest.raises(ValueError, match="do not fit"): cm.update(p, t)
    with pytest.raises(ValueError, match="must be integers"): cm.update(pred, target.float())
    with pytest.raises(TypeError, match="one part"): cm.update((logits, None), target)
    assert cm.counts.sum() == 0  # nothing of a bad batch is kept
    with pytest.raises(ValueError, match="do not fit"): ConfusionMatrix(3, mode="multilabel").update(logits, target)
    with pytest.raises(ValueError, match="do not fit"): ConfusionMatrix(1).update(logits, target)
    for build in (lambda: ConfusionMatrix(0), lambda: ConfusionMatrix(3, mode="binary"), lambda: ConfusionMatrix(3, mode="multi"),
                  lambda: ConfusionMatrix(3, ignore_index=2), lambda: ConfusionMatrix(1, ignore_index=1), lambda: ConfusionMatrix(1, threshold=1),
                  lambda: ConfusionMatrix(3, ignore_index=10**6), lambda: ConfusionMatrix(2.), lambda: cm.iou("mean"),
                  lambda: count_pairs(pred.view(3, -1), target.view(3, -1), 3, ignore_index=1)):
        with pytest.raises(ValueError): build()

def test_light_import():
    code = "import sys, segkit.metrics.confusion; assert not {'fastai', 'timm', 'scipy', 'sklearn', 'torchmetrics'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
