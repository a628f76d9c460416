"""Laws, tried on inputs that Hypothesis draws: what must hold whatever the sizes, values, classes and order"""
import json

import numpy as np
import pytest
import torch
from fastai.data.block import DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.vision.augment import CropPad, Dihedral, Flip, FlipItem, RandomCrop, aug_transforms
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from losses_helper import CASES, SPECS, make
from sklearn import metrics as sklearn_metrics
from torch import nn

import segkit
from segkit.core.geometry import crop, cut_back, pad_to, pad_to_least, pad_to_multiple, resize
from segkit.data import SegmentationBlocks, read_mask, save_mask, shims
from segkit.inference.tiles import tile_starts, tiled
from segkit.inference.views import VIEWS, View, ViewsModel
from segkit.losses import DiceLoss, SumLoss
from segkit.metrics import ConfusionMatrix, get_stats, iou_score
from segkit.model.config import plain, plain_arguments, restored

torch.set_num_threads(1)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{hidden.message}") for hidden in shims.HIDDEN.values()]
VOID = 255
SHAPE_ONLY = ("BoundaryLoss", "SoftClDiceLoss")  # look at neighbours, so the places of pixels matter

def tried(n): return settings(derandomize=True, deadline=None, max_examples=n, database=None, phases=[Phase.generate])

seeds, sides = st.integers(0, 2**32 - 1), st.integers(1, 9)
sizes = st.tuples(sides, sides)


# ---------------------------------------------------------------- padding and cropping

@tried(40)
@given(size=sizes, more=sizes, multiple=st.integers(1, 8), seed=seeds)
def test_cropping_undoes_padding(size, more, multiple, seed):
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 3, *size)))
    for framed in (pad_to(x, size[0] + more[0], size[1] + more[1]), pad_to_multiple(x, multiple), pad_to_least(x, more[0])):
        assert torch.equal(crop(framed, *size), x)
        assert torch.equal(cut_back(framed, x, framed), x)
        below, right = (a - b for a, b in zip(framed.shape[-2:], size, strict=True))
        assert torch.equal(framed, nn.functional.pad(x, (0, right, 0, below), "replicate"))  # the last row and column, again
    assert [n % multiple for n in pad_to_multiple(x, multiple).shape[-2:]] == [0, 0]
    assert min(pad_to_least(x, more[0]).shape[-2:]) >= more[0]

