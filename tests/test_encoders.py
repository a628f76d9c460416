"""Encoders through the package: the words of the seed, errors, checkpoints, preprocessing without a network."""
import functools

import pytest
import timm
import torch
from torch import nn

import segkit
from segkit.core.registry import UnknownName
from segkit.encoders import EncoderMixin, check_encoder, get_encoder, get_preprocessing_params
from segkit.encoders.universal import TimmUniversalEncoder


class MyEncoder(nn.Module, EncoderMixin):
    "As in SMP's documentation: the attributes are set in `__init__`, and `forward` looks at `_depth`"
    def __init__(self, **kwargs):
        super().__init__()
        self._out_channels, self._depth, self._in_channels = [3, 16, 64, 128, 256, 512], 5, 3
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(self._out_channels, self._out_channels[1:], strict=False))

    def forward(self, x):
        features = [x]
        for stage in self.stages[:self._depth]: features.append(stage(features[-1]).relu())
        return features


@pytest.fixture
def registered():
    segkit.encoders.encoders["my_awesome_encoder"] = {
        "encoder": MyEncoder,
        "pretrained_settings": {"imagenet": {"mean": [0.5]*3, "std": [0.2]*3, "url": "https://example.com/mine.pth", "input_space": "RGB", "input_range": [0, 1]}},
        "params": {}}
    yield "my_awesome_encoder"
    del segkit.encoders.encoders["my_awesome_encoder"]


@pytest.mark.parametrize("depth", [3, 4, 5])
def test_the_seed_words(registered, depth):
    aux = dict(pooling="avg", dropout=0.5, activation="sigmoid", classes=4)
    model = segkit.Unet(encoder_name=registered, encoder_depth=depth, encoder_weights=None, decoder_channels=(256, 128, 64, 32, 16)[:depth],
                        classes=4, aux_params=aux)
    mask, label = model(torch.randn(2, 3, 64, 96))
    assert mask.shape == (2, 4, 64, 96) and label.shape == (2, 4) and 0 <= label.min() and label.max() <= 1
    assert [type(m).__name__ for m in model.classification_head] == ["AdaptiveAvgPool2d", "Flatten", "Dropout", "Linear", "Activation"]
    assert segkit.Unet(registered, depth, None, decoder_channels=(32,)*depth)(torch.randn(2, 3, 64, 64)).shape == (2, 1, 64, 64)


def test_weights_from_the_url_of_the_settings(registered, tmp_path):
    state = MyEncoder().state_dict()
    torch.save(state, tmp_path/"mine.pth")
    segkit.encoders.encoders[registered]["pretrained_settings"]["imagenet"]["url"] = (tmp_path/"mine.pth").as_uri()
    for weights in ("imagenet", True, tmp_path/"mine.pth", state, lambda: state):
        encoder = get_encoder(registered, weights=weights)
        assert all(torch.equal(t, state[k]) for k, t in encoder.state_dict().items())
    four = get_encoder(registered, in_channels=4, weights=True).stages[0].weight
    assert torch.allclose(four, state["stages.0.weight"][:, [0, 1, 2, 0]]*3/4)
    assert get_preprocessing_params(registered)["mean"] == [0.5]*3


def test_offline_error_says_what_to_do(registered, monkeypatch, tmp_path):
    monkeypatch.setenv("SEGKIT_CACHE", str(tmp_path)); monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="example.com/mine.pth.*Looked in the cache.*pass a local file"): get_encoder(registered, weights="imagenet")


@pytest.mark.parametrize("name, wanted", [("resnet18", "timm/resnet18"), ("mit_b0", "smp-hub/mit_b0.imagenet"), ("tu-convnext_atto", "timm/convnext_atto.d2_in1k")])
def test_offline_error_for_files_of_the_hub(name, wanted, monkeypatch, tmp_path):
    "The libraries' own offline mode and an empty cache: the error names the file, the cache and the local way"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError) as error: segkit.Unet(name, encoder_weights="imagenet")
    for part in (f"encoder '{name}'", wanted, str(tmp_path), "pass a local file: encoder_weights='path/to/model.safetensors'"): assert part in str(error.value), part


