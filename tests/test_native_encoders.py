"""Native names: tensor for tensor, setting for setting and map for map as in SMP, at every depth, stride and size."""
import copy
import random
import warnings

import pytest
import torch
from oracle import (
    filled,
    on_meta,
    pair,
    randomise,
    relative_error,
    same_maps,
    settings,
    shapes,
    smp,
    smp_encoder,
    with_tensors,
    without_gradient,
)
from timm.layers import DropPath
from torch.export import Dim, export

import segkit
from segkit.encoders import check_encoder, encoders, get_encoder, get_encoder_names, get_preprocessing_params, parameter_stages
from segkit.encoders.mobileone import MobileOneBlock

NAMES = smp.encoders.get_encoder_names()
MEMBERS = {  # one of each class -> its shallowest depth
    "resnet18": 1, "vgg11": 1, "vgg11_bn": 1, "densenet121": 1, "se_resnet50": 1, "dpn68": 1, "inceptionv4": 1, "inceptionresnetv2": 1, "xception": 1,
    "efficientnet-b0": 1, "timm-tf_efficientnet_lite0": 1, "mobilenet_v2": 1, "mobileone_s1": 1, "timm-skresnet18": 1, "mit_b0": 2}
DILATABLE = ["resnet18", "efficientnet-b0", "timm-tf_efficientnet_lite0", "mobilenet_v2", "mobileone_s1", "timm-skresnet18"]
DILATABLE += [name for name in NAMES if name.startswith(("se", "dpn"))]
HEADS = {"efficientnet-b": {"_conv_head", "_bn1"}, **dict.fromkeys(("timm-efficientnet-b", "timm-efficientnet-l", "timm-tf_efficientnet_lite"), {"conv_head", "bn2"})}
RIGID = ["vgg11", "densenet121", "inceptionv4", "inceptionresnetv2", "xception", "mit_b0"]
ROUNDED_DOWN = {"vgg11", "vgg11_bn", "densenet121", "se_resnet50"}  # by their poolings
OLD = ["timm-regnetx_002", "timm-regnety_002", "timm-res2net50_26w_4s", "timm-res2next50", "timm-resnest14d", "timm-gernet_s", "timm-mobilenetv3_small_075"]
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning", "ignore:.*timm-:DeprecationWarning")


def same_settings(ours, theirs): return settings(ours).items() <= settings(theirs).items()


