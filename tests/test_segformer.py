"""`Segformer`: the numbers of SMP at each depth and size, and the composed form equal to the plain one, gradients too."""
import pytest
import torch
from oracle import AUX, assert_same, randomise, relative_error, without_gradient

from segkit.decoders.segformer import Segformer, SegformerDecoder

torch.set_num_threads(1)


@pytest.mark.parametrize("depth", [3, 4, 5])
@pytest.mark.parametrize("encoder", ["resnet18", "tu-convnext_atto", "mit_b0"])
def test_equals_smp_at_each_depth(encoder, depth):
    assert_same(Segformer, "Segformer", encoder_name=encoder, encoder_depth=depth, aux_params=AUX)


@pytest.mark.parametrize("options", [
    {"decoder_segmentation_channels": 96}, {"in_channels": 1}, {"in_channels": 5, "activation": "softmax2d"}, {"upsampling": 1},
    {"upsampling": 2, "activation": torch.nn.Tanh}, {"encoder_name": "resnet50"}, {"size": (32, 160)}, {"encoder_name": "tu-vgg11_bn", "size": (32, 64)}], ids=str)
def test_equals_smp_with_each_option(options): assert_same(Segformer, "Segformer", **{"decoder_segmentation_channels": 64} | options)


@pytest.mark.parametrize("channels", [(3, 8, 16, 24, 32, 40), (3, 0, 16, 24, 32), (3, 8, 16, 24)], ids=str)
@pytest.mark.parametrize("size", [(64, 96), (66, 75)])
@pytest.mark.parametrize("training", [True, False])
def test_composed_equals_plain_with_gradients(channels, size, training):
    torch.manual_seed(0)
    decoder = randomise(SegformerDecoder(channels, 32)).double().train(training)
    features = [torch.randn(2, c, -(-size[0]//2**i), -(-size[1]//2**i), dtype=torch.float64, requires_grad=True) for i, c in enumerate(channels)]
    weights, results = torch.randn(2, 32, *features[2].shape[-2:], dtype=torch.float64), []
    inputs = [f for i, f in enumerate(features) if i and f.numel()] + list(decoder.parameters())
    for form in (decoder.plain, decoder.composed):
        y = form(features)
        results.append([y, *torch.autograd.grad((y*weights).sum(), inputs)])
    least = 1e-3*max(t.abs().max() for t in results[0])  # batch norm takes a bias away again: its gradient is rounding alone in training
    for plain, composed in zip(*results, strict=True):
        assert (composed - plain).abs().max() < 1e-11*max(least, plain.abs().max())
        if not training: assert relative_error(composed, plain) < 1e-11


def test_the_composed_form_is_the_default():
    model = Segformer("resnet18", encoder_weights=None)
    assert model.decoder.compose
    called = []
    model.decoder.fuse_stage.register_forward_hook(lambda *args: called.append(1))
    x = torch.randn(1, 3, 64, 64)
    model.eval()(x)
    assert not called
    model.decoder.compose = False
    model(x)
    assert called


@pytest.mark.parametrize("depth", [3, 4, 5])
@pytest.mark.parametrize("encoder", ["resnet18", "mit_b0"])
@torch.no_grad()
def test_any_size(encoder, depth):
    model = Segformer(encoder, depth, None, classes=2, decoder_segmentation_channels=32).eval()
    for size in [(65, 71), (100, 260), (33, 224), (7, 5), (1, 1)]: assert model(torch.randn(1, 3, *size)).shape == (1, 2, *size)


def test_explicit_upsampling_is_obeyed():
    model = Segformer("resnet18", encoder_weights=None, upsampling=1, decoder_segmentation_channels=32).eval()
    assert model(torch.randn(1, 3, 65, 71)).shape == (1, 1, 17, 18)


@pytest.mark.parametrize("encoder", ["resnet18", "mit_b0", "tu-convnext_atto"])
@pytest.mark.parametrize("depth", [3, 5])
def test_every_parameter_gets_a_gradient(encoder, depth): assert without_gradient(Segformer(encoder, depth, None, aux_params=AUX)) == []


def test_batch_of_one_trains():
    mask, label = Segformer("mit_b0", encoder_weights=None, aux_params=AUX).train()(torch.randn(1, 3, 32, 32))
    (mask.square().mean() + label.sum()).backward()


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_refuses_other_depths(depth):
    with pytest.raises(ValueError, match=f"encoder_depth={depth}: expected 3 or 4 or 5"): Segformer("resnet18", depth, None)


@pytest.mark.parametrize("mode", ["nearest", "bicubic", "area", "nearest-exact"])
@torch.no_grad()
def test_composed_equals_plain_in_each_mode(mode):
    decoder = randomise(SegformerDecoder((3, 8, 16, 24, 32, 40), 32, interpolation=mode)).double().eval()
    features = [torch.randn(2, c, -(-66//2**i), -(-75//2**i), dtype=torch.float64) for i, c in enumerate((3, 8, 16, 24, 32, 40))]
    assert relative_error(decoder.composed(features), decoder.plain(features)) < 1e-11
