"""DeepLabV3+: SMP's numbers, any size, training with one picture, and what is refused."""
import warnings

import pytest
import torch
from torch.testing import assert_close

from segkit.decoders.deeplabv3plus import DeepLabV3Plus

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
    theirs = randomise(build(smp.DeepLabV3Plus, encoder, **options))
    ours = build(DeepLabV3Plus, encoder, **options).eval()
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

@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("depth", [3, 4, 5])
def test_parity_at_each_depth(depth, stride): check_parity(encoder_depth=depth, encoder_output_stride=stride, decoder_channels=64)

@pytest.mark.parametrize("options", [
    {"decoder_aspp_separable": False}, {"decoder_channels": 256}, {"decoder_atrous_rates": (2, 3, 5), "aux_params": aux}, {"upsampling": 1},
    {"activation": "softmax2d"}], ids=lambda o: next(iter(o)))
def test_parity_of_options(options): check_parity(decoder_channels=options.pop("decoder_channels", 32), **options)

@pytest.mark.parametrize("encoder", ["tu-convnext_atto", "tu-resnet18"])
def test_parity_of_encoders(encoder): check_parity(encoder, decoder_channels=32)

@pytest.mark.parametrize("size", [(65, 71), (100, 260), (33, 224), (1, 1)])
def test_any_size(size):
    model = build(DeepLabV3Plus, decoder_channels=32).eval()
    with torch.no_grad(): assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)

@pytest.mark.parametrize("mode", ["nearest", "bicubic"])
def test_interpolation(mode):
    torch.manual_seed(0)
    plain = build(DeepLabV3Plus, decoder_channels=32).eval()
    other = build(DeepLabV3Plus, decoder_channels=32, decoder_interpolation=mode).eval()
    other.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): assert not torch.allclose(plain(x), other(x))

def test_one_picture_and_gradients(): check_gradients(build(DeepLabV3Plus, decoder_channels=32, aux_params=aux))

def test_shortcut_is_read():
    decoder = build(DeepLabV3Plus, decoder_channels=16).decoder
    maps = [torch.randn(2, c, s, s, requires_grad=True) for c, s in zip((3, 64, 64, 128, 256, 512), (64, 32, 16, 8, 4, 4), strict=True)]
    decoder(maps).square().mean().backward()
    assert [m.grad is not None and m.grad.abs().sum().item() > 0 for m in maps] == [False, False, True, False, False, True]

@pytest.mark.parametrize("options, error", [
    ({"encoder_output_stride": 32}, "expected 8 or 16"), ({"encoder_depth": 2}, "encoder_depth=2: .*use 3, 4 or 5"),
    ({"decoder_interpolation": "bilinar"}, "did you mean 'bilinear'"), ({"decoder_atrous_rates": 12}, "decoder_atrous_rates=12")])
def test_refused(options, error):
    with pytest.raises(ValueError, match=error): build(DeepLabV3Plus, **options)
