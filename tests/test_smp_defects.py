"""SMP's public surface, and what SMP does wrong: each test names the row of behaviour that it holds segkit to."""
import functools
import inspect
import math
import types

import pytest
import torch
from oracle import AUX, outputs, smp
from torch import nn

import segkit
from segkit.core.registry import architectures

every = pytest.mark.parametrize("arch", sorted(architectures))
TINY = {"layers": (1, 1, 1, 1)}  # a ResNet with one block a stage


def build(arch, encoder=None, **options):
    "A small model"
    if arch == "dpt":
        options = dict(encoder_depth=3, decoder_intermediate_channels=(8, 8, 8), decoder_fusion_channels=8) | options
        return segkit.create_model(arch, "tu-test_vit", encoder_weights=None, **options)
    if encoder is None: options = TINY | options
    return segkit.create_model(arch, encoder or "resnet18", encoder_weights=None, **options)


@functools.cache
def built(arch): return build(arch, classes=2).eval()


def public(module):
    names = getattr(module, "__all__", None) or [n for n in dir(module) if n[0] != "_"]
    return {n for n in names if not isinstance(getattr(module, n), types.ModuleType)}


# ---- the same names and arguments

@every
def test_arguments_of_smp(arch):
    "The same names in the same order with the same defaults, what is new behind them; `upsampling` counts from the decoder's map"
    cls = architectures[arch]
    theirs, ours = (inspect.signature(c).parameters for c in (getattr(smp, cls.__name__), cls))
    names = [n for n in theirs if n != "kwargs"]
    assert list(ours)[:len(names)] == names and list(ours)[-1] == "kwargs"
    differ = {n for n in names if theirs[n].default != ours[n].default}
    assert differ <= {"upsampling"} and all(ours[n].default is None for n in differ)


def test_names_of_smp():
    assert {n for n in smp.__all__ if not hasattr(segkit, n)} <= {"datasets"}
    assert set(smp.MODEL_ARCHITECTURES_MAPPING) == set(segkit.MODEL_ARCHITECTURES_MAPPING)
    for package in ("losses", "metrics", "encoders"):
        assert public(getattr(smp, package)) <= set(dir(getattr(segkit, package))), package


@every
def test_decoders_of_smp(arch):
    "`smp.decoders.fpn.FPN` is `segkit.decoders.fpn.FPN`, and its decoder has the same name"
    name = architectures[arch].__name__
    module = __import__(f"segkit.decoders.{arch}", fromlist=[name])
    assert getattr(module, name) is architectures[arch]
    assert hasattr(module, "PSPDecoder" if arch == "pspnet" else f"{name}Decoder")


# ---- input

@every
@pytest.mark.parametrize("x, error, says", [
    (torch.zeros(3, 64, 64), ValueError, r"\(3, 64, 64\); add the batch axis"), (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "torch.uint8"),
    (torch.zeros(1, 4, 64, 64), ValueError, "3 channels, got 4"), (torch.zeros(1, 3, 0, 64), ValueError, "empty"), ("image.png", TypeError, "got str")], ids=str)
def test_bad_images(arch, x, error, says):
    with pytest.raises(error, match=says): built(arch)(x)


@every
def test_bad_arguments(arch):
    for options, error, says in [({"classes": 0}, ValueError, "classes=0"), ({"in_channels": 0}, ValueError, "in_channels=0"),
                                 ({"encoder_depth": 9}, ValueError, "encoder_depth|depth"), ({"activation": "sigmoyd"}, ValueError, "did you mean 'sigmoid'"),
                                 ({"aux_params": {"pooling": "avg"}}, ValueError, "add 'classes'")]:
        with pytest.raises(error, match=says): build(arch, **options)


# ---- activations, interpolation, norms, start of the weights

class Half(nn.Module):
    def forward(self, x): return x/2


@every
@torch.no_grad()
def test_any_activation(arch):
    "A name, a class, a module, a function that makes one: each is applied to the logits"
    model, x = built(arch), torch.randn(1, 3, 64, 64)
    logits = model(x)
    for activation, expected in [("sigmoid", logits.sigmoid()), (nn.Tanh, logits.tanh()), (Half(), logits/2), (lambda: nn.Softmax(1), logits.softmax(1))]:
        other = build(arch, classes=2, activation=activation).eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), expected)


INTERPOLATING = sorted(a for a in architectures if "decoder_interpolation" in inspect.signature(architectures[a]).parameters)


def test_all_that_interpolate_let_choose():
    "Linknet enlarges by a learned convolution, DPT by SMP's form, and DeepLabV3 nothing but a single cell"
    assert set(architectures) - set(INTERPOLATING) == {"linknet", "dpt", "deeplabv3"}


