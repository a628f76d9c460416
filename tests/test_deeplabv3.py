"""`DeepLabV3`: the numbers of SMP for every option, any size, training with one picture, and errors in words."""
import pytest
import torch
from oracle import AUX, assert_same, check_sizes, trains, without_gradient

from segkit.decoders.deeplabv3 import DeepLabV3


def build(encoder="resnet18", **options): return DeepLabV3(encoder, **{"encoder_weights": None, "classes": 3} | options)


def check_parity(encoder="resnet18", **options): assert_same(DeepLabV3, "DeepLabV3", encoder_name=encoder, **options)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_parity_at_each_depth(depth): check_parity(encoder_depth=depth)


@pytest.mark.parametrize("options", [
    {"encoder_output_stride": 16}, {"decoder_aspp_separable": True, "decoder_channels": 64}, {"decoder_atrous_rates": (2, 3, 5), "aux_params": AUX},
    {"upsampling": 4}, {"activation": "sigmoid", "in_channels": 5}], ids=lambda o: next(iter(o)))
def test_parity_of_options(options): check_parity(decoder_channels=options.pop("decoder_channels", 32), **options)


@pytest.mark.parametrize("encoder", ["tu-convnext_atto", "tu-resnet18"])
def test_parity_of_encoders(encoder): check_parity(encoder, encoder_output_stride=16, decoder_channels=32)


def test_old_names():
    state = build(decoder_channels=32).state_dict()
    numbers = {"decoder.aspp.": "decoder.0.", "decoder.conv.": "decoder.1.", "decoder.bn.": "decoder.2."}
    old = {next((k.replace(new, number) for new, number in numbers.items() if k.startswith(new)), k): t + 1 for k, t in state.items()}
    assert set(old) != set(state) and any(k.startswith("decoder.0.convs.") for k in old)
    names, model = list(old), build(decoder_channels=32)
    model.load_state_dict(old)
    assert list(old) == names
    for k, t in model.state_dict().items(): assert torch.equal(t, state[k] + 1), k


def test_any_size(): check_sizes(DeepLabV3, encoder_output_stride=16, decoder_channels=32)


def test_every_parameter_gets_a_gradient(): assert without_gradient(build(aux_params=AUX)) == []


def test_one_picture(): trains(DeepLabV3, decoder_channels=32, encoder_output_stride=16, aux_params=AUX)


@pytest.mark.parametrize("options, error", [
    ({"encoder_output_stride": 4}, r"encoder_output_stride=4: expected 8 or 16"), ({"decoder_atrous_rates": ()}, "positive whole numbers"),
    ({"decoder_atrous_rates": (6, 0)}, r"decoder_atrous_rates=\(6, 0\)"), ({"decoder_atrous_rates": (-6, 12)}, "positive whole numbers"),
    ({"decoder_atrous_rates": (r for r in (6, 12))}, "a list or tuple of positive whole numbers"), ({"decoder_atrous_rates": (True,)}, "positive whole numbers"),
 ({"encoder_depth": 6}, "depth"), ({"decoder_chanels": 8}, "decoder_channels")])
def test_refused(options, error):
    with pytest.raises((ValueError, TypeError), match=error): build(**options)


def test_encoders_that_cannot_be_dilated():
    with pytest.raises(ValueError, match="cannot be dilated"): build("tu-swin_tiny_patch4_window7_224", encoder_depth=5)


def test_any_number_of_rates():
    model = build(decoder_atrous_rates=[2, 4], decoder_channels=16, encoder_depth=3)
    assert len(model.decoder.aspp.convs) == 4
