"""The fused form of every model computes what the model computes."""
import copy
import io
import pickle

import pytest
import torch
from oracle import randomise, relative_error
from torch import nn
from torch.export import Dim, export

import segkit
from segkit.core.registry import architectures
from segkit.encoders.base import EncoderMixin
from segkit.inference.fuse import Fused, fuse
from segkit.inference.packed import PackedConv2d
from segkit.inference.rewrites import Forms, settle

LABELS = {"classes": 3, "pooling": "avg", "dropout": 0.3}
FIVE = dict(decoder_channels=(32, 24, 16, 12, 8))
NARROW = {"unet": FIVE, "unetplusplus": FIVE, "manet": FIVE, "linknet": {}, "pan": {}, "pspnet": dict(psp_out_channels=48, encoder_depth=4),
          "fpn": dict(decoder_pyramid_channels=48, decoder_segmentation_channels=32), "deeplabv3": dict(decoder_channels=32), "deeplabv3plus": dict(decoder_channels=64),
          "upernet": dict(decoder_channels=32), "segformer": dict(decoder_segmentation_channels=32),
          "dpt": dict(decoder_intermediate_channels=(16, 24, 32, 32), decoder_fusion_channels=32)}


class Tiny(nn.Module, EncoderMixin):
    "Two convolutions a stage: quick to build and to run"
    def __init__(self):
        super().__init__()
        self._out_channels, self._depth = [3, 8, 12, 16, 20, 24], 5
        def unit(i, o, stride): return nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()
        self.stages = nn.ModuleList(nn.Sequential(*unit(i, o, 2), *unit(o, o, 1)) for i, o in zip(self._out_channels, self._out_channels[1:]))

    def forward(self, x):
        maps = [x]
        for stage in self.stages[:self._depth]: maps.append(stage(maps[-1]))
        return maps

    def get_stages(self): return {2**(i+1): [stage] for i, stage in enumerate(self.stages) if i >= 3}


def build(arch, encoder=None, **options):
    encoder = encoder or ("tu-vit_tiny_patch16_224" if arch == "dpt" else Tiny())
    torch.manual_seed(0)
    return randomise(segkit.create_model(arch, encoder, None, classes=5, aux_params=LABELS, **NARROW[arch] | options)).eval()


def outputs(model, x):
    with torch.no_grad(): return model(x)


def assert_equal(a, b, tolerance):
    for p, q in zip(a, b, strict=True):
        assert p.shape == q.shape
        assert relative_error(p.double(), q.double()) <= tolerance


every = pytest.mark.parametrize("arch", sorted(architectures))


@pytest.fixture(scope="module")
def models():
    "Each architecture once, with its fused form"
    made = {}
    def get(arch):
        if arch not in made:
            model = build(arch)
            made[arch] = model, fuse(model)
        return made[arch]
    return get


@every
def test_single_precision(arch, models):
    "Within 2e-5 of the float64 result, with packed convolutions and without"
    model, fused = models(arch)
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = outputs(copy.deepcopy(model).double(), x.double())
    assert_equal(outputs(fused, x), expected, 2e-5)
    assert any(m._packed is not None for m in fused.modules() if isinstance(m, PackedConv2d)) == torch.backends.mkldnn.is_available()
    with torch.backends.mkldnn.flags(enabled=False): assert_equal(outputs(fused, x), expected, 2e-5)