@tried(25)
@given(size=sizes, stride=st.sampled_from([1, 2, 4, 8]), seed=seeds)
def test_cutting_a_coarse_mask_keeps_what_covers_the_picture(size, stride, seed):
    x = torch.zeros(1, 1, *size)
    frame = pad_to_multiple(x, stride)
    h, w = (n//stride for n in frame.shape[-2:])
    coarse = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 2, h, w)))
    kept = cut_back(coarse, x, frame, enlarge=False)
    assert kept.shape[-2:] == tuple(-(-n//stride) for n in size) and torch.equal(kept, coarse[..., :kept.shape[-2], :kept.shape[-1]])
    assert cut_back(coarse, x, frame).shape[-2:] == size
    assert torch.equal(cut_back(coarse, x, frame), resize(coarse, frame.shape[-2:], align_corners=True)[..., :size[0], :size[1]])


# ---------------------------------------------------------------- a picture and its mask, transformed together

def batch_of(masks, channels, void, item_tfms=(), batch_tfms=()):
    "Pictures whose every channel is 40*(class + 1), and their masks, as the blocks give them to a model"
    pairs = [((40*(mask.astype(int) % VOID + 1)).astype(np.uint8)[..., None].repeat(channels, -1), mask) for mask in masks]
    block = DataBlock(SegmentationBlocks(list("abcde"), in_channels=channels, void=VOID if void else None), n_inp=1,
                      get_x=lambda i: pairs[i][0], get_y=lambda i: pairs[i][1], splitter=IndexSplitter([0]), item_tfms=list(item_tfms), batch_tfms=list(batch_tfms))
    picture, mask = block.dataloaders(list(range(len(pairs))), bs=len(pairs) - 1, num_workers=0, device="cpu", shuffle=False).train.one_batch()
    return picture.as_subclass(torch.Tensor)*255/40, mask.as_subclass(torch.Tensor)

def masks_of(seed, size, n=3):
    return list(np.random.default_rng(seed).integers(0, 5, (n, *size), np.uint8))

def assert_still_coded(picture, mask, void):
    "The picture says class + 1 wherever the mask says a class; 0 is what no file holds"
    assert picture.shape[-2:] == mask.shape[-2:]
    expected = torch.where(mask == VOID, 0, mask + 1) if void else mask + 1
    assert (picture - expected[:, None]).abs().max() < 1e-2, (picture, mask)

@tried(20)
@given(size=sizes, seed=seeds, channels=st.sampled_from([1, 3, 4]), void=st.booleans())
def test_a_flip_of_items_moves_picture_and_mask_alike(size, seed, channels, void):
    masks = masks_of(seed, size)
    picture, mask = batch_of(masks, channels, void, [FlipItem(p=1.)])
    assert_still_coded(picture, mask, void)
    for before, after in zip(masks[1:], mask, strict=True): assert (before[:, ::-1] == after.numpy()).all()

@tried(25)
@given(size=sizes, window=sizes, seed=seeds, channels=st.sampled_from([1, 3, 4]), how=st.sampled_from([CropPad, RandomCrop]))
def test_a_crop_takes_the_same_window_of_picture_and_mask_and_is_void_outside(size, window, seed, channels, how):
    picture, mask = batch_of(masks_of(seed, size), channels, True, [how(window)])
    assert mask.shape[1:] == window
    assert_still_coded(picture, mask, True)
    inside = [min(a, b) for a, b in zip(size, window, strict=True)]
    assert ((mask != VOID).sum((1, 2)) == inside[0]*inside[1]).all()

@tried(15)
@given(side=st.integers(2, 9), seed=seeds, channels=st.sampled_from([1, 3, 4]), void=st.booleans(), how=st.sampled_from([Flip, Dihedral]))
def test_a_flip_or_a_turn_of_batches_moves_picture_and_mask_alike(side, seed, channels, void, how):
    torch.manual_seed(seed % 2**31)
    masks = masks_of(seed, (side, side))
    picture, mask = batch_of(masks, channels, void, batch_tfms=[how(p=1.)])
    assert_still_coded(picture, mask, void)
    for before, after in zip(masks[1:], mask, strict=True): assert sorted(before.ravel()) == sorted(after.numpy().ravel())

@tried(15)
@given(side=st.integers(4, 12), seed=seeds, channels=st.sampled_from([1, 3, 4]), pad_mode=st.sampled_from(["zeros", "reflection", "border"]))
def test_turns_zooms_and_warps_move_picture_and_mask_alike(side, seed, channels, pad_mode):
    "With the nearest pixel for both, to the last pixel; void is where there is no picture"
    torch.manual_seed(seed % 2**31)
    transforms = aug_transforms(mode="nearest", pad_mode=pad_mode, max_rotate=40, max_zoom=2., max_warp=.3, max_lighting=0)
    picture, mask = batch_of(masks_of(seed, (side, side)), channels, True, batch_tfms=transforms)
    assert_still_coded(picture, mask, True)
    if pad_mode != "zeros": assert (mask != VOID).all()


# ---------------------------------------------------------------- losses

@st.composite
def logits_and_target(draw, mode, smallest=1):
    "Float64 logits, some of them equal, and a hard target; at least two pictures"
    b, c = draw(st.integers(2, 4)), 1 if mode == "binary" else draw(st.integers(2, 4))
    shape = draw(st.integers(smallest, 6)), draw(st.integers(smallest, 6))
    rng = np.random.default_rng(draw(seeds))
    logits = 2*rng.normal(size=(b, c, *shape))
    if draw(st.booleans()): logits = logits.round()
    target = rng.integers(c, size=(b, *shape)) if mode == "multiclass" else rng.integers(2, size=(b, c, *shape))
    return torch.from_numpy(logits), torch.from_numpy(target)

def same(a, b): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

def pixels_last(x, mode, is_target): return x.flatten(1 if mode == "multiclass" and is_target else 2)

LAWFUL = [case for case in CASES if case[0] not in SHAPE_ONLY]

@pytest.mark.parametrize("name, mode", CASES)
def test_a_loss_does_not_see_the_order_of_pictures_nor_a_mirror(name, mode):
    @tried(4)
    @given(drawn=logits_and_target(mode, 3), seed=seeds)
    def law(drawn, seed):
        logits, target = drawn
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(logits)))
        loss = make(name, mode)
        value = loss(logits, target)
        same(loss(logits[order], target[order]), value)
        for turn in (lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.transpose(-1, -2)): same(loss(turn(logits), turn(target)), value)
        each = make(name, mode, reduction="none")(logits, target)
        same(make(name, mode, reduction="none")(logits[order], target[order]), each[order])
    law()

