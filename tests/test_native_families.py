"""VGG, DenseNet, SENet, DPN, Inception and Xception by their native names: tensor for tensor and map for map as in SMP."""
import warnings

import pytest
import torch
from oracle import relative_error, smp
from torch import nn

import segkit
from segkit.encoders import check_encoder, encoders, get_encoder, get_encoder_names, get_preprocessing_params, parameter_stages

FAMILIES = {
    "vgg": [f"vgg{n}{bn}" for n in (11, 13, 16, 19) for bn in ("", "_bn")],
    "densenet": [f"densenet{n}" for n in (121, 169, 201, 161)],
    "senet": ["senet154", "se_resnet50", "se_resnet101", "se_resnet152", "se_resnext50_32x4d", "se_resnext101_32x4d"],
    "dpn": ["dpn68", "dpn68b", "dpn92", "dpn98", "dpn107", "dpn131"],
    "inception": ["inceptionv4", "inceptionresnetv2", "xception"],
}
NAMES = [name for names in FAMILIES.values() for name in names]
MEMBERS = ["vgg11", "vgg11_bn", "densenet121", "se_resnet50", "dpn68", "inceptionv4", "inceptionresnetv2", "xception"]
RIGID = ["vgg11", "densenet121", "inceptionv4", "inceptionresnetv2", "xception"]


def on_meta(build, *args, **kwargs):
    "Build where weights have a shape and no values: drawing them costs more than the tests"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(*args, **kwargs)


def filled(build, *args, **kwargs):
    "A network in float64 with values for all tensors, statistics of norms among them"
    model, generator = on_meta(build, *args, **kwargs).to_empty(device="cpu").double().eval(), torch.Generator().manual_seed(0)
    for t in model.state_dict().values():
        if not t.is_floating_point(): t.zero_()
        elif t.dim() == 1: t.copy_(torch.rand(t.shape, generator=generator) + .5)
        else: t.normal_(generator=generator).div_(t[0].numel()**.5)
    return model


def with_tensors(state, build, *args, **kwargs):
    "A network of ours that holds these tensors"
    model = on_meta(build, *args, **kwargs)
    model.load_state_dict(state, assign=True)
    return model.eval()


def smp_encoder(name, **kwargs): return smp.encoders.get_encoder(name, weights=None, **kwargs)


def settings(encoder):
    "What a state dict does not hold: how each convolution and norm is set"
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
    theirs, ours = on_meta(smp_encoder, name), on_meta(get_encoder, name)
    assert {k: t.shape for k, t in theirs.state_dict().items()} == {k: t.shape for k, t in ours.state_dict().items()}
    assert list(ours.out_channels) == list(theirs.out_channels)
    assert settings(ours) == settings(theirs)


@pytest.fixture(scope="module", params=MEMBERS)
def pair(request):
    "SMP's encoder with random statistics, and ours with the same tensors, in float64"
    theirs = filled(smp_encoder, request.param)
    return request.param, with_tensors(theirs.state_dict(), get_encoder, request.param), theirs


def test_features_of_smp(pair):
    "An even height and an odd width: poolings round alike, too"
    name, ours, theirs = pair
    assert worst(ours, theirs, torch.randn(1, 3, 64, 71, dtype=torch.float64)) < 1e-10


@pytest.mark.parametrize("depth", [1, 4])
def test_shallow_encoders_take_whole_checkpoints(pair, depth):
    "Only what the levels need is built; the rest of a checkpoint is known as unused; the maps are the first of the whole"
    name, whole, _ = pair
    state, own = whole.state_dict(), on_meta(get_encoder, name, depth=depth).state_dict()
    assert len(own) < len(state) or (depth == 4 and name.startswith("vgg"))  # whose last level has no tensors
    shallow = with_tensors({k: state[k] for k in own}, get_encoder, name, depth=depth)
    assert shallow.unused_tensors() == {k: tuple(t.shape) for k, t in state.items()}
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad(): got, expected = shallow(x), whole(x)[:depth + 1]
    assert len(got) == depth + 1 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name, depth", [(name, depth) for name in MEMBERS if name != "inceptionresnetv2" for depth in (2, 5)])  # its page does that one
