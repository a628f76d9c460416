"""Checkpoints of SMP 0.6 load strictly in every way that people load them, and segkit's go back: all twelve architectures, native encoders and timm's."""
import copy
import functools
import re
import warnings

import pytest
import timm
import torch
from oracle import AUX, outputs, randomise, relative_error, smp
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision import models

import segkit
from segkit.core.registry import architectures
from segkit.core.stored import StoredNames, as_stored
from segkit.encoders.resnet import ResNetEncoder
from segkit.model.smp_state import smp_state_dict

NARROW = dict(decoder_channels=(32, 24, 16, 16, 16))
THREE = dict(encoder_depth=3, decoder_channels=(16, 8, 8))
# class, encoder, options; each holds something that only checkpoints have, or another family, depth or option
CASES = [
    ("Unet", "resnet18", NARROW | dict(decoder_attention_type="scse")),
    ("Unet", "efficientnet-b0", THREE | dict(in_channels=5)),
    ("UnetPlusPlus", "vgg11", NARROW | dict(decoder_attention_type="scse")),
    ("UnetPlusPlus", "tu-resnet18", THREE),
    ("MAnet", "mit_b0", NARROW),
    ("MAnet", "mobileone_s0", THREE),
    ("Linknet", "timm-efficientnet-b0", dict(encoder_depth=4)),
    ("FPN", "mobilenet_v2", dict(encoder_depth=4, upsampling=2, decoder_merge_policy="cat")),
    ("FPN", "tu-convnext_atto", {}),
    ("PSPNet", "resnet18", {}),
    ("PSPNet", "dpn68", dict(encoder_depth=4, upsampling=16)),
    ("DeepLabV3", "tu-mobilenetv2_100", dict(encoder_depth=3, decoder_channels=16, decoder_aspp_separable=True)),
    ("DeepLabV3Plus", "timm-regnetx_002", dict(decoder_channels=16)),
    ("PAN", "tu-resnet18", {}),
    ("UPerNet", "timm-skresnet18", dict(encoder_depth=4, decoder_channels=16)),
    ("Segformer", "mit_b0", dict(encoder_depth=3, decoder_segmentation_channels=16)),
    ("DPT", "tu-test_vit", dict(encoder_depth=2, decoder_intermediate_channels=(8, 8), decoder_fusion_channels=8, dynamic_img_size=True)),
]
PSPNET = next(i for i, (name, encoder, _) in enumerate(CASES) if (name, encoder) == ("PSPNet", "resnet18"))
cases = pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(CASES[i][:2]))


def test_the_table_has_all_twelve():
    assert {name.lower() for name, _, _ in CASES} == set(architectures)


@functools.cache
def pair(case):
    "SMP's model with weights that are not fresh, its checkpoint, and ours, built alike"
    name, encoder, options = CASES[case]
    options = dict(encoder_name=encoder, encoder_weights=None, classes=2, aux_params=AUX) | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = randomise(getattr(smp, name)(**options)).double().eval(), getattr(segkit, name)(**options).double().eval()
    return theirs, {k: t.clone() for k, t in theirs.state_dict().items()}, ours


class Lightning(nn.Module):
    "What a Lightning module is to a checkpoint: a parent"
    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, nn.BCEWithLogitsLoss(pos_weight=torch.ones(1))


WAYS = {  # parent, prefix, what the checkpoint holds beside
    "itself": (lambda m: m, "", {}),
    "Lightning": (Lightning, "model.", {"loss.pos_weight": torch.ones(1)}),
    "DataParallel": (nn.DataParallel, "module.", {}),
    "Sequential": (lambda m: nn.Sequential(m, nn.Sigmoid()), "0.", {}),
    "average": (AveragedModel, "module.", {"n_averaged": torch.tensor(3)}),
}


def forget(model):
    for t in model.state_dict().values(): t.zero_()
    return model


def assert_loaded(model, checkpoint):
    own = model.state_dict()
    assert own and all(torch.equal(t, checkpoint[name]) for name, t in own.items())


@cases
def test_loads_in_every_way(case):
    _, checkpoint, ours = pair(case)
    for wrap, prefix, beside in WAYS.values():
        parent = wrap(forget(ours))
        given = {prefix + k: t for k, t in checkpoint.items()} | beside
        names = list(given)
        result = parent.load_state_dict(given)
        assert not result.missing_keys and not result.unexpected_keys and list(given) == names
        model, = (m for m in parent.modules() if isinstance(m, segkit.SegmentationModel))
        assert_loaded(model, checkpoint)


