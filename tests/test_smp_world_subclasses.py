"""A subclass means what it means in SMP: what it overrides is called, in training, in evaluation and after `fuse`."""
import importlib
import types

import pytest
import torch
from oracle import outputs, randomise, relative_error, smp
from torch import nn

import segkit
from segkit import losses
from segkit.core.layers import Conv2dReLU
from segkit.core.registry import architectures
from segkit.decoders.unet import UnetDecoder, UnetDecoderBlock
from segkit.encoders.base import EncoderMixin
from segkit.encoders.resnet import ResNetEncoder
from segkit.heads.classification import ClassificationHead
from segkit.heads.segmentation import SegmentationHead
from segkit.inference.fuse import fuse

MODES = [("binary", 1), ("multiclass", 4), ("multilabel", 4)]
modes = pytest.mark.parametrize("mode, c", MODES)


def batch(mode, c, dtype=torch.float64):
    torch.manual_seed(0)
    y = torch.randint(3, (2, 6, 7)) if mode == "multiclass" else torch.randint(2, (2, c, 6, 7))
    return torch.randn(2, c, 6, 7, dtype=dtype), y


# ---- losses

def test_losses_are_torchs():
    for name in ("DiceLoss", "JaccardLoss", "TverskyLoss", "FocalLoss", "LovaszLoss", "SoftBCEWithLogitsLoss", "SoftCrossEntropyLoss", "MCCLoss"):
        assert issubclass(getattr(losses, name), nn.modules.loss._Loss), name


def shares(output, target, smooth=0.0, eps=1e-7, dims=None): return 1 - (output - target).abs().sum(dims)/output.sum(dims).clamp_min(eps)
def worst(self, loss): return loss.max()
def weighted(self, loss): return (loss*torch.arange(1, 1 + len(loss))).sum()


STEPS = {
    "compute_score": {"compute_score": lambda self, *args, **kwargs: shares(*args, **kwargs)},
    "aggregate_loss": {"aggregate_loss": worst}, "by class": {"aggregate_loss": weighted},
    "both": {"aggregate_loss": weighted, "compute_score": lambda self, *args, **kwargs: shares(*args, **kwargs)},
}
OPTIONS = [{}, {"log_loss": True}, {"smooth": 1.}, {"ignore_index": 1}, {"from_logits": False}, {"classes": [0, 2]}, {"class_weights": [.5, 2, 1, 0]}]


@modes
@pytest.mark.parametrize("name", ["DiceLoss", "JaccardLoss", "TverskyLoss"])
@pytest.mark.parametrize("steps", STEPS)
def test_steps_of_region_losses(name, steps, mode, c):
    "Subclass and instance, against SMP's, with gradients"
    ours_only = name == "JaccardLoss"  # which has no steps in SMP
    for options in OPTIONS:
        if mode == "binary" and {"classes", "class_weights"} & set(options): continue
        x, y = batch(mode, c)
        if "from_logits" in options: x = x.sigmoid()
        x.requires_grad_()
        ours = type("Ours", (getattr(losses, name),), STEPS[steps])(mode, **options)
        patched = getattr(losses, name)(mode, **options)
        for step, function in STEPS[steps].items(): setattr(patched, step, types.MethodType(function, patched))
        values = [ours(x, y), patched(x, y)]
        if not ours_only: values.append(type("Theirs", (getattr(smp.losses, name),), STEPS[steps])(mode, **options)(x, y))
        for value in values: assert abs(value - values[0]) < 1e-12 and relative_error(*(torch.autograd.grad(v, x, retain_graph=True)[0] for v in (value, values[0]))) < 1e-10
        if not options and steps != "by class" and (c > 1 or "score" in steps):
            assert abs(values[0] - getattr(losses, name)(mode)(x, y)) > 1e-3  # not the loss that it was made from


def test_steps_without_an_oracle():
    "`reduction`, `empty`, float32, `super()` in a step, and a step given as a module"
    x, y = batch("multiclass", 4, torch.float32)
    class Worst(losses.DiceLoss):
        def aggregate_loss(self, loss): return loss.max()
    each = Worst("multiclass", reduction="none")(x, y)
    assert each.shape == (2,) and torch.equal(each, torch.stack([Worst("multiclass")(x[i:i+1], y[i:i+1]) for i in range(2)]))
    assert Worst("multiclass", reduction="sum")(x, y) == each.sum() and each.dtype == torch.float32
    with pytest.raises(TypeError, match="aggregate_loss"): Worst("multiclass", empty="exclude")(x, y)  # it does not say which classes are there
    class Halved(losses.TverskyLoss):
        def compute_score(self, output, target, smooth=0.0, eps=1e-7, dims=None): return super().compute_score(output, target, smooth, eps, dims)
        def aggregate_loss(self, loss, present=None): return super().aggregate_loss(loss, present)/2
    for options in ({}, {"alpha": .2, "beta": .9, "gamma": 1.5}, {"empty": "exclude"}, {"empty": "penalize"}, {"ignore_index": 0}):
        assert abs(2*Halved("multiclass", **options)(x, y) - losses.TverskyLoss("multiclass", **options)(x, y)) < 1e-6
    class Score(nn.Module):
        def forward(self, output, target, smooth, eps, dims): return torch.zeros(output.shape[1])
    loss = losses.DiceLoss("multiclass")
    loss.compute_score = Score()
    present = sum(bool((y == c).any()) for c in range(4))
    assert loss(x, y) == present/4


