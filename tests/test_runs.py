"""Runs that break off: whatever ends a training, the learner is usable, and the same call goes on to the numbers of a run that was never interrupted"""
import errno
import hashlib
import io
import itertools
import os
import random
import signal
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.block import DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.vision.augment import Flip
from fastai.vision.data import ImageBlock, MaskBlock
from PIL import Image
from torch import nn

from segkit.core import files as core_files
from segkit.data import shapes_dataloaders, shims
from segkit.learner import EMA, Checkpoint, MaskCutMix, MaskMixUp, default_loss, read_checkpoint, segmentation_learner
from segkit.learner.resuming import _MAGIC
from segkit.losses import DiceLoss

torch.set_num_threads(1)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{hidden.message}") for hidden in shims.HIDDEN.values()]

class Tiny(nn.Module):
    "The least that has an encoder, a norm, and two heads if asked"
    def __init__(self, pair=False):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head, self.label = nn.Conv2d(4, 4, 1), nn.Linear(4, 3) if pair else None
    def forward(self, x):
        x = self.encoder(x)
        return self.head(x) if self.label is None else (self.head(x), self.label(x.mean((2, 3))))

class CpuPrecision(MixedPrecision):
    "fastai's mixed precision asks for CUDA on any machine; this one is bfloat16 on the CPU"
    def __init__(self): super().__init__(amp_mode=AMPMode.BF16)
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast("cpu", torch.bfloat16)

EXTRAS = {  # arguments of the learner, and callbacks of the call
    "nothing": ({}, list),
    "EMA": ({}, lambda: [EMA(.6)]),
    "bf16": ({}, lambda: [CpuPrecision()]),
    "accumulation": ({}, lambda: [GradientAccumulation(4)]),  # two batches a step, three an epoch: half a gradient crosses its end
    "CutMix": ({}, lambda: [MaskCutMix(p=.7)]),
    "MixUp": ({}, lambda: [MaskMixUp()]),
    "workers": ({"num_workers": 2}, list),
    "trackers": ({}, lambda: [SaveModelCallback("mask_miou", fname="best"), ReduceLROnPlateau("valid_loss", min_delta=10, patience=1)]),
    "two heads that learn their weights": ({"pair": True}, list),
    "torch's AdamW": ({"opt_func": partial(OptimWrapper, opt=torch.optim.AdamW)}, lambda: [GradientClip(.1)]),
    "all at once": ({"pair": True}, lambda: [EMA(.6), CpuPrecision(), GradientAccumulation(4), MaskCutMix()]),
}

def learner(folder, seed=0, pair=False, num_workers=0, n=6, loss_func=None, **kwargs):
    random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
    dls = shapes_dataloaders("largest" if pair else None, size=16, n=n, n_valid=3, bs=2, num_workers=num_workers, batch_tfms=Flip())
    model = Tiny(pair)
    learn = segmentation_learner(dls, model, path=folder, loss_func=loss_func, check=0, **kwargs)
    if pair:
        learn.loss_func = default_loss(learn.task, "uncertainty")
        learn.create_opt()
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn

CALLS = {
    "fit": lambda learn, **kwargs: learn.fit(3, 1e-2, **kwargs),
    "fit_one_cycle": lambda learn, **kwargs: learn.fit_one_cycle(3, slice(1e-3, 1e-2), **kwargs),
    "fit_flat_cos": lambda learn, **kwargs: learn.fit_flat_cos(3, 1e-2, **kwargs),
    "fine_tune, frozen": lambda learn, **kwargs: learn.fine_tune(2, 1e-2, freeze_epochs=2, **kwargs),
    "fine_tune, unfrozen": lambda learn, **kwargs: learn.fine_tune(2, 1e-2, freeze_epochs=2, **kwargs),
}

# how it breaks off

class Break(Callback):
    "Do something once, in an event of epoch 1"
    def __init__(self, event, what, order=30, training=None, phase=None, epoch=1):
        self.event, self.what, self.order, self.where, self.phase, self.when, self.over = event, what, order, training, phase, epoch, False
    def __call__(self, event):
        if event == self.event and not self.over and self._is_here():
            self.over = True
            self.what()
        return super().__call__(event)
    def _is_here(self):
        right_phase = self.phase is None or (self.learn.opt.frozen_idx > 0) == (self.phase == "frozen")
        return right_phase and self.learn.epoch == self.when and self.where in (None, self.learn.training)