@pytest.mark.parametrize("arch", INTERPOLATING)
@torch.no_grad()
def test_interpolation(arch):
    model, x = built(arch), torch.randn(1, 3, 65, 71)
    default, seen = inspect.signature(type(model)).parameters["decoder_interpolation"].default, {}
    for mode in ("nearest", "bilinear", "bicubic", "area", "nearest-exact"):
        other = build(arch, classes=2, decoder_interpolation=mode).eval()
        other.load_state_dict(model.state_dict())
        seen[mode] = other(x)
        assert seen[mode].shape == (1, 2, 65, 71)
    assert torch.equal(seen[default], model(x))
    for a, b in [("nearest", "bilinear"), ("bilinear", "bicubic"), ("nearest", "bicubic")]: assert not torch.allclose(seen[a], seen[b])
    with pytest.raises(ValueError, match="decoder_interpolation='linear'"): build(arch, decoder_interpolation="linear")


@every
def test_decoders_start_alike(arch):
    "Row 37: every decoder's convolutions start from He's distribution, DeepLab's too"
    torch.manual_seed(0)
    convs = [m for m in build(arch).decoder.modules() if type(m) is nn.Conv2d and m.weight.numel() > 500]
    assert convs
    for m in convs:
        bound = math.sqrt(6/m.weight[0].numel())  # torch's own start ends at 1/sqrt(fan_in)
        assert .9*bound < m.weight.abs().max() <= bound and (m.bias is None or not m.bias.any())


# ---- weights, freezing, saving

def test_row_4_false_means_random(monkeypatch):
    monkeypatch.setattr("segkit.encoders.weights._fetch_tag", lambda *args: pytest.fail("fetched"))
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *args, **kwargs: pytest.fail("fetched"))
    for name in ("resnet18", "tu-resnet18"): segkit.Unet(name, 1, False, decoder_channels=(8,))


def test_row_10_eval_is_eval():
    "Frozen or not: no dropout is active in evaluation, unfreezing keeps the mode"
    model = segkit.Segformer("mit_b0", encoder_weights=None).train()
    model.freeze_encoder()
    model.eval()
    assert not [m for m in model.modules() if m.training]
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(outputs(model, x)[0], outputs(model, x)[0])
    model.unfreeze_encoder()
    assert not [m for m in model.modules() if m.training] and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("arch", sorted(set(architectures) - {"dpt"}))
def test_freezes_by_stage(arch):
    model = build(arch).train()
    model.freeze_encoder(stages=[1, 2])
    frozen = {n.split(".")[0] for n, p in model.encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
    assert not model.encoder.bn1.training and model.encoder.layer2[0].bn1.training
    model.unfreeze_encoder(stages=[2])
    assert {n.split(".")[0] for n, p in model.encoder.named_parameters() if not p.requires_grad} == {"conv1", "bn1"}


def test_row_11_load_state_dict_is_torchs():
    model = build("unet")
    state = dict(model.state_dict(), extra=torch.zeros(1))
    names = list(state)
    missing, unexpected = model.load_state_dict(state, False)
    assert (missing, unexpected, list(state)) == ([], ["extra"], names)


def test_row_15_card_claims_no_licence(tmp_path):
    model = segkit.Unet("resnet18", 1, None, decoder_channels=(8,))
    cards = [(model.save_pretrained(tmp_path/str(i))/"README.md").read_text() for i in range(2)]
    assert cards[0] == cards[1] and "license: mit" not in cards[0]


def test_row_27_mix_transformers_are_not_dilated():
    with pytest.raises(ValueError, match="cannot be dilated"): segkit.DeepLabV3("mit_b0", encoder_weights=None)


def test_row_40_unused_attention():
    "SMP stores attention that no block runs: it loads, and there is nothing of it to train"
    theirs = smp.Unet("resnet18", 2, None, decoder_channels=(32, 16), decoder_attention_type="scse").state_dict()
    ours = segkit.Unet("resnet18", 2, None, decoder_channels=(32, 16), decoder_attention_type="scse")
    spare = {k for k in theirs if k not in ours.state_dict() and not k.startswith("encoder.")}
    assert spare and all(".attention1." in k for k in spare)
    ours.load_state_dict(theirs)


def test_empty_aux_params():
    "SMP's PSPNet takes an empty dict for no head; the others ask for the number of labels"
    assert segkit.PSPNet("resnet18", None, aux_params={}).classification_head is None is smp.PSPNet("resnet18", None, aux_params={}).classification_head
    with pytest.raises(ValueError, match="add 'classes'"): segkit.Unet("resnet18", encoder_weights=None, aux_params={})
    with pytest.raises(TypeError): smp.Unet("resnet18", encoder_weights=None, aux_params={})


def test_aux_head_options():
    model = build("fpn", aux_params=AUX | {"dropout": None, "activation": nn.Sigmoid}).eval()
    label = outputs(model, torch.randn(2, 3, 64, 64))[1]
    assert label.shape == (2, 3) and label.min() > 0 and label.max() < 1
