"""SMP's functional scores: equal where SMP is right, checked by hand, sklearn or torchmetrics where it is not."""
import inspect
import math
import warnings

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch.testing import assert_close

from segkit.metrics import scores
from segkit.metrics.scores import SCORE_REDUCTIONS, fbeta_score, get_stats, iou_score

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import segmentation_models_pytorch as smp

NAMES = [n for n in smp.metrics.__all__ if n != "get_stats"]

def masks(c, shape=(3, 12, 10), void=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    target, output = torch.randint(c, shape, generator=g), torch.randint(c, shape, generator=g)
    output = torch.where(torch.rand(shape, generator=g) < .5, target, output)
    if void is not None: target[torch.rand(shape, generator=g) < .2] = void
    return output, target

def test_same_names_and_arguments():
    for name in smp.metrics.__all__:
        mine, theirs = inspect.signature(getattr(scores, name)), inspect.signature(getattr(smp.metrics, name))
        assert list(mine.parameters) == list(theirs.parameters), name
        assert [p.default for p in mine.parameters.values()] == [p.default for p in theirs.parameters.values()], name

@pytest.mark.parametrize("void", [None, 255, -1])
def test_multiclass_counts_equal_smp(void):
    output, target = masks(4, void=void)
    mine = get_stats(output, target, "multiclass", ignore_index=void, num_classes=4)
    theirs = smp.metrics.get_stats(output, target, mode="multiclass", ignore_index=void, num_classes=4)
    for a, b in zip(mine, theirs, strict=True): assert a.dtype == torch.int64 and torch.equal(a, b)

@pytest.mark.parametrize("mode, c", [("binary", 1), ("multilabel", 3)])
def test_yes_or_no_counts_equal_smp(mode, c):
    output, target = masks(2, (4, c, 6, 5))
    probs = torch.rand(4, c, 6, 5, generator=torch.Generator().manual_seed(0))
    for o, kwargs in ((output, {}), (probs, {"threshold": .3})):
        mine, theirs = get_stats(o, target, mode, **kwargs), smp.metrics.get_stats(o, target, mode=mode, **kwargs)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

@pytest.mark.parametrize("mode, c", [("binary", 1), ("multilabel", 3)])
def test_ignore_index_and_thresholds_everywhere(mode, c):
    _, target = masks(2, (4, c, 6, 5), void=255)
    probs = torch.rand(4, c, 6, 5, generator=torch.Generator().manual_seed(0))
    threshold = [.2, .5, .8][:c]
    stats = get_stats(probs, target, mode, ignore_index=255, threshold=threshold)
    yes, counts = probs >= torch.tensor(threshold).view(-1, 1, 1), target != 255
    want = [(counts & (yes == y) & ((target == 1) == t)).sum((2, 3)) for y, t in ((1, 1), (1, 0), (0, 1), (0, 0))]
    assert all(torch.equal(a, b) for a, b in zip(stats, want, strict=True))
    logits = probs.logit()
    at = torch.tensor(threshold).logit().tolist()
    assert all(torch.equal(a, b) for a, b in zip(get_stats(logits, target, mode, ignore_index=255, threshold=at), want, strict=True))

def test_binary_without_a_channel_is_one_class():
    output, target = masks(2)
    flat, deep = get_stats(output, target, "binary"), get_stats(output[:, None], target[:, None], "binary")
    assert flat[0].shape == (3, 1) and all(torch.equal(a, b) for a, b in zip(flat, deep, strict=True))
    assert torch.equal(get_stats(output*255, target*255, "binary", threshold=.5)[0], flat[0])

@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_smp_where_smp_is_right(name):
    stats = get_stats(*masks(4), "multiclass", num_classes=4)
    mine, theirs = getattr(scores, name), getattr(smp.metrics, name)
    for reduction in SCORE_REDUCTIONS:
        if reduction == "weighted-imagewise": continue
        w = [1., 2, 3, 4] if reduction == "weighted" else None
        assert_close(mine(*stats, reduction=reduction, class_weights=w), theirs(*stats, reduction=reduction, class_weights=w), rtol=0, atol=1e-5)

def test_weighted_means_are_means():
    stats = get_stats(*masks(4), "multiclass", num_classes=4)
    w = torch.tensor([1., 2, 3, 4])
    each = iou_score(*stats)
    assert_close(iou_score(*stats, reduction="weighted-imagewise", class_weights=w.tolist()), (each*w).sum(1).mean()/w.sum())
    assert_close(iou_score(*stats, reduction="macro-imagewise", class_weights=w), (each*w).sum(1).mean()/w.sum())
    whole = iou_score(*[t.sum(0, keepdim=True) for t in stats])[0]
    for reduction in ("macro", "weighted"): assert_close(iou_score(*stats, reduction=reduction, class_weights=w), (whole*w).sum()/w.sum())
    for reduction in ("micro", "micro-imagewise"):
        assert_close(iou_score(*stats, reduction=reduction, class_weights=w), iou_score(*stats, reduction=reduction))

@pytest.mark.parametrize("beta", [.5, 1, 2])
def test_fbeta_equals_sklearn(beta):
    output, target = masks(4)
    stats = get_stats(output, target, "multiclass", num_classes=4)
    for reduction in ("micro", "macro"):
        want = sklearn.metrics.fbeta_score(target.flatten(), output.flatten(), beta=beta, average=reduction)
        assert_close(fbeta_score(*stats, beta=beta, reduction=reduction).item(), want, rtol=0, atol=1e-6)
    each = fbeta_score(*stats, beta)
    for o, t, row in zip(output, target, each, strict=True):
        want = sklearn.metrics.fbeta_score(t.flatten(), o.flatten(), beta=beta, average=None)
        assert_close(row.double(), torch.tensor(want), rtol=0, atol=1e-6)

def counts(*rows): return [torch.tensor(r)[:, None] for r in zip(*rows, strict=True)]

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["micro", "macro", "micro-imagewise", "macro-imagewise", None])
def test_zero_division_everywhere(name, reduction):
    score, nothing = getattr(scores, name), counts((0, 0, 0, 0))
    for value in (1., 0., .25): assert score(*nothing, reduction=reduction, zero_division=value).item() == value
    assert score(*nothing, reduction=reduction, zero_division=math.nan).isnan()
    with pytest.warns(UserWarning, match="division by zero"): assert score(*nothing, reduction=reduction, zero_division="warn").item() == 0

