"""Adapters against SMP itself: the same tensors go in strictly, the same numbers come out."""
import inspect
from importlib import import_module

import pytest
import torch

SMP = "segmentation_models_pytorch"
x8, x16, x32 = torch.randn(2, 8, 8, 12), torch.randn(2, 16, 4, 6), torch.randn(2, 32, 8, 8)
CHANNELS = (3, 8, 16, 24, 32, 40)
FEATURES = [torch.randn(2, c, 128//2**i, 192//2**i) for i, c in enumerate(CHANNELS)]
TOKENS = [torch.randn(2, 1, 32) for _ in range(4)]
MAPS = [torch.randn(2, 32, 4, 6) for _ in range(4)]
WIDTHS = (24, 20, 16, 12, 8)


def up(x, channels): return torch.randn(len(x), channels, 2*x.shape[2], 2*x.shape[3])


# module, name, keywords of the constructor, arguments of the call
PARTS = [
    ("decoders.unet.decoder", "UnetDecoderBlock", dict(in_channels=16, skip_channels=4, out_channels=18, attention_type="scse"), (x16, 16, 24, torch.randn(2, 4, 16, 24))),
    ("decoders.unet.decoder", "UnetDecoderBlock", dict(in_channels=8, skip_channels=0, out_channels=6), (x8, 15, 23)),
    ("decoders.unet.decoder", "UnetDecoderBlock", dict(in_channels=16, skip_channels=0, out_channels=18, attention_type="scse", interpolation_mode="bilinear"), (x16, 15, 23)),
    ("decoders.unet.decoder", "UnetCenterBlock", dict(in_channels=8, out_channels=6, use_norm="identity"), (x8,)),
    ("decoders.unet.decoder", "UnetDecoder", dict(encoder_channels=CHANNELS, decoder_channels=(24, 20, 18, 17, 16), n_blocks=5, attention_type="scse"), (FEATURES,)),
    ("decoders.unet.decoder", "UnetDecoder", dict(encoder_channels=CHANNELS[:4], decoder_channels=WIDTHS[:3], n_blocks=3, add_center_block=True), (FEATURES[:4],)),
    ("decoders.unetplusplus.decoder", "DecoderBlock", dict(in_channels=8, skip_channels=4, out_channels=6), (x8, up(x8, 4))),
    ("decoders.unetplusplus.decoder", "DecoderBlock", dict(in_channels=8, skip_channels=0, out_channels=6, interpolation_mode="bilinear"), (x8,)),
    ("decoders.unetplusplus.decoder", "CenterBlock", dict(in_channels=8, out_channels=6), (x8,)),
    ("decoders.unetplusplus.decoder", "UnetPlusPlusDecoder", dict(encoder_channels=CHANNELS, decoder_channels=WIDTHS, n_blocks=5), (FEATURES,)),
    ("decoders.manet.decoder", "PABBlock", dict(in_channels=8, pab_channels=4), (x8,)),
    ("decoders.manet.decoder", "MFABBlock", dict(in_channels=8, skip_channels=16, out_channels=6, reduction=4), (x8, up(x8, 16))),
    ("decoders.manet.decoder", "DecoderBlock", dict(in_channels=8, skip_channels=0, out_channels=6), (x8,)),
    ("decoders.manet.decoder", "DecoderBlock", dict(in_channels=8, skip_channels=4, out_channels=6), (x8, up(x8, 4))),
    ("decoders.manet.decoder", "MAnetDecoder", dict(encoder_channels=CHANNELS, decoder_channels=WIDTHS, n_blocks=5, reduction=8, pab_channels=4), (FEATURES,)),
    ("decoders.linknet.decoder", "TransposeX2", dict(in_channels=8, out_channels=6), (x8,)),
    ("decoders.linknet.decoder", "DecoderBlock", dict(in_channels=8, out_channels=6), (x8, up(x8, 6))),
    ("decoders.linknet.decoder", "LinknetDecoder", dict(encoder_channels=CHANNELS, prefinal_channels=10, n_blocks=5), (FEATURES,)),
    ("decoders.fpn.decoder", "Conv3x3GNReLU", dict(in_channels=8, out_channels=32, upsample=True), (x8,)),
    ("decoders.fpn.decoder", "Conv3x3GNReLU", dict(in_channels=8, out_channels=32), (x8,)),
    ("decoders.fpn.decoder", "FPNBlock", dict(pyramid_channels=8, skip_channels=4, interpolation_mode="nearest"), (x8, up(x8, 4))),
    ("decoders.fpn.decoder", "SegmentationBlock", dict(in_channels=8, out_channels=32, n_upsamples=2), (x8,)),
    ("decoders.fpn.decoder", "SegmentationBlock", dict(in_channels=8, out_channels=32), (x8,)),
    ("decoders.fpn.decoder", "MergeBlock", dict(policy="cat"), ([x8, x8],)),
    ("decoders.fpn.decoder", "FPNDecoder", dict(encoder_channels=CHANNELS, encoder_depth=5, pyramid_channels=16, segmentation_channels=32, merge_policy="cat"), (FEATURES,)),
    ("decoders.pspnet.decoder", "PSPBlock", dict(in_channels=8, out_channels=6, pool_size=2), (x8,)),
    ("decoders.pspnet.decoder", "PSPModule", dict(in_channels=8), (x8,)),
    ("decoders.pspnet.decoder", "PSPDecoder", dict(encoder_channels=CHANNELS, out_channels=16), (FEATURES,)),
    ("decoders.deeplabv3.decoder", "ASPPConv", dict(in_channels=8, out_channels=6, dilation=2), (x8,)),
    ("decoders.deeplabv3.decoder", "ASPPSeparableConv", dict(in_channels=8, out_channels=6, dilation=2), (x8,)),
    ("decoders.deeplabv3.decoder", "ASPPPooling", dict(in_channels=8, out_channels=6), (x8,)),
    ("decoders.deeplabv3.decoder", "ASPP", dict(in_channels=8, out_channels=6, atrous_rates=(1, 2, 3), separable=True, dropout=.5), (x8,)),
    ("decoders.deeplabv3.decoder", "SeparableConv2d", dict(in_channels=8, out_channels=6, kernel_size=3, stride=2, padding=1, dilation=1), (x8,)),
    ("decoders.deeplabv3.decoder", "DeepLabV3Decoder", dict(in_channels=40, out_channels=8, atrous_rates=(1, 2, 3), aspp_separable=False, aspp_dropout=.5), (FEATURES,)),
    ("decoders.deeplabv3.decoder", "DeepLabV3PlusDecoder", dict(encoder_channels=CHANNELS, encoder_depth=5, out_channels=8, atrous_rates=[1, 2, 3], output_stride=16, aspp_separable=True, aspp_dropout=.5),
     ([*FEATURES[:5], torch.randn(2, 40, 8, 12)],)),
    ("decoders.pan.decoder", "ConvBnRelu", dict(in_channels=8, out_channels=6, kernel_size=3, padding=1, interpolate=True), (x8,)),
    ("decoders.pan.decoder", "ConvBnRelu", dict(in_channels=8, out_channels=6, kernel_size=1, add_relu=False), (x8,)),
    ("decoders.pan.decoder", "FPABlock", dict(in_channels=32, out_channels=6), (x32,)),
    ("decoders.pan.decoder", "GAUBlock", dict(in_channels=4, out_channels=8), (up(x8, 4), x8)),
    ("decoders.pan.decoder", "PANDecoder", dict(encoder_channels=CHANNELS, encoder_depth=5, decoder_channels=8), ([*FEATURES[:5], torch.randn(2, 40, 8, 12)],)),
    ("decoders.upernet.decoder", "PSPModule", dict(in_channels=8, out_channels=6), (x8,)),
    ("decoders.upernet.decoder", "LayerNorm2d", dict(normalized_shape=8), (x8,)),
    ("decoders.upernet.decoder", "FPNLateralBlock", dict(lateral_channels=4, out_channels=8), (x8, up(x8, 4))),
    ("decoders.upernet.decoder", "UPerNetDecoder", dict(encoder_channels=CHANNELS, encoder_depth=5, decoder_channels=8), (FEATURES,)),
    ("decoders.segformer.decoder", "MLP", dict(skip_channels=8, segmentation_channels=6), (x8,)),
    ("decoders.segformer.decoder", "SegformerDecoder", dict(encoder_channels=CHANNELS, encoder_depth=5, segmentation_channels=8), (FEATURES,)),
    ("decoders.dpt.decoder", "ReadoutConcatBlock", dict(embed_dim=8, has_prefix_tokens=True), (x8, torch.randn(2, 1, 8))),
    ("decoders.dpt.decoder", "ReadoutAddBlock", {}, (x8, torch.randn(2, 3, 8))),
    ("decoders.dpt.decoder", "ReadoutIgnoreBlock", {}, (x8, torch.randn(2, 3, 8))),
    ("decoders.dpt.decoder", "ReassembleBlock", dict(in_channels=8, mid_channels=4, out_channels=6, upsample_factor=4), (x8,)),
    ("decoders.dpt.decoder", "ReassembleBlock", dict(in_channels=8, mid_channels=4, out_channels=6, upsample_factor=.5), (x8,)),
    ("decoders.dpt.decoder", "ResidualConvBlock", dict(feature_dim=8), (x8,)),
    ("decoders.dpt.decoder", "FusionBlock", dict(feature_dim=8), (x8, x8.flip(0))),
    ("decoders.dpt.decoder", "FusionBlock", dict(feature_dim=8), (x8,)),
    ("decoders.dpt.decoder", "DPTDecoder", dict(encoder_out_channels=(32,)*4, intermediate_channels=(8, 8, 8, 8), fusion_channels=16), (MAPS, TOKENS)),
    ("decoders.dpt.decoder", "DPTSegmentationHead", dict(in_channels=8, out_channels=2, activation=None, kernel_size=3, upsampling=2.0), (x8,)),
    ("base.heads", "SegmentationHead", dict(in_channels=8, out_channels=2, kernel_size=3, activation="sigmoid", upsampling=2), (x8,)),
    ("base.heads", "ClassificationHead", dict(in_channels=8, classes=3, pooling="max", dropout=.2, activation=None), (x8,)),
    ("base.modules", "SCSEModule", dict(in_channels=16, reduction=4), (x16,)),
]


def both(module, name): return [getattr(import_module(f"{top}.{module}"), name) for top in ("segkit.compat.smp", SMP)]


def shaken(model):
    "Statistics of norms that are not those of a fresh module"
    for key, t in model.state_dict().items():
        if key.endswith(("running_mean", "bias")): t.normal_()
        if key.endswith("running_var"): t.uniform_(.5, 2)
    return model.eval()


@pytest.mark.parametrize(("module", "name", "options", "inputs"), PARTS, ids=[f"{name}-{i}" for i, (_, name, _, _) in enumerate(PARTS)])
def test_part(module, name, options, inputs):
    "Arguments by SMP's names, tensors strictly, numbers, and the call by place and by SMP's names"
    ours, theirs = (cls(**options).eval() for cls in both(module, name))
    state = shaken(theirs).state_dict()
    ours.load_state_dict(state)
    with torch.no_grad():
        expected = theirs(*inputs)
        torch.testing.assert_close(ours(*inputs), expected, rtol=1e-5, atol=1e-5)
        if "forward" not in vars(type(theirs)) or not module.endswith(".decoder"): return
        names = [p for p in inspect.signature(theirs.forward).parameters if p not in ("args", "kwargs")]
        if name == "MergeBlock" or len(names) < len(inputs): return
        torch.testing.assert_close(ours(**dict(zip(names, inputs))), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for module, name, *_ in PARTS if name.endswith("Decoder")])
def test_wrong_number_of_stages(name):
    "SMP's number of stages is checked against the channels"
    module, options = next((m, o) for m, n, o, _ in PARTS if n == name)
    count = next((argument for argument in ("n_blocks", "encoder_depth") if argument in options), None)
    if count is None: pytest.skip("this decoder takes no number of stages")
    with pytest.raises(ValueError, match=f"{count}=4"): both(module, name)[0](**{**options, count: 4})


@pytest.mark.parametrize("model", ["Unet", "UnetPlusPlus", "FPN", "MAnet", "Linknet"])
def test_blocks_of_the_tree_stand_in_models_of_segkit(model):
    "A part of the tree, put into a model of segkit in the place of its own, gives the same mask"
    import segkit
    from segkit.compat.smp import decoders
    net = shaken(getattr(segkit, model)("resnet18", encoder_weights=None))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): before = net(x)
    if model == "Unet":
        part = decoders.unet.decoder.UnetDecoderBlock(512, 256, 256)
        part.load_state_dict(net.decoder.blocks[0].state_dict())
        net.decoder.blocks[0] = part
    elif model == "UnetPlusPlus":
        part = decoders.unetplusplus.decoder.DecoderBlock(512, 256, 256)
        part.load_state_dict(net.decoder.blocks["x_0_0"].state_dict())
        net.decoder.blocks["x_0_0"] = part
    elif model == "FPN":
        part = decoders.fpn.decoder.SegmentationBlock(256, 128, 2)
        part.load_state_dict(net.decoder.seg_blocks[1].state_dict())
        net.decoder.seg_blocks[1] = part
    elif model == "MAnet":
        part = decoders.manet.decoder.MFABBlock(512, 256, 256)
        part.load_state_dict(net.decoder.blocks[0].state_dict())
        net.decoder.blocks[0] = part
    else:
        part = decoders.linknet.decoder.DecoderBlock(512, 256)
        part.load_state_dict(net.decoder.blocks[0].state_dict())
        net.decoder.blocks[0] = part
    with torch.no_grad(): torch.testing.assert_close(net.eval()(x), before)