def image(channels=3, size=(32, 64)): return torch.randn(1, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# every name, without values

def test_every_native_name_of_smp_is_there(): assert set(NAMES) <= set(get_encoder_names())


@pytest.mark.parametrize("name", NAMES)
def test_tensors_channels_and_settings_of_smp(name):
    "The classifier's first layer, which only an EfficientNet of SMP has, is not built; a checkpoint may have it"
    theirs, ours = on_meta(smp_encoder, name), on_meta(get_encoder, name)
    expected, have = shapes(theirs.state_dict()), shapes(ours.state_dict())
    spare = {k for k in expected if k not in have}
    assert {k.split(".")[0] for k in spare} == HEADS.get(name.rstrip("0123456789"), set())
    assert have.items() <= expected.items() and (not spare or expected.items() <= (ours.unused_tensors() | have).items())
    assert ours.out_channels == list(theirs.out_channels)
    assert same_settings(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_smp(name):
    "The same tags; the same file where it is SMP's, of one revision in any case"
    ours, theirs = encoders[name]["pretrained_settings"], smp.encoders.encoders[name]["pretrained_settings"]
    assert list(ours) == list(theirs)
    for tag, known in theirs.items():
        file = ours[tag]
        assert file["filename"].endswith(".safetensors") and file["input_space"] == "RGB" and file["input_range"] == [0, 1]
        if file["repo_id"].startswith("smp-hub/"): assert (file["repo_id"], file["revision"]) == (known["repo_id"], known["revision"])
        else: assert file["repo_id"].startswith(f"timm/{name}.") and name.startswith("resne")
        halved = tag == "advprop" or "lite" in name or "ception" in name
        if not name.startswith("dpn"):
            found = get_preprocessing_params(name, tag)
            assert (found["mean"], found["std"]) == (([.5]*3, [.5]*3) if halved else ([.485, .456, .406], [.229, .224, .225]))
    if "imagenet" not in ours:
        with pytest.raises(ValueError, match="has no weights 'imagenet'.* Its tags: '"): get_preprocessing_params(name)


def test_statistics_of_dpn():
    found = get_preprocessing_params("dpn92", "imagenet+5k")
    assert found["mean"] == pytest.approx([.48627, .45882, .40784], abs=1e-5) and found["std"] == pytest.approx([.23482]*3, abs=1e-5)


def test_offline_error_names_the_file(monkeypatch):
    def offline(*args, **kwargs): raise OSError("offline")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(OSError, match=r"model.safetensors of smp-hub/vgg11.imagenet .*pass a local file"): get_encoder("vgg11", weights="imagenet")


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", DILATABLE)
def test_dilated_layers_of_smp(name, output_stride):
    theirs, ours = (on_meta(build, name, output_stride=output_stride) for build in (smp_encoder, get_encoder))
    assert same_settings(ours, theirs) and ours.output_stride == output_stride


@pytest.mark.parametrize("name", RIGID)
def test_what_cannot_be_dilated_says_what_can(name):
    for output_stride in (8, 16):
        with pytest.raises(ValueError, match="cannot be dilated .* such as 'tu-"): on_meta(get_encoder, name, output_stride=output_stride)
    if name != "mit_b0":  # SMP dilates it, reduction of attention included
        with pytest.raises(ValueError): on_meta(smp_encoder, name, output_stride=8)
    assert on_meta(get_encoder, name, depth=3, output_stride=8).output_stride == 8  # nothing to dilate


@pytest.mark.parametrize("name", MEMBERS)
def test_contract_at_each_depth(name):
    "Other channels, odd sizes, no spare weights"
    shallowest, is_vgg = MEMBERS[name], name.startswith("vgg")
    for depth in (2,) if name == "inceptionresnetv2" else (2, 5):  # its page does the rest
        encoder = on_meta(get_encoder, name, depth=depth, in_channels=4).eval()
        check_encoder(encoder)
        assert encoder.in_channels == 4 and encoder.out_channels[0] == (64 if is_vgg else 4)
        with torch.no_grad(): found = [tuple(f.shape) for f in encoder(torch.empty(1, 4, 65, 71, device="meta"))]
        assert found == [(1, c, -(-65//2**i), -(-71//2**i)) for i, c in enumerate(encoder.out_channels)] or name in ROUNDED_DOWN
        stages = parameter_stages(encoder)
        assert len(stages) == len(list(encoder.parameters())) and max(stages.values()) == depth - (depth == 5 and is_vgg)
    for depth in {shallowest - 1, 6} - {0}:
        with pytest.raises(ValueError, match=f"depths {shallowest} to 5"): on_meta(get_encoder, name, depth=depth)


@pytest.mark.parametrize("name", OLD)
def test_old_names(name):
    with warnings.catch_warnings(record=True) as caught, torch.device("meta"):
        warnings.simplefilter("always")
        ours = get_encoder(name)
    deprecations = [str(w.message) for w in caught if w.category is DeprecationWarning]
    assert len(deprecations) == 1 and ours.name in deprecations[0]
    theirs = on_meta(smp_encoder, name)
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict()) and ours.out_channels == theirs.out_channels
    assert get_preprocessing_params(name)["mean"] and name not in get_encoder_names()


@pytest.mark.parametrize("name", [*random.Random(0).sample([name for name in NAMES if not name.startswith("mit")], 6), "timm-efficientnet-b0", "tu-resnet18"])
def test_the_names_that_warn_are_those_of_smp(name):
    def warned(get):
        with warnings.catch_warnings(record=True) as caught, torch.device("meta"):
            warnings.simplefilter("always")
            get(name, depth=2, weights=None)
        return any(w.category is DeprecationWarning and "deprecated" in str(w.message) for w in caught)
    assert warned(get_encoder) == warned(smp.encoders.get_encoder) == name.startswith("timm-")


# numbers

@pytest.fixture(scope="module", params=MEMBERS)
def members(request): return request.param, *pair(request.param)


def test_maps_of_smp(members):
    "An even height and an odd width, so that poolings round alike, too, where SMP rounds up; a checkpoint of SMP in every class"
    name, ours, theirs = members
    rounds_down = name.startswith(("efficientnet", "timm", "mobile"))
    same_maps(ours, theirs, image(size=(32, 64 if rounds_down else 71)))


def test_shallow_encoders_take_whole_checkpoints(members):
    "Only what the levels need is built; the rest of a checkpoint is known as unused; the maps are the first of the whole"
    name, whole, theirs = members
    state, x = theirs.state_dict(), image(size=(32, 32))
    with torch.no_grad(): maps = whole(x)
    for depth in (MEMBERS[name], 4):
        shallow = with_tensors(state, get_encoder, name, depth=depth)
        assert len(shallow.state_dict()) < len(state) or (depth == 4 and name.startswith("vgg"))  # whose last level has no tensors
        assert shallow.unused_tensors() == shapes(state)
        with torch.no_grad(): got = shallow(x)
        assert len(got) == depth + 1 and all(torch.equal(a, b) for a, b in zip(got, maps[:depth + 1], strict=True))


def test_a_given_encoder_serves_at_a_smaller_depth(members):
    "The same module, asked for less"
    name, whole, _ = members
    depth = max(2, MEMBERS[name])
    x = image(size=(32, 32))
    with torch.no_grad(): got, expected = get_encoder(whole, depth=depth)(x), whole(x)[:depth + 1]
    assert len(got) == depth + 1 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)) and whole.depth == 5


@pytest.mark.parametrize("name, arguments", [
    ("resnet18", {"output_stride": 8}), ("resnet50", {"output_stride": 16}), ("resnext50_32x4d", {}),
    ("se_resnet50", {"output_stride": 8}), ("dpn68", {"output_stride": 8}), ("dpn68b", {"output_stride": 16}),
    *((name, arguments) for name in DILATABLE[1:6] for arguments in ({"depth": 3, "in_channels": 4}, {"output_stride": 8})),
    ("efficientnet-b2", {}), ("timm-efficientnet-b0", {}), ("mobileone_s0", {"depth": 3}), ("timm-skresnext50_32x4d", {"depth": 3}), ("mit_b1", {}),
    ("timm-mobilenetv3_small_075", {}),  # an old name
], ids=str)
def test_maps_of_smp_where_a_variant_differs(name, arguments): same_maps(*pair(name, **arguments), image(arguments.get("in_channels", 3)))


@pytest.mark.parametrize("size", [(65, 71), (128, 160)])
def test_maps_of_mix_transformers_at_other_sizes(size): same_maps(*pair("mit_b0"), image(size=size))


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["vgg11", "densenet121", "dpn68"])
def test_other_channels_as_in_smp(name, channels):
    "The first layer is adapted as SMP adapts it"
    theirs = filled(smp_encoder, name, depth=2)
    ours = get_encoder(name, depth=2, weights=theirs.state_dict(), in_channels=channels).eval()
    theirs.set_in_channels(channels, pretrained=True)
    same_maps(ours, theirs.float(), image(channels).float(), 1e-5)


def test_every_branch_that_looks_at_the_picture_is_adapted():
    state = get_encoder("mobileone_s1").state_dict()
    one = get_encoder("mobileone_s1", in_channels=1, weights=state).stage0
    assert one.rbr_scale.conv.weight.shape == (64, 1, 1, 1)
    for k in ("rbr_conv.0.conv", "rbr_scale.conv"):
        assert torch.allclose(one.get_submodule(k).weight[:, 0], state[f"stage0.{k}.weight"].sum(1))


# in models

@pytest.mark.parametrize("name", ["efficientnet-b0", "timm-tf_efficientnet_lite0", "mobilenet_v2", "mobileone_s1"])
def test_checkpoints_with_unused_tensors_load(name):
    "SMP's checkpoint holds the classifier's first layer and, at depth 3, the deeper stages"
    arguments = dict(encoder_name=name, encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8))
    theirs = filled(smp.Unet, **arguments).float()
    ours = on_meta(segkit.Unet, **arguments).to_empty(device="cpu").eval()
    missing = ours.load_state_dict(theirs.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in theirs.parameters())
    with torch.no_grad(): assert relative_error(ours(image().float()), theirs(image().float())) < 1e-5