def test_undefined_scores_and_means():
    stats = counts((7, 0, 1, 8), (1, 1, 1, 13), (0, 0, 0, 16))
    for value, want in ((1., (7/8 + 1/3 + 1)/3), (0., (7/8 + 1/3)/3), (math.nan, (7/8 + 1/3)/2)):
        assert_close(iou_score(*stats, reduction="macro-imagewise", zero_division=value).item(), want)
    assert scores.positive_likelihood_ratio(*counts((3, 0, 1, 4)), zero_division=5.).item() == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iou_score(*counts((7, 0, 1, 8)), zero_division="warn")

def test_exact_past_float32():
    n = 2**26 + 1
    assert_close(iou_score(*counts((n, 1, 0, 0)), reduction="micro").double().item(), n/(n + 1), rtol=1e-7, atol=0)
    big = torch.zeros(1, 4200, 4200, dtype=torch.uint8)
    assert get_stats(big, big, "multiclass", num_classes=2)[0].tolist() == [[4200*4200, 0]]

def test_no_images():
    for shape, kwargs in (((0, 4, 4), dict(mode="multiclass", num_classes=3)), ((0, 3, 4, 4), dict(mode="multilabel")), ((2, 0), dict(mode="multiclass", num_classes=3))):
        x = torch.zeros(shape, dtype=torch.long)
        for t in get_stats(x, x, **kwargs): assert t.shape == (shape[0], 3) and t.dtype == torch.int64 and t.sum() == 0