def failing(number):
    def fail(*args, **kwargs): raise OSError(number, os.strerror(number))
    return fail

def error(): raise RuntimeError("an error of a test")
def press_stop():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may have none
    signal.raise_signal(signal.SIGINT)
WAYS = {  # event and what is done there; a patch is undone before the run goes on
    "an error in training": (partial(Break, "after_backward", error, training=True), RuntimeError),
    "an error in validation": (partial(Break, "after_pred", error, training=False), RuntimeError),
    "an error in a late callback": (partial(Break, "after_epoch", error, order=200), RuntimeError),
    "an error in an early callback": (partial(Break, "before_epoch", error, order=-20), RuntimeError),
    "stop pressed in training": (partial(Break, "after_step", press_stop), KeyboardInterrupt),
    "stop pressed in validation": (partial(Break, "before_validate", press_stop), KeyboardInterrupt),
    "a full disk": (errno.ENOSPC, OSError),
    "a read-only folder": (errno.EROFS, OSError),
}

def breaker(way, monkeypatch, phase=None):
    "A callback that breaks a run off in this way, and the error it ends with"
    what, kind = WAYS[way]
    if not isinstance(what, int): return what(phase=phase), kind
    target = (core_files.os, "fsync") if what == errno.ENOSPC else (core_files.tempfile, "mkstemp")
    return Break("before_validate", lambda: monkeypatch.setattr(*target, failing(what)), phase=phase), kind

WHOLE = {}

def rows(learn): return [list(row) for row in learn.recorder.values]

def whole(call, extra, folder):
    "What the run comes to when nothing interrupts it; without a checkpoint"
    if (call, extra) not in WHOLE:
        options, callbacks = EXTRAS[extra]
        learn = learner(folder/"whole", **options)
        CALLS[call](learn, cbs=callbacks())
        WHOLE[call, extra] = rows(learn), {k: v.clone() for k, v in learn.model.state_dict().items()}
    return WHOLE[call, extra]

def same(learn, expected):
    values, weights = expected
    assert rows(learn) == values
    for name, t in learn.model.state_dict().items(): assert torch.equal(t, weights[name]), name

def phase_of(call): return call.split(", ")[1] if ", " in call else None

def assert_usable(learn):
    "It predicts and trains; nothing of the run lies around in it"
    assert not torch.is_autocast_enabled("cpu") and learn.first_epoch == 0 and learn.phases_left == 1
    assert all(p.grad is None for p in learn.model.parameters())
    assert all(np.isfinite(v) for v in learn.evaluate().values())
    before = [p.detach().clone() for p in learn.model.head.parameters()]
    learn.fit(1, 1e-2)
    assert not any(torch.equal(a, b) for a, b in zip(before, learn.model.head.parameters()))

# every way in every call; and every extra in the second phase of `fine_tune` and in one call more
PAIRS = [pair for extra, call in zip(list(EXTRAS)[1:], itertools.cycle(list(CALLS)[:4])) for pair in ((call, extra), ("fine_tune, unfrozen", extra))]
CASES = [*((call, "nothing", way) for call in CALLS for way in WAYS), *((call, extra, way) for (call, extra), way in zip(PAIRS, itertools.cycle(WAYS)))]

@pytest.mark.parametrize("call, extra, way", CASES)
def test_the_same_call_goes_on(call, extra, way, tmp_path, monkeypatch):
    expected = whole(call, extra, tmp_path)
    options, callbacks = EXTRAS[extra]
    with monkeypatch.context() as patched:
        stop, kind = breaker(way, patched, phase_of(call))
        learn = learner(tmp_path, **options)
        with pytest.raises(kind): CALLS[call](learn, cbs=[*callbacks(), Checkpoint(), stop])
    assert_usable(learn)
    assert [f.name for f in tmp_path.rglob("*.ckpt*")] == ["checkpoint.ckpt"]  # no part, no lock
    if CASES.index((call, extra, way)) % 2: learn = learner(tmp_path, seed=7, **options)  # else the same learner, in the same session
    CALLS[call](learn, cbs=[*callbacks(), Checkpoint()])
    same(learn, expected)
    assert not list(tmp_path.rglob("*.ckpt*"))

