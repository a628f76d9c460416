"""`Segformer`: the numbers of SMP at each depth and size, and the composed form equal to the plain one, gradients too."""
import pytest
import torch
from oracle import AUX, assert_same, randomise, relative_error, without_gradient

from segkit.decoders.segformer import ComposedSegformerDecoder, Segformer, SegformerDecoder

torch.set_num_threads(1)


@pytest.mark.parametrize("depth", [3, 4, 5])
@pytest.mark.parametrize("encoder", ["resnet18", "tu-convnext_atto", "mit_b0"])
def test_equals_smp_at_each_depth(encoder, depth):
    assert_same(Segformer, "Segformer", encoder_name=encoder, encoder_depth=depth, aux_params=AUX)


@pytest.mark.parametrize("options", [
    {"decoder_segmentation_channels": 96}, {"in_channels": 1}, {"in_channels": 5, "activation": "softmax2d"}, {"upsampling": 1},
    {"upsampling": 2, "activation": torch.nn.Tanh}, {"encoder_name": "resnet50"}, {"size": (32, 160)}, {"encoder_name": "tu-vgg11_bn", "size": (32, 64)}], ids=str)
def test_equals_smp_with_each_option(options): assert_same(Segformer, "Segformer", **{"decoder_segmentation_channels": 64} | options)


def composed_of(decoder, channels, **options):
    "The composed decoder with the same weights"
    composed = ComposedSegformerDecoder(channels, 32, **options).double().train(decoder.training)
    composed.load_state_dict(decoder.state_dict())
    return composed


@pytest.mark.parametrize("channels", [(3, 8, 16, 24, 32, 40), (3, 0, 16, 24, 32), (3, 8, 16, 24)], ids=str)
@pytest.mark.parametrize("size", [(64, 96), (66, 75)])
@pytest.mark.parametrize("training", [True, False])
def test_composed_equals_plain_with_gradients(channels, size, training):
    torch.manual_seed(0)
    decoder = randomise(SegformerDecoder(channels, 32)).double().train(training)
    features = [torch.randn(2, c, -(-size[0]//2**i), -(-size[1]//2**i), dtype=torch.float64, requires_grad=True) for i, c in enumerate(channels)]
    weights, results = torch.randn(2, 32, *features[2].shape[-2:], dtype=torch.float64), []
    inputs = [f for i, f in enumerate(features) if i and f.numel()]
    for form in (decoder, composed_of(decoder, channels)):
        y = form(features)
        results.append([y, *torch.autograd.grad((y*weights).sum(), [*inputs, *form.parameters()])])
    least = 1e-3*max(t.abs().max() for t in results[0])  # batch norm takes a bias away again: its gradient is rounding alone in training
    for plain, composed in zip(*results, strict=True):
        assert (composed - plain).abs().max() < 1e-11*max(least, plain.abs().max())
        if not training: assert relative_error(composed, plain) < 1e-11


def called_layers(model):
    "Names of the layers of the decoder that a run calls"
    called, names = set(), {m: n for n, m in model.decoder.named_modules()}
    for module in names: module.register_forward_hook(lambda m, *args: called.add(names[m]))
    model.eval()(torch.randn(1, 3, 64, 64))
    return called


def test_the_plain_form_is_the_default():
    model = Segformer("resnet18", encoder_weights=None)
    assert type(model.decoder) is SegformerDecoder
    assert {"fuse_stage", "fuse_stage.0", "mlp_stage.0", "mlp_stage.4"} <= called_layers(model)


@torch.no_grad()
def test_the_composed_form_is_chosen_by_name():
    plain, composed = (randomise(Segformer("resnet18", encoder_weights=None, decoder_composed=c)).double().eval() for c in (False, True))
    assert type(composed.decoder) is ComposedSegformerDecoder and composed.config["decoder_composed"] is True
    composed.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 65, 71, dtype=torch.float64)
    assert relative_error(composed(x), plain(x)) < 1e-11


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
    plain = decoder(features)
    assert relative_error(composed_of(decoder, (3, 8, 16, 24, 32, 40), interpolation=mode)(features), plain) < 1e-11