@pytest.mark.parametrize("name", ["resnet18", "mit_b0", "tu-convnext_atto", "tu-test_efficientnet", "tu-regnetx_002"])
def test_local_files_in_every_form(name, tmp_path):
    "A file of the encoder itself or, for timm names, of timm's whole model as timm publishes it"
    from safetensors.torch import save_file
    encoder = get_encoder(name)
    source = encoder if not name.startswith("tu-") else timm.create_model(name[3:])
    state = {k: torch.rand_like(t) if t.is_floating_point() else t for k, t in source.state_dict().items()}
    save_file(state, tmp_path/"a.safetensors"); torch.save({"state_dict": state}, tmp_path/"a.pth")
    loaded = [get_encoder(name, weights=w) for w in (tmp_path/"a.safetensors", str(tmp_path/"a.pth"), state, lambda: state)]
    for other in loaded[1:]: assert all(torch.equal(t, loaded[0].state_dict()[k]) for k, t in other.state_dict().items())
    given = {t.sum().item() for t in state.values()}
    assert all(t.sum().item() in given for k, t in loaded[0].state_dict().items() if "index" not in k)


@functools.cache
def some_state(name): return {k: torch.randn_like(t) if t.is_floating_point() else t for k, t in get_encoder(name).state_dict().items()}


@pytest.mark.parametrize("n", [1, 2, 4, 7])
@pytest.mark.parametrize("strategy", ["tile", "sum", "zero", lambda w, n: w.mean(1, keepdim=True).expand(-1, n, -1, -1)*2])
@pytest.mark.parametrize("name, first", [("resnet18", "conv1.weight"), ("mit_b0", "patch_embed1.proj.weight"), ("tu-convnext_atto", "model.stem_0.weight")])
def test_first_layer(name, first, strategy, n):
    "Against a sum over the channels, written out"
    state = some_state(name)
    old = state[first]
    state = {k.removeprefix("model."): t for k, t in state.items()}
    new = get_encoder(name, n, weights=state, channel_strategy=strategy).state_dict()[first]
    grey = old.sum(1)
    for c in range(n):
        expected = {"tile": grey if n == 1 else old[:, c % 3]*3/n, "sum": grey/n, "zero": old[:, c] if c < 3 else 0*grey}.get(strategy, grey/3*2)
        assert torch.allclose(new[:, c], expected, atol=1e-5), (strategy, c)


def test_weights_of_another_model():
    with pytest.raises(ValueError, match="do not fit encoder 'resnet18'.*Of another shape: layer1.0.conv1.weight: .64, 64, 1, 1. given, .64, 64, 3, 3. expected"):
        get_encoder("resnet18", weights=get_encoder("resnet50").state_dict())
    with pytest.raises(ValueError, match="do not fit encoder 'tu-resnet18'.*: 0 of its 120 tensors match.*Missing: conv1.weight.*given and not known: stem.0.weight"):
        get_encoder("tu-resnet18", weights=timm.create_model("test_convnext").state_dict())


def test_a_file_is_read_without_running_code(tmp_path):
    torch.save({"conv1.weight": nn.Conv2d(1, 1, 1)}, tmp_path/"module.pth")
    with pytest.raises(Exception, match="[Ww]eights.only"): get_encoder("resnet18", weights=tmp_path/"module.pth")


