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
from segkit.decoders.fpn import FPNDecoder
from segkit.encoders.base import EncoderMixin
from segkit.inference.fold import fold_norms
from segkit.inference.fuse import Fused, agreement, fuse

LABELS = {"classes": 3, "pooling": "avg", "dropout": 0.3}
FIVE = dict(decoder_channels=(32, 24, 16, 12, 8))
NARROW = {
    "unet": FIVE, "unetplusplus": FIVE, "manet": FIVE, "linknet": {}, "pan": {},
    "pspnet": dict(psp_out_channels=48, encoder_depth=4),
    "fpn": dict(decoder_pyramid_channels=48, decoder_segmentation_channels=32),
    "deeplabv3": dict(decoder_channels=32), "deeplabv3plus": dict(decoder_channels=64),
    "upernet": dict(decoder_channels=32), "segformer": dict(decoder_segmentation_channels=32),
    "dpt": dict(decoder_intermediate_channels=(16, 24, 32, 32), decoder_fusion_channels=32),
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Tiny(nn.Module, EncoderMixin):
    "Two convolutions a stage: quick to build and to run"
    def __init__(self):
        super().__init__()
        self._out_channels, self._depth = [3, 8, 12, 16, 20, 24], 5
        self.stages = nn.ModuleList(
            nn.Sequential(*self.unit(i, o, 2), *self.unit(o, o, 1))
            for i, o in zip(self._out_channels, self._out_channels[1:]))

    @staticmethod
    def unit(i, o, stride): return nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()

    def forward(self, x):
        maps = [x]
        for stage in self.stages[:self._depth]: maps.append(stage(maps[-1]))
        return maps

    def get_stages(self): return {2**(i+1): [stage] for i, stage in enumerate(self.stages) if i >= 3}


def build(arch, encoder=None, **options):
    encoder = encoder or ("tu-vit_tiny_patch16_224" if arch == "dpt" else Tiny())
    torch.manual_seed(0)
    options = NARROW[arch] | dict(classes=5, aux_params=LABELS) | options
    return randomise(segkit.create_model(arch, encoder, None, **options)).eval()


def outputs(model, x):
    with torch.no_grad(): y = model(x)
    return y if isinstance(y, tuple) else (y,)


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
    "Within 2e-5 of the float64 result, for batches of one and more, and in each memory format"
    model, fused = models(arch)
    exact = copy.deepcopy(model).double()
    for shape in ((2, 3, 64, 96), (1, 3, 65, 71)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        expected = outputs(exact, x.double())
        assert_equal(outputs(fused, x), expected, 2e-5)
        assert_equal(outputs(fused, x.to(memory_format=torch.channels_last)), expected, 2e-5)


@torch.no_grad()
def test_the_channels_are_last(models):
    "Whatever order the images come in"
    _, fused = models("unet")
    seen = []
    handles = [m.register_forward_hook(lambda m, args, y: seen.append(y)) for m in fused.modules() if isinstance(m, nn.Conv2d)]
    fused(torch.randn(2, 3, 65, 71))
    for handle in handles: handle.remove()
    assert len(seen) > 10 and all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)


CASES = [
    *((arch, {}) for arch in sorted(architectures)),
    ("unet", dict(decoder_attention_type="scse")), ("unet", dict(decoder_use_norm="layernorm")),
    ("unet", dict(decoder_interpolation="bilinear")), ("unet", dict(encoder="resnet18")),
    ("unet", dict(decoder_use_norm=False, encoder_depth=3, decoder_channels=(32, 16, 8))),
    ("unet", dict(encoder="mit_b0")), ("unet", dict(encoder="tu-densenet121")),
    ("unet", dict(encoder="tu-resnet10t", in_channels=1)), ("unet", dict(encoder="efficientnet-b0")),
    ("unetplusplus", dict(decoder_attention_type="scse", decoder_interpolation="bicubic")),
    ("unetplusplus", dict(deep_supervision=True)), ("unetplusplus", dict(level=2)),
    ("manet", dict(decoder_pab_form="rowwise", decoder_use_norm="groupnorm")),
    ("linknet", dict(encoder="mit_b0", decoder_use_norm="instancenorm")),
    ("linknet", dict(decoder_use_norm=False)), ("linknet", dict(encoder="tu-mobileone_s0")),
    ("fpn", dict(decoder_merge_policy="cat")), ("fpn", dict(decoder_interpolation="bilinear")),
    ("fpn", dict(encoder="mit_b0", encoder_depth=3)), ("fpn", dict(upsampling=1, activation="sigmoid")),
    ("fpn", dict(decoder_segmentation_channels=64, decoder_pyramid_channels=8)),
    ("fpn", dict(encoder="tu-convnext_atto")), ("fpn", dict(encoder="tu-resnet50", encoder_depth=3)),
    ("fpn", dict(encoder="tu-tf_efficientnet_b0")), ("fpn", dict(encoder="vgg11_bn", classes=1)),
    ("pspnet", dict(decoder_use_norm="groupnorm")), ("pspnet", dict(encoder_depth=3)),
    ("deeplabv3", dict(decoder_aspp_separable=True, encoder_output_stride=16)),
    ("deeplabv3", dict(decoder_atrous_rates=(1, 5, 9), activation="softmax2d")),
    ("deeplabv3plus", dict(decoder_aspp_separable=False)),
    ("deeplabv3plus", dict(decoder_interpolation="nearest")),
    ("pan", dict(decoder_interpolation="nearest", encoder_output_stride=32)),
    ("upernet", dict(decoder_use_norm="groupnorm", encoder_depth=4)), ("upernet", dict(encoder="mit_b0")),
    ("segformer", dict(encoder="mit_b0")), ("segformer", dict(encoder_depth=3)),
    ("segformer", dict(encoder="tu-mobilenetv3_small_050")),
    ("dpt", dict(decoder_readout="add")), ("dpt", dict(decoder_readout="ignore")),
    *((arch, dict(decoder_interpolation=mode)) for mode in ("nearest", "bicubic", "area")
      for arch in ("segformer", "pspnet", "upernet", "manet")),
]


@pytest.mark.parametrize("arch, options", CASES)
def test_double_precision(arch, options):
    "Equal to 1e-12, with both heads, at a size where everything doubles and at two where nothing does"
    model = build(arch, **options).double()
    fused = fuse(model)
    # rounding is multiplied by the scores of a softmax, hundreds in a MAnet with random statistics,
    # and by a group norm of a few values that are nearly equal
    steep = arch == "manet" or options.get("decoder_use_norm") == "groupnorm"
    tolerance = 1e-10 if steep else 1e-12
    for size in ((64, 96), (65, 71), (33, 160)):
        x = torch.randn(1, model.encoder.in_channels, *size, dtype=torch.float64)
        assert_equal(outputs(fused, x), outputs(model, x), tolerance)


class Squashed(nn.Module):
    "A decoder, and a tanh"
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, *features): return self.decoder(*features).tanh()


