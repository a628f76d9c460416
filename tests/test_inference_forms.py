"""The forms for inference that stand beside the decoders: equal to the plain ones, in float64, at any size."""
import copy

import pytest
import torch
from oracle import randomise, relative_error

import segkit

SIZES = [(64, 96), (65, 71), (33, 100), (128, 40)]
CASES = [
    ("upernet", "resnet18", {}), ("upernet", "resnet18", {"encoder_depth": 3, "decoder_use_norm": False}),
    ("upernet", "mit_b0", {"decoder_interpolation": "nearest"}), ("upernet", "resnet18", {"decoder_use_norm": "layernorm"}),
    ("segformer", "resnet18", {}), ("segformer", "mit_b0", {}), ("segformer", "resnet18", {"decoder_composed": True}),
    ("unet", "resnet18", {}), ("unet", "resnet18", {"encoder_depth": 3, "decoder_channels": (32, 16, 8)}),
    ("unetplusplus", "resnet18", {}), ("unetplusplus", "resnet18", {"encoder_depth": 3, "decoder_channels": (32, 16, 8)}),
]


def with_form(model):
    "A copy whose decoder has its form for inference"
    form = copy.deepcopy(model)
    form.decoder = form.decoder.inference_form()
    return form


def build(arch, encoder, options):
    torch.manual_seed(0)
    return randomise(segkit.create_model(arch, encoder, encoder_weights=None, classes=3, **options)).double().eval()


@pytest.mark.parametrize("arch, encoder, options", CASES, ids=str)
@torch.no_grad()
def test_equal_to_the_plain_form(arch, encoder, options):
    model = build(arch, encoder, options)
    form = with_form(model)
    assert type(form.decoder) is not type(model.decoder)
    for size in SIZES:
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        expected, got = model(x), form(x)
        assert got.shape == expected.shape
        assert relative_error(got, expected) < 1e-11


@pytest.mark.parametrize("arch, encoder, options", [CASES[i] for i in (0, 4, 7, 9)], ids=str)
@torch.no_grad()
def test_the_original_is_not_changed_by_a_form_of_its_copy(arch, encoder, options):
    model = build(arch, encoder, options)
    x, state = torch.randn(1, 3, 65, 71, dtype=torch.float64), copy.deepcopy(model.state_dict())
    expected = model(x)
    with_form(model)
    assert torch.equal(model(x), expected)
    for name, tensor in model.state_dict().items(): assert torch.equal(tensor, state[name]), name
