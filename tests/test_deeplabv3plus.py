"""`DeepLabV3Plus`: the numbers of SMP for every option, any size, training with one picture, and errors in words."""
import pytest
import torch
from oracle import AUX, assert_same, check_sizes, trains, without_gradient

from segkit.decoders.deeplabv3plus import DeepLabV3Plus


def build(encoder="resnet18", **options): return DeepLabV3Plus(encoder, **{"encoder_weights": None, "classes": 3} | options)


def check_parity(encoder="resnet18", **options): assert_same(DeepLabV3Plus, "DeepLabV3Plus", encoder_name=encoder, **options)


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("depth", [3, 4, 5])
def test_parity_at_each_depth(depth, stride): check_parity(encoder_depth=depth, encoder_output_stride=stride, decoder_channels=64)


@pytest.mark.parametrize("options", [
    {"decoder_aspp_separable": False}, {"decoder_channels": 256}, {"decoder_atrous_rates": (2, 3, 5), "aux_params": AUX}, {"upsampling": 1},
    {"activation": "softmax2d"}], ids=lambda o: next(iter(o)))
def test_parity_of_options(options): check_parity(decoder_channels=options.pop("decoder_channels", 32), **options)


@pytest.mark.parametrize("encoder", ["tu-convnext_atto", "tu-resnet18"])
def test_parity_of_encoders(encoder): check_parity(encoder, decoder_channels=32)


def test_any_size(): check_sizes(DeepLabV3Plus, decoder_channels=32)


@pytest.mark.parametrize("mode", ["nearest", "bicubic"])
def test_interpolation(mode):
    torch.manual_seed(0)
    plain = build(decoder_channels=32).eval()
    other = build(decoder_channels=32, decoder_interpolation=mode).eval()
    other.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): assert not torch.allclose(plain(x), other(x))


def test_every_parameter_gets_a_gradient(): assert without_gradient(build(aux_params=AUX)) == []


def test_one_picture(): trains(DeepLabV3Plus, decoder_channels=32, aux_params=AUX)


def test_shortcut_is_read():
    decoder = build(decoder_channels=16).decoder
    maps = [torch.randn(2, c, s, s, requires_grad=True) for c, s in zip((3, 64, 64, 128, 256, 512), (64, 32, 16, 8, 4, 4), strict=True)]
    decoder(maps).square().mean().backward()
    assert [m.grad is not None and m.grad.abs().sum().item() > 0 for m in maps] == [False, False, True, False, False, True]


@pytest.mark.parametrize("options, error", [
    ({"encoder_output_stride": 32}, "expected 8 or 16"), ({"encoder_depth": 2}, "encoder_depth=2: .*use 3, 4 or 5"),
    ({"decoder_interpolation": "bilinar"}, "did you mean 'bilinear'"), ({"decoder_atrous_rates": 12}, "decoder_atrous_rates=12"),
    ({"decoder_atrous_rates": (-6, 12)}, "positive whole numbers"), ({"decoder_atrous_rates": (r for r in (6, 12))}, "a list or tuple of positive")])
def test_refused(options, error):
    with pytest.raises(ValueError, match=error): build(**options)


@pytest.mark.parametrize("rates", [(6,), (6, 12), (2, 4, 6, 8)], ids=str)
def test_any_number_of_rates(rates):
    model = build(decoder_atrous_rates=rates, decoder_channels=16).eval()
    assert len(model.decoder.aspp[0].convs) == len(rates) + 2
    assert model(torch.randn(1, 3, 65, 71)).shape[-2:] == (65, 71)