# ---- functions

p, t = torch.rand(2, 3, 5, 7), torch.randint(2, (2, 3, 5, 7)).float()
LABELS = torch.randint(3, (2, 5, 7))
FUNCTIONS = [
    *[("losses._functional", name, (p, t), options) for name in ("soft_jaccard_score", "soft_dice_score")
      for options in ({}, dict(smooth=.5, eps=1e-3, dims=(0, 2, 3)))],
    ("losses._functional", "soft_tversky_score", (p, t, .3, .7), dict(smooth=1., dims=(0, 2))),
    ("losses._functional", "soft_dice_score", (p*0, t*0), {}),
    *[("losses._functional", "focal_loss_with_logits", (4*p - 2, t), options) for options in (
        {}, dict(gamma=0, alpha=None), dict(reduction="none"), dict(reduction="sum", normalized=True),
        dict(reduction="batchwise_mean", reduced_threshold=.5), dict(alpha=.7, gamma=1.5))],
    *[("losses._functional", "softmax_focal_loss_with_logits", (4*p - 2, LABELS), options) for options in (
        {}, dict(reduction="none"), dict(normalized=True), dict(reduced_threshold=.5, reduction="sum"))],
    *[("losses._functional", "wing_loss", (9*p, 9*t), options) for options in ({}, dict(width=2, curvature=1.5, reduction="sum"), dict(reduction="none"))],
    *[("losses._functional", "label_smoothed_nll_loss", (p.log_softmax(1), LABELS, .1), options) for options in (
        dict(dim=1), dict(dim=1, ignore_index=1), dict(dim=1, reduction="sum"), dict(dim=1, reduction="none"), dict(dim=1, ignore_index=2, reduction="none"))],
    ("losses._functional", "to_tensor", ([1., 2.],), dict(dtype=torch.float64)),
    *[("utils.functional", name, (p, t), options) for name in ("iou", "jaccard", "f_score", "precision", "recall")
      for options in ({}, dict(threshold=.5), dict(eps=1., ignore_channels=[1]))],
    ("utils.functional", "f_score", (p, t), dict(beta=2)),
    ("utils.functional", "accuracy", (p, t), {}),
    ("utils.functional", "accuracy", (p, t), dict(threshold=.3, ignore_channels=[0, 2])),
]


