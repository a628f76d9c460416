"""Predictions in the picture's own size, masks saved for a folder, new data for an old learner"""
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, ItemGetter, Normalize
from fastai.learner import load_learner
from fastai.vision.augment import RandomCrop, RandomResizedCrop, Resize, ResizeMethod, aug_transforms
from fastai.vision.core import PILImage
from fasttransform import Transform
from PIL import Image
from torch import nn

from segkit.data import SegmentationBlocks, read_targets, shapes_dataloaders, shims
from segkit.learner import SegmentationLearner, default_loss, segmentation_learner

torch.set_num_threads(1)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{hidden.message}") for hidden in shims.HIDDEN.values()]
SMALL = dict(encoder_name="resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8))
CODES = ["dark", "bright"]

class Bright(nn.Module):
    "An oracle: class 1 where the first channel is positive, and with a label its share"
    def __init__(self, label=False):
        super().__init__()
        self.scale, self.label = nn.Parameter(torch.ones(1)), label

    def forward(self, x):
        x = x[:, :1].as_subclass(torch.Tensor)
        mask = torch.cat([-x, x], 1)*5*self.scale
        return (mask, mask.mean((2, 3))) if self.label else mask

def quiet(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn

def draw(folder, name="a.png", size=(90, 200)):
    "A picture with a bright square in its lower right corner, and the mask"
    folder.mkdir(parents=True, exist_ok=True)
    picture = np.zeros((*size, 3), np.uint8)
    picture[-30:, -35:] = 255
    Image.fromarray(picture).save(folder/name)
    return folder/name, (picture[..., 0] > 0).astype(np.uint8)

def mask_of(file): return (np.array(Image.open(file))[..., 0] > 127).astype(np.uint8)
def label_of(file): return "x"

def oracle(files, item_tfms=None, batch_tfms=(), label=False, bs=1):
    blocks, get_y = SegmentationBlocks(CODES), [mask_of]
    if label: blocks, get_y = (*blocks, CategoryBlock(vocab=["x", "y"])), [mask_of, label_of]
    block = DataBlock(blocks, n_inp=1, get_y=get_y, splitter=IndexSplitter([0]), item_tfms=item_tfms,
                      batch_tfms=[*batch_tfms, Normalize.from_stats([.5]*3, [.5]*3, cuda=False)])
    dls = block.dataloaders(list(files)*4, bs=bs, num_workers=0, device="cpu", path=files[0].parent)
    return quiet(SegmentationLearner(dls, Bright(label), loss_func=default_loss(read_targets(dls))))

def overlap(a, b): return (np.asarray(a) & np.asarray(b)).sum()/(np.asarray(a) | np.asarray(b)).sum()

# predict (fault 27)

@pytest.mark.parametrize("item_tfms, batch_tfms", [
    (Resize(64), ()), (Resize(64, ResizeMethod.Pad), ()), (Resize(64, ResizeMethod.Squish), ()), (Resize((48, 96)), ()),
    (RandomCrop(64), ()), (RandomResizedCrop(64), ()), (Resize(80), aug_transforms(size=64)), (Resize(80), aug_transforms(size=64, min_scale=.75)), (None, ())],
    ids=["crop", "pad", "squish", "wide", "random crop", "resized crop", "batch", "batch crop", "none"])
def test_the_mask_has_the_size_and_the_place_of_the_picture(tmp_path, item_tfms, batch_tfms):
    file, true = draw(tmp_path)
    decoded, classes, probs = oracle([file], item_tfms, batch_tfms).predict(file)
    assert classes.shape == decoded.shape == true.shape and probs.shape == (2, *true.shape)
    assert overlap(classes, true) > .85  # the square at the edge is found, where it is
    assert torch.allclose(probs.sum(0), torch.ones(true.shape), atol=1e-5)

@pytest.mark.parametrize("size", [(90, 200), (200, 90), (64, 64), (37, 300), (64, 65)])
def test_any_form_of_picture(tmp_path, size):
    file, true = draw(tmp_path, size=size)
    assert overlap(oracle([file], Resize(64)).predict(file)[1], true) > .8

def test_a_pair_and_the_picture(tmp_path):
    file, true = draw(tmp_path)
    learn = oracle([file], Resize(64), label=True)
    picture, (mask, label), classes, probs = learn.predict(file, with_input=True)
    assert picture.shape == (3, 90, 200) and overlap(mask, true) > .85 and label in ("x", "y")
    assert np.array_equal(picture.numpy().transpose(1, 2, 0), np.array(Image.open(file)))
    assert classes[1].shape == () and probs[0].shape == (2, 90, 200) and probs[1].shape == (2,)

def test_a_string_is_a_path(tmp_path):
    "Where the items are paths; also after `export` (fault 53)"
    file, true = draw(tmp_path)
    learn = oracle([file], Resize(64))
    assert torch.equal(learn.predict(str(file))[1], learn.predict(file)[1])
    assert learn.predict_tiled(str(file), 64).shape == (90, 200)
    dls = shapes_dataloaders(n=4, n_valid=4, size=48, bs=4, labels=None, device="cpu")  # whose items are no paths
    made = quiet(segmentation_learner(dls, "Unet", **SMALL))
    assert made.predict(dls.valid.items[0])[1].shape == (48, 48)

class Narrower(Transform):
    "A transform of one's own that cuts off the right half"
    order = 2
    def encodes(self, x: PILImage): return x.crop((0, 0, x.width//2, x.height))

class Squeezed(Transform):
    "One that keeps all, and says so"
    order, whole = 2, True
    def encodes(self, x: PILImage): return x.resize((x.width//2, x.height))

def test_who_cuts_is_named(tmp_path):
    file, true = draw(tmp_path)
    learn = oracle([file], [Resize(64), Narrower()])
    with pytest.warns(UserWarning, match="Narrower"): mask = learn.predict(file)[1]
    assert mask.shape == (64, 71)
    with pytest.raises(ValueError, match="a.png.*Narrower.*`tile=`"): learn.predict_folder([file], tmp_path/"out")
    assert overlap(oracle([file], [Resize(64), Squeezed()]).predict(file)[1], true) > .8

def test_the_batch_of_the_data_is_as_it_was(tmp_path):
    file, _ = draw(tmp_path)
    learn = oracle([file], Resize(64), bs=2)
    before = [t.shape for t in learn.dls.one_batch()]
    learn.predict(file)
    assert [t.shape for t in learn.dls.one_batch()] == before == [(2, 3, 64, 64), (2, 64, 64)]
    assert learn.get_preds()[0].shape == (1, 2, 64, 64)

# pictures of different sizes (fault 35)

@pytest.mark.parametrize("label", [False, True])
@pytest.mark.parametrize("names", [["a.png", "b.png", "c.png"], ["a.png", "a.png"], ["b.png"]])
def test_predictions_of_different_sizes_are_a_list(tmp_path, label, names):
    sizes = {"a.png": (40, 50), "b.png": (64, 48), "c.png": (32, 90)}
    made = {name: draw(tmp_path, name, size) for name, size in sizes.items()}
    learn = oracle([made["a.png"][0]], label=label)
    files = [made[name][0] for name in names]
    inputs, probs, targets, classes = learn.get_preds(dl=learn.dls.test_dl(files, with_labels=True, bs=1, num_workers=0), with_input=True, with_decoded=True)
    masks, decided = (probs[0], classes[0]) if label else (probs, classes)
    assert len(masks) == len(names) == len(decided) == len(inputs)
    if label: assert probs[1].shape == (len(names), 2) and classes[1].shape == (len(names),)
    for name, p, k in zip(names, masks, decided):
        true = made[name][1]
        assert p.shape == (2, *true.shape) and np.array_equal(k.numpy(), true)
    if len(set(names)) == 1: assert isinstance(masks, torch.Tensor)  # as ever

# a folder of masks (fault 54)

def test_masks_of_a_folder(tmp_path):
    "In the files' own sizes, at their places, readable as numbers; large ones in tiles"
    made = {f"{name}.png": draw(tmp_path/"in", name=f"{name}.png", size=size) for name, size in (("a", (90, 200)), ("b", (64, 64)))}
    made["sub/a.jpg"] = draw(tmp_path/"in/sub", "a.jpg", (70, 50))
    learn = oracle([made["a.png"][0]], Resize(64))
    out = learn.predict_folder(tmp_path/"in", tmp_path/"out", colors=[[0, 0, 0], [9, 8, 7]])
    assert sorted(str(f.relative_to(tmp_path/"out")) for f in out) == ["a.png", "b.png", "sub/a.png"]
    for name, (_, true) in made.items():
        mask = Image.open((tmp_path/"out"/name).with_suffix(".png"))
        assert mask.mode == "P" and mask.size == true.shape[::-1] and overlap(mask, true) > .85
        assert np.array(mask.convert("RGB"))[np.array(mask) == 1][0].tolist() == [9, 8, 7]
    tiles = learn.predict_folder(tmp_path/"in", str(tmp_path/"tiles"), tile=64)
    assert overlap(Image.open(tiles[0]), made["a.png"][1]) == 1

def test_nothing_is_lost_when_masks_are_saved(tmp_path):
    "Masks that are there, pictures of one name, a damaged picture, a break in the middle"
    file, _ = draw(tmp_path/"in")
    other, _ = draw(tmp_path/"in", "b.png")
    learn = oracle([file], Resize(64))
    first = learn.predict_folder([file], tmp_path/"out")
    with pytest.raises(FileExistsError, match="1 of 2 masks are there"): learn.predict_folder(tmp_path/"in", tmp_path/"out")
    first[0].write_bytes(b"mine")
    assert learn.predict_folder(tmp_path/"in", tmp_path/"out", existing="skip") == [tmp_path/"out/b.png"]
    assert first[0].read_bytes() == b"mine"
    with pytest.raises(ValueError, match="is one of the pictures"): learn.predict_folder(tmp_path/"in", tmp_path/"in", existing="replace")
    draw(tmp_path/"in", "a.jpg")
    with pytest.raises(ValueError, match="would both be"): learn.predict_folder(tmp_path/"in", tmp_path/"new")
    (tmp_path/"in/a.jpg").unlink()
    (tmp_path/"in/z.png").write_bytes(other.read_bytes()[:90])
    with pytest.raises(ValueError, match="z.png"): learn.predict_folder(tmp_path/"in", tmp_path/"new")
    assert not (tmp_path/"new").exists()  # seen before the first mask

def test_overlapping_classes_do_not_fit_into_a_picture(tmp_path):
    file, true = draw(tmp_path)
    block = DataBlock(SegmentationBlocks(CODES, overlapping=True), n_inp=1, get_y=lambda f: np.stack([true, true], -1), splitter=IndexSplitter([0]))
    learn = quiet(segmentation_learner(block.dataloaders([file]*4, bs=1, num_workers=0, device="cpu", path=tmp_path), "Unet", **SMALL))
    with pytest.raises(ValueError, match="overlap"): learn.predict_folder([file], tmp_path/"out")
    assert learn.predict(file)[1].shape == (2, 90, 200)

# new data for an old learner (fault 5)

def shapes(**kwargs): return shapes_dataloaders(**dict(n=8, n_valid=4, size=48, classes=3, labels=None, bs=4, device="cpu") | kwargs)

def statistics(dls): return [(t.mean.flatten().tolist(), t.std.flatten().tolist()) for t in dls.after_batch.fs if isinstance(t, Normalize)]

@pytest.fixture
def learn(tmp_path):
    torch.manual_seed(0)
    return quiet(segmentation_learner(shapes(path=tmp_path), "Unet", **SMALL))

def test_new_data_are_normalised_as_the_old_ones(learn):
    "The same pictures, built again, score the same; larger ones have the same statistics"
    learn.fit(2, 1e-2)
    before, kept = list(learn.validate()), statistics(learn.dls)
    learn.dls = shapes()
    assert statistics(learn.dls) == kept and list(learn.validate()) == pytest.approx(before, abs=1e-6)
    learn.dls = shapes(size=64)
    assert statistics(learn.dls) == kept
    learn.fit(1)

def test_new_data_with_other_statistics_get_those_of_the_learner(learn):
    "And the learner that they belong to keeps its own"
    other = segmentation_learner(shapes(seed=1, size=32), "Unet", **SMALL)
    theirs, ours = statistics(other.dls), statistics(learn.dls)
    assert theirs != ours
    learn.dls = other.dls
    assert statistics(learn.dls) == ours and statistics(other.dls) == theirs

def test_new_data_for_an_exported_learner(learn, tmp_path):
    learn.path, before, known = tmp_path, statistics(learn.dls), learn.dls
    learn.export("a.pkl")
    assert learn.dls is known
    again = load_learner(tmp_path/"a.pkl")
    again.dls = shapes(seed=2)
    assert statistics(again.dls) == before
    with pytest.raises(ValueError, match="classes"): again.dls = shapes(classes=5)

@pytest.mark.parametrize("kwargs, said", [
    (dict(classes=5), r"number of classes: the learner has 3, the data 5"), (dict(labels="largest"), r"kind of label: the learner has None")])
def test_data_of_other_classes_are_refused(learn, kwargs, said):
    known = learn.dls
    with pytest.raises(ValueError, match=f"do not fit the learner.*{said}"): learn.dls = shapes(**kwargs)
    assert learn.dls is known

def test_data_of_other_codes_channels_void_or_values_are_refused(tmp_path, learn):
    def block(codes=None, channels=3, value=0, **kwargs):
        items = [(np.full((48, 48, channels), i, np.uint8), np.full((48, 48), value, np.uint8)) for i in range(6)]
        blocks = SegmentationBlocks(codes or learn.task.codes, in_channels=channels, **kwargs)
        return DataBlock(blocks, n_inp=1, get_x=ItemGetter(0), get_y=ItemGetter(1), splitter=IndexSplitter([4, 5])).dataloaders(items, bs=2, num_workers=0, device="cpu")
    known = learn.dls
    for kwargs, said in ((dict(codes=list(reversed(learn.task.codes))), "classes: the learner has"), (dict(channels=4), "channels of the pictures: the learner has 3, the data 4"),
                         (dict(void=255), "void value: the learner has None, the data 255"), (dict(value=7), "value 7")):
        with pytest.raises(ValueError, match=said): learn.dls = block(**kwargs)
        assert learn.dls is known
    learn.dls = block()
    assert learn.dls is not known and statistics(learn.dls) == statistics(known)

def test_learners_without_normalisation_take_none(tmp_path):
    learn = segmentation_learner(shapes(path=tmp_path), "Unet", normalize=False, **SMALL)
    learn.dls = shapes()
    assert statistics(learn.dls) == []
    normalised = segmentation_learner(shapes(), "Unet", **SMALL).dls
    with pytest.raises(ValueError, match="normalised 0 times, the new data 1 times"): learn.dls = normalised

def test_new_data_with_wrong_files_are_named(tmp_path, learn):
    files = [draw(tmp_path/"in", f"{i}.png", (48, 48))[0] for i in range(40)]
    for f in files: Image.fromarray(mask_of(f)).save(f.with_suffix(".bmp"))
    Image.fromarray(np.zeros((50, 48), np.uint8)).save(tmp_path/"in/21.bmp")
    block = DataBlock(SegmentationBlocks(learn.task.codes), n_inp=1, get_y=lambda f: f.with_suffix(".bmp"), splitter=IndexSplitter([0, 1]), item_tfms=Resize(32))
    with pytest.raises(ValueError, match=r"21\.png.*21\.bmp \(50, 48\)"): learn.dls = block.dataloaders(files, bs=2, num_workers=0, device="cpu")
    assert isinstance(files[0], Path)

def test_a_string_is_a_path_where_the_reader_is_a_function(tmp_path):
    "fastai knows such a pipeline by the types that came through it: paths, no strings"
    for i in range(3): np.save(tmp_path/f"{i}.npy", np.zeros((32, 32, 4), np.float32))
    block = DataBlock(SegmentationBlocks(CODES, in_channels=4), n_inp=1, get_y=lambda f: np.zeros((32, 32), np.uint8), splitter=IndexSplitter([0]))
    files = sorted(tmp_path.glob("*.npy"))
    learn = quiet(segmentation_learner(block.dataloaders(files, bs=1, num_workers=0, device="cpu", path=tmp_path), "Unet", **SMALL))
    assert torch.equal(learn.predict(str(files[1]))[1], learn.predict(files[1])[1])
    learn.export("a.pkl")
    assert load_learner(tmp_path/"a.pkl").predict(str(files[1]))[1].shape == (32, 32)
