"""DeepLabV3: SMP's numbers, any size, training with one picture, and what is refused."""
import warnings

import pytest
import torch
from torch.testing import assert_close

from segkit.decoders.deeplabv3 import DeepLabV3

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    smp = pytest.importorskip("segmentation_models_pytorch")

torch.set_num_threads(2)

def build(cls, encoder="resnet18", **options): return cls(encoder, **{"encoder_weights": None, "classes": 3} | options)

def randomise(model):
    "Draw every vector of the state dict, since zero biases and fresh norms hide mistakes"
    generator = torch.Generator().manual_seed(0)
    for t in model.state_dict().values():
        if t.dim() == 1: t.copy_(torch.rand(t.shape, generator=generator) + .5)
    return model.eval()

def check_parity(encoder="resnet18", size=(64, 96), **options):
    "The same keys in the same order, and the same numbers"
    theirs = randomise(build(smp.DeepLabV3, encoder, **options))
    ours = build(DeepLabV3, encoder, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    own = [k for k in theirs.state_dict() if k in ours.state_dict()]
    assert own == list(ours.state_dict())
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): a, b = ours(x), theirs(x)
    for p, q in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (a, b)), strict=True):
        assert_close(p, q, rtol=0, atol=1e-5*q.abs().max().item())

def check_gradients(model, sizes=(64, 64)):
    "Both heads train, with one picture, and every parameter gets a gradient"
    mask, label = model.train()(torch.randn(1, 3, *sizes))
    (mask.square().mean() + label.square().mean()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, missing
    assert model.encoder.conv1.weight.grad.abs().sum() > 0

aux = {"classes": 4, "dropout": None}

@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_parity_at_each_depth(depth): check_parity(encoder_depth=depth)

@pytest.mark.parametrize("options", [
    {"encoder_output_stride": 16}, {"decoder_aspp_separable": True, "decoder_channels": 64}, {"decoder_atrous_rates": (2, 3, 5), "aux_params": aux},
    {"upsampling": 4}, {"activation": "sigmoid", "in_channels": 3}], ids=lambda o: next(iter(o)))
def test_parity_of_options(options): check_parity(decoder_channels=options.pop("decoder_channels", 32), **options)

@pytest.mark.parametrize("encoder", ["tu-convnext_atto", "tu-resnet18"])
def test_parity_of_encoders(encoder): check_parity(encoder, encoder_output_stride=16, decoder_channels=32)

def test_old_names():
    state = build(DeepLabV3, decoder_channels=32).state_dict()
    numbers = {"decoder.aspp.": "decoder.0.", "decoder.conv.": "decoder.1.", "decoder.bn.": "decoder.2."}
    old = {next((k.replace(new, number) for new, number in numbers.items() if k.startswith(new)), k): t + 1 for k, t in state.items()}
    assert set(old) != set(state) and any(k.startswith("decoder.0.convs.") for k in old)
    names, model = list(old), build(DeepLabV3, decoder_channels=32)
    model.load_state_dict(old)
    assert list(old) == names
    for k, t in model.state_dict().items(): assert torch.equal(t, state[k] + 1), k

@pytest.mark.parametrize("size", [(65, 71), (100, 260), (33, 224), (1, 1)])
def test_any_size(size):
    model = build(DeepLabV3, encoder_output_stride=16, decoder_channels=32).eval()
    with torch.no_grad(): assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)

def test_one_picture_and_gradients(): check_gradients(build(DeepLabV3, decoder_channels=32, encoder_output_stride=16, aux_params=aux))

@pytest.mark.parametrize("options, error", [
    ({"encoder_output_stride": 4}, r"encoder_output_stride=4: expected 8 or 16"), ({"decoder_atrous_rates": ()}, "positive whole numbers"),
    ({"decoder_atrous_rates": (6, 0)}, r"decoder_atrous_rates=\(6, 0\)"), ({"encoder_depth": 6}, "depth"), ({"decoder_chanels": 8}, "decoder_channels")])
def test_refused(options, error):
    with pytest.raises((ValueError, TypeError), match=error): build(DeepLabV3, **options)

def test_encoders_that_cannot_be_dilated():
    with pytest.raises(ValueError, match="cannot be dilated"): build(DeepLabV3, "tu-swin_tiny_patch4_window7_224", encoder_depth=5)

def test_any_number_of_rates():
    model = build(DeepLabV3, decoder_atrous_rates=iter([2, 4]), decoder_channels=16, encoder_depth=3)
    assert len(model.decoder.aspp.convs) == 4