@cases
def test_parts_load_alone(case):
    theirs, _, ours = pair(case)
    for part in ("encoder", "decoder", "segmentation_head", "classification_head"):
        own, checkpoint = getattr(ours, part), getattr(theirs, part).state_dict()
        forget(own).load_state_dict(checkpoint)
        if own.state_dict(): assert_loaded(own, checkpoint)


@cases
@torch.no_grad()
def test_there_and_back(case):
    "The same numbers after loading, and SMP's model, strict, has them again after the way back"
    theirs, checkpoint, ours = pair(case)
    ours.load_state_dict(checkpoint)
    side = 128 if CASES[case][0] == "PAN" else 64  # which pools the deepest map three times
    x = torch.randn(1, theirs.encoder._in_channels if hasattr(theirs.encoder, "_in_channels") else 3, side, side, dtype=torch.float64)
    expected = outputs(theirs, x)
    for a, b in zip(outputs(ours, x), expected, strict=True): assert relative_error(a, b) < 1e-10
    state = smp_state_dict(ours)
    assert set(state) == set(checkpoint)
    assert all(state[k].shape == t.shape and state[k].dtype == t.dtype for k, t in checkpoint.items())
    forget(theirs).load_state_dict(state, strict=True)
    try:
        for a, b in zip(outputs(theirs, x), expected, strict=True): assert relative_error(a, b) < 1e-6
    finally: theirs.load_state_dict(checkpoint, strict=True)


@pytest.mark.parametrize("case", [0, 2, 4, 10, len(CASES) - 1], ids=lambda i: "-".join(CASES[i][:2]))
def test_from_pretrained(case, tmp_path):
    theirs, checkpoint, ours = pair(case)
    theirs.save_pretrained(tmp_path)
    for load in (segkit.from_pretrained, type(ours).from_pretrained): assert_loaded(load(tmp_path), checkpoint)


# ---- what must stay an error, in a parent too

