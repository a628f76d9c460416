"""VGG, DenseNet, SENet, DPN, Inception and Xception by their native names: tensor for tensor and map for map as in SMP."""
import warnings

import pytest
import torch
from oracle import assert_same, randomise, relative_error, smp
from torch import nn

import segkit
from segkit.encoders import check_encoder, get_encoder, get_encoder_names, get_preprocessing_params, parameter_stages
from segkit.encoders.base import encoders

FAMILIES = {
    "vgg": [f"vgg{n}{bn}" for n in (11, 13, 16, 19) for bn in ("", "_bn")],
    "densenet": [f"densenet{n}" for n in (121, 169, 201, 161)],
    "senet": ["senet154", "se_resnet50", "se_resnet101", "se_resnet152", "se_resnext50_32x4d", "se_resnext101_32x4d"],
    "dpn": ["dpn68", "dpn68b", "dpn92", "dpn98", "dpn107", "dpn131"],
    "inception": ["inceptionv4", "inceptionresnetv2", "xception"],
}
NAMES = [name for names in FAMILIES.values() for name in names]
MEMBERS = ["vgg11", "vgg11_bn", "densenet121", "se_resnet50", "dpn68", "inceptionv4", "inceptionresnetv2", "xception"]
DILATED = ["se_resnet50", "se_resnext50_32x4d", "dpn68", "dpn68b"]
RIGID = ["vgg11", "densenet121", "inceptionv4", "inceptionresnetv2", "xception"]


def on_meta(name, **kwargs):
    with torch.device("meta"): return get_encoder(name, **kwargs)


