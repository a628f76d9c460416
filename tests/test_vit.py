"""`TimmViTEncoder`: SMP's maps and tokens, any size, other channels, and errors in words."""
import pytest
import torch
from oracle import randomise, relative_error
from segmentation_models_pytorch.encoders.timm_vit import TimmViTEncoder as Theirs

from segkit.encoders.vit import TimmViTEncoder, block_facts, check_indices, get_vit_encoder, sample_block_indices_uniformly

torch.set_num_threads(1)
TINY = "vit_tiny_patch16_224"


@torch.no_grad()
@pytest.mark.parametrize("name", [TINY, "eva02_tiny_patch14_224", "resnet18"])
def test_equals_smp(name):
    torch.manual_seed(0)
    theirs = randomise(Theirs(name, pretrained=False)).double().eval()
    ours = TimmViTEncoder(name, pretrained=False).double().eval()
    spare = set(theirs.state_dict()) - set(ours.state_dict())
    assert spare <= set(ours.unused_tensors())
    ours.load_state_dict({k: t for k, t in theirs.state_dict().items() if k not in spare})
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    (a, p), (b, q) = ours(x), theirs(x)
    assert all(relative_error(s, t) < 1e-9 for s, t in zip(a, b, strict=True))  # the rotary table of EVA is made in float32
    for s, t in zip(p, q, strict=True): assert s is t is None or relative_error(s, t) < 1e-9
    for fact in ("out_channels", "output_strides", "output_stride", "has_prefix_tokens"): assert getattr(ours, fact) == getattr(theirs, fact)


@torch.no_grad()
@pytest.mark.parametrize("name, stride, tokens", [
    (TINY, 16, 1), ("vit_small_patch14_dinov2", 14, 1), ("mixer_s32_224", 32, None), ("deit_tiny_distilled_patch16_224", 16, 2),
    ("vit_small_patch16_dinov3", 16, 5), ("convit_tiny", 16, None)])
def test_any_size(name, stride, tokens):
    encoder = TimmViTEncoder(name, pretrained=False, depth=2).eval()
    for h, w in [(100, 60), (stride, 1)]:
        maps, prefix = encoder(torch.randn(2, 3, h, w))
        assert [f.shape[-2:] for f in maps] == [(-(-h//stride), -(-w//stride))]*2
        assert all(p is None if tokens is None else p.shape[:2] == (2, tokens) for p in prefix)


def test_other_channels():
    encoder = get_vit_encoder(f"tu-{TINY}", in_channels=5, depth=1)
    assert encoder.in_channels == 5 and encoder.out_channels == [192] and encoder(torch.randn(1, 5, 32, 32))[0][0].shape == (1, 192, 2, 2)


def test_a_fixed_size_on_request():
    encoder = TimmViTEncoder(TINY, pretrained=False, depth=1, dynamic_img_size=False).eval()
    assert encoder.fixed_size == (224, 224) and TimmViTEncoder(TINY, pretrained=False, depth=1).fixed_size is None
    x = torch.randn(1, 3, 112, 112)
    larger = torch.nn.functional.interpolate(x, size=(224, 224), mode="bilinear")
    expected = torch.nn.functional.interpolate(encoder(larger)[0][0], size=(7, 7), mode="bilinear")
    torch.testing.assert_close(encoder(x)[0][0], expected)


def test_indices():
    assert sample_block_indices_uniformly(4, 12) == [2, 5, 8, 11] and sample_block_indices_uniformly(3, 5) == [0, 2, 4]
    assert check_indices([-1, 0], 2, 12) == [11, 0]
    with pytest.raises(ValueError, match="expected 3 numbers"): check_indices([1, 2], 3, 12)
    with pytest.raises(ValueError, match="there is no block -13"): check_indices([-13], 1, 12)
    with pytest.raises(ValueError, match="expected 1 whole numbers, or None"): check_indices("1", 1, 12)


def test_facts_are_read_without_weights():
    assert block_facts(TINY) == ((16,)*12, (192,)*12, (224, 224), True)
    assert block_facts("mixer_s32_224")[2:] == ((224, 224), False)


def test_refuses():
    with pytest.raises(ValueError, match="'num_classes' of the timm model"): TimmViTEncoder(TINY, pretrained=False, num_classes=3)
    with pytest.raises(TypeError, match="does not take one of these arguments"): TimmViTEncoder(TINY, pretrained=False, foo=3)
    with pytest.raises(TypeError, match="expected a name or a TimmViTEncoder"): get_vit_encoder(torch.nn.Identity())
    with pytest.raises(ValueError, match="pass encoder_depth=2"): get_vit_encoder(TimmViTEncoder(TINY, pretrained=False, depth=2), depth=4)