@pytest.mark.parametrize(("module", "name", "inputs", "options"), FUNCTIONS, ids=[f"{f[1]}-{i}" for i, f in enumerate(FUNCTIONS)])
def test_function(module, name, inputs, options):
    ours, theirs = both(module, name)
    torch.testing.assert_close(ours(*inputs, **options), theirs(*inputs, **options), rtol=1e-5, atol=1e-6)


OBJECTS = [
    ("utils.losses", "JaccardLoss", dict(activation="sigmoid")), ("utils.losses", "DiceLoss", dict(beta=2., ignore_channels=[0])),
    ("utils.losses", "L1Loss", {}), ("utils.losses", "MSELoss", {}), ("utils.losses", "BCEWithLogitsLoss", dict(reduction="sum")), ("utils.losses", "BCELoss", {}),
    ("utils.metrics", "IoU", {}), ("utils.metrics", "Fscore", dict(beta=2)), ("utils.metrics", "Accuracy", {}),
    ("utils.metrics", "Recall", dict(activation="sigmoid")), ("utils.metrics", "Precision", dict(threshold=.3, ignore_channels=[1])),
]


@pytest.mark.parametrize(("module", "name", "options"), OBJECTS, ids=[name for _, name, _ in OBJECTS])
def test_losses_and_metrics_of_the_old_loop(module, name, options):
    "The same number under the same name"
    ours, theirs = (cls(**options) for cls in both(module, name))
    torch.testing.assert_close(ours(p, t), theirs(p, t))
    assert ours.__name__ == theirs.__name__