CASES = [*((arch, {}) for arch in sorted(architectures)),
         ("unet", dict(decoder_attention_type="scse")), ("unet", dict(decoder_use_norm="layernorm")), ("unet", dict(decoder_interpolation="bilinear")),
         ("unet", dict(decoder_use_norm=False, encoder_depth=3, decoder_channels=(32, 16, 8))), ("unet", dict(encoder="mit_b0")),
         ("unetplusplus", dict(decoder_attention_type="scse", decoder_interpolation="bicubic")), ("unetplusplus", dict(deep_supervision=True)),
         ("unetplusplus", dict(level=2)), ("manet", dict(decoder_pab_form="rowwise", decoder_use_norm="groupnorm")),
         ("linknet", dict(encoder="mit_b0", decoder_use_norm="instancenorm")), ("linknet", dict(decoder_use_norm=False)),
         ("fpn", dict(decoder_merge_policy="cat")), ("fpn", dict(decoder_interpolation="bilinear")), ("fpn", dict(encoder="mit_b0", encoder_depth=3)),
         ("fpn", dict(decoder_segmentation_channels=64, decoder_pyramid_channels=8)), ("unet", dict(encoder="resnet18")), ("fpn", dict(upsampling=1, activation="sigmoid")),
         ("pspnet", dict(decoder_use_norm="groupnorm")), ("pspnet", dict(encoder_depth=3)), ("deeplabv3", dict(decoder_aspp_separable=True, encoder_output_stride=16)),
         ("deeplabv3", dict(decoder_atrous_rates=(1, 5, 9), activation="softmax2d")), ("deeplabv3plus", dict(decoder_aspp_separable=False)),
         ("deeplabv3plus", dict(decoder_interpolation="nearest")), ("pan", dict(decoder_interpolation="nearest", encoder_output_stride=32)),
         ("upernet", dict(decoder_use_norm="groupnorm", encoder_depth=4)), ("upernet", dict(encoder="mit_b0")),
         ("segformer", dict(encoder="mit_b0")), ("segformer", dict(encoder_depth=3)), ("dpt", dict(decoder_readout="add")), ("dpt", dict(decoder_readout="ignore")),
         ("unet", dict(encoder="tu-densenet121")), ("fpn", dict(encoder="tu-convnext_atto")), ("segformer", dict(encoder="tu-mobilenetv3_small_050")),
         *((arch, dict(decoder_interpolation=mode)) for arch in ("segformer", "pspnet", "upernet", "manet") for mode in ("nearest", "bicubic", "area")),
         ("unet", dict(encoder="tu-resnet10t", in_channels=1)), ("linknet", dict(encoder="tu-mobileone_s0")), ("fpn", dict(encoder="tu-resnet50", encoder_depth=3))]


@pytest.mark.parametrize("arch, options", CASES)
def test_double_precision(arch, options):
    "Equal to 1e-12, with both heads, at a size where everything doubles and at one where nothing does"
    model = build(arch, **options).double()
    fused = fuse(model)
    for size in ((64, 96), (65, 71)):
        x = torch.randn(1, model.encoder.in_channels, *size, dtype=torch.float64)
        # a softmax multiplies rounding by the size of its scores, which are in the hundreds in a MAnet with random statistics
        assert_equal(outputs(fused, x), outputs(model, x), 1e-11 if arch == "manet" else 1e-12)


@pytest.mark.parametrize("arch", ["unetplusplus", "upernet", "dpt"])
def test_both_forms_of_each_part(arch):
    "What a race may choose is equal, too"
    model, x = build(arch).double(), torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected, seen = outputs(model, x), []
    for pick in (0, 1, -1):
        def choose(m, x=None, pick=pick):
            for part in m.modules():
                if isinstance(part, Forms): part.chosen = list(part.forms)[pick]
            seen.append(choices := settle(m))
            return choices
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("segkit.inference.fuse.settle", choose)
            fused = fuse(model)
        assert_equal(outputs(fused, x), expected, 1e-12)
    assert seen[0] and [c.chosen for c in seen[0]] != [c.chosen for c in seen[1]]


def test_the_model_is_not_changed(models):
    model = build("unet").train()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    fused = fuse(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert not {t.data_ptr() for t in fused.state_dict().values()} & {t.data_ptr() for t in model.state_dict().values()}
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) and not any(isinstance(m, (nn.BatchNorm2d, nn.Dropout)) for m in fused.modules())


def test_a_race_chooses(models):
    model, _ = models("upernet")
    x = torch.randn(1, 3, 64, 64)
    fused = fuse(model, x)
    assert fused.choices and all(c.times and c.chosen in c.times for c in fused.choices)
    assert "memory format" in str(fused.choices) and "small" in str(fused.choices)
    assert_equal(outputs(fused, x), outputs(model, x), 2e-5)