def test_dtypes_and_shapes():
    output, target = masks(3)
    want = get_stats(output, target, "multiclass", num_classes=3)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert all(torch.equal(a, b) for a, b in zip(get_stats(output.to(dtype), target.to(dtype), "multiclass", num_classes=3), want, strict=True))
    deep = [t.view(3, 1, 12, 10) for t in (output, target)]
    assert torch.equal(get_stats(*deep, "multiclass", num_classes=3)[0], want[0])
    assert iou_score(*want, reduction="macro").dtype == torch.float32
    yes = torch.rand(2, 3, 4, 4) > .5
    assert torch.equal(get_stats(yes, yes, "multilabel")[0], yes.sum((2, 3)))

def test_errors():
    output, target = masks(3)
    cases = [(dict(output=output, target=target, mode="multi"), "mode"), (dict(output=output, target=target.float(), mode="binary"), "target"),
             (dict(output=output.float(), target=target, mode="binary"), "threshold"), (dict(output=output, target=target, mode="multiclass"), "num_classes"),
             (dict(output=output.float(), target=target, mode="multiclass", num_classes=3), "labels"),
             (dict(output=output, target=target, mode="multiclass", num_classes=3, threshold=.5), "threshold"),
             (dict(output=output[:, :3], target=target, mode="multiclass", num_classes=3), "shape"),
             (dict(output=output, target=target, mode="multiclass", num_classes=3, ignore_index=1), "ignore_index"),
             (dict(output=output, target=target, mode="multiclass", num_classes=2), "label 2"),
             (dict(output=output, target=target, mode="binary"), "label 2"),
             (dict(output=torch.zeros(2, 3, 4, 4).long(), target=torch.zeros(2, 3, 4, 4).long(), mode="binary"), "binary masks"),
             (dict(output=torch.rand(2, 3, 4, 4), target=torch.zeros(2, 3, 4, 4).long(), mode="multilabel", threshold=[.5, .5]), "2 thresholds"),
             (dict(output=output[0, 0], target=target[0, 0], mode="multilabel"), "dimension")]
    for kwargs, words in cases:
        with pytest.raises(ValueError, match=words): get_stats(**kwargs)
    stats = get_stats(output, target, "multiclass", num_classes=3)
    for kwargs, words in (({"reduction": "mean"}, "reduction"), ({"reduction": "weighted"}, "class_weights"),
                          ({"reduction": "weighted-imagewise"}, "class_weights"), ({"zero_division": "raise"}, "zero_division"),
                          ({"reduction": "weighted", "class_weights": [1., 2]}, "shape")):
        with pytest.raises(ValueError, match=words): iou_score(*stats, **kwargs)

def test_numpy_oracle_by_image():
    output, target = masks(4, void=255, seed=3)
    stats = get_stats(output, target, "multiclass", ignore_index=255, num_classes=4)
    o, t = output.numpy(), target.numpy()
    iou = [[((o[i] == c) & (t[i] == c)).sum()/(((o[i] == c) | (t[i] == c)) & (t[i] != 255)).sum() for c in range(4)] for i in range(3)]
    assert_close(iou_score(*stats).double().numpy(), np.array(iou), rtol=0, atol=1e-6)

def test_tensors_of_fastai():
    mask = pytest.importorskip("fastai.torch_core").TensorMask
    pred, true = torch.randint(0, 3, (2, 8, 8)), torch.randint(0, 3, (2, 8, 8))
    for a, b in zip(get_stats(mask(pred), mask(true), "multiclass", num_classes=3), get_stats(pred, true, "multiclass", num_classes=3)): assert torch.equal(a, b)


def test_binary_masks_with_and_without_a_channel():
    "Also of other numbers of dimensions behind it, with void and with a threshold"
    output, target = torch.rand(3, 4, 5), torch.randint(0, 2, (3, 4, 5))
    target[:, 0] = 255
    for kwargs in ({"threshold": .5}, {"threshold": .2, "ignore_index": 255}):
        flat, with_channel = (get_stats(o, t, "binary", **kwargs) for o, t in ((output, target), (output[:, None], target[:, None])))
        for a, b in zip(flat, with_channel): assert a.shape == (3, 1) and torch.equal(a, b)
