"""`Unet`: the numbers of SMP for every option, any size, and errors in words."""
import pytest
import torch
from oracle import AUX, assert_same, without_gradient

from segkit import Unet

WIDTHS = (64, 48, 32, 16, 16)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_equals_smp_at_each_depth(depth):
    assert_same(Unet, "Unet", encoder_depth=depth, decoder_channels=WIDTHS[:depth], aux_params=AUX)


@pytest.mark.parametrize("options", [
    {"decoder_attention_type": "scse"},
    {"decoder_use_norm": False}, {"decoder_use_norm": {"type": "instancenorm", "affine": True}},
    {"decoder_use_norm": {"type": "batchnorm", "eps": 1e-3}},
    {"decoder_interpolation": "bilinear"}, {"decoder_interpolation": "bicubic"}, {"decoder_interpolation": "area"},
    {"decoder_interpolation": "nearest-exact"},
    {"activation": "softmax2d"}, {"activation": torch.nn.Tanh},
    {"in_channels": 1}, {"in_channels": 5}, {"encoder_name": "resnet50"}, {"encoder_name": "resnext50_32x4d"},
    {"encoder_name": "tu-convnext_atto", "encoder_depth": 4, "decoder_channels": WIDTHS[:4], "decoder_attention_type": "scse"},
    {"encoder_name": "tu-vgg11_bn"}, {"encoder_name": "tu-efficientnet_b0", "encoder_depth": 3, "decoder_channels": WIDTHS[:3]},
], ids=str)
def test_equals_smp_with_each_option(options):
    assert_same(Unet, "Unet", **{"decoder_channels": WIDTHS} | options)


@pytest.mark.parametrize("size", [(65, 71), (100, 260), (33, 224)])
def test_equals_smp_at_odd_sizes(size): assert_same(Unet, "Unet", size=size)


@pytest.mark.parametrize("encoder", ["resnet18", "tu-convnext_atto"])
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_any_size(encoder, depth):
    model = Unet(encoder, depth, None, decoder_channels=WIDTHS[:depth], classes=2).eval()
    for size in [(65, 71), (100, 260), (33, 224), (7, 5), (4, 4)]:
        assert model(torch.randn(1, 3, *size)).shape == (1, 2, *size)


@pytest.mark.parametrize("encoder", ["resnet18", "tu-convnext_atto", "tu-efficientnet_b0", "tu-vgg11_bn"])
@pytest.mark.parametrize("depth", [3, 5])
@pytest.mark.parametrize("attention", [None, "scse"])
def test_every_parameter_gets_a_gradient(encoder, depth, attention):
    assert without_gradient(Unet(encoder, depth, None, decoder_channels=WIDTHS[:depth], decoder_attention_type=attention, aux_params=AUX)) == []


@pytest.mark.parametrize("norm", ["batchnorm", "groupnorm", "layernorm", "instancenorm", "identity", {"type": "batchnorm", "affine": False}])
def test_each_norm_runs_forward_and_backward(norm):
    assert without_gradient(Unet("resnet18", 3, None, decoder_use_norm=norm, decoder_channels=WIDTHS[:3])) == []


def test_renamed_argument():
    with pytest.warns(DeprecationWarning, match="now called 'decoder_use_norm'"):
        assert Unet("resnet18", 1, None, decoder_channels=(8,), decoder_use_batchnorm=False).config["decoder_use_norm"] is False


@pytest.mark.parametrize("kwargs, error, says", [
    ({"encoder_name": "resnet43"}, KeyError, "no encoder 'resnet43'; did you mean"),
    ({"decoder_channels": (64, 32)}, ValueError, r"decoder_channels has 2 numbers, \(64, 32\), but the encoder has 5 stages"),
    ({"decoder_chanels": WIDTHS}, TypeError, "Unet has no argument 'decoder_chanels'; did you mean 'decoder_channels'"),
    ({"foo": 1}, TypeError, "encoder 'resnet18' has no argument 'foo'"),
    ({"encoder_depth": 6}, ValueError, "encoder_depth=6"),
    ({"decoder_attention_type": "se"}, ValueError, "attention_type='se'"),
    ({"decoder_interpolation": "linear"}, ValueError, "decoder_interpolation='linear'"),
    ({"decoder_use_norm": "batch"}, ValueError, "use_norm='batch'"),
    ({"activation": "sigmoyd"}, ValueError, "did you mean 'sigmoid'"),
    ({"aux_params": {"pooling": "avg"}}, ValueError, "add 'classes'"),
    ({"aux_params": {"classes": 2, "poling": "avg"}}, TypeError, "did you mean 'pooling'"),
    ({"aux_params": {"classes": 2, "pooling": "mean"}}, ValueError, "expected 'avg' or 'max'"),
    ({"in_channels": 0}, ValueError, "in_channels=0"),
    ({"classes": 0}, ValueError, "classes=0"),
    ({"encoder_weights": "imgnet"}, KeyError, "did you mean 'imagenet'"),
], ids=lambda v: str(v)[:40] if isinstance(v, dict) else "")
def test_errors_say_what_to_do(kwargs, error, says):
    with pytest.raises(error, match=says): Unet(**{"encoder_name": "resnet18", "encoder_weights": None} | kwargs)


@pytest.mark.parametrize("x, error, says", [
    (torch.zeros(3, 64, 64), ValueError, r"x\[None\]"), (torch.zeros(1, 64, 64, 3), ValueError, "permute"),
    (torch.zeros(1, 4, 64, 64), ValueError, "in_channels=4"), (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "float"),
])
def test_bad_images(x, error, says):
    with pytest.raises(error, match=says): Unet("resnet18", encoder_weights=None)(x)