@modes
@pytest.mark.parametrize("how", ["instance", "in __init__", "a module"])
def test_the_step_of_focal_loss(mode, c, how):
    def hinge(output, target): return (1 - output*(2*target - 1)).clamp_min(0).mean()
    class Hinge(nn.Module):
        def forward(self, output, target): return hinge(output, target)
    class Prepared:
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.focal_loss_fn = hinge
    for options in ({}, {"ignore_index": 1}, {"class_weights": [.5, 2, 1, 0]}, {"gamma": 3., "alpha": .3}):
        if mode == "binary" and "class_weights" in options or mode == "multilabel" and "ignore_index" in options: continue
        x, y = batch(mode, c)
        values = []
        for library in (losses, smp.losses):
            if how == "in __init__": loss = type("Mine", (Prepared, library.FocalLoss), {})(mode, **options)
            else:
                loss = library.FocalLoss(mode, **options)
                loss.focal_loss_fn = hinge if how == "instance" or library is smp.losses else Hinge()
            values.append(loss(x, y))
        assert abs(values[0] - values[1]) < 1e-12


def test_a_method_of_focal_loss():
    class Mine(losses.FocalLoss):
        def focal_loss_fn(self, output, target): return output.sum()*0 + 7
    x, y = batch("multiclass", 4)
    assert Mine("multiclass")(x, y) == 7 and Mine("multiclass", reduction="none")(x, y).tolist() == [7, 7]
    for options in ({"reduction": "pixel"}, {"activation": "softmax"}):
        with pytest.raises(ValueError, match="focal_loss_fn"): Mine("multiclass", **options)(x, y)


# ---- blocks and heads

class Halving(UnetDecoderBlock):
    def forward(self, x, size, skip=None): return super().forward(x, size, skip)/2


class Noisy(SegmentationHead):
    def forward(self, x): return super().forward(x) + 3


class Loud(ClassificationHead):
    def forward(self, x): return super().forward(x)*5


class Cubed(Conv2dReLU):
    def forward(self, x): return super().forward(x)**3


class Once(UnetDecoder):
    def forward(self, features): return super().forward(features)*.5


TINY = dict(layers=(1, 1, 1, 1))


def unet(): return randomise(segkit.Unet("resnet18", encoder_weights=None, decoder_channels=(24, 16, 16, 8, 8), aux_params={"classes": 3}, **TINY)).eval()
def recast(module, cls): module.__class__ = cls


def twice(self, *args): return 2*type(self).forward(self, *args)
def doubled(module): module.forward = types.MethodType(twice, module)


def longer(model): model.decoder.blocks[1].conv1 = nn.Sequential(*model.decoder.blocks[1].conv1, nn.Tanh())
def wider(model): model.decoder.blocks[2].conv1[0] = nn.Conv2d(80, 16, 5, padding=2)
def attentive(model): model.decoder.blocks[0].attention1 = nn.Sequential(nn.Sigmoid())


CHANGES = {
    "a block": lambda m: recast(m.decoder.blocks[1], Halving), "a decoder": lambda m: recast(m.decoder, Once), "a head": lambda m: recast(m.segmentation_head, Noisy),
    "the label's head": lambda m: recast(m.classification_head, Loud), "a convolution": lambda m: recast(m.decoder.blocks[0].conv1, Cubed),
    "a second convolution": lambda m: recast(m.decoder.blocks[2].conv2, Cubed), "a block's forward": lambda m: doubled(m.decoder.blocks[2]),
    "a decoder's forward": lambda m: doubled(m.decoder), "a longer unit": longer, "a wider kernel": wider, "an attention": attentive,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_part_is_called_and_survives_fuse(what):
    model, x = unet(), torch.randn(1, 3, 64, 64)
    before = outputs(model, x)
    CHANGES[what](model)
    after = outputs(model, x)
    assert max(relative_error(a, b) for a, b in zip(after, before)) > 1e-3
    for a, b in zip(outputs(fuse(model), x), after, strict=True): assert relative_error(a, b) < 1e-4


class Narrow(nn.Module, EncoderMixin):
    "One convolution a stage"
    def __init__(self):
        super().__init__()
        self._out_channels, self._depth = [3, 8, 8, 16, 16, 16], 5
        self.stages = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in zip(self._out_channels, self._out_channels[1:]))

    def forward(self, x):
        maps = [x]
        for stage in self.stages[:self._depth]: maps.append(stage(maps[-1]))
        return maps


