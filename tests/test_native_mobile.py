"""EfficientNet, MobileNet, MobileOne, SKNet and the old `timm-` names, against SMP: tensors, maps level by level, dilation, warnings."""
import copy
import warnings

import pytest
import torch
from oracle import randomise, relative_error, smp

import segkit
from segkit.core.registry import encoders
from segkit.encoders import get_encoder, get_encoder_names, get_preprocessing_params, parameter_stages
from segkit.encoders.mobileone import MobileOneBlock

NATIVE = [*(f"efficientnet-b{i}" for i in range(8)), "mobilenet_v2", *(f"mobileone_s{i}" for i in range(5)),
          *(f"timm-efficientnet-b{i}" for i in range(9)), "timm-efficientnet-l2", *(f"timm-tf_efficientnet_lite{i}" for i in range(5)),
          "timm-skresnet18", "timm-skresnet34", "timm-skresnext50_32x4d"]
ALIASES = ["timm-regnetx_002", "timm-regnety_002", "timm-res2net50_26w_4s", "timm-res2next50", "timm-resnest14d", "timm-gernet_s", "timm-mobilenetv3_small_075"]
SMALL = ["efficientnet-b0", "mobilenet_v2", "mobileone_s1", "timm-tf_efficientnet_lite0", "timm-skresnet18"]
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning", "ignore:.*timm-:DeprecationWarning")


def shapes(state): return {k: tuple(t.shape) for k, t in state.items()}


def strided(encoder): return [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d) and m.stride[0] == 2]


def pair(name, **arguments):
    "SMP's encoder with random vectors, and ours with its tensors, in float64"
    theirs = randomise(smp.encoders.get_encoder(name, weights=None, **arguments)).double().eval()
    ours, state = get_encoder(name, **arguments).double().eval(), theirs.state_dict()
    unused = ours.unused_tensors() if set(state) - set(ours.state_dict()) else {}
    assert all(unused[k] == tuple(state.pop(k).shape) for k in set(state) - set(ours.state_dict()))
    ours.load_state_dict(state)  # strict
    return ours, theirs


def same_maps(ours, theirs, channels=3, size=(64, 64)):
    x = torch.randn(1, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): a, b = ours(x), theirs(x)
    assert [f.shape for f in a] == [f.shape for f in b]
    assert max(map(relative_error, a, b)) < 1e-10


def test_every_timm_name_of_smp_is_there():
    assert {n for n in smp.encoders.get_encoder_names() if n.startswith("timm-")} <= set(NATIVE) <= set(get_encoder_names())


