"""U-Net++: SMP's numbers, any size, training with one picture, and what is refused."""
import warnings

import pytest
import torch
from torch.testing import assert_close

from segkit.decoders.unetplusplus import UnetPlusPlus

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
    theirs = randomise(build(smp.UnetPlusPlus, encoder, **options))
    ours = build(UnetPlusPlus, encoder, **options).eval()
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

def widths(depth): return (64, 48, 32, 24, 16)[:depth]

@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_parity_at_each_depth(depth): check_parity(encoder_depth=depth, decoder_channels=widths(depth))

@pytest.mark.parametrize("options", [
    {"decoder_attention_type": "scse"}, {"decoder_use_norm": False}, {"decoder_interpolation": "bilinear"}, {"activation": "sigmoid", "aux_params": aux}],
    ids=lambda o: next(iter(o)))
def test_parity_of_options(options): check_parity(encoder_depth=4, decoder_channels=widths(4), **options)

@pytest.mark.parametrize("depth", [2, 3, 4])
def test_parity_without_stride_2(depth): check_parity("tu-convnext_atto", encoder_depth=depth, decoder_channels=widths(depth))

def test_parity_of_timm(): check_parity("tu-resnet18")

@pytest.mark.parametrize("depth", [1, 3, 5])
@pytest.mark.parametrize("size", [(65, 71), (33, 224), (1, 1)])
def test_any_size(size, depth):
    model = build(UnetPlusPlus, encoder_depth=depth, decoder_channels=widths(depth)).eval()
    with torch.no_grad(): assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)

@pytest.mark.parametrize("norm", ["batchnorm", "groupnorm", "layernorm", "instancenorm", "identity", {"type": "batchnorm", "affine": False}], ids=str)
def test_norms(norm):
    model = build(UnetPlusPlus, encoder_depth=3, decoder_channels=(32, 32, 32), decoder_use_norm=norm)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())

def test_one_picture_and_gradients(): check_gradients(build(UnetPlusPlus, aux_params=aux))

@pytest.mark.parametrize("encoder, depth, count", [("resnet18", 5, 4), ("resnet18", 3, 2), ("tu-convnext_atto", 5, 3), ("tu-convnext_atto", 4, 2)])
def test_deep_supervision(encoder, depth, count):
    torch.manual_seed(0)
    model = randomise(build(UnetPlusPlus, encoder, encoder_depth=depth, decoder_channels=widths(depth), deep_supervision=True))
    x = torch.randn(2, 3, 65, 71)
    with torch.no_grad(): single = model(x)
    assert single.shape == (2, 3, 65, 71)
    masks = model.train()(x)
    assert isinstance(masks, list) and [m.shape for m in masks] == [(2, 3, 65, 71)]*count
    sum(m.square().mean() for m in masks).backward()
    assert all(p.grad is not None for p in model.parameters())

@pytest.mark.parametrize("encoder, count", [("resnet18", 4), ("tu-convnext_atto", 3)])
def test_prune(encoder, count):
    torch.manual_seed(0)
    model = randomise(build(UnetPlusPlus, encoder, decoder_channels=widths(5), deep_supervision=True))
    x = torch.randn(1, 3, 65, 71)
    # in training mode all masks are seen; norms that stay in evaluation make the numbers comparable
    model.train()
    for m in model.modules(): m.training = m is model
    with torch.no_grad(): masks = model(x)
    model.eval()
    sizes = []
    for level in range(1, count + 1):
        small = model.prune(level)
        assert not small.training
        with torch.no_grad(): assert torch.equal(small(x), masks[count - level])
        sizes.append(sum(p.numel() for p in small.parameters()))
        again = UnetPlusPlus(**small.config)
        again.load_state_dict(small.state_dict())
    assert sizes == sorted(set(sizes))
    with pytest.raises(ValueError, match="level=5"): model.prune(5)
    with pytest.raises(ValueError, match="deep_supervision"): build(UnetPlusPlus).prune(1)

def test_prune_keeps_the_label():
    model = randomise(build(UnetPlusPlus, decoder_channels=widths(5), deep_supervision=True, aux_params=aux))
    x, small = torch.randn(1, 3, 64, 64), model.prune(1)
    with torch.no_grad(): assert torch.equal(small(x)[1], model(x)[1])

def test_levels_with_smps_weights():
    theirs = randomise(build(smp.UnetPlusPlus, encoder_depth=3, decoder_channels=widths(3)))
    ours = build(UnetPlusPlus, encoder_depth=3, decoder_channels=widths(3), deep_supervision=True).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and set(k.split(".")[0] for k in missing) == {"deep_heads"}
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): assert_close(ours(x), theirs(x))

@pytest.mark.parametrize("options, error", [
    ({"decoder_channels": (64, 32)}, "decoder_channels has 2 numbers"), ({"encoder_depth": 2, "decoder_channels": (8, 8), "deep_supervision": True}, "one mask only"),
    ({"level": 5}, "level=5: expected 1 or 2 or 3 or 4"), ({"encoder_name": "tu-convnext_atto", "encoder_depth": 1, "decoder_channels": (8,)}, "at least 2"),
    ({"decoder_attention_type": "se"}, "decoder_attention_type|attention_type='se'")])
def test_refused(options, error):
    with pytest.raises(ValueError, match=error): UnetPlusPlus(**{"encoder_name": "resnet18", "encoder_weights": None} | options)

def test_old_argument():
    with pytest.warns(DeprecationWarning, match="decoder_use_batchnorm"): build(UnetPlusPlus, decoder_use_batchnorm=False)