@pytest.mark.parametrize("name", ["efficientnet-b0", "mobilenet_v2", "mobileone_s1", "mit_b0"])
def test_odd_images_through_models_and_training(name):
    "The encoder's maps are rounded up, so a mask has the image's size also where nothing is padded; and every weight learns"
    model = segkit.Unet(name, encoder_weights=None, classes=2, decoder_channels=(32, 16, 16, 8, 8), aux_params={"classes": 2})
    with torch.no_grad(): assert model.eval()(torch.randn(1, 3, 65, 71))[0].shape == (1, 2, 65, 71)
    assert without_gradient(model) == []


@pytest.mark.parametrize("name", ["vgg11", "densenet121", "se_resnet50", "dpn68", "xception", "mit_b0"])
def test_any_size(name):
    model = on_meta(segkit.Unet, name, encoder_weights=None, decoder_channels=(8,)*5).eval()
    for size in ((33, 50), (8, 100), (1, 1)): assert model(torch.empty(1, 3, *size, device="meta")).shape == (1, 1, *size)


@pytest.mark.parametrize("architecture, kwargs", [
    ("Unet", {"decoder_channels": (32, 16, 16, 8, 8)}), ("Unet", {"encoder_name": "vgg11_bn", "encoder_depth": 3, "decoder_channels": (32, 16, 8)}),
    ("UnetPlusPlus", {"decoder_channels": (32, 16, 16, 8, 8)}), ("MAnet", {"decoder_channels": (32, 16, 16, 8, 8)}), ("Linknet", {}),
    ("FPN", {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}), ("PSPNet", {}), ("PAN", {"encoder_depth": 4, "encoder_output_stride": 32}),
    ("UPerNet", {"decoder_channels": 32}), ("Segformer", {"decoder_segmentation_channels": 32}),
], ids=str)
def test_models_on_vgg(architecture, kwargs):
    "Whose first map is not the image"
    kwargs = {"encoder_name": "vgg11", "encoder_weights": None, "classes": 3} | kwargs
    theirs = filled(getattr(smp, architecture), **kwargs)
    ours = on_meta(getattr(segkit, architecture), **kwargs).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x = image(size=(128, 128) if architecture == "PAN" else (32, 64))
    with torch.no_grad(): assert relative_error(ours(x), theirs(x)) < 1e-10


