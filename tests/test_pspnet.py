"""PSPNet against SMP, at every depth, size and option"""
import pytest
import torch
from oracle import check_sizes, same_as_smp, shape, survives, trains
from torch.testing import assert_close

from segkit.decoders.pspnet import GridMean, PSPNet, grid_means

norms = ["batchnorm", True, "groupnorm", "layernorm", "instancenorm", "identity", False, {"type": "batchnorm", "affine": False}]

@pytest.mark.parametrize("arguments", [
    {}, {"decoder_use_norm": "identity"}, {"decoder_use_norm": {"type": "instancenorm", "affine": True}},
    {"psp_out_channels": 64, "psp_dropout": .5},
    {"in_channels": 5, "activation": "sigmoid", "aux_params": None}, {"encoder_name": "tu-convnext_atto"}, {"size": (48, 80)},
    {"encoder_name": "mit_b0"}, {"encoder_name": "tu-vgg11_bn"}, {"encoder_name": "resnet50"},
], ids=str)
def test_same_as_smp(arguments): same_as_smp(PSPNet, **arguments)

@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_same_as_smp_at_depth(depth):
    "SMP needs the right factor by hand; ours finds it, and obeys an explicit one"
    same_as_smp(PSPNet, encoder_depth=depth, theirs={"upsampling": 2**depth})
    same_as_smp(PSPNet, encoder_depth=depth, upsampling=3)

def test_unused_stages_are_not_built():
    "SMP's checkpoint has them; it was loaded strictly above. Names of any other kind are refused"
    ours, theirs = same_as_smp(PSPNet)
    assert {n.split(".")[0] for n, _ in ours.encoder.named_parameters()} == {"conv1", "bn1", "layer1", "layer2"}
    spare = [n for n in theirs.state_dict() if n not in ours.state_dict()]
    assert {n.split(".")[1] for n in spare} == {"layer3", "layer4"}
    assert len([n for n in spare if "running" not in n and "num" not in n]) == 30
    with pytest.raises(RuntimeError, match="layer5"): ours.load_state_dict(theirs.state_dict() | {"encoder.layer5.weight": torch.zeros(1)})
    wrong = {n: t[:1] if n == "encoder.layer4.0.conv1.weight" else t for n, t in theirs.state_dict().items()}
    with pytest.raises(RuntimeError, match="layer4"): ours.load_state_dict(wrong)

@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_any_size(depth): check_sizes(PSPNet, encoder_depth=depth)

def test_missing_level():
    assert shape(PSPNet, (65, 71), encoder_name="tu-convnext_atto", encoder_depth=2) == (1, 2, 65, 71)
    with pytest.raises(ValueError, match="no map at stride 2.*use a depth from 2 to 5"):
        PSPNet("tu-convnext_atto", encoder_weights=None, encoder_depth=1)

def test_explicit_upsampling(): assert shape(PSPNet, (65, 71), upsampling=1) == (1, 2, 9, 9)

def test_dilated_encoder():
    "The paper's own form: all five stages at stride 8"
    assert shape(PSPNet, (65, 71), encoder_depth=5, output_stride=8) == (1, 2, 65, 71)

@pytest.mark.parametrize("norm", norms, ids=str)
def test_norms(norm): trains(PSPNet, decoder_use_norm=norm)

@pytest.mark.parametrize("arguments", [{}, {"size": (16, 24)}, {"encoder_depth": 5}, {"encoder_name": "tu-convnext_atto"}], ids=str)
def test_trains_with_a_batch_of_one(arguments): trains(PSPNet, **arguments)

def test_old_argument():
    with pytest.warns(DeprecationWarning, match="decoder_use_norm"):
        model = PSPNet("resnet18", encoder_weights=None, psp_use_batchnorm=False)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.decoder.modules())

def test_copy_and_pickle(): survives(PSPNet)

@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_grid_means(n):
    "The matrices against torch's adaptive pooling, at every size up to 25, where regions overlap too"
    for h in range(1, 26):
        x = torch.randn(2, 3, h, h + 5, dtype=torch.float64)
        means = grid_means(h, n, x) @ x @ grid_means(h + 5, n, x).T
        assert_close(means, torch.nn.functional.adaptive_avg_pool2d(x, n), rtol=0, atol=1e-13)

def test_grid_means_export():
    "One exported program for every size; with torch's adaptive pooling an ONNX file holds for one size only"
    free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(GridMean(6), (torch.randn(2, 3, 12, 18),), dynamic_shapes=(free,))
    assert not any("adaptive" in str(node.target) for node in program.graph.nodes)
    for size in ((9, 31), (5, 12)):
        x = torch.randn(3, 3, *size)
        assert_close(program.module()(x), GridMean(6)(x), rtol=0, atol=1e-6)