def smp_encoder(name, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return smp.encoders.get_encoder(name, weights=None, **kwargs)


def settings(encoder):
    "What a state dict does not hold: how each convolution, norm and pooling is set, in the order of their names"
    facts = {nn.Conv2d: ("stride", "padding", "dilation", "groups"), nn.BatchNorm2d: ("eps", "momentum")}
    return {name: [getattr(m, a) for a in attributes] for name, m in encoder.named_modules()
            for kind, attributes in facts.items() if isinstance(m, kind)}


@torch.no_grad()
def worst(ours, theirs, x):
    "Largest relative difference at any level"
    ours, theirs = ours(x), theirs(x)
    assert [f.shape for f in ours] == [f.shape for f in theirs]
    return max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_names_shapes_and_settings_of_smp(name):
    with torch.device("meta"): theirs, ours = smp_encoder(name), get_encoder(name)
    assert {k: t.shape for k, t in theirs.state_dict().items()} == {k: t.shape for k, t in ours.state_dict().items()}
    assert list(ours.out_channels) == list(theirs.out_channels)
    assert settings(ours) == settings(theirs)


@pytest.fixture(scope="module", params=MEMBERS)
def pair(request):
    "SMP's encoder with random statistics, and ours with the same tensors, in float64"
    torch.manual_seed(0)
    theirs, ours = randomise(smp_encoder(request.param)).double(), get_encoder(request.param).double()
    ours.load_state_dict(theirs.state_dict())
    return request.param, ours, theirs


@pytest.mark.parametrize("size", [(64, 96), (65, 71)])
def test_features_of_smp(pair, size):
    name, ours, theirs = pair
    assert worst(ours.eval(), theirs.eval(), torch.randn(1, 3, *size, dtype=torch.float64)) < 1e-10


def test_features_of_smp_in_training(pair):
    name, ours, theirs = pair
    before = {k: t.clone() for k, t in theirs.state_dict().items()}
    assert worst(ours.train(), theirs.train(), torch.randn(2, 3, 64, 64, dtype=torch.float64)) < 1e-8
    for k, t in ours.state_dict().items(): assert torch.allclose(t, theirs.state_dict()[k], rtol=1e-8, atol=1e-8)
    for other in (ours, theirs): other.load_state_dict(before)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_shallow_encoders_take_whole_checkpoints(pair, depth):
    "Only what the levels need is built; the rest of a checkpoint is known as unused; the maps are the first of the whole"
    name, whole, _ = pair
    shallow = get_encoder(name, depth=depth).double()
    own, state, unused = shallow.state_dict(), whole.state_dict(), shallow.unused_tensors()
    assert set(own) < set(state) and {k: tuple(t.shape) for k, t in state.items()} == unused
    shallow.load_state_dict({k: state[k] for k in own})
    x = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    with torch.no_grad(): got, expected = shallow.eval()(x), whole.eval()(x)[:depth + 1]
    assert len(got) == depth + 1 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("depth", [1, 3, 5])
def test_contract_and_no_spare_weights(name, depth):
    encoder = on_meta(name, depth=depth, in_channels=4)
    check_encoder(encoder)
    assert len(parameter_stages(encoder)) == len(list(encoder.parameters()))
    assert encoder.in_channels == 4 and encoder.out_channels[0] == (64 if name.startswith("vgg") else 4)
    assert set(encoder.parameters_by_stage()) <= set(range(1, depth + 1))


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["vgg11", "densenet121", "se_resnet50", "dpn68", "xception", "inceptionv4"])
def test_other_channels_as_in_smp(name, channels):
    "The adapted first layer is SMP's, and maps agree (two levels suffice: the rest does not depend on it)"
    theirs = randomise(smp_encoder(name, depth=2)).eval()
    ours = get_encoder(name, depth=2, weights=theirs.state_dict(), in_channels=channels).eval()
    theirs.set_in_channels(channels, pretrained=True)
    assert worst(ours.double(), theirs.double(), torch.randn(1, channels, 32, 64, dtype=torch.float64)) < 1e-6


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", DILATED)
def test_dilation_of_smp(name, output_stride):
    theirs, ours = randomise(smp_encoder(name, output_stride=output_stride)).double().eval(), get_encoder(name, output_stride=output_stride).double().eval()
    assert settings(ours) == settings(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert ours.output_stride == output_stride
    assert worst(ours, theirs, torch.randn(1, 3, 32, 64, dtype=torch.float64)) < 1e-10


@pytest.mark.parametrize("name", RIGID)
def test_what_cannot_be_dilated_says_what_can(name):
    with pytest.raises(ValueError): smp_encoder(name, output_stride=8)
    for output_stride in (8, 16):
        with pytest.raises(ValueError, match="cannot be dilated .* such as 'resnet34'"): on_meta(name, output_stride=output_stride)
    assert on_meta(name, depth=3, output_stride=8).output_stride == 8  # nothing to dilate


def test_names_weights_and_statistics():
    assert set(NAMES) <= set(get_encoder_names())
    half, imagenet = [.5]*3, [.485, .456, .406]
    mean = {"vgg11": imagenet, "densenet161": imagenet, "se_resnext50_32x4d": imagenet, "xception": half, "inceptionv4": half}
    for name, expected in mean.items():
        found = get_preprocessing_params(name)
        assert found["mean"] == expected and found["input_space"] == "RGB" and found["input_range"] == [0, 1]
    assert get_preprocessing_params("inceptionresnetv2", "imagenet+background")["std"] == half
    assert get_preprocessing_params("dpn92", "imagenet+5k")["mean"] == pytest.approx([.48627, .45882, .40784], abs=1e-5)
    with pytest.raises(ValueError, match=r"no weights 'imagenet'; .*'imagenet\+5k'"): get_preprocessing_params("dpn92")
    for name in NAMES:
        for tag, entry in encoders[name]["pretrained_settings"].items():
            assert entry["repo_id"] == f"smp-hub/{name}.{tag.replace('+', '-')}" and len(entry["revision"]) == 40 and entry["filename"].endswith(".safetensors")


def test_offline_error_names_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(OSError, match=r"model.safetensors of smp-hub/vgg11.imagenet .*pass a local file"): get_encoder("vgg11", weights="imagenet")


@pytest.mark.parametrize("architecture, kwargs", [
    ("Unet", {}), ("Unet", {"encoder_depth": 3, "decoder_channels": (32, 16, 8)}), ("Unet", {"encoder_name": "vgg11_bn", "decoder_attention_type": "scse"}),
    ("UnetPlusPlus", {"decoder_channels": (64, 32, 16, 8, 8)}), ("MAnet", {}), ("Linknet", {}), ("FPN", {}), ("PSPNet", {}),
    ("UPerNet", {}), ("Segformer", {}),
], ids=str)
def test_models_on_vgg(architecture, kwargs):
    assert_same(getattr(segkit, architecture), architecture, **{"encoder_name": "vgg11", "size": (64, 64)} | kwargs)


@pytest.mark.parametrize("architecture", ["DeepLabV3", "DeepLabV3Plus"])
def test_models_that_need_dilation_refuse_vgg(architecture):
    with pytest.raises(ValueError): getattr(smp, architecture)("vgg11", encoder_weights=None)
    with pytest.raises(ValueError, match="VGGEncoder cannot be dilated"): getattr(segkit, architecture)("vgg11", encoder_weights=None)


@pytest.mark.parametrize("name", ["densenet121", "se_resnet50", "dpn68", "inceptionv4", "xception"])
def test_unet_on_each_family(name):
    assert_same(segkit.Unet, "Unet", encoder_name=name, size=(32, 64), decoder_channels=(32, 16, 16, 8, 8))


@pytest.mark.parametrize("name", MEMBERS)
def test_any_size(name):
    model = segkit.Unet(name, encoder_weights=None, decoder_channels=(8,)*5).eval()
    for size in ((33, 50), (1, 1)):
        with torch.no_grad(): assert model(torch.randn(1, 3, *size)).shape == (1, 1, *size)
