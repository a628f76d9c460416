"""FPN against SMP, at every depth, size and option"""
import pytest
from oracle import check_sizes, same_as_smp, shape, survives, trains

from segkit.decoders.fpn import FPN


@pytest.mark.parametrize("arguments", [
    {}, {"decoder_merge_policy": "cat"}, {"decoder_interpolation": "bilinear"}, {"decoder_interpolation": "bicubic"},
    {"decoder_pyramid_channels": 96, "decoder_segmentation_channels": 64, "decoder_dropout": .5},
    {"in_channels": 5, "activation": "sigmoid", "aux_params": None},
    {"encoder_name": "tu-convnext_atto"}, {"encoder_name": "tu-convnext_atto", "decoder_merge_policy": "cat"},
    {"encoder_name": "mit_b0"}, {"encoder_name": "tu-vgg11_bn"}, {"encoder_name": "resnet50"},
], ids=str)
def test_same_as_smp(arguments): same_as_smp(FPN, **arguments)

@pytest.mark.parametrize("depth, upsampling", [(3, 1), (4, 2), (5, 4)])
def test_same_as_smp_at_depth(depth, upsampling):
    "SMP needs the right factor by hand; ours finds it, and obeys an explicit one"
    same_as_smp(FPN, encoder_depth=depth, theirs={"upsampling": upsampling})
    same_as_smp(FPN, encoder_depth=depth, upsampling=8)

@pytest.mark.parametrize("depth", [3, 4, 5])
def test_any_size(depth): check_sizes(FPN, encoder_depth=depth)

@pytest.mark.parametrize("depth", [3, 4, 5])
def test_missing_level(depth): assert shape(FPN, (65, 71), encoder_name="tu-convnext_atto", encoder_depth=depth) == (1, 2, 65, 71)

def test_explicit_upsampling():
    assert shape(FPN, (65, 71), upsampling=1) == (1, 2, 17, 18)
    assert shape(FPN, (64, 64), encoder_depth=3, upsampling=4) == (1, 2, 256, 256)

def test_dilated_encoder(): assert shape(FPN, (65, 71), output_stride=16) == (1, 2, 65, 71)

@pytest.mark.parametrize("arguments", [{}, {"decoder_merge_policy": "cat", "encoder_depth": 3}, {"encoder_name": "tu-convnext_atto"}],
                         ids=str)
def test_trains_with_a_batch_of_one(arguments): trains(FPN, **arguments)

def test_copy_and_pickle(): survives(FPN)

@pytest.mark.parametrize("arguments, message", [
    ({"encoder_depth": 2}, "encoder_depth=2: expected 3 or 4 or 5"),
    ({"decoder_merge_policy": "mean"}, "expected 'add' or 'cat'"),
    ({"decoder_interpolation": "linear"}, "did you mean 'bilinear'"),
    ({"decoder_segmentation_channels": 100}, "multiple of 32, such as 96"),
], ids=str)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message): FPN("resnet18", encoder_weights=None, **arguments)