@pytest.mark.parametrize("name, mode", LAWFUL)
def test_a_loss_of_pixels_does_not_see_their_places(name, mode):
    @tried(4)
    @given(drawn=logits_and_target(mode), seed=seeds)
    def law(drawn, seed):
        x, y = (pixels_last(part, mode, i) for i, part in enumerate(drawn))
        order = torch.from_numpy(np.random.default_rng(seed).permutation(x.shape[-1]))
        loss = make(name, mode)
        same(loss(x[..., order], y[..., order]), loss(*drawn))
    law()

@pytest.mark.parametrize("name, mode", [case for case in CASES if case[1] != "binary"])
def test_a_loss_does_not_see_the_order_of_classes_with_their_weights(name, mode):
    weighted = mode in SPECS[name].weights
    @tried(4)
    @given(drawn=logits_and_target(mode, 3), seed=seeds)
    def law(drawn, seed):
        logits, target = drawn
        rng = np.random.default_rng(seed)
        order, weights = torch.from_numpy(rng.permutation(logits.shape[1])), torch.from_numpy(rng.uniform(.1, 3, logits.shape[1]))
        other = order.argsort()[target] if mode == "multiclass" else target[:, order]
        before, after = [{"class_weights": w.tolist()} if weighted else {} for w in (weights, weights[order])]
        value = make(name, mode, **before)(logits, target)
        torch.testing.assert_close(make(name, mode, **after)(logits[:, order], other), value, rtol=1e-5, atol=1e-6)  # weights are float32
    law()

@pytest.mark.parametrize("name, mode", CASES)
def test_splitting_a_batch_splits_its_losses(name, mode):
    @tried(4)
    @given(drawn=logits_and_target(mode, 3), seed=seeds)
    def law(drawn, seed):
        logits, target = drawn
        at = 1 + seed % (len(logits) - 1)
        parts = [(logits[:at], target[:at]), (logits[at:], target[at:])]
        each, total = (make(name, mode, reduction=how) for how in ("none", "sum"))
        same(torch.cat([each(*part) for part in parts]), each(logits, target))
        same(sum(total(*part) for part in parts), total(logits, target))
        for i in range(len(logits)): same(make(name, mode)(logits[i:i + 1], target[i:i + 1]), each(logits, target)[i])
    law()

# losses whose mean is defined as a mean over pixels, or over pictures
MEANS = ["FocalLoss", "FocalLoss softmax", "SoftCrossEntropyLoss", "SoftBCEWithLogitsLoss", "LovaszLoss per image"]