WRONG = {
    "a stranger": ("encoder.layer9.weight", torch.zeros(1)), "an idle tensor of another shape": ("encoder.layer4.0.conv1.weight", torch.zeros(512, 256, 5, 5)),
    "a stranger in the decoder": ("decoder.psp.extra.weight", torch.zeros(1)), "beside the model's parts": ("extra.weight", torch.zeros(1)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_strangers_stay_errors(wrong):
    _, checkpoint, ours = pair(PSPNET)
    name, tensor = WRONG[wrong]
    for wrap, prefix, beside in list(WAYS.values())[:3]:
        given = {prefix + k: t for k, t in (checkpoint | {name: tensor}).items()} | beside
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*" + re.escape(prefix + name)): wrap(ours).load_state_dict(given)
        assert wrap(ours).load_state_dict(given, strict=False).unexpected_keys == [prefix + name]
    del checkpoint["decoder.conv.0.weight"], given
    with pytest.raises(RuntimeError, match="Missing key.*decoder.conv.0.weight"): Lightning(ours).load_state_dict({f"model.{k}": t for k, t in checkpoint.items()}, strict=True)
    pair.cache_clear()


def test_another_shape_in_a_parent_is_torchs_error():
    _, checkpoint, ours = pair(PSPNET)
    other = {f"model.{k}": t for k, t in checkpoint.items()} | {"model.segmentation_head.0.weight": torch.zeros(7, 512, 3, 3), "loss.pos_weight": torch.ones(1)}
    with pytest.raises(RuntimeError, match="size mismatch for model.segmentation_head.0.weight"): Lightning(ours).load_state_dict(other)
    with pytest.warns(UserWarning, match="segmentation_head.0.weight"):
        result = ours.load_state_dict({k.removeprefix("model."): t for k, t in other.items() if k.startswith("model.")}, strict=False)
    assert result.missing_keys == ["segmentation_head.0.weight"]


# ---- old names

def old_deeplab(name): return re.sub(r"^decoder\.(aspp|conv|bn)\.", lambda m: f"decoder.{['aspp', 'conv', 'bn'].index(m[1])}.", name)
def without_model(name): return name.replace("encoder.model.", "encoder.")
def dotted(name): return re.sub(r"^encoder\.model\.(\w+?)_(\d)\.", r"encoder.\1.\2.", name).replace("encoder.model.", "encoder.")
def old_densenet(name): return re.sub(r"(denselayer\d+)\.(norm|conv)(\d)", r"\1.\2.\3", name)


OLD = [
    ("DeepLabV3", "resnet18", dict(decoder_channels=8), old_deeplab), ("Linknet", "tu-regnetx_002", {}, without_model),
    ("Linknet", "tu-gernet_s", {}, dotted), ("FPN", "tu-tf_mobilenetv3_small_075", dict(encoder_depth=3), without_model),
    ("Linknet", "densenet121", dict(encoder_depth=3), old_densenet),
]


@pytest.mark.parametrize("name, encoder, options, old", OLD, ids=lambda value: getattr(value, "__name__", str(value)))
def test_old_names(name, encoder, options, old):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = randomise(getattr(segkit, name)(encoder, encoder_weights=None, **options))
    checkpoint = {k: t.clone() for k, t in as_stored(model).items()}
    renamed = {old(k): t for k, t in checkpoint.items()}
    assert renamed.keys() != checkpoint.keys()
    for wrap, prefix, beside in list(WAYS.values())[:4]:
        wrap(forget(model)).load_state_dict({prefix + k: t for k, t in renamed.items()} | beside)
        assert_loaded(model, checkpoint)
    for part in ("encoder", "decoder"):
        getattr(forget(model), part).load_state_dict({k.removeprefix(f"{part}."): t for k, t in renamed.items() if k.startswith(f"{part}.")})
        assert all(torch.equal(t, checkpoint[k]) for k, t in model.state_dict().items() if k.startswith(f"{part}."))


# ---- a classifier's checkpoint

CLASSIFIERS = {
    "resnet18": lambda: timm.create_model("resnet18"), "resnet34": models.resnet34, "vgg11": lambda: models.vgg11(init_weights=False),
    "mobilenet_v2": models.mobilenet_v2, "densenet121": models.densenet121, "dpn68": lambda: timm.create_model("dpn68"),
    "xception": lambda: timm.create_model("legacy_xception"), "tu-resnet18": lambda: timm.create_model("resnet18"),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_an_encoder_takes_a_classifiers_checkpoint(name):
    classifier = CLASSIFIERS[name]().state_dict()
    encoder = forget(segkit.encoders.get_encoder(name, weights=None))
    result = encoder.load_state_dict(classifier)
    assert not result.missing_keys and not result.unexpected_keys
    own = encoder.state_dict()
    assert all(torch.equal(t, classifier[k.removeprefix("model.")]) for k, t in own.items())
    parent = nn.Sequential(forget(encoder))
    parent.load_state_dict({f"0.{k}": t for k, t in classifier.items()})
    assert all(torch.equal(t, classifier[k.removeprefix("0.").removeprefix("model.")]) for k, t in parent.state_dict().items())


def test_a_subclass_of_an_encoder_knows_the_names_too():
    class Mine(ResNetEncoder):
        def forward(self, x): return [2*f for f in super().forward(x)]
    mine = Mine("resnet18", (3, 64, 64, 128, 256, 512), depth=3)
    _, checkpoint, _ = pair(PSPNET)
    mine.load_state_dict({k.removeprefix("encoder."): t for k, t in checkpoint.items() if k.startswith("encoder.")})
    segkit.Linknet(mine, encoder_depth=3)  # and is an encoder
    assert isinstance(copy.deepcopy(mine), StoredNames)


def test_what_smp_does_not_have_does_not_go_there():
    for name, options, says in [("UPerNet", dict(decoder_interpolation="nearest"), "decoder_interpolation"), ("MAnet", dict(decoder_pab_form="rowwise"), "decoder_pab_form"),
                                ("UnetPlusPlus", dict(deep_supervision=True), "deep_supervision"), ("Unet", dict(decoder_use_norm={"type": "groupnorm"}), "groupnorm"),
                                ("Unet", dict(encoder_name="tu-test_vit"), "bridge")]:
        model = getattr(segkit, name)(**dict(encoder_name="resnet18", encoder_weights=None) | options)
        with pytest.raises(ValueError, match=says): smp_state_dict(model)
