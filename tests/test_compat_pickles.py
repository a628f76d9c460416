"""Whole models that SMP pickled, read in a process where SMP's name leads to segkit."""
import json
import re
import subprocess
import sys

import pytest

# file -> class, encoder, options, what is done to the model before it is pickled
MODELS = {
    "unet": ("Unet", "resnet18", {}, ""), "unet-mobilenet": ("Unet", "mobilenet_v2", {}, ""),
    "unet-timm": ("Unet", "tu-resnet18", {"decoder_attention_type": "scse"}, ""),
    "unet-mobileone": ("Unet", "mobileone_s0", {"encoder_depth": 3, "decoder_channels": (16, 8, 8)}, ""),
    "unetplusplus": ("UnetPlusPlus", "vgg11", {"decoder_channels": (16,)*5}, ""), "manet": ("MAnet", "resnet18", {}, ""),
    "linknet": ("Linknet", "resnet18", {"in_channels": 5}, ""), "fpn": ("FPN", "mobilenet_v2", {"activation": "sigmoid"}, ""),
    "fpn-timm": ("FPN", "tu-mobilenetv2_100", {}, ""), "pspnet": ("PSPNet", "resnet18", {}, ""),
    "deeplabv3": ("DeepLabV3", "mobilenet_v2", {}, ""), "deeplabv3plus": ("DeepLabV3Plus", "resnet18", {"encoder_output_stride": 8}, ""),
    "deeplabv3plus-timm": ("DeepLabV3Plus", "tu-resnet18", {}, ""), "pan": ("PAN", "resnet18", {}, ""),
    "upernet": ("UPerNet", "resnet18", {"decoder_channels": 16}, ""), "segformer": ("Segformer", "mobilenet_v2", {}, ""),
    "dpt": ("DPT", "tu-test_vit", {"encoder_depth": 2, "decoder_intermediate_channels": (8, 8), "decoder_fusion_channels": 8, "dynamic_img_size": True}, ""),
    # what a user did to the model comes along, or is refused
    "half": ("FPN", "resnet18", {}, "model.double()"),
    "frozen": ("FPN", "resnet18", {}, "model.train().freeze_encoder()"),
    "mode": ("FPN", "resnet18", {}, "model.train(); model.encoder.eval(); model.decoder.p5.weight.requires_grad_(False)"),
    "own attribute": ("FPN", "resnet18", {}, "model.labels = ['road', 'sky']"),
    "parent": ("FPN", "resnet18", {}, "model = torch.nn.DataParallel(model)"),
    "conversion": ("Unet", "efficientnet-b0", {}, ""), "class": ("Unet", "mit_b0", {}, ""), "another": ("Unet", "se_resnet50", {}, ""),
    "softmax": ("FPN", "resnet18", {}, "model.segmentation_head[2] = torch.nn.Softmax(dim=1)"),
    "inner": ("Unet", "resnet18", {}, "model.decoder.blocks[0].conv1[2] = torch.nn.LeakyReLU()"),
    "head": ("FPN", "resnet18", {}, "model.segmentation_head = torch.nn.Conv2d(128, 2, 1)"),
    "beside": ("FPN", "resnet18", {}, "model.extra = torch.nn.Linear(2, 2)"),
}
ERRORS = {
    "conversion": r"ImportError: .*encoders\._efficientnet", "class": "AttributeError: .*OverlapPatchEmbed", "another": r"ImportError: .*encoders\._senet",
    "softmax": "FPN .*activation.Softmax was put into it", "inner": "Unet .*LeakyReLU was put into it",
    "head": "FPN .*segmentation_head", "beside": "FPN .*extra.weight",
}
WRITE = """
import segmentation_models_pytorch as smp, torch
for file, (name, encoder, options, change) in json.loads(sys.argv[1]).items():
    torch.manual_seed(0)
    model = getattr(smp, name)(encoder, encoder_weights=None, classes=2, aux_params=dict(classes=3), **options).eval()
    for p in model.parameters():
        if p.dim() == 1: p.data.uniform_(.5, 1.5)
    exec(change)
    x = torch.randn(1, options.get("in_channels", 3), *[128 if name == "PAN" else 64]*2, dtype=next(model.parameters()).dtype)
    modes = [m.training for m in model.modules()] if file == "mode" else []
    with torch.no_grad(): outputs = [] if file in ("mode", "frozen") else [*model(x)] if isinstance(model(x), tuple) else [model(x)]
    torch.save((model, x, outputs), f"{file}.pt")
"""
READ = """
import torch
from segkit.compat.smp import install
install()
assert not [n for n in sys.modules if n.startswith("segmentation_models_pytorch.")]
found = {}
for file, (name, *_) in json.loads(sys.argv[1]).items():
    before = torch.get_rng_state()
    try:
        model, x, outputs = torch.load(f"{file}.pt", weights_only=False)
        apart = 0.
        for ours, theirs in zip(model(x) if outputs else [], outputs, strict=True):
            apart = max(apart, ((ours - theirs).abs().max()/theirs.abs().max()).item())
        inner = getattr(model, "module", model)
        found[file] = dict(apart=apart, kind=type(inner).__module__, labels=getattr(inner, "labels", None), training=inner.training,
                           encoder=[inner.encoder.training, inner.encoder.bn1.training] if hasattr(inner.encoder, "bn1") else None,
                           fixed=[n for n, p in inner.named_parameters() if not p.requires_grad], rng=torch.equal(before, torch.get_rng_state()))
        torch.save(model, "again.pt")
        again = torch.load("again.pt", weights_only=False)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    except Exception as error: found[file] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    "What came of each file: SMP writes in one process, segkit reads in another"
    for program in (WRITE, READ):
        command = [sys.executable, "-W", "ignore", "-c", f"import json, sys\n{program}", json.dumps(MODELS)]
        done = subprocess.run(command, cwd=tmp_path_factory.getbasetemp(), text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("file", [file for file in MODELS if file not in ERRORS])
def test_it_predicts_equal_numbers(read, file):
    found = read[file]
    assert isinstance(found, dict), found
    assert found["apart"] < 1e-4 and found["kind"].startswith("segkit.decoders.") and found["rng"]


@pytest.mark.parametrize("file", ERRORS)
def test_what_cannot_be_read_says_how_to_convert(read, file):
    assert isinstance(read[file], str) and re.search(ERRORS[file], read[file], re.S)
    assert "segmentation_models_pytorch" in read[file] and "save model.state_dict()" in read[file] and "0x" not in read[file]


def test_what_the_user_did_comes_along(read):
    assert read["own attribute"]["labels"] == ["road", "sky"]
    assert read["frozen"]["training"] and not read["frozen"]["encoder"][1] and "encoder.conv1.weight" in read["frozen"]["fixed"]
    assert read["mode"]["training"] and read["mode"]["encoder"] == [False, False] and read["mode"]["fixed"] == ["decoder.p5.weight"]
