"""What must hold for every architecture in the table, whatever it is called."""
import copy
import pickle
import weakref

import pytest
import torch
from oracle import AUX, assert_same, without_gradient

import segkit
from segkit.core.registry import architectures

SMALL = {"encoder_name": "resnet18", "encoder_weights": None}
ENCODERS = {"dpt": "tu-vit_tiny_patch16_224"}  # architectures that do not take a ResNet


def build(arch, **kwargs):
    return segkit.create_model(arch, **SMALL | ({"encoder_name": ENCODERS[arch]} if arch in ENCODERS else {}) | kwargs)


every = pytest.mark.parametrize("arch", sorted(architectures))
sized = pytest.mark.parametrize("arch", sorted(set(architectures) - set(ENCODERS)))


@sized
def test_any_size_in_the_same_size_out(arch):
    model = build(arch, classes=2, aux_params=AUX).eval()
    with torch.no_grad():
        for size in [(65, 71), (100, 260), (33, 224), (64, 64)]:
            mask, label = model(torch.randn(1, 3, *size))
            assert mask.shape == (1, 2, *size) and label.shape == (1, 3)


@sized
def test_trains_on_a_batch_of_one(arch):
    model = build(arch, aux_params=AUX).train()
    mask, label = model(torch.randn(1, 3, 64, 64))
    (mask.sum() + label.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@sized
def test_every_parameter_gets_a_gradient(arch): assert without_gradient(build(arch, aux_params=AUX)) == []


@sized
def test_finer_maps_are_gone_when_the_head_runs(arch):
    model, maps, left = build(arch).eval(), [], []
    model.encoder.register_forward_hook(lambda module, args, features: maps.extend(weakref.ref(f.untyped_storage()) for f in features[1:-1]))
    model.segmentation_head.register_forward_pre_hook(lambda module, args: left.extend(m for m in maps if m() is not None))
    with torch.no_grad(): model(torch.randn(1, 3, 64, 64))
    assert maps and not left


@sized
def test_copies_give_the_same_result(arch):
    model, x = build(arch, classes=2).eval(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert pickle.loads(pickle.dumps(model)).config == model.config


@sized
def test_frozen_encoder_does_not_move(arch):
    model = build(arch)
    model.freeze_encoder()
    before = {k: t.clone() for k, t in model.encoder.state_dict().items()}
    model.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(torch.equal(t, before[k]) for k, t in model.encoder.state_dict().items())
    assert all(p.grad is None for p in model.encoder.parameters())
    assert any(p.grad is not None for p in model.decoder.parameters())


@sized
def test_channels_last_stays(arch):
    model = build(arch, classes=4).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        out = model(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(out, build_like(model)(x.contiguous()), atol=1e-3)


def build_like(model):
    "The same model and weights in the ordinary memory format"
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("name, encoder, options", [
    ("Unet", "mit_b0", {}), ("MAnet", "mit_b0", {}), ("MAnet", "resnet50", {}), ("UnetPlusPlus", "resnet50", {}),
    ("PAN", "resnet50", {"size": (128, 128)}), ("PAN", "mit_b0", {"size": (256, 256), "encoder_output_stride": 32}),
    ("DeepLabV3", "resnet50", {"decoder_channels": 32, "encoder_output_stride": 16}), ("DeepLabV3Plus", "resnet50", {"decoder_channels": 32})])
def test_same_as_smp_with_encoders(name, encoder, options):
    "Beside the encoders that the tests of each architecture take"
    if "Unet" in name or name == "MAnet": options = {"decoder_channels": (32, 24, 16, 8, 8)}
    assert_same(getattr(segkit, name), name, **{"encoder_name": encoder, "size": (64, 64)} | options)


@every
def test_bad_arguments(arch):
    with pytest.raises(TypeError, match="did you mean 'in_channels'"): build(arch, in_chanels=3)
    with pytest.raises(TypeError, match="did you mean 'classes'"): build(arch, aux_params={"class": 3})
    with pytest.raises(ValueError, match="encoder_depth=0"): build(arch, encoder_depth=0)


def test_names_of_the_table_are_exported():
    assert {cls.__name__ for cls in architectures.values()} <= set(segkit.__all__)
    assert all(cls.__name__.lower() == name for name, cls in architectures.items())
    with pytest.raises(KeyError, match="did you mean 'unet'"): segkit.create_model("unett")

@pytest.mark.parametrize("name", ["tu-regnetx_002", "tu-gernet_s", "tu-mobilenetv3_small_050"])
def test_files_from_before_smp_0_4(name):
    model = segkit.FPN(name, encoder_weights=None, encoder_depth=4)
    old = {k.replace("encoder.model.", "encoder.").replace("stages_", "stages."): t + 1 for k, t in model.state_dict().items()}
    assert any(k not in model.state_dict() for k in old)
    model.load_state_dict(old)
    new = model.state_dict()
    assert all(torch.equal(old[k.replace("encoder.model.", "encoder.").replace("stages_", "stages.")], t) for k, t in new.items())
    old["encoder.nothing"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="encoder.nothing"): model.load_state_dict(old)
