"""`PAN`: the numbers of SMP for every option, any size, training with one picture, and errors in words."""
import pytest
import torch
from oracle import AUX, assert_same, check_sizes, smp, trains, without_gradient

from segkit.decoders.pan import PAN


def build(encoder="resnet18", **options): return PAN(encoder, **{"encoder_weights": None, "classes": 3} | options)


def check_parity(encoder="resnet18", **options): assert_same(PAN, "PAN", encoder_name=encoder, **options)


@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("depth", [3, 4, 5])
def test_parity_at_each_depth(depth, stride): check_parity(size=(256, 256) if stride == 32 else (128, 160), encoder_depth=depth, encoder_output_stride=stride)


@pytest.mark.parametrize("options", [
    {"decoder_interpolation": "nearest"}, {"decoder_interpolation": "bicubic"}, {"decoder_channels": 24, "aux_params": AUX}, {"upsampling": 1},
    {"activation": "sigmoid"}], ids=lambda o: "-".join(map(str, o.values())))
def test_parity_of_options(options): check_parity(size=(144, 240), **options)  # 9 x 15 cells: pooling leaves a row and a column out


@pytest.mark.parametrize("encoder", ["tu-convnext_atto", "tu-resnet18"])
def test_parity_of_encoders(encoder): check_parity(encoder, size=(128, 160))


@pytest.mark.parametrize("stride", [16, 32])
def test_any_size(stride): check_sizes(PAN, [(65, 71), (100, 260), (33, 224), (17, 200), (1, 1)], encoder_output_stride=stride)


def test_small_maps_are_too_small_for_smp():
    with torch.no_grad(), pytest.raises(RuntimeError, match="too small"): smp.PAN("resnet18", encoder_weights=None).eval()(torch.randn(1, 3, 96, 96))


def test_every_parameter_gets_a_gradient(): assert without_gradient(build(aux_params=AUX)) == []


def test_one_picture(): trains(PAN, aux_params=AUX)


def test_every_level_is_read():
    decoder = build().decoder
    maps = [torch.randn(2, c, s, s, requires_grad=True) for c, s in zip((3, 64, 64, 128, 256, 512), (128, 64, 32, 16, 8, 8), strict=True)]
    decoder(maps).square().mean().backward()
    assert [m.grad is not None and m.grad.abs().sum().item() > 0 for m in maps] == [False, False, True, True, True, True]


def test_old_argument():
    with pytest.warns(DeprecationWarning, match="upscale_mode"): model = build(upscale_mode="nearest")
    assert model.decoder.gau1.interpolation == "nearest"


@pytest.mark.parametrize("options, error", [
    ({"encoder_output_stride": 8}, "encoder_output_stride=8: expected 16 or 32"), ({"encoder_depth": 2}, "encoder_depth=2: .*use 3, 4 or 5"),
    ({"decoder_interpolation": "linear"}, "decoder_interpolation='linear'")])
def test_refused(options, error):
    with pytest.raises(ValueError, match=error): build(**options)


def test_swin_at_stride_32():
    model = build("tu-swin_tiny_patch4_window7_224", encoder_output_stride=32).eval()
    with torch.no_grad(): assert model(torch.randn(1, 3, 70, 90)).shape == (1, 3, 70, 90)
