"""Classes and modules as `encoder_name`: timm models, torchvision extractors, anything that returns maps; and saving them."""
import json

import pytest
import timm
import torch
from oracle import relative_error
from torch import nn

import segkit
from segkit.encoders import EncoderMixin, check_encoder, get_encoder, get_preprocessing_params, parameter_stages

X = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


class Maps(nn.Module):
    "Returns maps and knows nothing of encoders"
    def __init__(self, widths=(8, 16, 24, 32), depth=5):
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(a, b, s + 1, s, s//2) for a, b, s in zip((3, *widths), widths, (4, 2, 2, 2), strict=False))

    def forward(self, x):
        maps = []
        for stage in self.stages: maps.append(stage(maps[-1] if maps else x).relu())
        return maps


class Mixed(Maps, EncoderMixin):
    "The same with the contract"
    def __init__(self, widths=(8, 16, 24, 32), depth=5):
        super().__init__(widths); self._out_channels, self._depth, self._in_channels = [3, 0, *widths], depth, 3

    def forward(self, x): return [x, x.new_empty(len(x), 0, -(-x.shape[2]//2), -(-x.shape[3]//2)), *super().forward(x)][:self._depth + 1]


@pytest.mark.parametrize("thing", [Maps, Maps(), Mixed, Mixed()], ids=["class of maps", "module of maps", "class", "instance"])
@pytest.mark.parametrize("arch", ["Unet", "FPN", "Segformer"])
def test_classes_and_modules_in_decoders(thing, arch):
    model = getattr(segkit, arch)(thing, encoder_weights=None, in_channels=5, classes=2).eval()
    assert model.encoder.out_channels == [5, 0, 8, 16, 24, 32]
    assert model(torch.randn(1, 5, 65, 71)).shape == (1, 2, 65, 71)
    if not isinstance(thing, type): thing.__init__()   # fresh for the next


def test_arguments_go_to_a_class_and_not_to_a_module():
    assert get_encoder(Mixed, widths=(4, 4, 4, 4)).out_channels == [3, 0, 4, 4, 4, 4]
    with pytest.raises(TypeError, match="encoder 'Mixed' has no argument 'width'; did you mean 'widths'"): get_encoder(Mixed, width=3)
    with pytest.raises(TypeError, match="Mixed that was given is built already and takes no arguments: 'widths'"): get_encoder(Mixed(), widths=3)
    with pytest.raises(KeyError, match="encoder 'Mixed' offers no weights.*pass encoder_weights=None"): get_encoder(Mixed, weights="imagenet")


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0", "mobilenetv3_small_050", "edgenext_xx_small", "pvt_v2_b0", "regnetx_002"])
@pytest.mark.parametrize("features_only", [True, False], ids=["pyramid", "classifier"])
def test_timm_models_equal_their_names(name, features_only):
    "A model in memory gives the maps that its name gives, with its own weights, and every parameter is used"
    theirs = timm.create_model(name, features_only=features_only).eval()
    given, named = get_encoder(theirs).eval(), get_encoder(f"tu-{name}", weights=theirs.state_dict()).eval()
    assert given.out_channels == named.out_channels and given.output_stride == named.output_stride
    with torch.no_grad():
        for a, b in zip(given(X), named(X), strict=True):
            assert a.shape == b.shape and (not a.numel() or relative_error(a, b) < 1e-6)
    assert set(parameter_stages(given)) == set(dict(given.named_parameters()))
    check_encoder(given)


def test_settings_of_a_timm_model():
    model = timm.create_model("tf_efficientnet_b0", features_only=True)
    assert get_preprocessing_params(model) == get_preprocessing_params("tu-tf_efficientnet_b0")
    assert get_preprocessing_params(get_encoder(model)) == get_preprocessing_params("tu-tf_efficientnet_b0")
    with pytest.raises(ValueError, match="Maps that was given does not say how to normalise"): get_preprocessing_params(Maps())


def test_a_module_trains_in_a_model():
    model = segkit.Unet(timm.create_model("test_resnet"), classes=2)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_class_is_saved_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path/"own_class.py").write_text("from torch import nn\nclass Own(nn.Module):\n    def __init__(self, width=8):\n        super().__init__(); self.a = nn.Conv2d(3, width, 4, 4); "
                                         "self.b = nn.Conv2d(width, 16, 2, 2)\n    def forward(self, x):\n        x = self.a(x); return [x, self.b(x)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    import sys

    import own_class
    model = segkit.Unet(own_class.Own, 3, None, decoder_channels=(8, 8, 8), width=4)
    model.save_pretrained(tmp_path/"saved")
    config = json.loads((tmp_path/"saved/config.json").read_text())
    assert config["encoder_name"] == {"_import": "own_class:Own"} and config["width"] == 4
    del sys.modules["own_class"]
    again = segkit.from_pretrained(tmp_path/"saved", trust_remote_code=True)
    assert torch.equal(again.predict(X), model.predict(X)) and again.encoder.model.a.out_channels == 4
    del sys.modules["own_class"]; (tmp_path/"own_class.py").unlink()
    with pytest.raises(ImportError, match="own_class as Own, which cannot be imported here"): segkit.from_pretrained(tmp_path/"saved", trust_remote_code=True)


def test_a_module_is_not_saved_and_the_error_says_what_is(tmp_path):
    timms = timm.create_model("test_resnet", features_only=True)
    with pytest.raises(ValueError, match="the argument encoder_name is a FeatureListNet that was built already: use encoder_name='tu-test_resnet'"):
        segkit.Unet(timms).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the argument encoder_name is a Maps that was built already: register its class"): segkit.Unet(Maps()).save_pretrained(tmp_path)
    way_out = segkit.Unet("tu-test_resnet", encoder_weights=timms.state_dict())
    way_out.save_pretrained(tmp_path)
    assert all(torch.equal(t, timms.state_dict()[k]) for k, t in segkit.from_pretrained(tmp_path).encoder.model.state_dict().items())


def test_dilated_by_timm():
    model = segkit.DeepLabV3Plus(timm.create_model("resnet18", features_only=True, output_stride=16), classes=2).eval()
    assert model.encoder.output_stride == 16 and [f.shape[-1] for f in model.encoder(X)] == [96, 48, 24, 12, 6, 6]
    assert model(X).shape == (1, 2, 64, 96)
    with pytest.raises(ValueError, match="cannot be dilated .output_stride=16.*resnet"): segkit.DeepLabV3Plus(Maps(), encoder_weights=None)