def test_it_goes_on_wherever_it_broke_off(tmp_path):
    "Between any two events of a run, again and again"
    expected = whole("fine_tune, unfrozen", "EMA", tmp_path)
    for phase, epoch, event in [("frozen", 0, "before_train"), ("frozen", 1, "after_fit"), ("unfrozen", 0, "before_fit"), ("unfrozen", 0, "after_epoch"), ("unfrozen", 1, "after_epoch")]:
        learn = learner(tmp_path, seed=epoch)
        with pytest.raises(RuntimeError): CALLS["fine_tune, unfrozen"](learn, cbs=[EMA(.6), Checkpoint(), Break(event, error, order=200, phase=phase, epoch=epoch)])
    learn = learner(tmp_path, seed=9)
    CALLS["fine_tune, unfrozen"](learn, cbs=[EMA(.6), Checkpoint()])
    same(learn, expected)

# a process that is killed

KILLED = {"fit": "nothing", "fit_one_cycle": "EMA", "fit_flat_cos": "workers", "fine_tune, frozen": "accumulation", "fine_tune, unfrozen": "all at once"}

def kill(): os.kill(os.getpid(), signal.SIGKILL)

def train_until_killed(folder, call, extra, while_writing):
    options, callbacks = EXTRAS[extra]
    def kill_at_next_write(): core_files.os.fsync = lambda handle: kill()
    stop = Break("before_validate" if while_writing else "after_backward", kill_at_next_write if while_writing else kill, phase=phase_of(call))
    CALLS[call](learner(folder, **options), cbs=[*callbacks(), Checkpoint(), stop])

def main(folder):
    "Each killed run in a child of this process, so that everything is imported once"
    for i, (call, extra) in enumerate(KILLED.items()):
        if not (child := os.fork()): train_until_killed(folder/str(i), call, extra, i % 2)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, (call, extra)