@every
def test_a_head_or_decoder_of_ones_own(arch):
    "What stands in place of a part is kept, whatever form the part had"
    model = build(arch, aux_params=None).double()
    x = torch.randn(1, 3, 64, 96).double()
    head, decoder = model.segmentation_head, model.decoder
    model.segmentation_head = nn.Sequential(head, nn.Tanh())
    assert_equal(outputs(fuse(model), x), outputs(model, x), 1e-9)
    model.segmentation_head, model.decoder = head, Squashed(decoder)
    assert_equal(outputs(fuse(model), x), outputs(model, x), 1e-9)


def test_the_model_is_not_changed():
    model = build("unet").train()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    fused = fuse(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    own = {t.data_ptr() for t in fused.state_dict().values()}
    assert not own & {t.data_ptr() for t in model.state_dict().values()}
    assert any(isinstance(m, BATCH_NORMS) for m in model.modules())
    assert not any(isinstance(m, (*BATCH_NORMS, nn.Dropout, nn.Dropout2d)) for m in fused.modules())


@pytest.mark.parametrize("arch", ["unet", "upernet", "dpt"])
def test_travels(arch, models):
    "Copies, pickles, files, other precisions and back, and its own state dict"
    model, fused = models(arch)
    x, file = torch.randn(1, 3, 64, 64), io.BytesIO()
    expected = outputs(fused, x)
    torch.save(fused, file)
    file.seek(0)
    other = fuse(build(arch).apply(lambda m: nn.init.zeros_(m.weight) if isinstance(m, nn.Conv2d) else None))
    other.load_state_dict(fused.state_dict())
    copies = copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(file, weights_only=False)
    for again in (*copies, other, copies[0].double().float()): assert_equal(outputs(again, x), expected, 1e-6)
    assert len(pickle.dumps(fused)) < 1.6*len(pickle.dumps(model))


@pytest.mark.parametrize("low, digits", [(torch.bfloat16, .05), (torch.float16, .01)])
def test_a_precision_and_back(low, digits):
    "What a conversion rounds stays rounded, in every layer; the images keep their own type"
    fused, x = fuse(build("unet")), torch.randn(1, 3, 64, 64)
    expected = outputs(fused, x)
    narrow = copy.deepcopy(fused).to(low)
    assert all(y.dtype == torch.float32 for y in outputs(narrow, x))
    back = narrow.float()
    by_hand = copy.deepcopy(fused)
    with torch.no_grad():
        for p in by_hand.parameters(): p.copy_(p.to(low).float())
    assert_equal(outputs(back, x), outputs(by_hand, x), 1e-6)
    assert 0 < relative_error(outputs(back, x)[0], expected[0]) < digits
    by_hand.model.get_parameter("segmentation_head.0.bias").data = torch.full((5,), 1e6)
    assert outputs(by_hand, x)[0].min() > 9e5  # the weights that answer are those that are there


def test_weights_of_the_plain_model_are_refused(models):
    model, fused = models("unet")
    with pytest.raises(RuntimeError, match="Missing key"): copy.deepcopy(fused).load_state_dict(model.state_dict())


@pytest.mark.parametrize("arch", ["unet", "fpn", "upernet", "deeplabv3plus"])
def test_exports_with_free_sizes(arch, models):
    model, fused = models(arch)
    sizes = {2: Dim("h", min=33, max=4096), 3: Dim("w", min=33, max=4096)}
    free = {0: Dim("b", min=1, max=64), **sizes}
    exported = export(fused, (torch.randn(2, 3, 65, 71),), dynamic_shapes=(free,)).module()
    x = torch.randn(3, 3, 64, 96)
    assert_equal(outputs(exported, x), outputs(model, x), 2e-5)


@pytest.mark.parametrize("arch", ["unet", "segformer"])
def test_traces(arch, models):
    model, fused = models(arch)
    x = torch.randn(1, 3, 64, 96)
    assert_equal(outputs(torch.jit.trace(fused, x), x), outputs(model, x), 2e-5)


def test_gradients_of_the_image_still_flow():
    "As pictures of saliency need them"
    model = build("unet").double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    grads = [torch.autograd.grad(m(x)[0].square().mean(), x)[0] for m in (fuse(model), model)]
    assert relative_error(*grads) < 1e-9


def test_says_what_it_cannot_do(models):
    _, fused = models("unet")
    with pytest.raises(RuntimeError, match="inference only"): fused.train()
    assert not fused.eval().training
    with pytest.raises(TypeError, match="expected a segkit model, got Fused"): fuse(fused)
    with pytest.raises(TypeError, match="expected a segkit model, got Conv2d"): fuse(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="3 channels"): fused(torch.randn(1, 4, 64, 64))
    assert isinstance(fused, Fused)


def test_a_wrong_form_is_refused():
    "The result is compared with the model before it is returned"
    class Forgetful(FPNDecoder):
        def inference_form(self):
            form = copy.deepcopy(self)
            nn.init.zeros_(form.p5.bias)
            return form
    model = build("fpn")
    model.decoder.__class__ = Forgetful
    with pytest.raises(RuntimeError, match="differs from the original"): fuse(model)


def test_a_subclass_is_not_its_parent():
    "A form belongs to the class that defines it"
    class Doubled(FPNDecoder):
        def forward(self, features): return 2*super().forward(features)
    model, x = build("fpn"), torch.randn(1, 3, 64, 64)
    model.decoder.__class__ = Doubled
    assert_equal(outputs(fuse(model), x), outputs(model, x), 1e-4)


def test_a_model_with_a_forward_of_its_own():
    class Cautious(segkit.FPN):
        def forward(self, x): return super().forward(x)[0].sigmoid()
    torch.manual_seed(0)
    model = randomise(Cautious(Tiny(), encoder_weights=None, aux_params=LABELS)).eval()
    x = torch.randn(1, 3, 65, 96)
    assert_equal(outputs(fuse(model), x), outputs(model, x), 1e-4)


class Late(FPNDecoder):
    "Reads a level that an FPN does not read, but only on larger maps"
    def forward(self, features):
        y = super().forward(features)
        if features[0].shape[-1] <= 64: return y
        return y + features[1].mean((1, 2, 3), keepdim=True)


def test_reads_that_depend_on_the_size():
    model = build("fpn")
    model.decoder.__class__ = Late
    fused = fuse(model)
    for size in (64, 65, 128, 200):
        x = torch.randn(1, 3, size, size)
        assert_equal(outputs(fused, x), outputs(model, x), 2e-5)


class HiddenSwitch(FPNDecoder):
    "Asks what a symbol answers otherwise than a tensor, so that its graph is another network"
    def forward(self, features):
        y = super().forward(features)
        return y + 1 if isinstance(features[0], torch.Tensor) else y


def test_a_graph_that_is_another_network_is_refused():
    model = build("fpn")
    model.decoder.__class__ = HiddenSwitch
    with pytest.raises(RuntimeError, match="differs from the original"): fuse(model)


@pytest.mark.parametrize("place", ["", "encoder", "decoder", "encoder.stages.0.1"])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_are_refused(place, kind):
    model = build("unet")
    handle = getattr(model.get_submodule(place), f"register_{kind}")(lambda *_: None)
    with pytest.raises(ValueError, match=f"hooks on {place or 'the model itself'}.*remove them"): fuse(model)
    handle.remove()
    fuse(model)


def test_hooks_on_the_fused_model(models):
    _, fused = models("unet")
    x, seen = torch.randn(1, 3, 64, 64), []
    expected = outputs(fused, x)
    handles = [m.register_forward_hook(lambda m, *_: seen.append(m)) for m in fused.modules()]
    assert all(torch.equal(a, b) for a, b in zip(outputs(fused, x), expected))
    for handle in handles: handle.remove()
    assert sum(isinstance(m, nn.Conv2d) for m in seen) > 10


class Fusing(Tiny):
    "A layer called `fuse`, one whose method of that name needs an argument, and one that means something else"
    class Layer(nn.Conv2d):
        def fuse(self, other): raise AssertionError("called")

    class Rebel(nn.Conv2d):
        def reparameterize(self): return nn.Identity()

    def __init__(self):
        super().__init__()
        self.fuse, self.reparameterize = nn.Conv2d(24, 24, 1), self.Layer(24, 24, 1)
        self.rebel = self.Rebel(24, 24, 1)

    def forward(self, x):
        *maps, last = super().forward(x)
        return [*maps, self.rebel(self.reparameterize(self.fuse(last)))]


def test_layers_that_are_called_fuse():
    model, x = build("unet", Fusing()), torch.randn(1, 3, 64, 64)
    assert_equal(outputs(fuse(model), x), outputs(model, x), 1e-4)


def test_a_tuple_of_maps():
    class Frozen(Tiny):
        def forward(self, x): return tuple(super().forward(x))
    for arch in ("unet", "manet", "linknet", "fpn"):
        model = build(arch, Frozen())
        x = torch.randn(1, 3, 64, 64)
        assert_equal(outputs(fuse(model), x), outputs(model, x), 1e-4)


class Standardised(nn.Conv2d):
    "Its weights have mean 0 and variance 1 in each run, so that a scale in them is lost"
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight/(weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return nn.functional.conv2d(x, weight, self.bias)


@torch.no_grad()
def test_what_cannot_be_folded_stays():
    "Unusual convolutions, shared ones, tied weights, norms without statistics, norms in training"
    shared, tied = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    tied.weight = shared.weight
    without = nn.BatchNorm2d(3, track_running_stats=False)
    grouped = nn.ConvTranspose2d(4, 4, 2, 2, groups=2)
    training = nn.BatchNorm2d(3)
    cases = ((Standardised(3, 3, 1), nn.BatchNorm2d(3)), (nn.Conv2d(3, 3, 1), without),
             (nn.Conv2d(3, 3, 1), training), (grouped, nn.BatchNorm2d(4)))
    for first, second in cases:
        pair = randomise(nn.Sequential(first, second)).eval()
        training.train()
        assert fold_norms(pair) == 0
    for layers in ([shared, nn.BatchNorm2d(3), shared], [shared, nn.BatchNorm2d(3), tied, nn.BatchNorm2d(3)]):
        assert fold_norms(nn.Sequential(*layers).eval()) == 0
    assert fold_norms(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()) == 1


def test_the_example_is_compared_too():
    "A form that is wrong at one size only, and an example of that size"
    class Larger(FPNDecoder):
        def inference_form(self):
            form = copy.deepcopy(self)
            form.__class__ = LargerForm
            return form

    class LargerForm(FPNDecoder):
        def forward(self, features):
            y = super().forward(features)
            return y*1.01 if features[0].shape[-1] > 200 else y
    model = build("fpn")
    model.decoder.__class__ = Larger
    fuse(model)
    with pytest.raises(RuntimeError, match=r"shape \(2, 3, 64, 224\)"): fuse(model, torch.randn(2, 3, 64, 224))


def test_agreement():
    "Share of pixels that are decided alike; a logit of 0 is a yes"
    class Answer(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = logits
        def forward(self, x): return self.logits
    x = torch.zeros(1, 3, 1, 2)
    zero, mixed = (Answer(torch.tensor([[[v]]])) for v in ([0., 0.], [1., -1.]))
    assert agreement(zero, zero, x) == 1 and agreement(zero, mixed, x) == .5
