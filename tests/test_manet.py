"""`MAnet`: the numbers of SMP for every option, any size, training with one picture, and errors in words."""
import pytest
import torch
from oracle import AUX, assert_same, check_sizes, randomise, smp, trains, widths, without_gradient
from torch.testing import assert_close

from segkit.decoders.manet import MAnet, PositionAttention, joint_attention, joint_attention_chunked


def build(encoder="resnet18", **options): return MAnet(encoder, **{"encoder_weights": None, "classes": 3} | options)


def check_parity(encoder="resnet18", **options): assert_same(MAnet, "MAnet", encoder_name=encoder, **options)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_parity_at_each_depth(depth): check_parity(encoder_depth=depth, decoder_channels=widths(depth))


@pytest.mark.parametrize("options", [
    {"decoder_pab_channels": 16}, {"decoder_use_norm": False}, {"decoder_interpolation": "bilinear"}, {"activation": "sigmoid", "aux_params": AUX}],
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
    theirs = randomise(smp.MAnet("resnet18", 3, None, decoder_channels=widths(3), classes=3)).double().eval()
    ours = build(encoder_depth=3, decoder_channels=widths(3)).double().eval()
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
@pytest.mark.parametrize("form", ["joint", "rowwise"])
def test_any_size(depth, form): check_sizes(MAnet, encoder_depth=depth, decoder_channels=widths(depth), decoder_pab_form=form)


@pytest.mark.parametrize("norm", ["batchnorm", "groupnorm", "layernorm", "instancenorm", "identity", {"type": "batchnorm", "affine": False}], ids=str)
def test_norms(norm):
    assert without_gradient(build(encoder_depth=3, decoder_channels=(32, 32, 32), decoder_use_norm=norm)) == []


@pytest.mark.parametrize("form", ["joint", "rowwise"])
def test_every_parameter_gets_a_gradient(form): assert without_gradient(build(aux_params=AUX, decoder_pab_form=form)) == []


@pytest.mark.parametrize("form", ["joint", "rowwise"])
def test_one_picture(form): trains(MAnet, aux_params=AUX, decoder_pab_form=form)


@pytest.mark.parametrize("options, error", [
    ({"decoder_channels": (64, 32)}, "decoder_channels has 2 numbers"), ({"decoder_pab_form": "row"}, "did you mean 'rowwise'"),
    ({"encoder_name": "tu-convnext_atto", "encoder_depth": 1, "decoder_channels": (8,)}, "at least 2")])
def test_refused(options, error):
    with pytest.raises(ValueError, match=error): MAnet(**{"encoder_name": "resnet18", "encoder_weights": None} | options)