@pytest.mark.parametrize("name, mode", [case for case in CASES if case[0] in MEANS])
def test_the_mean_of_a_batch_is_the_mean_of_its_parts(name, mode):
    @tried(6)
    @given(drawn=logits_and_target(mode), void=st.booleans(), seed=seeds)
    def law(drawn, void, seed):
        logits, target = drawn
        if void:  # in all classes of a pixel: the focal loss of each class is a mean over the pixels that count there
            each = target[:, 0].shape if mode != "multiclass" else target.shape
            hidden = torch.from_numpy(np.random.default_rng(seed).random(each) < .4)
            target = torch.where(hidden if mode == "multiclass" else hidden[:, None], VOID, target)
        loss, at = make(name, mode, ignore_index=VOID), 1 + seed % (len(logits) - 1)
        parts = [(logits[:at], target[:at]), (logits[at:], target[at:])]
        counted = [(y != VOID).flatten(1).sum(1) for _, y in parts]
        share = [(n > 0).sum() if "per image" in name else n.sum() for n in counted]
        expected = sum(loss(*part)*n for part, n in zip(parts, share, strict=True))/max(sum(share), 1)
        same(loss(logits, target), expected.to(torch.float64))
    law()

@pytest.mark.parametrize("name, mode", LAWFUL)
def test_void_pixels_around_a_picture_change_nothing(name, mode):
    @tried(4)
    @given(drawn=logits_and_target(mode), more=st.tuples(st.integers(0, 3), st.integers(0, 3)), seed=seeds)
    def law(drawn, more, seed):
        logits, target = drawn
        rng = np.random.default_rng(seed)
        wide = torch.from_numpy(9*rng.normal(size=(*logits.shape[:2], logits.shape[-2] + more[0], logits.shape[-1] + more[1])))
        wide[..., :logits.shape[-2], :logits.shape[-1]] = logits
        framed = nn.functional.pad(target, (0, more[1], 0, more[0]), value=VOID)
        weights = {"class_weights": rng.uniform(.1, 3, logits.shape[1]).tolist()} if mode in SPECS[name].weights else {}
        for how, more_ in (("mean", {}), ("none", {}), ("mean", weights)):
            loss = make(name, mode, ignore_index=VOID, reduction=how, **more_)
            same(loss(wide, framed), loss(logits, target))
    law()

# a share of the hardest is rounded up, and the correlation adds a constant to its four counts
@pytest.mark.parametrize("name, mode", [case for case in LAWFUL if case[0] not in ("OHEMCrossEntropyLoss", "MCCLoss")])
def test_a_mean_loss_does_not_see_that_each_pixel_is_repeated(name, mode):
    @tried(4)
    @given(drawn=logits_and_target(mode), times=st.integers(2, 3))
    def law(drawn, times):
        twice = [part.repeat_interleave(times, -1).repeat_interleave(times, -2) for part in drawn]
        same(make(name, mode)(*twice), make(name, mode)(*drawn))
    law()

@tried(10)
@given(drawn=logits_and_target("multiclass"), a=st.floats(0, 5), b=st.floats(0, 5))
def test_a_sum_of_losses_is_linear_in_its_weights(drawn, a, b):
    first, second = DiceLoss("multiclass"), make("FocalLoss", "multiclass")
    total = SumLoss(first=first, second=second, weights={"first": a, "second": b})
    same(total(*drawn), a*first(*drawn) + b*second(*drawn))


# ---------------------------------------------------------------- metrics

@st.composite
def labels(draw, void=False):
    "Predicted and true labels of some pictures, and the number of classes"
    n, c, size = draw(st.integers(1, 4)), draw(st.integers(2, 5)), draw(sizes)
    rng = np.random.default_rng(draw(seeds))
    pred, target = torch.from_numpy(rng.integers(0, c, (2, n, *size)))
    if void: target = torch.where(torch.from_numpy(rng.random(target.shape) < .3), VOID, target)
    return pred, target, c

def counted(pred, target, c): return ConfusionMatrix(c, VOID).update(pred, target)