def test_killed(tmp_path):
    job = subprocess.run([sys.executable, "-W", "ignore", __file__, tmp_path], capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
    for i, (call, extra) in enumerate(KILLED.items()):
        options, callbacks = EXTRAS[extra]
        folder = tmp_path/str(i)
        assert (folder/"models/checkpoint.ckpt").exists()
        assert len(list(folder.rglob(".checkpoint.ckpt.*"))) == i % 2  # a part was left ...
        learn = learner(folder, seed=5, **options)
        CALLS[call](learn, cbs=[*callbacks(), Checkpoint()])
        same(learn, whole(call, extra, tmp_path))
        assert not [f for f in folder.rglob("*") if "ckpt" in f.name]  # ... and is removed

# a checkpoint knows its run

def broken(folder, call=CALLS["fit_one_cycle"], cbs=(), **kwargs):
    learn = learner(folder, **kwargs)
    with pytest.raises(RuntimeError): call(learn, cbs=[*cbs, Checkpoint(), Break("after_backward", error)])
    return folder/"models/checkpoint.ckpt"

def refused(learn, call=CALLS["fit_one_cycle"], cbs=(), match=None, kind=ValueError, **kwargs):
    "The call is refused, and nothing in the learner has changed"
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    moments, numbers = moments_of(learn), torch.get_rng_state()
    with pytest.raises(kind, match=match) as caught: call(learn, cbs=[*cbs, Checkpoint(**kwargs)])
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert moments_of(learn) == moments and torch.equal(numbers, torch.get_rng_state())
    return str(caught.value)

def moments_of(learn): return str(learn.opt.state_dict()["state"])

def with_lr(lr, **options): return lambda learn, **kwargs: learn.fit_one_cycle(3, lr, **options, **kwargs)
def frozen(folder, **kwargs):
    learn = learner(folder, **kwargs)
    learn.freeze()
    return learn
def other_model(folder):
    learn = learner(folder)
    learn.model.head = nn.Conv2d(4, 4, 3, padding=1)
    learn.create_opt()
    return learn

DIFFERENT = {  # what changed -> (learner, call, callbacks, what the message says, name to accept)
    "optimiser": (partial(learner, opt_func=SGD), None, [], "optimizer, steps was", ["optimizer", "schedule"]),
    "optimiser of torch": (partial(learner, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)), None, [], "optimizer, class was 'Optimizer', now it is 'OptimWrapper'", ["optimizer", "schedule"]),
    "option of the optimiser": (partial(learner, opt_func=partial(Adam, sqr_mom=.9)), None, [], "schedule, group 0, ", ["schedule"]),
    "learning rate": (learner, with_lr(1e-3), [], "schedule, lr was", ["schedule"]),
    "weight decay": (learner, with_lr(slice(1e-3, 1e-2), wd=.3), [], "schedule, group 0, ", ["schedule"]),
    "shape of the schedule": (learner, with_lr(slice(1e-3, 1e-2), pct_start=.5), [], "schedule, lr was", ["schedule"]),
    "another call": (learner, CALLS["fit"], [], "schedule, group 0, lr was 'absent', now it is 0.01", ["schedule"]),
    "more epochs": (learner, lambda learn, **kwargs: learn.fit_one_cycle(4, slice(1e-3, 1e-2), **kwargs), [], "epochs was 3, now it is 4", ["epochs"]),
    "fine_tune": (learner, CALLS["fine_tune, frozen"], [], "call, name was 'fit', now it is 'fine_tune'", None),
    "number of pictures": (partial(learner, n=8), None, [], "batches was 3, now it is 4; data, training, items was 6, now it is 8", ["batches", "data"]),
    "frozen": (frozen, None, [], "frozen, encoder.0.weight was 'absent', now it is 'frozen'.*and 2 more", ["frozen"]),
    "loss": (partial(learner, loss_func=nn.CrossEntropyLoss()), None, [], "loss, mask_loss, class was 'SumLoss', now it is 'CrossEntropyLoss'", ["loss"]),
    "weights of classes": (partial(learner, loss_func=DiceLoss("multiclass", class_weights=[1, 2, 3, 4])), None, [], "loss, .*class", ["loss"]),
    "EMA added": (learner, None, [EMA(.5)], "callbacks, ema was 'absent'", ["callbacks"]),
    "mixing added": (learner, None, [MaskCutMix()], "callbacks, mask_cut_mix was 'absent'", ["callbacks"]),
    "accumulation added": (learner, None, [GradientAccumulation(4)], "callbacks, gradient_accumulation was 'absent'", ["callbacks"]),
    "another model": (other_model, None, [], r"model, head.weight was 'float32 \(4, 4, 1, 1\)', now it is 'float32 \(4, 4, 3, 3\)'", None),
}

@pytest.mark.parametrize("changed", DIFFERENT)
def test_another_run_is_refused_in_words(changed, tmp_path):
    build, call, cbs, match, accept = DIFFERENT[changed]
    call = call or CALLS["fit_one_cycle"]
    file = broken(tmp_path)
    content = file.read_bytes()
    said = refused(build(tmp_path), call, cbs, f"(?s)checkpoint.ckpt is of another run: .*{match}")
    assert file.read_bytes() == content and "resume=False" in said
    if accept is None: return
    assert f"accept={accept}" in said
    learn = build(tmp_path, seed=3) if isinstance(build, partial) or build in (learner, frozen) else build(tmp_path)
    call(learn, cbs=[*cbs, Checkpoint(accept=accept)])  # meant: it goes on behind epoch 0
    assert len(learn.recorder.values) == learn.n_epoch and not file.exists()