@pytest.mark.parametrize("arch", ["unet", "upernet", "dpt"])
def test_travels(arch, models):
    "Copies, pickles, files, and another precision"
    model, fused = models(arch)
    x, file = torch.randn(1, 3, 64, 64), io.BytesIO()
    expected = outputs(fused, x)
    torch.save(fused, file)
    file.seek(0)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(file, weights_only=False), fused.double().float()):
        assert_equal(outputs(other, x), expected, 1e-6)
    assert len(pickle.dumps(fused)) < 1.6*len(pickle.dumps(model))


@pytest.mark.parametrize("arch", ["unet", "fpn", "upernet", "deeplabv3plus"])
def test_exports_with_free_sizes(arch, models):
    model, fused = models(arch)
    free = {0: Dim("b", min=1, max=64), 2: Dim("h", min=33, max=4096), 3: Dim("w", min=33, max=4096)}
    exported = export(fused, (torch.randn(2, 3, 65, 71),), dynamic_shapes=(free,)).module()
    x = torch.randn(3, 3, 64, 96)
    assert_equal(outputs(exported, x), outputs(model, x), 2e-5)


def test_gradients_of_the_image_still_flow(models):
    "As pictures of saliency need them"
    model, fused = models("unet")
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    grads = [torch.autograd.grad(m(x)[0].square().mean(), x)[0] for m in (fused, model)]
    assert relative_error(*grads) < 1e-3


def test_says_what_it_cannot_do(models):
    _, fused = models("unet")
    with pytest.raises(RuntimeError, match="inference only"): fused.train()
    assert not fused.eval().training
    with pytest.raises(TypeError, match="expected a segkit model, got Fused"): fuse(fused)
    with pytest.raises(ValueError, match="3 channels"): fused(torch.randn(1, 4, 64, 64))
    assert isinstance(fused, Fused)


def test_a_wrong_rewrite_is_refused(monkeypatch):
    "The result is compared with the model before it is returned"
    from segkit.decoders.linknet import LinknetBlock
    from segkit.inference.rewrites import rewrites
    monkeypatch.setitem(rewrites.table, LinknetBlock, lambda block, x, skip=None: block.block)  # forgets the skip
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, x, *ignored: [x := m(x) for m in self][-1] if len(self) else x)
    with pytest.raises(RuntimeError, match="differs from the original"): fuse(build("linknet"))


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "densenet121", "se_resnet50", "dpn68", "efficientnet-b0", "timm-efficientnet-b0", "mobilenet_v2",
                                  "mobileone_s0", "tu-resnet18", "tu-convnext_atto"])
def test_unread_maps_are_not_kept(name):
    "An FPN reads no map of stride 2: a fused encoder hands out its size, and the masks stay what they were"
    model = build("fpn", name)
    fused, x = fuse(model), torch.randn(2, 3, 64, 96)
    first, kept = (m.encoder(x)[1].shape for m in (fused.model, model))
    assert (first[1], first[2:], kept[1]) == (0, (32, 48), model.encoder.out_channels[1])
    assert_equal(outputs(fused, x), outputs(model, x), 1e-4)


@pytest.mark.parametrize("arch", ["unet", "manet", "linknet"])
def test_maps_may_come_in_a_tuple(arch):
    "A decoder that takes its maps out of the list gets one of its own"
    class Frozen(Tiny):
        def forward(self, x): return tuple(super().forward(x))
    model = build(arch, Frozen())
    x = torch.randn(1, 3, 64, 64)
    assert_equal(outputs(fuse(model), x), outputs(model, x), 1e-4)


def test_batches_in_pieces(models):
    "Images one, two or four at a time give what the whole batch gives, masks and labels"
    _, fused = models("unet")
    x, fused = torch.randn(5, 3, 64, 96), copy.deepcopy(fused)
    expected = outputs(fused, x)
    for n in (1, 2, 4, 5, 9):
        fused.at_once = n
        assert_equal(outputs(fused, x), expected, 1e-5)


def test_the_race_offers_pieces(models):
    "With a batch as an example there is a row for its size; with one image there is not"
    model, _ = models("linknet")
    parts = [[choice.part for choice in fuse(model, torch.randn(b, 3, 64, 64)).choices] for b in (3, 1)]
    assert ["images at a time" in p for p in parts] == [True, False]