@tried(40)
@given(drawn=labels(void=True))
def test_the_confusion_matrix_and_its_scores_equal_sklearns(drawn):
    pred, target, c = drawn
    cm, known = counted(*drawn), target != VOID
    if not known.any(): return
    truth, guess = target[known].numpy(), pred[known].numpy()
    assert (cm.matrix.numpy() == sklearn_metrics.confusion_matrix(truth, guess, labels=range(c))).all()
    options = dict(labels=range(c), average=None, zero_division=0)
    for name, score in {"iou": "jaccard", "dice": "f1", "precision": "precision", "recall": "recall"}.items():
        expected = getattr(sklearn_metrics, f"{score}_score")(truth, guess, **options)
        np.testing.assert_allclose(getattr(cm, name)().nan_to_num(0), expected, rtol=1e-12)
    np.testing.assert_allclose(cm.accuracy(), sklearn_metrics.accuracy_score(truth, guess))

@tried(30)
@given(drawn=labels(void=True), seed=seeds)
def test_counts_do_not_see_the_order_of_pictures_pixels_or_batches(drawn, seed):
    pred, target, c = drawn
    rng, cm = np.random.default_rng(seed), counted(*drawn)
    for part in (pred[:1], pred.flatten()):
        order = torch.from_numpy(rng.permutation(pred.shape[0] if part.ndim == 3 else part.numel()))
        shape = (lambda x: x) if part.ndim == 3 else torch.flatten
        assert torch.equal(counted(shape(pred)[order], shape(target)[order], c).matrix, cm.matrix)
    at = seed % (len(pred) + 1)  # one part may be empty
    streamed, merged = counted(pred[:at], target[:at], c), counted(pred[:at], target[:at], c)
    assert torch.equal(streamed.update(pred[at:], target[at:]).matrix, cm.matrix)
    assert torch.equal(merged.merge(counted(pred[at:], target[at:], c)).matrix, cm.matrix)
    stats = get_stats(pred, target, "multiclass", VOID, num_classes=c)
    parts = [get_stats(pred[a:b], target[a:b], "multiclass", VOID, num_classes=c) for a, b in ((0, at), (at, len(pred)))]
    for whole, first, second, total in zip(stats, *parts, cm.stats(), strict=True):
        assert torch.equal(torch.cat([first, second]), whole) and torch.equal(whole.sum(0), total)

@tried(30)
@given(drawn=labels(void=True), seed=seeds, times=st.integers(2, 3))
def test_scores_follow_their_classes_and_do_not_see_void_or_resolution(drawn, seed, times):
    pred, target, c = drawn
    cm = counted(*drawn)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(c))
    place = order.argsort()
    renamed = counted(place[pred], torch.where(target == VOID, VOID, place[target.clamp(max=c - 1)]), c)
    wide = [nn.functional.pad(part, (0, 2, 1, 0), value=value) for part, value in ((pred, 0), (target, VOID))]
    fine = [part.repeat_interleave(times, 1).repeat_interleave(times, 2) for part in (pred, target)]
    for name in ("iou", "dice", "precision", "recall"):
        score = getattr(cm, name)()
        torch.testing.assert_close(getattr(renamed, name)(), score[order], equal_nan=True)
        torch.testing.assert_close(getattr(counted(*wide, c), name)(), score, equal_nan=True)
        torch.testing.assert_close(getattr(counted(*fine, c), name)(), score, equal_nan=True)
    for average in ("macro", "micro", "weighted"):
        torch.testing.assert_close(renamed.iou(average), cm.iou(average), equal_nan=True)

@tried(20)
@given(drawn=labels(), seed=seeds)
def test_iou_is_symmetric_and_its_reductions_agree(drawn, seed):
    pred, target, c = drawn
    options = dict(mode="multiclass", num_classes=c)
    there, back = get_stats(pred, target, **options), get_stats(target, pred, **options)
    weights = np.random.default_rng(seed).uniform(.1, 2, c).tolist()
    for reduction in ("micro", "macro", "micro-imagewise", "macro-imagewise", "weighted"):
        given_ = {"class_weights": weights} if reduction == "weighted" else {}
        torch.testing.assert_close(iou_score(*there, reduction, zero_division=1., **given_), iou_score(*back, reduction, zero_division=1., **given_))
    torch.testing.assert_close(iou_score(*there, "weighted", class_weights=[1.]*c, zero_division=1.), iou_score(*there, "macro", zero_division=1.))
    torch.testing.assert_close(iou_score(*there, "micro"), counted(*drawn).iou("micro").float())