def test_a_tag_of_timm_in_either_place(monkeypatch):
    import timm
    asked, create_model = [], timm.create_model
    def create(name, pretrained=False, **kwargs):
        if pretrained: asked.append(name)
        return create_model(name, pretrained=False, **kwargs)
    monkeypatch.setattr("timm.create_model", create)
    for name, weights in [("tu-test_resnet.r160_in1k", True), ("tu-test_resnet", "r160_in1k"), ("tu-test_resnet", "imagenet")]:
        encoder = get_encoder(name, weights=weights)
        assert encoder.preprocessing == get_preprocessing_params(name, weights) != {}
    assert asked == ["test_resnet.r160_in1k", "test_resnet.r160_in1k", "test_resnet"]
    with pytest.raises(KeyError, match="has no weights .r16_in1k.; did you mean .r160_in1k.. Its tags: .imagenet., .r160_in1k."): get_encoder("tu-test_resnet", weights="r16_in1k")


@pytest.mark.parametrize("change, error, says", [
    (lambda e: setattr(e, "_out_channels", [3, 16, 32, 128, 256, 512]), ValueError, r"level 2 is \(1, 64, 16, 16\), expected \(1, 32, 16, 16\)"),
    (lambda e: setattr(e, "_out_channels", [3, 16]), ValueError, "needs 6 numbers in _out_channels"),
    (lambda e: delattr(e, "_out_channels"), TypeError, "_out_channels is 'missing'"),
    (lambda e: setattr(e.stages[3], "stride", (1, 1)), ValueError, r"level 4 is \(1, 256, 8, 8\), expected \(1, 256, 4, 4\)"),
    (lambda e: setattr(e, "stages", e.stages[:3]), ValueError, "returned 4 maps, expected 6"),
])
def test_broken_contract_names_the_level(change, error, says):
    encoder = MyEncoder(); change(encoder)
    with pytest.raises(error, match=says): check_encoder(encoder)
    with pytest.raises(error, match=says): segkit.Unet(encoder, encoder_weights=None)


def test_a_shallow_encoder_needs_no_dilation():
    "At depth 3 the deepest map has stride 8 anyway, also for an encoder that cannot be dilated"
    assert get_encoder("tu-swin_tiny_patch4_window7_224", depth=3, output_stride=8).output_stride == 8
    assert get_encoder("resnet18", depth=3, output_stride=8).layer2[0].conv1.stride == (2, 2)


@pytest.mark.parametrize("kwargs, error, says", [
    ({"name": "resnet43"}, KeyError, "did you mean 'resnet34'"), ({"name": "tu-resnett18"}, KeyError, "timm has no model 'resnett18'; did you mean"),
    ({"name": "resnet18", "weights": "imagnet"}, KeyError, "did you mean 'imagenet'.*Its tags: 'imagenet'"),
    ({"name": "resnet18", "depth": 6}, ValueError, "depths 1 to 5"), ({"name": "resnet18", "depth": 0}, ValueError, "encoder_depth=0"),
    ({"name": "resnet18", "output_stride": 4}, ValueError, "expected 8 or 16"),
    ({"name": "resnet18", "weights": {"conv1.weight": torch.ones(64, 3, 7, 7)}}, ValueError, "of its .* tensors match.*Missing: bn1.weight"),
    ({"name": "tu-vit_tiny_patch16_224", "depth": 6}, ValueError, "use a depth of 1 to 5"),
    ({"name": "tu-swin_tiny_patch4_window7_224", "output_stride": 8}, ValueError, "cannot be dilated"),
    ({"name": nn.Conv2d(3, 3, 3)}, TypeError, "Conv2d that was given is not an encoder: it returned Tensor"),
    ({"name": "resnet18", "depht": 3}, TypeError, "encoder 'resnet18' has no argument 'depht'"),
    ({"name": "mit_b0", "widhts": 3}, TypeError, "has no argument 'widhts'; did you mean 'widths'"),
    ({"name": "tu-resnet18", "foo": 3}, TypeError, "does not take one of these arguments.*foo"),
    ({"name": 34}, TypeError, "encoder_name=34: expected a name, a class or a module"),
    ({"name": "resnet18", "in_channels": 4, "channel_strategy": "titel", "weights": lambda: get_encoder("resnet18").state_dict()}, ValueError, "did you mean 'tile'"),
    # over a bridge
    ({"name": "tu-vit_tiny_patch16_224", "bridge": "simpel"}, ValueError, "did you mean 'simple'"),
    ({"name": "tu-vit_tiny_patch16_224", "indices": [12]}, ValueError, "has the blocks 0 to 11"),
    ({"name": "tu-vit_tiny_patch16_224", "colour": 1}, TypeError, "unexpected keyword argument 'colour'"),
    ({"name": "tu-vit_tiny_patch16_224", "num_classes": 1}, ValueError, "'num_classes' of the timm model"),
    ({"name": "tu-swin_tiny_patch4_window7_224", "output_stride": 16}, ValueError, "cannot be dilated.*bridge='resize'"),
    ({"name": "resnet18", "bridge": "resize"}, TypeError, "has no argument 'bridge'"),
])
def test_errors_say_what_to_do(kwargs, error, says):
    with pytest.raises(error, match=says): get_encoder(**kwargs)


