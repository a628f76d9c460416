"""MAnet: SMP's numbers, any size, training with one picture, and what is refused."""
import warnings

import pytest
import torch
from torch.testing import assert_close

from segkit.decoders.manet import MAnet, PositionAttention, joint_attention, joint_attention_chunked

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
    theirs = randomise(build(smp.MAnet, encoder, **options))
    ours = build(MAnet, encoder, **options).eval()
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

@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_parity_at_each_depth(depth): check_parity(encoder_depth=depth, decoder_channels=widths(depth))

@pytest.mark.parametrize("options", [
    {"decoder_pab_channels": 16}, {"decoder_use_norm": False}, {"decoder_interpolation": "bilinear"}, {"activation": "sigmoid", "aux_params": aux}],
    ids=lambda o: next(iter(o)))
def test_parity_of_options(options): check_parity(encoder_depth=4, decoder_channels=widths(4), **options)

@pytest.mark.parametrize("depth", [2, 4, 5])
def test_parity_without_stride_2(depth): check_parity("tu-convnext_atto", encoder_depth=depth, decoder_channels=widths(depth))

def test_parity_of_timm(): check_parity("tu-resnet18")

@pytest.mark.parametrize("chunk", [1, 7, 35, 100])
def test_chunks_change_nothing(chunk):
    torch.manual_seed(0)
    inputs = [torch.randn(2, n, c, dtype=torch.float64, requires_grad=True) for n, c in ((35, 8), (35, 8), (35, 5))]
    results = []
    for attend in (joint_attention, lambda *qkv: joint_attention_chunked(*qkv, chunk)):
        y = attend(*inputs)
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    for a, b in zip(*results, strict=True): assert_close(a, b, rtol=0, atol=1e-12)

def test_chunked_module_equals_smp():
    torch.manual_seed(0)
    theirs = randomise(build(smp.MAnet, encoder_depth=3, decoder_channels=widths(3))).double()
    ours = build(MAnet, encoder_depth=3, decoder_channels=widths(3)).double().eval()
    ours.load_state_dict(theirs.state_dict())
    ours.decoder.center.chunk = 11
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad(): assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)

def test_rowwise_is_attention():
    torch.manual_seed(0)
    pab = PositionAttention(12, 6, form="rowwise").double()
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    query, key, value = (conv(x).flatten(2) for conv in (pab.center_conv, pab.top_conv, pab.bottom_conv))
    expected = torch.zeros_like(value)
    for i in range(35):  # one cell at a time
        weights = torch.softmax((query[:, :, i, None]*key).sum(1), dim=1)
        expected[:, :, i] = (value*weights[:, None]).sum(2)
    assert_close(pab.attend(x), expected.view_as(x), rtol=0, atol=1e-12)
    joint = PositionAttention(12, 6).double()
    joint.load_state_dict(pab.state_dict())
    assert not torch.allclose(joint(x), pab(x))

@pytest.mark.parametrize("depth", [1, 3, 5])
@pytest.mark.parametrize("size", [(65, 71), (33, 224), (1, 1)])
@pytest.mark.parametrize("form", ["joint", "rowwise"])
def test_any_size(size, depth, form):
    model = build(MAnet, encoder_depth=depth, decoder_channels=widths(depth), decoder_pab_form=form).eval()
    with torch.no_grad(): assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)

@pytest.mark.parametrize("norm", ["batchnorm", "groupnorm", "layernorm", "instancenorm", "identity", {"type": "batchnorm", "affine": False}], ids=str)
def test_norms(norm):
    model = build(MAnet, encoder_depth=3, decoder_channels=(32, 32, 32), decoder_use_norm=norm)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())

@pytest.mark.parametrize("form", ["joint", "rowwise"])
def test_one_picture_and_gradients(form): check_gradients(build(MAnet, aux_params=aux, decoder_pab_form=form))

@pytest.mark.parametrize("options, error", [
    ({"decoder_channels": (64, 32)}, "decoder_channels has 2 numbers"), ({"decoder_pab_form": "row"}, "did you mean 'rowwise'"),
    ({"encoder_name": "tu-convnext_atto", "encoder_depth": 1, "decoder_channels": (8,)}, "at least 2")])
def test_refused(options, error):
    with pytest.raises(ValueError, match=error): MAnet(**{"encoder_name": "resnet18", "encoder_weights": None} | options)