# ---------------------------------------------------------------- tiles

@st.composite
def tilings(draw, overlap=0):
    "Size of a picture, of a tile that fits, and an overlap that is smaller than the tile"
    size = draw(st.integers(overlap + 1, 23)), draw(st.integers(overlap + 1, 23))
    tile = tuple(draw(st.integers(overlap + 1, n)) for n in size)
    return size, tile, draw(st.integers(overlap, min(tile) - 1))

def joined(predict, size, tile, overlap, batch): return torch.cat(list(tiled(predict, size, tile, overlap, batch)), 1)

@tried(40)
@given(tiling=tilings(), batch=st.integers(1, 5), seed=seeds)
def test_tiles_of_a_map_give_the_map(tiling, batch, seed):
    size, tile, overlap = tiling
    whole = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, *size)))
    def predict(corners): return torch.stack([whole[:, y:y + tile[0], x:x + tile[1]] for y, x in corners])
    torch.testing.assert_close(joined(predict, size, tile, overlap, batch), whole, rtol=1e-5, atol=1e-6)
    for n, t in zip(size, tile, strict=True):
        starts = tile_starts(n, t, overlap)
        assert starts[0] == 0 and starts[-1] == n - t and all(a + t - b >= overlap for a, b in zip(starts, starts[1:]))

def field_of(layers):
    "Convolutions 3x3, and how far they see"
    torch.manual_seed(layers)
    return nn.Sequential(*[nn.Conv2d(2, 2, 3, padding=1) for _ in range(layers)]).double().eval(), layers

@tried(20)
@given(layers=st.integers(0, 2), tiling=tilings(overlap=4), seed=seeds)
@torch.no_grad()
def test_tiles_of_a_net_equal_the_whole_where_no_edge_of_a_tile_is_in_sight(layers, tiling, seed):
    "With its surroundings in sight everywhere; without, wherever each tile's edge is out of the field"
    size, tile, overlap = tiling
    net, radius = field_of(layers)
    picture = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 2, *size)))
    whole = net(picture)[0]
    edge = torch.zeros(size, dtype=torch.bool)  # pixels that see the edge of a tile, inside of the picture
    def alone(corners):
        for y, x in corners:
            for start, length, n, axis in ((y, tile[0], size[0], 0), (x, tile[1], size[1], 1)):
                box = edge[y:y + tile[0], x:x + tile[1]]
                if start > 0: box.narrow(axis, 0, min(radius, length)).fill_(True)
                if start + length < n: box.narrow(axis, max(length - radius, 0), min(radius, length)).fill_(True)
        return net(torch.cat([picture[..., y:y + tile[0], x:x + tile[1]] for y, x in corners]))
    def with_surroundings(corners):
        answers = []
        for y, x in corners:
            top, left = max(y - radius, 0), max(x - radius, 0)
            seen = net(picture[..., top:y + tile[0] + radius, left:x + tile[1] + radius])
            answers.append(seen[0, :, y - top:y - top + tile[0], x - left:x - left + tile[1]])
        return torch.stack(answers)
    torch.testing.assert_close(joined(with_surroundings, size, tile, overlap, 2), whole, rtol=1e-5, atol=1e-6)
    lone = joined(alone, size, tile, overlap, 2)
    torch.testing.assert_close(lone[:, ~edge], whole[:, ~edge], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- views

views = st.builds(View, flip=st.booleans(), turns=st.integers(-5, 5))

@tried(40)
@given(stack=st.lists(views, min_size=1, max_size=4), size=sizes, seed=seeds)
def test_undoing_views_of_views_is_the_identity(stack, size, seed):
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 2, *size)))
    seen, before = x, []
    for view in stack:
        before.append(tuple(seen.shape[-2:]))
        seen = view.apply(seen)
    for view, size_before in zip(reversed(stack), reversed(before), strict=True): seen = view.undo(seen, size_before)
    assert torch.equal(seen, x)