# Row 50: what was given, and what to choose. Seen on the old code: another class's name alone, timm's bare RuntimeError, a hang.

@pytest.mark.parametrize("architecture, name, owner", [
    ("DeepLabV3", "vgg11", "VGGEncoder"), ("DeepLabV3Plus", "vgg16_bn", "VGGEncoder"), ("PAN", "densenet121", "DenseNetEncoder"),
    ("DeepLabV3", "mit_b0", "MixVisionTransformerEncoder"),
])
def test_an_encoder_that_cannot_be_dilated_is_named_with_what_to_choose(architecture, name, owner):
    with pytest.raises(ValueError) as caught: getattr(segkit, architecture)(name, encoder_weights=None)
    text = str(caught.value)
    assert f"encoder {name!r}: {owner} cannot be dilated" in text and "resnet*" in text and "Unet" in text
    assert " output_stride=32" not in text  # no model takes an argument of this name


@pytest.mark.parametrize("weights", [True, "imagenet", None, "a1_in1k"])
@pytest.mark.parametrize("architecture, name, tag, close", [
    ("Unet", "tu-resnet18.nope", "nope", "a1_in1k"), ("Unet", "tu-resnet18.tv_in1", "tv_in1", "did you mean 'tv_in1k'"),
    ("FPN", "tu-resnet18.", "''", "a1_in1k"), ("Unet", "tu-vit_tiny_patch16_224.augreg", "augreg", "augreg_in21k"),
    ("DPT", "tu-vit_tiny_patch16_224.augreg", "augreg", "augreg_in21k"),
])
def test_a_tag_in_the_name_that_timm_does_not_have_is_named(architecture, name, tag, close, weights):
    with pytest.raises(UnknownName) as caught: segkit.create_model(architecture, name, encoder_weights=weights)
    assert tag in str(caught.value) and close in str(caught.value)


@pytest.mark.parametrize("depth", [10**12, 65, 0, -1, True, 2.5, 5., "5", None, float("nan")])
def test_a_depth_that_is_no_depth_is_refused_at_once(depth):
    builds = [lambda: get_encoder("resnet18", depth=depth), lambda: get_encoder("tu-resnet18", depth=depth),
              lambda: get_encoder("tu-vit_tiny_patch16_224", depth=depth), lambda: TimmUniversalEncoder("resnet18", depth=depth)]
    names = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer".split()
    builds += [lambda name=name: getattr(segkit, name)("resnet18", encoder_depth=depth, encoder_weights=None) for name in names]
    builds.append(lambda: segkit.DPT("tu-vit_tiny_patch16_224", encoder_depth=depth, encoder_weights=None))
    for build in builds:
        with pytest.raises(ValueError) as caught: build()
        assert f"encoder_depth={depth!r}: expected" in str(caught.value)
