"""Three ways to keep a learner: what breaks off leaves the old file, what cannot be read again is named, and a folder predicts as the learner does."""
import json
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import load_learner
from fastai.optimizer import SGD
from fastai.vision.augment import RandomResizedCrop, Resize, ResizeMethod, aug_transforms
from PIL import Image
from torch import Tensor, nn

import segkit
from segkit.data.shapes import shapes_dataloaders
from segkit.data.whole import uncropped
from segkit.learner import SegmentationLearner

SMALL = dict(encoder_name="resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(8, 8, 8))


def built(labels="largest", arch="Unet", learner=None, path=".", **data):
    dls = shapes_dataloaders(labels, n=8, n_valid=4, bs=4, **{"size": 32, "path": path, **data})
    learn = segkit.segmentation_learner(dls, arch, aux_params=None if labels is None else {}, **SMALL, **(learner or {}))
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "A learner after one epoch"
    learn = built(path=tmp_path_factory.mktemp("learner"))
    learn.fit(1, 1e-3)
    return learn


@pytest.fixture
def learn(shared, tmp_path):
    shared.path = tmp_path
    before, dls, opt = numbers(shared), shared.dls, shared.opt
    yield shared
    assert all(map(torch.equal, numbers(shared), before))  # whatever a test has tried
    assert shared.dls is dls and shared.opt is opt and not hasattr(shared, "_needs")


def numbers(learn):
    moments = [t for s in learn.opt.state_dict()["state"] for t in s.values() if isinstance(t, Tensor)]
    return [t.clone() for t in (*learn.model.state_dict().values(), *moments)]


def half_written(error):
    "`torch.save` that stops in the middle"
    def save(thing, file, **kwargs):
        file.write(b"half")
        raise error
    return save


# rows 15, 41: what breaks off, what is damaged (further: an interrupt, a full disk, a frozen encoder, another optimiser, fastai's own callback)

@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("enforce fail")], ids=repr)
@pytest.mark.parametrize("what", ["save", "export"])
def test_what_breaks_off_leaves_the_old_file(what, error, learn, monkeypatch):
    file = learn.save("best") if what == "save" else learn.export("best.pkl")
    old = file.read_bytes()
    monkeypatch.setattr("torch.save", half_written(error))
    with pytest.raises(type(error)) as raised: learn.save("best") if what == "save" else learn.export("best.pkl")
    if isinstance(error, OSError): assert str(file) in str(raised.value)
    assert file.read_bytes() == old and [p.name for p in file.parent.iterdir()] == [file.name]