def test_names_of_combined_losses():
    def combined(top):
        losses = import_module(f"{top}.utils.losses")
        return [losses.DiceLoss() + losses.BCELoss(), 2*losses.DiceLoss(), .5*(losses.DiceLoss() + losses.L1Loss()) + losses.CrossEntropyLoss()]
    ours, theirs = combined("segkit.compat.smp"), combined(SMP)
    assert [loss.__name__ for loss in ours] == [loss.__name__ for loss in theirs]
    torch.testing.assert_close(ours[0](p, t), theirs[0](p, t))
    losses = import_module("segkit.compat.smp.utils.losses")
    assert sum([losses.DiceLoss(), losses.L1Loss()]).__name__ == "dice_loss + l1_loss"
    with pytest.raises(ValueError, match="expected a loss"): losses.DiceLoss() + torch.nn.L1Loss()
    with pytest.raises(ValueError, match="expected a number"): losses.DiceLoss()*"2"


def test_meter():
    ours, theirs = (cls() for cls in both("utils.meter", "AverageValueMeter"))
    for number in (3., 1., 4., 1.5):
        for meter in (ours, theirs): meter.add(number)
        assert ours.value() == pytest.approx(theirs.value())


def test_epochs_train_as_smps():
    "The same network, seed and batches: the same logs, epoch by epoch"
    def logs(top):
        utils = import_module(f"{top}.utils")
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 1))
        loss = utils.losses.DiceLoss(activation="sigmoid") + utils.losses.BCEWithLogitsLoss()
        metrics = [utils.metrics.IoU(threshold=.5, activation="sigmoid"), utils.metrics.Fscore(activation="sigmoid")]
        train = utils.train.TrainEpoch(net, loss=loss, metrics=metrics, optimizer=torch.optim.Adam(net.parameters(), .01), device="cpu", verbose=False)
        valid = utils.train.ValidEpoch(net, loss=loss, metrics=metrics, device="cpu", verbose=False)
        data = torch.utils.data.DataLoader(list(zip(torch.randn(6, 3, 8, 8), torch.randint(2, (6, 3, 8, 8)).float())), batch_size=4)
        return [epoch.run(data) for _ in range(2) for epoch in (train, valid)]
    for ours, theirs in zip(logs("segkit.compat.smp"), logs(SMP), strict=True):
        assert list(ours) == list(theirs) and list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-4)


