"""UPerNet against SMP, at every depth, size and option"""
import pytest
from oracle import check_sizes, same_as_smp, shape, survives, trains

from segkit.decoders.upernet import UPerNet

norms = ["batchnorm", True, "groupnorm", "layernorm", "instancenorm", "identity", False, {"type": "batchnorm", "affine": False}]
small = {"decoder_channels": 32}

@pytest.mark.parametrize("arguments", [
    {}, {"decoder_use_norm": "identity"}, {"decoder_channels": 64}, {"in_channels": 5, "activation": "sigmoid", "aux_params": None},
    {"encoder_name": "tu-convnext_atto"}, {"size": (96, 160)},
    {"encoder_name": "mit_b0"}, {"encoder_name": "tu-vgg11_bn"}, {"encoder_name": "resnet50"},
], ids=str)
def test_same_as_smp(arguments): same_as_smp(UPerNet, **small | arguments)

@pytest.mark.parametrize("depth", [3, 4, 5])
@pytest.mark.parametrize("encoder", ["resnet18", "tu-convnext_atto"])
def test_same_as_smp_at_depth(depth, encoder):
    same_as_smp(UPerNet, encoder_name=encoder, encoder_depth=depth, **small)
    same_as_smp(UPerNet, encoder_name=encoder, encoder_depth=depth, upsampling=2, **small)

@pytest.mark.parametrize("depth", [3, 4, 5])
def test_any_size(depth): check_sizes(UPerNet, encoder_depth=depth, **small)

def test_explicit_upsampling(): assert shape(UPerNet, (65, 71), upsampling=1, **small) == (1, 2, 17, 18)

def test_dilated_encoder(): assert shape(UPerNet, (65, 71), output_stride=16, **small) == (1, 2, 65, 71)

@pytest.mark.parametrize("norm", norms, ids=str)
def test_norms(norm): trains(UPerNet, decoder_use_norm=norm, **small)

@pytest.mark.parametrize("arguments", [{}, {"size": (64, 32)}, {"encoder_depth": 3}, {"encoder_name": "tu-convnext_atto"}], ids=str)
def test_trains_with_a_batch_of_one(arguments): trains(UPerNet, **small | arguments)

def test_copy_and_pickle(): survives(UPerNet, **small)

def test_refuses():
    with pytest.raises(ValueError, match="encoder_depth=2: expected 3 or 4 or 5"):
        UPerNet("resnet18", encoder_depth=2, encoder_weights=None)