@tried(20)
@given(first=views, second=views, scale=st.floats(.3, 3), size=sizes, value=st.floats(-9, 9))
def test_a_scaled_view_of_a_view_comes_back_to_its_size_and_place(first, second, scale, size, value):
    second = View(second.flip, second.turns, scale)
    flat = torch.full((1, 1, *size), value, dtype=torch.float64)
    turned = first.apply(flat)
    back = first.undo(second.undo(second.apply(turned), turned.shape[-2:]), size)
    torch.testing.assert_close(back, flat)
    rows = torch.arange(size[0]*size[1], dtype=torch.float64).view(1, 1, *size)
    assert torch.equal(first.undo(first.apply(rows), size), rows)

@tried(12)
@given(size=sizes, seed=seeds, turn=st.sampled_from(VIEWS["dihedral"]))
@torch.no_grad()
def test_the_mean_over_all_turns_turns_with_its_picture(size, seed, turn):
    net, _ = field_of(2)
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 2, *size)))
    model = ViewsModel(net, "dihedral")
    torch.testing.assert_close(model(turn.apply(x)), turn.apply(model(x)))
    pixelwise = nn.Conv2d(2, 3, 1).double()  # sees no neighbours, so a view changes nothing
    torch.testing.assert_close(ViewsModel(pixelwise, "dihedral")(x).softmax(1), pixelwise(x).softmax(1))


# ---------------------------------------------------------------- saving and reading back

@tried(12)
@given(size=sizes, seed=seeds, high=st.sampled_from([1, 2, 5, 256]), kind=st.sampled_from([np.uint8, np.int64, torch.int32, bool]))
def test_a_saved_mask_is_read_as_it_was(tmp_path_factory, size, seed, high, kind):
    mask = np.random.default_rng(seed).integers(0, high, size)
    given_ = torch.from_numpy(mask).to(kind) if isinstance(kind, torch.dtype) else mask.astype(kind)
    file = save_mask(given_, tmp_path_factory.mktemp("masks")/"a.png")
    assert (read_mask(file) == np.asarray(given_).astype(int)).all() and read_mask(file).shape == size

plains = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text().filter(lambda key: not key.startswith("_")), inner, max_size=3), max_leaves=6)

@tried(60)
@given(value=plains)
def test_plain_data_comes_back_from_json(value):
    assert plain(plain(value)) == plain(value)
    assert restored(json.loads(json.dumps(plain(value))), "here") == value

@tried(5)
@given(classes=st.integers(1, 3), channels=st.integers(1, 4), widths=st.lists(st.integers(2, 6), min_size=2, max_size=2),
       norm=st.sampled_from([True, False, "batchnorm", {"type": "groupnorm", "num_groups": 1}]), label=st.booleans(), seed=seeds)
@torch.no_grad()
def test_a_saved_model_comes_back_with_its_arguments_and_answers(tmp_path_factory, classes, channels, widths, norm, label, seed):
    torch.manual_seed(seed % 2**31)
    arguments = dict(encoder_weights=None, encoder_depth=2, decoder_channels=tuple(widths), decoder_use_norm=norm, classes=classes,
                     in_channels=channels, aux_params={"classes": 2} if label else None)
    model = segkit.Unet("resnet18", **arguments).eval()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    back = segkit.from_pretrained(folder).eval()
    assert json.dumps(dict(back.config)) == json.dumps(dict(model.config)) == json.dumps(plain_arguments(segkit.Unet, ("resnet18",), arguments))
    assert type(back) is type(model) and model.state_dict().keys() == back.state_dict().keys()
    for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True): assert torch.equal(a, b)
    x = torch.randn(2, channels, 17, 13)
    ours, theirs = ([out] if isinstance(out, torch.Tensor) else out for out in (model(x), back(x)))
    for a, b in zip(ours, theirs, strict=True): assert torch.equal(a, b)