@pytest.mark.parametrize("architecture", ["DeepLabV3", "DeepLabV3Plus"])
def test_models_that_need_dilation_refuse_vgg(architecture):
    with pytest.raises(ValueError): on_meta(getattr(smp, architecture), "vgg11", encoder_weights=None)
    with pytest.raises(ValueError, match="cannot be dilated"): on_meta(getattr(segkit, architecture), "vgg11", encoder_weights=None)


# what one family has alone

def test_mobileone_becomes_one_convolution_a_layer():
    "Exact in float64, dilated or not, at other depths and channels, through a whole model"
    for arguments in ({"output_stride": 8}, {"depth": 3, "in_channels": 4}):
        plain = filled(get_encoder, "mobileone_s1", **arguments)
        merged = copy.deepcopy(plain).reparameterize()
        assert merged.reparameterize() is merged  # twice is once
        same_maps(merged, plain, image(plain.in_channels))
    layer = randomise(MobileOneBlock(32, 32, 3, groups=16, branches=3, squeeze=True)).double().eval()
    x = torch.randn(2, 32, 9, 7).double()
    before = layer(x)
    layer.reparameterize()
    assert relative_error(layer(x), before) < 1e-13 and not any(isinstance(m, torch.nn.BatchNorm2d) for m in layer.modules())


def test_drop_path_grows_with_the_block():
    rates = [m.drop_prob for m in on_meta(get_encoder, "mit_b0").modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([.1*i/7 for i in range(8)])


def test_the_licence_of_mix_transformers_is_told():
    for name in NAMES:
        told = [s.get("license", "") for s in encoders[name]["pretrained_settings"].values()]
        assert all("no commercial" in text for text in told) == name.startswith("mit_")


def test_tensors_of_mix_transformers_keep_their_order():
    "Optimizers and older checkpoints count them"
    for name in ("mit_b0", "mit_b3"): assert list(on_meta(get_encoder, name).state_dict()) == list(on_meta(smp_encoder, name).state_dict())


def test_exports_with_free_sizes():
    "One block a stage: each stage has another size of regions"
    model = segkit.Segformer("mit_b0", encoder_weights=None, depths=(1, 1, 1, 1)).eval()
    free = {0: Dim("b", min=1, max=64), 2: Dim("h", min=33, max=4096), 3: Dim("w", min=33, max=4096)}
    exported = export(model, (torch.randn(2, 3, 65, 71),), dynamic_shapes=(free,)).module()
    x = torch.randn(3, 3, 96, 130)
    with torch.no_grad(): assert relative_error(exported(x), model(x)) < 1e-4