# ---- encoders

def test_resnet_of_blocks():
    options = dict(out_channels=(3, 64, 256, 512, 1024, 2048), depth=4, layers=[1, 2, 1, 1], groups=2, width_per_group=32)
    ours, theirs = both("encoders.resnet", "ResNetEncoder")
    block = both("encoders.resnet", "Bottleneck")
    assert block[0] is block[1]
    ours, theirs = ours(block=block[0], **options), theirs(block=block[0], **options)
    ours.load_state_dict({name: t for name, t in theirs.state_dict().items() if name in ours.state_dict()})
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(ours.eval()(x), theirs.eval()(x), strict=True): torch.testing.assert_close(a, b)
    assert list(ours.out_channels) == list(theirs.out_channels) and ours.output_stride == theirs.output_stride == 16
    for encoder in (ours, theirs): encoder.make_dilated(8)
    torch.testing.assert_close(ours(x)[-1], theirs(x)[-1])


def test_own_encoder_of_smps_class_in_the_table():
    "SMP's way to a wider network: an entry in the table, used by name"
    from segkit.compat import smp
    from segkit.compat.smp.encoders.resnet import Bottleneck, ResNetEncoder
    smp.encoders.encoders["wide"] = {"encoder": ResNetEncoder, "pretrained_settings": {}, "params": {
        "out_channels": (3, 64, 256, 512, 1024, 2048), "block": Bottleneck, "layers": [1, 1, 1, 1], "width_per_group": 32}}
    try:
        for depth in (3, 5):
            model = smp.Unet("wide", encoder_depth=depth, encoder_weights=None, decoder_channels=(32, 16, 8, 8, 8)[:depth], in_channels=4).eval()
            assert model(torch.randn(1, 4, 64, 64)).shape == (1, 1, 64, 64)
    finally: del smp.encoders.encoders["wide"]


