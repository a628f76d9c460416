"""Linknet against SMP, at every depth, size and option"""
import pytest
import torch
from oracle import check_sizes, same_as_smp, shape, survives, trains

from segkit.decoders.linknet import Linknet

norms = ["batchnorm", True, "groupnorm", "layernorm", "instancenorm", "identity", False, {"type": "batchnorm", "affine": False}]

@pytest.mark.parametrize("arguments", [
    {}, {"decoder_use_norm": "identity"}, {"decoder_use_norm": {"type": "instancenorm", "affine": True}},
    {"in_channels": 5, "activation": "sigmoid", "aux_params": None}, {"encoder_name": "tu-convnext_atto"},
    {"encoder_name": "tu-vgg11_bn"}, {"encoder_name": "resnet50"},
], ids=str)
def test_same_as_smp(arguments): same_as_smp(Linknet, **arguments)

@pytest.mark.parametrize("encoder, depth", [("resnet18", d) for d in (1, 2, 3, 4, 5)] + [("tu-convnext_atto", d) for d in (2, 3, 4)])
def test_same_as_smp_at_depth(encoder, depth): same_as_smp(Linknet, encoder_name=encoder, encoder_depth=depth)

@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_any_size(depth): check_sizes(Linknet, encoder_depth=depth)

def test_missing_level():
    assert shape(Linknet, (65, 71), encoder_name="mit_b0") == (1, 2, 65, 71)  # SMP refuses it
    assert shape(Linknet, (65, 71), encoder_name="tu-convnext_atto", encoder_depth=2) == (1, 2, 65, 71)
    with pytest.raises(ValueError, match="no map at stride 2.*use a depth from 2 to 5"):
        Linknet("tu-convnext_atto", encoder_weights=None, encoder_depth=1)

@pytest.mark.parametrize("norm", norms, ids=str)
def test_norms(norm): trains(Linknet, decoder_use_norm=norm)

@pytest.mark.parametrize("arguments", [{}, {"encoder_depth": 1}, {"encoder_name": "tu-convnext_atto"}], ids=str)
def test_trains_with_a_batch_of_one(arguments): trains(Linknet, **arguments)

def test_old_argument():
    with pytest.warns(DeprecationWarning, match="decoder_use_norm"):
        model = Linknet("resnet18", encoder_weights=None, decoder_use_batchnorm=False)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.decoder.modules())

def test_copy_and_pickle(): survives(Linknet)

def test_refuses_dilation():
    with pytest.raises(ValueError, match="output_stride=16: every block of a Linknet doubles"):
        Linknet("resnet18", encoder_weights=None, output_stride=16)