@pytest.mark.parametrize("name", NATIVE)
def test_tensors_channels_and_settings_of_smp(name):
    with torch.device("meta"): theirs, ours = smp.encoders.get_encoder(name, weights=None), get_encoder(name)
    expected, have, unused = shapes(theirs.state_dict()), shapes(ours.state_dict()), ours.unused_tensors()
    assert ours.out_channels == theirs.out_channels
    assert have.items() <= expected.items() <= unused.items() | have.items()
    head = {k for k in expected if k.split(".")[0] in ("_conv_head", "_bn1", "conv_head", "bn2")}
    assert set(expected) - set(have) == head and bool(head) == ("efficientnet" in name)
    if name.startswith("efficientnet"): assert [m.static_padding.padding[0] for m in strided(theirs)] == [m.kernel_size[0]//2 - m.early for m in strided(ours)]
    settings, known = encoders[name]["pretrained_settings"], smp.encoders.encoders[name]["pretrained_settings"]
    assert {tag: (s["repo_id"], s["revision"]) for tag, s in settings.items()} == {tag: (s["repo_id"], s["revision"]) for tag, s in known.items()}
    for tag in settings: assert get_preprocessing_params(name, tag)["mean"] == ([.5]*3 if tag == "advprop" or "lite" in name else [.485, .456, .406])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("arguments", [{}, {"depth": 3, "in_channels": 4}, {"output_stride": 8}, {"output_stride": 16}], ids=str)
def test_maps_of_smp(name, arguments):
    same_maps(*pair(name, **arguments), arguments.get("in_channels", 3))


@pytest.mark.parametrize("name, depth", [("efficientnet-b2", 5), ("timm-efficientnet-b0", 5), ("mobileone_s0", 3), ("timm-skresnext50_32x4d", 3)])
def test_maps_of_smp_where_a_variant_differs(name, depth): same_maps(*pair(name, depth=depth), size=(32, 64))


@pytest.mark.parametrize("name", SMALL)
def test_depths_sizes_channels(name):
    for depth in (1, 4):
        with torch.device("meta"): encoder = get_encoder(name, depth=depth, in_channels=4).eval()
        with torch.no_grad(): found = [tuple(f.shape[1:]) for f in encoder(torch.empty(1, 4, 65, 71, device="meta"))]
        assert found == [(c, -(-65//2**i), -(-71//2**i)) for i, c in enumerate(encoder.out_channels)]
    stages = parameter_stages(encoder)
    assert set(stages.values()) == set(range(1, depth + 1)) and len(stages) == len(list(encoder.parameters()))
    with pytest.raises(ValueError, match="depths 1 to 5"): get_encoder(name, depth=6)
    with torch.device("meta"), pytest.raises(ValueError, match="expected 8 or 16"): get_encoder(name, output_stride=4)


def test_the_first_weights_for_other_channels():
    "Every branch that looks at the picture is adapted"
    three = get_encoder("mobileone_s1").stage0
    state = get_encoder("mobileone_s1").state_dict()
    one = get_encoder("mobileone_s1", in_channels=1, weights=state).stage0
    assert one.rbr_scale.conv.weight.shape == (64, 1, 1, 1) and three.rbr_scale.conv.weight.shape == (64, 3, 1, 1)
    for k in ("rbr_conv.0.conv", "rbr_scale.conv"):
        assert torch.allclose(one.get_submodule(k).weight[:, 0], state[f"stage0.{k}.weight"].sum(1))


def test_checkpoints_with_unused_tensors_load():
    "SMP's checkpoint holds the classifier's first layer and, at depth 3, the deeper stages"
    for name in ("efficientnet-b0", "timm-tf_efficientnet_lite0", "mobilenet_v2", "mobileone_s1"):
        arguments = dict(encoder_name=name, encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8))
        theirs, ours = smp.Unet(**arguments).eval(), segkit.Unet(**arguments).eval()
        missing = ours.load_state_dict(theirs.state_dict())
        assert not missing.missing_keys and not missing.unexpected_keys
        assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in theirs.parameters())
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad(): assert relative_error(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("name", ["efficientnet-b0", "mobilenet_v2", "mobileone_s1"])
def test_odd_images_through_models_and_training(name):
    "The encoder's maps are rounded up, so a mask has the image's size also where nothing is padded; and every weight learns"
    model = segkit.Unet(name, encoder_weights=None, classes=2, decoder_channels=(32, 16, 16, 8, 8))
    assert model.eval()(torch.randn(1, 3, 65, 71)).shape == (1, 2, 65, 71)
    model.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_mobileone_becomes_one_convolution_a_layer():
    "Exact in float64, dilated or not, at other depths and channels, through a whole model"
    torch.manual_seed(0)
    for arguments in ({"output_stride": 8}, {"depth": 3, "in_channels": 4}):
        plain = randomise(get_encoder("mobileone_s1", **arguments)).double().eval()
        merged = copy.deepcopy(plain).reparameterize()
        assert merged.reparameterize() is merged  # twice is once
        same_maps(merged, plain, plain.in_channels)
    layer = randomise(MobileOneBlock(32, 32, 3, groups=16, branches=3, squeeze=True)).double().eval()
    x = torch.randn(2, 32, 9, 7).double()
    before = layer(x)
    layer.reparameterize()
    assert relative_error(layer(x), before) < 1e-13 and not any(isinstance(m, torch.nn.BatchNorm2d) for m in layer.modules())


@pytest.mark.parametrize("name", ALIASES)
def test_old_names(name):
    with warnings.catch_warnings(record=True) as caught, torch.device("meta"):
        warnings.simplefilter("always")
        ours = get_encoder(name)
    deprecations = [str(w.message) for w in caught if w.category is DeprecationWarning]
    assert len(deprecations) == 1 and ours.name in deprecations[0]
    with torch.device("meta"): theirs = smp.encoders.get_encoder(name, weights=None)
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict()) and ours.out_channels == theirs.out_channels
    assert get_preprocessing_params(name)["mean"] and name not in get_encoder_names()


def test_old_name_gives_maps_of_smp(): same_maps(*pair("timm-mobilenetv3_small_075"))


@pytest.mark.parametrize("name", NATIVE[::9] + ["resnet18", "tu-resnet18"])
def test_the_names_that_warn_are_those_of_smp(name):
    def warned(get):
        with warnings.catch_warnings(record=True) as caught, torch.device("meta"):
            warnings.simplefilter("always")
            get(name, weights=None)
        return any(w.category is DeprecationWarning and "deprecated" in str(w.message) for w in caught)
    assert warned(get_encoder) == warned(smp.encoders.get_encoder) == name.startswith("timm-")


def test_every_name_of_smp():
    "All 76 are in the table, and those that no test above has built have the channels that SMP's table states"
    names = smp.encoders.get_encoder_names()
    assert len(names) == 76 and set(names) <= set(get_encoder_names())
    for name in set(names) - set(NATIVE):
        with torch.device("meta"): ours = get_encoder(name)
        assert ours.out_channels == list(smp.encoders.encoders[name]["params"]["out_channels"]), name