def test_tables_have_smps_names():
    import segmentation_models_pytorch.encoders as theirs

    from segkit.compat.smp import encoders as ours
    for table in (name for name in dir(theirs) if name.endswith("_encoders") and name != "get_encoder_names"):
        assert set(getattr(ours, table)) >= set(getattr(theirs, table)), table
        for name, entry in getattr(ours, table).items():
            assert set(entry) >= {"encoder", "pretrained_settings", "params"} and entry is ours.encoders[name]
    assert [ours.is_equivalent_to_timm_universal(n) for n in ("timm-regnetx_002", "timm-gernet_l", "timm-efficientnet-b0", "resnet18")] == [
        theirs.is_equivalent_to_timm_universal(n) for n in ("timm-regnetx_002", "timm-gernet_l", "timm-efficientnet-b0", "resnet18")]


def test_surgery():
    for top in ("segkit.compat.smp", SMP):
        utils = import_module(f"{top}.encoders._utils")
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.nn.Conv2d(4, 4, (3, 3), stride=2))
        weight = net[0].weight.clone()
        utils.patch_first_conv(net, 5)
        utils.replace_strides_with_dilation(net, 2)
        torch.testing.assert_close(net[0].weight[:, 3]*5/3, weight[:, 0])
        assert [(c.stride, tuple(c.dilation), tuple(c.padding)) for c in net] == [((1, 1), (2, 2), (2, 2))]*2


# ---- data sets

def test_pets(tmp_path):
    "SMP's class and ours read a drawn tree alike"
    import numpy as np

    from segkit.data.tiny import write_tiny_pets
    write_tiny_pets(tmp_path, n=24)
    for name in ("OxfordPetDataset", "SimpleOxfordPetDataset"):
        ours, theirs = both("datasets", name)
        for mode in ("train", "valid", "test"):
            a, b = ours(str(tmp_path), mode), theirs(str(tmp_path), mode)
            assert a.filenames == b.filenames and len(a) == len(b)
            for key, value in b[1].items(): np.testing.assert_array_equal(a[1][key], value, err_msg=key)
            assert a[1]["mask"].dtype == b[1]["mask"].dtype
    ours = both("datasets", "OxfordPetDataset")[0](tmp_path, transform=lambda image, **rest: dict(image=image[:1], **rest))
    assert ours[0]["image"].shape == (1, 80, 3)


def test_pets_are_fetched_whole(tmp_path, monkeypatch):
    "From archives like the real ones; what is there stays, a damaged file leaves no folder"
    import hashlib
    import shutil

    from segkit.compat.smp.datasets import OxfordPetDataset
    from segkit.core.archive import Archive
    from segkit.data import pets
    from segkit.data.tiny import write_tiny_pets
    write_tiny_pets(tmp_path/"made", n=24)
    archives = []
    for name in ("images", "annotations"):
        file = shutil.make_archive(str(tmp_path/name), "gztar", tmp_path/"made", name)
        archives.append(Archive(f"file://{file}", md5=hashlib.md5(open(file, "rb").read()).hexdigest()))
    monkeypatch.setattr(pets, "PETS", (archives[0], Archive(archives[1].url, md5="0"*32)))
    root = tmp_path/"pets"
    with pytest.raises(ValueError, match="checksum"): OxfordPetDataset.download(root)
    assert (root/"images").is_dir() and not (root/"annotations").exists()
    monkeypatch.setattr(pets, "PETS", tuple(archives))
    OxfordPetDataset.download(root)
    assert len(OxfordPetDataset(root)) == 10
    OxfordPetDataset.download(root)