def test_contract_and_no_spare_weights(name, depth):
    encoder = on_meta(get_encoder, name, depth=depth, in_channels=4)
    check_encoder(encoder)
    stages = parameter_stages(encoder)
    assert len(stages) == len(list(encoder.parameters())) and max(stages.values()) == depth - (depth == 5 and name.startswith("vgg"))
    assert encoder.in_channels == 4 and encoder.out_channels[0] == (64 if name.startswith("vgg") else 4)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["vgg11", "densenet121", "dpn68"])
def test_other_channels_as_in_smp(name, channels):
    "The first layer is adapted as SMP adapts it"
    theirs = filled(smp_encoder, name, depth=2)
    ours = get_encoder(name, depth=2, weights=theirs.state_dict(), in_channels=channels).eval()
    theirs.set_in_channels(channels, pretrained=True)
    assert worst(ours, theirs.float(), torch.randn(1, channels, 32, 64)) < 1e-5


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", FAMILIES["senet"] + FAMILIES["dpn"])
def test_dilated_layers_of_smp(name, output_stride):
    theirs, ours = (on_meta(build, name, output_stride=output_stride) for build in (smp_encoder, get_encoder))
    assert settings(ours) == settings(theirs) and ours.output_stride == output_stride


@pytest.mark.parametrize("name, output_stride", [("se_resnet50", 8), ("dpn68", 8), ("dpn68b", 16)])
def test_dilated_features_of_smp(name, output_stride):
    theirs = filled(smp_encoder, name, output_stride=output_stride)
    ours = with_tensors(theirs.state_dict(), get_encoder, name, output_stride=output_stride)
    assert worst(ours, theirs, torch.randn(1, 3, 32, 64, dtype=torch.float64)) < 1e-10


@pytest.mark.parametrize("name", RIGID)
def test_what_cannot_be_dilated_says_what_can(name):
    with pytest.raises(ValueError): on_meta(smp_encoder, name, output_stride=8)
    for output_stride in (8, 16):
        with pytest.raises(ValueError, match="cannot be dilated .* such as 'tu-"): on_meta(get_encoder, name, output_stride=output_stride)
    assert on_meta(get_encoder, name, depth=3, output_stride=8).output_stride == 8  # nothing to dilate


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


def test_offline_error_names_the_file(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(OSError, match=r"model.safetensors of smp-hub/vgg11.imagenet .*pass a local file"): get_encoder("vgg11", weights="imagenet")


@pytest.mark.parametrize("architecture, kwargs", [
    ("Unet", {"decoder_channels": (32, 16, 16, 8, 8)}), ("Unet", {"encoder_name": "vgg11_bn", "encoder_depth": 3, "decoder_channels": (32, 16, 8)}),
    ("UnetPlusPlus", {"decoder_channels": (32, 16, 16, 8, 8)}), ("MAnet", {"decoder_channels": (32, 16, 16, 8, 8)}), ("Linknet", {}),
    ("FPN", {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}), ("PSPNet", {}), ("PAN", {"encoder_depth": 4, "encoder_output_stride": 32, "size": (128, 128)}),
    ("UPerNet", {"decoder_channels": 32}), ("Segformer", {"decoder_segmentation_channels": 32}),
], ids=str)
def test_models_on_vgg(architecture, kwargs):
    size, kwargs = kwargs.get("size", (64, 64)), {"encoder_name": "vgg11", "encoder_weights": None, "classes": 3} | {k: v for k, v in kwargs.items() if k != "size"}
    theirs = filled(getattr(smp, architecture), **kwargs)
    ours = with_tensors(theirs.state_dict(), getattr(segkit, architecture), **kwargs)
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad(): assert relative_error(ours(x), theirs(x)) < 1e-10


@pytest.mark.parametrize("architecture", ["DeepLabV3", "DeepLabV3Plus"])
def test_models_that_need_dilation_refuse_vgg(architecture):
    with pytest.raises(ValueError): on_meta(getattr(smp, architecture), "vgg11", encoder_weights=None)
    with pytest.raises(ValueError, match="VGGEncoder cannot be dilated"): on_meta(getattr(segkit, architecture), "vgg11", encoder_weights=None)


@pytest.mark.parametrize("name", ["vgg11", "densenet121", "se_resnet50", "dpn68", "xception"])
def test_any_size(name):
    with torch.device("meta"):
        model = segkit.Unet(name, encoder_weights=None, decoder_channels=(8,)*5).eval()
        for size in ((33, 50), (1, 1)): assert model(torch.empty(1, 3, *size)).shape == (1, 1, *size)