def from_files(folder, first="a", **kwargs):
    "A learner of pictures that are files"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(9):
        for name, shape in ((f"{first}{i}.bmp", (16, 16, 3)), (f"{first}{i}.png", (16, 16))):
            Image.fromarray(rng.integers(0, 4, shape, np.uint8)).save(folder/name)
    block = DataBlock([ImageBlock, MaskBlock(list("abcd"))], get_y=lambda f: f.with_suffix(".png"), splitter=IndexSplitter([0, 1, 2]))
    dls = block.dataloaders(sorted(folder.glob(f"{first}*.bmp")), bs=2, path=folder, device="cpu", num_workers=0)
    learn = segmentation_learner(dls, Tiny(), path=folder, check=0, **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn

def test_other_pictures_of_the_same_number(tmp_path):
    with pytest.raises(RuntimeError): CALLS["fit"](from_files(tmp_path/"data"), cbs=[Checkpoint(), Break("after_backward", error)])
    refused(from_files(tmp_path/"data", "b"), CALLS["fit"], match="of another run: data, training, names was .* data, set 1, names was")
    (tmp_path/"data").rename(tmp_path/"moved")  # the folder as a whole may have another place
    learn = from_files(tmp_path/"moved")
    CALLS["fit"](learn, cbs=Checkpoint())
    assert len(learn.recorder.values) == 3 and not list(tmp_path.rglob("*.ckpt"))

def test_options_of_what_takes_part(tmp_path):
    broken(tmp_path, cbs=[EMA(.5), MaskCutMix(p=.5)])
    refused(learner(tmp_path), cbs=[EMA(.6), MaskCutMix(p=.5)], match="ema, decay was '0.5', now it is '0.6'")
    refused(learner(tmp_path), cbs=[EMA(.5), MaskCutMix(p=1)], match="mask_cut_mix, p was '0.5', now it is '1'")
    refused(learner(tmp_path), cbs=[MaskCutMix(p=.5)], match="ema was .*, now it is 'absent'")

def test_a_change_that_is_meant(tmp_path):
    "What changed is new, all else goes on"
    file = broken(tmp_path)
    weights = read_checkpoint(file)["model"]
    class Start(Callback):
        order = 200
        def before_fit(self): self.seen = [p.clone() for p in self.learn.model.parameters()], self.learn.opt.hypers[0]["wd"]
    learn = learner(tmp_path, seed=4, opt_func=SGD)
    learn.fit_one_cycle(3, 5e-2, wd=.2, cbs=[EMA(.5), Checkpoint(accept=["optimizer", "schedule", "callbacks"]), start := Start()])
    assert all(torch.equal(a, weights[name]) for a, (name, _) in zip(start.seen[0], learn.model.named_parameters())) and start.seen[1] == .2
    assert max(learn.recorder.lrs[3:]) > 1e-2 and len(learn.recorder.values) == 3
    with pytest.raises(ValueError, match="did you mean 'schedule'"): Checkpoint(accept="schedul")

def test_a_complete_phase_is_not_trained_again(tmp_path):
    class Count(Callback):
        frozen = 0
        def after_batch(self): Count.frozen += self.training and self.learn.opt.frozen_idx > 0
    call = CALLS["fine_tune, unfrozen"]
    learn = learner(tmp_path)
    with pytest.raises(RuntimeError): call(learn, cbs=[Count(), Checkpoint(), Break("after_backward", error, phase="unfrozen")])
    assert Count.frozen == 6
    call(learner(tmp_path), cbs=[Count(), Checkpoint()])
    assert Count.frozen == 6
    with pytest.raises(RuntimeError): call(learn, cbs=[Checkpoint(), Break("after_backward", error, phase="unfrozen")])
    refused(learner(tmp_path), lambda learn, **kwargs: learn.fine_tune(4, 1e-2, freeze_epochs=2, **kwargs), match="call, epochs was 2, now it is 4; phase was 'the last', now it is 'the first of two'")
    call(learner(tmp_path), cbs=[Count(), Checkpoint(resume=False)])  # all anew
    assert Count.frozen == 12

# files that are damaged, or from strangers

def with_checksum(content): return _MAGIC + hashlib.sha256(content).hexdigest().encode() + content

def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()

class Runs:
    "A pickle that runs something when it is read"
    def __reduce__(self): return os.mkdir, ("ran",)

def bomb():
    "A zip whose content is larger than itself"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("archive/data.pkl", b"0"*10**7)
    return buffer.getvalue()

DAMAGED = {
    "empty": lambda good: b"",
    "cut in half": lambda good: good[:len(good)//2],
    "cut in its head": lambda good: good[:50],
    "the last byte missing": lambda good: good[:-1],
    "a byte too many": lambda good: good + b"0",
    "a bit of the checksum": lambda good: good[:30] + bytes([good[30] ^ 1]) + good[31:],
    "an old checkpoint": lambda good: saved({"epoch": 1, "model": {}}),
    "text": lambda good: b"<html>404</html>",
    "a class": lambda good: with_checksum(saved({"facts": Runs()})),
    "no zip": lambda good: with_checksum(b"what"),
    "a zip bomb": lambda good: with_checksum(bomb()),
    "a list": lambda good: with_checksum(saved([1, 2])),
    "no weights": lambda good: with_checksum(saved({"facts": {}, "epoch": 0})),
    **{f"bit {bit}": lambda good, bit=bit: flip(good, bit) for bit in (200, 5_000, 20_000, -9)},
}

def flip(data, bit):
    data = bytearray(data)
    data[bit] ^= 4
    return bytes(data)

@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = broken(tmp_path)
    file.write_bytes(DAMAGED[damage](file.read_bytes()))
    said = refused(learner(tmp_path), match=r"(?s)checkpoint\.ckpt \([0-9,]+ bytes\) .*resume=False")
    assert len(said) < 1000 and not Path("ran").exists()
    refused(learner(tmp_path), CALLS["fine_tune, frozen"], match="checkpoint.ckpt")
    learn = learner(tmp_path)
    CALLS["fit_one_cycle"](learn, cbs=Checkpoint(resume=False))
    assert len(learn.recorder.values) == 3

def edited(file, **changes):
    state = read_checkpoint(file)
    for name, change in changes.items(): state[name] = change(state[name])
    file.write_bytes(with_checksum(saved(state)))

HOSTILE = {
    "weights of another shape": dict(model=lambda m: {k: v[..., None] for k, v in m.items()}),
    "a weight is missing": dict(model=lambda m: dict(list(m.items())[1:])),
    "moments of fewer weights": dict(opt=lambda o: o | {"state": o["state"][1:]}),
    "no hypers": dict(opt=lambda o: {"state": o["state"]}),
    "an epoch that is none": dict(epoch=lambda e: 10**9),
    "a negative epoch": dict(epoch=lambda e: -5),
    "random numbers of another kind": dict(random=lambda r: [r[0] | {"python": (1, 2, 3)}]),
    "random numbers of no process": dict(random=lambda r: []),
    "a recorder without losses": dict(recorder=lambda r: {}),
    "values that are no rows": dict(recorder=lambda r: r | {"values": 3}),
}

@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_a_stranger_wrote_changes_all_or_nothing(what, tmp_path):
    file = broken(tmp_path)
    edited(file, **HOSTILE[what])
    said = refused(learner(tmp_path), match=r"(?s)checkpoint\.ckpt cannot be taken up.*resume=False")
    assert len(said) < 1500

def test_a_stranger_sets_no_attribute(tmp_path):
    cbs = [SaveModelCallback(fname="best")]
    file = broken(tmp_path, cbs=cbs)
    edited(file, remembered=lambda r: {name: known | {"fname": "../../outside", "run": False} for name, known in r.items()})
    CALLS["fit_one_cycle"](learner(tmp_path), cbs=[SaveModelCallback(fname="best"), Checkpoint()])
    assert (tmp_path/"models/best.pth").exists() and not list(tmp_path.parent.glob("outside*"))

# what is seen before the training

class Never(Callback):
    def before_train(self): raise AssertionError("it trained")

def test_a_folder_that_cannot_be_written_is_seen_before_training(tmp_path, monkeypatch):
    (tmp_path/"file").write_text("no folder")
    refused(learner(tmp_path/"file"), cbs=[Never()], kind=OSError, match="no checkpoint can be written there")
    for number in (errno.EROFS, errno.EACCES, errno.ENOSPC):
        with monkeypatch.context() as patched:
            patched.setattr(core_files.tempfile, "mkstemp", failing(number))
            refused(learner(tmp_path), cbs=[Never()], kind=OSError, match="checkpoint.ckpt: the checkpoint of .* could not be written")
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        refused(learner(tmp_path), cbs=[Never()], kind=OSError, match=r"0 MB are free, but two checkpoints of this run need up to .* MB")
    assert not [f for f in tmp_path.rglob("*") if "ckpt" in f.name]
    for save in (SaveModelCallback(), SaveModelCallback(every_epoch=True)):
        with pytest.raises(OSError, match="no model can be written there"): learner(tmp_path/"file").fit(1, cbs=[save, Never()])

def test_a_folder_that_another_run_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "patience", 0)
    file = broken(tmp_path)
    code = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, f"{file}.lock"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        try:
            content = file.read_bytes()
            said = refused(learner(tmp_path), kind=RuntimeError, match="belongs to a run that is going on")
            assert file.read_bytes() == content and "Checkpoint('second')" in said
            learner(tmp_path).fit(1, cbs=Checkpoint("second"))  # another name is another run
        finally: other.kill()
    CALLS["fit_one_cycle"](learner(tmp_path), cbs=Checkpoint())  # a killed run holds nothing
    with pytest.raises(RuntimeError, match="belongs to a run that is going on"): learner(tmp_path).fit(1, cbs=[Checkpoint(), Checkpoint()])
    learner(tmp_path).fit(1, cbs=Checkpoint())

def test_looking_does_not_touch_a_run(tmp_path):
    "Row 51: also while the callback stands in the learner's own list, and in a learner that never trained"
    file = broken(tmp_path)
    content = file.read_bytes()
    learn = learner(tmp_path, cbs=[Checkpoint(), SaveModelCallback()])
    learn.evaluate(); learn.get_preds(); learn.tta(); learn.lr_find(num_it=6, show_plot=False)
    assert file.read_bytes() == content and [f.name for f in tmp_path.rglob("*") if f.is_file()] == ["checkpoint.ckpt"]

# the learner afterwards, whatever broke off

def test_lr_find_that_is_interrupted_gives_the_weights_back(tmp_path):
    learn = learner(tmp_path, cbs=SaveModelCallback())
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    class Stop(Callback):
        def after_step(self):
            if self.learn.train_iter == 4: raise KeyboardInterrupt
    learn.add_cb(stop := Stop())
    with pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=9, show_plot=False)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert not [f for f in (tmp_path/"models").rglob("*") if f.name != "model.pth"]
    learn.remove_cb(stop)
    learn.fit(1)  # and callbacks that rested wake up
    assert (tmp_path/"models/model.pth").exists()

