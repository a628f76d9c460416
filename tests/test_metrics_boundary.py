"""Scores of outlines against scipy.ndimage: repeated erosion and distance transforms."""
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch.testing import assert_close

from segkit.metrics import boundary_iou, boundary_stats, get_stats, hausdorff95, iou_score
from segkit.metrics.boundary import boundary_band, outline

root = Path(__file__).parents[1]

def ragged(n=3, c=3, h=36, w=48, seed=0):
    noise = torch.randn(n, c, h//6, w//6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=(h, w), mode="bicubic").max(1).indices

def edges(mask, void, structure, times):
    return mask & ~void & ~ndimage.binary_erosion(mask | void, structure, iterations=times)

def oracle(o, t, void, d, percentile=95, spacing=(1., 1.)):
    "Boundary IoU and Hausdorff distance of two boolean masks"
    g, p = (edges(m, void, np.ones((3, 3)), d) for m in (t, o))
    iou = (g & p).sum()/(g | p).sum() if (g | p).any() else 1.
    a, b = (edges(m, void, None, 1) for m in (t, o))
    if not (a.any() and b.any()): return iou, math.inf if a.any() or b.any() else math.nan
    ways = [ndimage.distance_transform_edt(~y, sampling=spacing)[x] for x, y in ((a, b), (b, a))]
    return iou, max(np.percentile(way, percentile) for way in ways)

@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 8, 13, 14, 40, 100])
def test_band_is_what_erosion_takes_away(d):
    labels = ragged()
    void = torch.zeros_like(labels, dtype=torch.bool)
    void[:, 5:11, 20:33] = True
    for v in (None, void):
        band = boundary_band(labels, d, v)
        for m, b in zip(labels.numpy(), band.numpy(), strict=True):
            hidden = np.zeros(m.shape, bool) if v is None else v[0].numpy()
            for c in range(3): assert np.array_equal(b & (m == c), edges(m == c, hidden, np.ones((3, 3)), d))

def test_outline_has_a_neighbour_outside():
    labels = ragged(seed=1)
    void = torch.zeros_like(labels, dtype=torch.bool)
    void[:, 5:11, 20:33] = True
    for v in (None, void):
        hidden = np.zeros(labels.shape[1:], bool) if v is None else v[0].numpy()
        for m, e in zip(labels.numpy(), outline(labels, v).numpy(), strict=True):
            for c in range(3): assert np.array_equal(e & (m == c), edges(m == c, hidden, None, 1))

@pytest.mark.parametrize("void", [None, 255, -1])
@pytest.mark.parametrize("percentile, spacing", [(95, (1., 1.)), (100, (3., .5)), (50, (1., 1.))])
def test_multiclass(void, percentile, spacing):
    output, target = ragged(seed=2), ragged(seed=3)
    output[:, :, :20] = target[:, :, :20]
    output[2][output[2] == 1] = 0   # a class that is not predicted
    hidden = np.zeros(target.shape, bool)
    if void is not None:
        target[:, 5:11, 18:33] = void
        hidden = (target == void).numpy()
    options = dict(mode="multiclass", num_classes=4, ignore_index=void)
    iou = boundary_iou(output, target, width=3, **options)
    distance = hausdorff95(output, target, percentile=percentile, spacing=spacing, **options)
    for i in range(3):
        for c in range(4):
            want = oracle((output[i] == c).numpy(), (target[i] == c).numpy(), hidden[i], 3, percentile, spacing)
            assert_close([iou[i, c].item(), distance[i, c].item()], list(map(float, want)), rtol=0, atol=1e-6, equal_nan=True)
    assert distance[:, 3].isnan().all() and distance[2, 1].isinf()
    assert hausdorff95(output, target, missing=77., **options)[2, 1] == 77

@pytest.mark.parametrize("mode", ["binary", "multilabel"])
def test_yes_or_no(mode):
    c = 1 if mode == "binary" else 2
    probs = torch.rand(3, c, 6, 8, generator=torch.Generator().manual_seed(0))
    probs = F.interpolate(probs, scale_factor=6, mode="bicubic")
    target = ragged(seed=4)[:, None].eq(torch.arange(c).view(-1, 1, 1)).long()
    target[:, :, :8, :8] = 255
    hidden, options = (target == 255).numpy(), dict(mode=mode, threshold=.6, ignore_index=255)
    iou, distance = boundary_iou(probs, target, width=4, **options), hausdorff95(probs, target, **options)
    assert iou.shape == distance.shape == (3, c)
    for i in range(3):
        for k in range(c):
            want = oracle((probs[i, k] >= .6).numpy(), (target[i, k] == 1).numpy(), hidden[i, k], 4)
            assert_close([iou[i, k].item(), distance[i, k].item()], list(map(float, want)), rtol=0, atol=1e-6)
    if mode == "binary":
        assert_close(boundary_iou(probs[:, 0], target[:, 0], width=4, **options), iou)
        assert_close(hausdorff95(probs[:, 0], target[:, 0], **options), distance)

def test_counts_cover_what_is_not_void():
    output, target = ragged(seed=5), ragged(seed=6)
    target[:, :4] = 255
    stats = boundary_stats(output, target, "multiclass", ignore_index=255, num_classes=3, width=3)
    assert torch.equal(sum(stats), (target != 255).sum((1, 2))[:, None].expand(3, 3))
    assert_close(boundary_iou(output, target, "multiclass", 255, num_classes=3, width=3, reduction="macro"), iou_score(*stats, reduction="macro"))

def test_width():
    output, target = ragged(seed=7), ragged(seed=8)
    options = dict(mode="multiclass", num_classes=3)
    share = boundary_iou(output, target, width=.05, **options)  # the diagonal is 60 pixels
    assert torch.equal(share, boundary_iou(output, target, width=3, **options))
    assert torch.equal(boundary_iou(output, target, width=1e-6, **options), boundary_iou(output, target, width=1, **options))
    assert torch.equal(boundary_iou(output, target, width=60, **options), iou_score(*get_stats(output, target, "multiclass", num_classes=3)))
    assert not torch.equal(share, boundary_iou(output, target, width=60, **options))

def test_perfect_is_perfect():
    target = ragged()
    assert boundary_iou(target, target, "multiclass", num_classes=3, reduction="macro") == 1
    assert hausdorff95(target, target, "multiclass", num_classes=3).nan_to_num().eq(0).all()

def test_errors():
    output, target = ragged(), ragged(seed=1)
    for width in (0, -1, 1.5, -.1):
        with pytest.raises(ValueError, match="width"): boundary_iou(output, target, "multiclass", num_classes=3, width=width)
    with pytest.raises(ValueError, match="percentile"): hausdorff95(output, target, "multiclass", num_classes=3, percentile=101)
    for score in (boundary_iou, hausdorff95):
        with pytest.raises(ValueError, match="two dimensions"): score(output.flatten(1), target.flatten(1), "multiclass", num_classes=3)
        with pytest.raises(ValueError, match="label 2"): score(output, target, "multiclass", num_classes=2)
        with pytest.raises(ValueError, match="mode"): score(output, target, "multi")
        with pytest.raises(ValueError, match="shape"): score(output[:, :5], target, "multiclass", num_classes=3)

def test_light_import():
    code = "import sys; from segkit.metrics import hausdorff95; assert not {'scipy', 'sklearn', 'fastai', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