def cut(content): return content[:len(content)//2]
def empty(content): return b""
def flip(content): return content[:len(content)//2] + bytes([content[len(content)//2] ^ 4]) + content[len(content)//2 + 1:]


@pytest.mark.parametrize("damage", [cut, empty, flip])
def test_a_damaged_file_is_named(damage, learn):
    file = learn.save("a")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="models/a.pth"): learn.load("a")


def test_weights_of_another_model_or_optimiser(learn, tmp_path):
    other = built(None, path=tmp_path)
    other.save("no_label")
    with pytest.raises(ValueError, match="no_label.pth: its optimiser had .*with_opt=False"): learn.load("no_label")
    with pytest.raises(RuntimeError, match="(?s)no_label.pth: .*Missing key.*classification_head"): learn.load("no_label", with_opt=False)
    torch.save({"model": learn.model.state_dict(), "opt": {**learn.opt.state_dict(), "state": [{"mom": torch.ones(3, 3)} for _ in learn.opt.state_dict()["state"]]}}, tmp_path/"models/shape.pth")
    with pytest.raises(ValueError, match="shape.pth: mom of its optimiser has the shape"): learn.load("shape")
    with pytest.raises(FileNotFoundError, match="nothing.pth"): learn.load("nothing")


def test_there_and_back(learn):
    before = numbers(learn)
    learn.save("a")
    with torch.no_grad():
        for p in learn.model.parameters(): p.add_(1)
    learn.opt.state_dict()["state"][0].clear()
    learn.load("a", weights_only=False)  # as fastai's callbacks ask; nothing is run all the same
    assert all(map(torch.equal, numbers(learn), before))
    learn.save("bare", with_opt=False)
    learn.load("bare")
    torch.save(nn.DataParallel(learn.model).state_dict(), learn.path/"models/wrapped.pth")
    with pytest.warns(UserWarning, match="DataParallel"): learn.load("wrapped")


def test_a_stranger_file_runs_nothing(learn):
    class Danger:
        def __reduce__(self): return (exec, ("ran.append(1)",))
    (learn.path/"models").mkdir(exist_ok=True)
    torch.save({"model": Danger()}, learn.path/"models/danger.pth")
    with pytest.raises(ValueError, match="danger.pth.* holds more than tensors: it names builtins.exec"): learn.load("danger", weights_only=False)


def test_save_model_callback(tmp_path):
    learn = built(None, path=tmp_path, learner=dict(opt_func=SGD))
    learn.fit(1, 1e-3, cbs=SaveModelCallback())
    assert (tmp_path/"models/model.pth").exists()


# row 53: what cannot be pickled, what cannot be imported (further: a module used in a function, a callback's class, an own learner, a loss, a lambda)

def test_export_makes_its_folder(learn):
    file = learn.export("a/b/c.pkl")
    with pytest.warns(UserWarning, match="insecure pickle module"): again = load_learner(file)
    assert type(again) is SegmentationLearner and again.task == learn.task
    item = learn.dls.valid.items[0]
    assert all(map(torch.equal, again.predict(item)[2], learn.predict(item)[2]))


class Holder(Callback):
    def __init__(self, thing): self.thing = thing


UNPICKLABLE = {
    "a lock in a callback": (lambda learn: learn.add_cb(Holder({"deep": [1, threading.Lock()]})), r"learn.cbs\[\d+\].thing\['deep'\]\[1\]"),
    "an open socket": (lambda learn: setattr(learn, "log", socket.socket()), "learn.log"),
    "a generator of a loss": (lambda learn: setattr(learn, "loss_func", WithGenerator()), "learn.loss_func.*source"),
}


class WithGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.source = (i for i in range(3))
    def forward(self, pred, *targets): return pred.mean()


@pytest.mark.parametrize("case", UNPICKLABLE)
def test_what_cannot_be_pickled_is_named(case, learn):
    spoil, where = UNPICKLABLE[case]
    loss, cbs = learn.loss_func, list(learn.cbs)
    spoil(learn)
    try:
        with pytest.raises(ValueError, match=f"cannot be exported: {where}.* cannot be pickled .*save_pretrained"): learn.export("a.pkl")
        assert not (learn.path/"a.pkl").exists()
    finally:
        learn.loss_func = loss
        for cb in set(learn.cbs) - set(cbs): learn.remove_cb(cb)
        if hasattr(learn, "log"): learn.log.close(); del learn.log


NEEDS = {
    "a function": "learn.note = own.label_of",
    "a module in a function": "def f(x): return own.label_of(x)\nf.__module__ = '__main__'\nlearn.note = f",
    "a callback": "learn.add_cb(own.Mine())",
    "a learner": "learn.__class__ = own.Learner",
}


@pytest.mark.parametrize("case", NEEDS)
def test_what_cannot_be_imported_is_named(case, learn, tmp_path):
    (tmp_path/"own.py").write_text("from fastai.callback.core import Callback\nfrom segkit.learner import SegmentationLearner\ndef label_of(x): return 1\nclass Mine(Callback): pass\n"
                                   "class Learner(SegmentationLearner): pass\n")
    sys.path.insert(0, str(tmp_path))
    cbs = list(learn.cbs)
    try:
        import own
        exec(NEEDS[case], {"own": own, "learn": learn, "__name__": "__main__"})
        file = learn.export("a.pkl")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_learner(file)  # here it is
            del sys.modules["own"]
            (tmp_path/"own.py").unlink()
            with pytest.raises(RuntimeError, match=r"needs own.*, which cannot be imported here. Install or copy own to .*save_pretrained"): load_learner(file)
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("own", None)
        learn.__class__ = SegmentationLearner
        for cb in set(learn.cbs) - set(cbs): learn.remove_cb(cb)
        vars(learn).pop("note", None)


# item 7: a folder that predicts as the learner does (further: binary, one and six channels, two labels at once, every rule of resizing, a compiled model, no normalisation)

WAYS = {
    "mask and label": {}, "mask": dict(labels=None), "several labels": dict(labels="present"), "binary": dict(labels=None, classes=2), "grey": dict(labels=None, in_channels=1), "six channels": dict(in_channels=6),
    "squish": dict(size=(40, 56), item_tfms=Resize((32, 48), ResizeMethod.Squish), batch_tfms=aug_transforms()), "pad": dict(size=(40, 56), item_tfms=Resize(48, ResizeMethod.Pad)),
    "crop": dict(size=(40, 60), item_tfms=Resize((32, 48))), "not normalised": dict(learner=dict(normalize=False)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_predicts_as_the_learner_does(way, tmp_path):
    learn = built(path=tmp_path, **WAYS[way])
    predictor = segkit.load_predictor(learn.save_pretrained(tmp_path/"net"))
    dl, _ = uncropped(learn.dls.valid)
    picture = dl.dataset[1][0]
    dl.before_iter()
    batch = dl.after_batch(dl.do_batch([dl.after_item(dl.dataset[1])]))[0].as_subclass(Tensor)
    assert torch.allclose(predictor.seen(picture), batch, atol=1e-5)
    with torch.no_grad(): out = learn.model.eval()(batch)
    mask, *label = out if isinstance(out, tuple) else (out,)
    task, answer = predictor.task, predictor(picture)
    probs = learn.predict(dl.dataset.items[1])[2]
    assert torch.allclose(answer.probabilities, probs[0] if label else probs, atol=1e-5)
    h, w = picture.shape[-2:] if isinstance(picture, Tensor) else picture.size[::-1]
    assert answer.mask.shape == (h, w) and answer.probabilities.shape == (mask.shape[1], h, w)
    if mask.shape[-2:] == (h, w):
        assert torch.allclose(answer.probabilities, task.activation(mask)[0], atol=1e-5)
        assert (answer.mask == task.decodes(task.activation(mask))[0]).float().mean() > .999
    if label:
        assert torch.allclose(answer.label_probabilities, predictor.label_task.activation(label[0])[0], atol=1e-5)
        assert answer.labels == list(learn.dls.vocab[-1] if isinstance(learn.dls.vocab[-1], list) else learn.dls.vocab)
    assert predictor.classes == [str(c) for c in learn.task.codes] and answer._repr_png_()


def test_a_folder_keeps_what_was_reached_and_asks_for_nothing(learn, tmp_path):
    learn.model = torch.compile(learn.model, backend="eager")
    try: folder = learn.save_pretrained(tmp_path/"net", dataset="shapes")
    finally: learn.model = learn.model._orig_mod
    facts = json.loads((folder/"preprocessing.json").read_text())
    assert facts["format_version"] == 1 and facts["dataset"] == "shapes" and facts["mode"] == "multiclass" and set(facts["scores"]) >= {"train_loss", "valid_loss", "mask_miou"}
    code = (f"import sys, numpy, segkit; print(segkit.load_predictor({str(folder)!r})(numpy.zeros((20, 30, 3), 'uint8')).mask.shape)\n"
            "assert not {'fastai', 'fastcore', 'cloudpickle'} & set(sys.modules)")
    assert "[20, 30]" in subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert segkit.from_pretrained(folder).encoder.preprocessing["mean"] == facts["mean"]


def test_what_no_folder_can_say_is_refused(learn, tmp_path):
    cropped = built(None, item_tfms=RandomResizedCrop(48), path=tmp_path)
    with pytest.raises(ValueError, match="transform RandomResizedCrop changes pictures.*ignore="): cropped.save_pretrained(tmp_path/"no")
    with pytest.raises(ValueError, match="other numbers than your data do"): cropped.save_pretrained(tmp_path/"no", ignore=["RandomResizedCrop"])
    with pytest.raises(TypeError, match="a Sequential cannot be built again"):
        foreign = segkit.segmentation_learner(learn.dls, nn.Sequential(nn.Conv2d(3, 4, 1)), loss_func=nn.CrossEntropyLoss()) if learn.task.label is None else built(None, path=tmp_path)
        foreign.model = nn.Sequential(nn.Conv2d(3, 4, 1))
        foreign.save_pretrained(tmp_path/"no")
    assert not (tmp_path/"no").exists()


def test_pictures_as_people_have_them(learn, tmp_path):
    predictor = segkit.load_predictor(learn.save_pretrained(tmp_path/"net"))
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path/"a.png")
    np.save(tmp_path/"a.npy", pixels)
    expected = predictor(pixels).probabilities
    given = [str(tmp_path/"a.png"), tmp_path/"a.png", tmp_path/"a.npy", Image.fromarray(pixels), Image.fromarray(pixels).convert("RGBA"), torch.from_numpy(pixels).movedim(-1, 0)]
    for picture in given: assert torch.equal(predictor(picture).probabilities, expected)
    assert len(predictor(given)) == 6 and len(predictor(np.stack([pixels]*2))) == 2
    assert torch.allclose(predictor(torch.from_numpy(pixels).movedim(-1, 0)/255).probabilities, expected, atol=1e-5)
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright
    Image.fromarray(pixels).save(tmp_path/"turned.png", exif=exif)
    assert torch.equal(predictor(tmp_path/"turned.png").probabilities, predictor(np.rot90(pixels, -1)).probabilities)
    (tmp_path/"cut.png").write_bytes((tmp_path/"a.png").read_bytes()[:200])
    for wrong, message in ((tmp_path/"cut.png", "cut.png"), (tmp_path/"none.png", "none.png"), (pixels.astype(float), "another scale"), (pixels[..., :2], "channels|expected"), (np.full((8, 8, 3), np.nan), "NaN|finite|no numbers")):
        with pytest.raises((ValueError, FileNotFoundError), match=message): predictor(wrong)


def test_folders_that_say_too_little(tmp_path):
    segkit.Unet("resnet18", 3, None, decoder_channels=(8, 8, 8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{Path(tmp_path).name}: nothing says how the pictures .* were normalised"): segkit.load_predictor(tmp_path)
    predictor = segkit.load_predictor(tmp_path, mean=[0], std=[1], class_names=["road"])
    assert predictor.task.mode == "binary" and predictor(torch.zeros(3, 8, 8)).classes == ["road"]
    facts = json.loads((tmp_path/"preprocessing.json").read_text())
    (tmp_path/"preprocessing.json").write_text(json.dumps(facts | {"format_version": 2}))
    with pytest.raises(ValueError, match="format_version is 2, expected 1; update segkit"): segkit.load_predictor(tmp_path)


@pytest.mark.parametrize("kind", ["sixteen bits", "own units", "no data"])
def test_numbers_of_every_kind(kind, tmp_path):
    "What the reader of training does to numbers, the folder does, too"
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 65536, (8, 24, 32, 3)).astype(np.uint16)
    options = {"sixteen bits": dict(scale=65535), "own units": {}, "no data": dict(nodata=[-9999., float("nan")])}[kind]
    if kind != "sixteen bits": pictures = pictures.astype(np.float32)/1000 - 20
    if kind == "no data": pictures[:, :3, :4] = -9999
    dls = segkit.data.MaskDataLoaders.from_items(list(range(8)), lambda i: pictures[i], lambda i: np.full((24, 32), i % 2, np.uint8), ["a", "b"], bs=4, seed=0, num_workers=0, path=tmp_path, **options)
    learn = segkit.segmentation_learner(dls, "Unet", **SMALL)
    predictor, dl = segkit.load_predictor(learn.save_pretrained(tmp_path/"net")), dls.valid
    dl = learn.dls.valid
    dl.before_iter()
    batch = dl.after_batch(dl.do_batch([dl.after_item(dl.dataset[0])]))[0].as_subclass(Tensor)
    assert torch.allclose(predictor.seen(pictures[dl.dataset.items[0]]), batch, atol=1e-5)
    if kind == "own units":
        with pytest.raises(ValueError, match="holds bytes, but the pictures of training did not"): predictor(np.zeros((8, 8, 3), np.uint8))