SMALL = {
    "unet": dict(decoder_channels=(8,)*5), "unetplusplus": dict(decoder_channels=(8,)*5), "upernet": dict(decoder_channels=8),
    "segformer": dict(decoder_segmentation_channels=8),
}


def test_the_table_has_every_form():
    assert {arch for arch, cls in architectures.items() if hasattr(getattr(importlib.import_module(cls.__module__), f"{cls.__name__}Decoder", None), "inference_form")} == set(SMALL)


@pytest.mark.parametrize("arch", SMALL)
def test_every_kind_of_part_may_be_a_subclass(arch):
    "Each kind of module that a decoder with an inference form calls: a subclass with another forward is still called after `fuse`"
    model = randomise(segkit.create_model(arch, Narrow(), encoder_weights=None, classes=2, **SMALL[arch])).eval()
    assert hasattr(model.decoder, "inference_form")
    x, called = torch.randn(1, 3, 64, 64), []
    handles = [m.register_forward_hook(lambda m, args, out: called.append(m)) for m in model.decoder.modules() if m is not model.decoder]
    plain = outputs(model, x)[0]
    for handle in handles: handle.remove()
    kinds = {type(m): m for m in called if type(m).__module__.startswith("segkit.")}
    for kind, module in kinds.items():
        module.__class__ = type(f"My{kind.__name__}", (kind,), {"forward": scaled(kind), "__module__": __name__})
        expected, = outputs(model, x)
        assert relative_error(expected, plain) > 1e-6, kind
        assert relative_error(outputs(fuse(model), x)[0], expected) < 1e-4, kind
        module.__class__ = kind
    assert kinds


def scaled(kind):
    def forward(self, *args):
        out = kind.forward(self, *args)
        return [o.tanh() for o in out] if isinstance(out, list) else out.tanh()
    return forward


# ---- encoders and models

def test_what_an_encoder_overrides_is_called():
    heard = []
    class Mine(ResNetEncoder):
        def set_in_channels(self, in_channels, pretrained=True):  # SMP's signature
            heard.append(("channels", in_channels, pretrained))
            super().set_in_channels(in_channels, pretrained)
        def get_stages(self):
            heard.append("stages")
            return super().get_stages()
        def make_dilated(self, output_stride):
            heard.append(("dilated", output_stride))
            super().make_dilated(output_stride)

    segkit.encoders.encoders["mine"] = {"encoder": Mine, "pretrained_settings": {}, "params": {"name": "resnet18", "out_channels": (3, 64, 64, 128, 256, 512)}}
    try: model = segkit.DeepLabV3("mine", encoder_weights=None, in_channels=4, decoder_channels=8).eval()
    finally: del segkit.encoders.encoders["mine"]
    assert heard == [("channels", 4, False), ("dilated", 8), "stages"]
    assert model(torch.randn(1, 4, 64, 64)).shape == (1, 1, 64, 64) and model.encoder.output_stride == 8


def test_an_encoder_in_smps_order_of_bases():
    class Mine(nn.Module, EncoderMixin):
        def __init__(self, **kwargs):
            super().__init__()
            self._out_channels, self._depth, self._in_channels = [3, 8, 16], 2, 3
            self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)])
        def forward(self, x):
            features = [x]
            for conv in self.convs: features.append(conv(features[-1]))
            return features
    model = segkit.Unet(Mine(), encoder_depth=2, encoder_weights=None, decoder_channels=(8, 8))
    parent = nn.Sequential(model)
    parent.load_state_dict({k: torch.ones_like(t) for k, t in parent.state_dict().items()})
    assert model.encoder.convs[1].bias.sum() == 16


def test_what_a_model_overrides_is_called():
    heard = []
    class Mine(segkit.UnetPlusPlus):
        def check_input_shape(self, x): heard.append("shape")
        def initialize(self):
            heard.append("initialize")
            super().initialize()
            nn.init.constant_(self.segmentation_head[0].bias, -4.)
        def deepest(self, features):
            heard.append("deepest")
            return super().deepest(features)
    model = Mine("resnet18", encoder_weights=None, decoder_channels=(24, 16, 16, 8, 8), classes=2, aux_params={"classes": 3}, **TINY).eval()
    assert heard == ["initialize"] and model.segmentation_head[0].bias.tolist() == [-4, -4]
    model(torch.randn(1, 3, 64, 64))
    assert heard == ["initialize", "shape", "deepest"]
    class Strict(segkit.FPN):
        def check_input_shape(self, x):
            super().check_input_shape(x)
            if x.shape[-1] % 32: raise RuntimeError("a multiple of 32, please")
    model = Strict("resnet18", encoder_weights=None, **TINY).eval()
    model(torch.randn(1, 3, 64, 64))
    for form in (model, fuse(model)):
        with pytest.raises(RuntimeError, match="please"): form(torch.randn(1, 3, 64, 65))
    with pytest.raises(ValueError, match="3 channels"): model(torch.randn(1, 4, 64, 64))
