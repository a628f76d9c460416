"""PAN: SMP's numbers, any size, training with one picture, and what is refused."""
import warnings

import pytest
import torch
from torch.testing import assert_close

from segkit.decoders.pan import PAN

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
    theirs = randomise(build(smp.PAN, encoder, **options))
    ours = build(PAN, encoder, **options).eval()
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

@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("depth", [3, 4, 5])
def test_parity_at_each_depth(depth, stride): check_parity(size=(256, 288) if stride == 32 else (128, 160), encoder_depth=depth, encoder_output_stride=stride)

@pytest.mark.parametrize("options", [
    {"decoder_interpolation": "nearest"}, {"decoder_interpolation": "bicubic"}, {"decoder_channels": 24, "aux_params": aux}, {"upsampling": 1},
    {"activation": "sigmoid"}], ids=lambda o: "-".join(map(str, o.values())))
def test_parity_of_options(options): check_parity(size=(144, 240), **options)  # 9 x 15 cells: pooling leaves a row and a column out

@pytest.mark.parametrize("encoder", ["tu-convnext_atto", "tu-resnet18"])
def test_parity_of_encoders(encoder): check_parity(encoder, (128, 160))

@pytest.mark.parametrize("size", [(65, 71), (100, 260), (33, 224), (17, 200), (1, 1)])
@pytest.mark.parametrize("stride", [16, 32])
def test_any_size(size, stride):
    model = build(PAN, encoder_output_stride=stride).eval()
    with torch.no_grad(): assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)

def test_small_maps_are_too_small_for_smp():
    with torch.no_grad(), pytest.raises(RuntimeError, match="too small"): build(smp.PAN).eval()(torch.randn(1, 3, 96, 96))

def test_one_picture_and_gradients():
    torch.manual_seed(0)
    check_gradients(build(PAN, aux_params=aux))

def test_every_level_is_read():
    decoder = build(PAN).decoder
    maps = [torch.randn(2, c, s, s, requires_grad=True) for c, s in zip((3, 64, 64, 128, 256, 512), (128, 64, 32, 16, 8, 8), strict=True)]
    decoder(maps).square().mean().backward()
    assert [m.grad is not None and m.grad.abs().sum().item() > 0 for m in maps] == [False, False, True, True, True, True]

def test_old_argument():
    with pytest.warns(DeprecationWarning, match="upscale_mode"): model = build(PAN, upscale_mode="nearest")
    assert model.decoder.gau1.interpolation == "nearest"

@pytest.mark.parametrize("options, error", [
    ({"encoder_output_stride": 8}, "encoder_output_stride=8: expected 16 or 32"), ({"encoder_depth": 2}, "encoder_depth=2: .*use 3, 4 or 5"),
    ({"decoder_interpolation": "linear"}, "decoder_interpolation='linear'")])
def test_refused(options, error):
    with pytest.raises(ValueError, match=error): build(PAN, **options)

def test_swin_at_stride_32():
    model = build(PAN, "tu-convnext_atto", encoder_output_stride=32).eval()
    with torch.no_grad(): assert model(torch.randn(1, 3, 70, 90)).shape == (1, 3, 70, 90)