def test_gradients_of_an_interrupted_step_are_gone(tmp_path):
    def losses(learn): learn.fit(1, 1e-2); return [float(v) for v in learn.recorder.losses]
    learns = [learner(tmp_path) for _ in range(2)]
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError): learns[0].fit(1, 1e-2, cbs=Break("after_backward", error, epoch=0))
    learns[0].model.load_state_dict(learns[1].model.state_dict())
    for learn in learns: learn.dls.train.rng.seed(0); learn.dls.valid.rng.seed(0)
    results = []
    for learn in learns:
        torch.set_rng_state(state); random.seed(0)
        results.append(losses(learn))
    assert results[0] == results[1]

def test_what_is_frozen_does_not_move_by_old_gradients(tmp_path):
    learn = learner(tmp_path)
    learn.fit(1, 1e-2)
    learn.freeze()
    before = [p.clone() for p in learn.model.encoder.parameters()]
    learn.fit(1, 1e-2, wd=.5)
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.encoder.parameters()))

def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    learn = learner(tmp_path)
    class Ruin(Callback):
        def after_validate(self):
            if self.learn.epoch == 1: self.learn.model.head.bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="weights that are not finite"): learn.fit(3, 1e-2, cbs=[Checkpoint(), Ruin()])
    state = read_checkpoint(tmp_path/"models/checkpoint.ckpt")
    assert state["epoch"] == 0 and all(v.isfinite().all() for v in state["model"].values())

def test_early_stopping_ends_a_run(tmp_path):
    learn = learner(tmp_path)
    learn.fit(5, 1e-2, cbs=[EarlyStoppingCallback("valid_loss", min_delta=10, patience=2), Checkpoint()])
    assert len(learn.recorder.values) < 5 and not list(tmp_path.rglob("*.ckpt*"))

def test_a_memory_that_is_no_plain_data_is_refused_before_training(tmp_path):
    class Odd(Callback):
        def state_dict(self): return {"what": object()}
        def load_state_dict(self, state): pass
    with pytest.raises(TypeError, match="a object cannot be part of a checkpoint"): learner(tmp_path).fit(1, cbs=[Odd(), Checkpoint(), Never()])

if __name__ == "__main__": main(Path(sys.argv[1]))
