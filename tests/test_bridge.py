"""Any timm model as a pyramid: small real models of unlike kinds in several decoders, and a sample of the sweep without values."""
import pytest
import timm
import torch
from oracle import relative_error, smp

import segkit
from segkit.encoders import check_encoder, get_encoder
from segkit.encoders.bridge import TimmBridgeEncoder, choose_maps
from segkit.encoders.fit import Fit, find_fit
from segkit.encoders.universal import TimmUniversalEncoder

KINDS = {  # name -> architecture it is tried in, and an odd size
    "deit_tiny_distilled_patch16_224": ("unet", (50, 71)),  # two prefix tokens
    "eva02_tiny_patch14_224": ("linknet", (45, 64)),  # patch of 14, rotary positions
    "gmixer_12_224": ("upernet", (47, 66)),  # of one size, no attention
    "swin_tiny_patch4_window7_224": ("manet", (70, 100)),  # channels last, of one size until asked
    "levit_128s": ("unetplusplus", (40, 60)),  # 16, 32, 64
    "pit_ti_224": ("fpn", (60, 60)),  # 8, 16, 32
    "nest_tiny": ("segformer", (30, 50)),  # 4, 8, 16, no deeper
    "convmixer_768_32": ("deeplabv3plus", (29, 43)),  # stride 7
    "test_vit2": ("pan", (33, 70)),
}
SAMPLE = ["beit_base_patch16_224", "cait_xxs24_224", "dla34", "darknet17", "dpn68", "efficientvim_m1", "gmlp_s16_224", "hiera_tiny_224",
          "maxvit_tiny_rw_224", "mobilenetv3_small_050", "naflexvit_base_patch16_gap", "regnetx_002", "shvit_s1", "tresnet_m", "vgg11",
          "visformer_tiny", "vit_small_r26_s32_224", "xcit_nano_12_p8_224"]


@pytest.mark.parametrize("name", KINDS)
def test_a_mask_of_the_size_and_a_gradient_to_the_first_layer(name):
    arch, size = KINDS[name]
    torch.manual_seed(0)
    model = segkit.create_model(arch, f"tu-{name}", encoder_weights=None, classes=2, **({"encoder_output_stride": 16} if arch == "pan" else {}))
    mask = model.train()(torch.randn(2, 3, *size))
    assert mask.shape == (2, 2, *size) and mask.isfinite().all()
    mask.square().mean().backward()
    first = next(p for p in model.encoder.model.parameters() if p.dim() == 4)
    assert first.grad.abs().sum() > 0
    silent = [k for k, p in model.encoder.named_parameters() if p.requires_grad and p.grad is None]
    if isinstance(model.encoder, TimmBridgeEncoder) and not arch.startswith("deeplab"): assert silent == []


@pytest.mark.parametrize("name", SAMPLE)
def test_sample_of_the_sweep(name):
    with torch.device("meta"): encoder = get_encoder(f"tu-{name}").eval()
    size = (97, 130)
    with torch.no_grad(): maps = encoder(torch.zeros(1, 3, *size, device="meta"))
    assert [tuple(f.shape) for f in maps] == [(1, c, *(-(-n//2**level) for n in size)) for level, c in enumerate(encoder.out_channels)]
    assert all(encoder.out_channels[2:])


@pytest.mark.parametrize("name", ["test_vit2", "levit_128s"])
@pytest.mark.parametrize("bridge", ["simple", "resize"])
def test_depths_and_strides(name, bridge):
    with torch.device("meta"):
        for depth in (1, 4, 5):
            for output_stride in (16, 32):
                encoder = get_encoder(f"tu-{name}", depth=depth, output_stride=output_stride, bridge=bridge, in_channels=2)
                assert encoder.depth == depth and encoder.out_channels[-1] and encoder.output_stride == min(2**depth, output_stride)
                check_encoder(encoder)


def test_blocks_are_those_of_timm():
    "Level 4 of the ViTDet form is timm's last map; prefix tokens are gone, positions are resized as timm does"
    encoder = get_encoder("tu-vit_tiny_patch16_224").eval()
    theirs = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    theirs.load_state_dict(encoder.model.state_dict(), strict=False)
    x = torch.randn(1, 3, 96, 160)
    with torch.no_grad(): tokens, level = theirs.forward_features(x), encoder(x)[4]
    assert relative_error(level.flatten(2).transpose(1, 2), tokens[:, 1:]) < 1e-5


def test_padding_and_stretching():
    pad, stretch, loose = Fit(multiple=32), Fit(multiple=14, stretch=True), Fit(minimum=32, resize_maps=True)
    x = torch.randn(1, 3, 40, 60)
    assert pad.image(x).shape[-2:] == (64, 64) and stretch.image(x).shape[-2:] == (42, 70) and loose.image(x).shape[-2:] == (40, 60)
    f = torch.arange(64.).reshape(1, 1, 8, 8)
    assert torch.equal(pad.map(f, 8, x, pad.image(x)), f[..., :5, :8])
    assert stretch.map(f[..., :3, :5], 16, x, stretch.image(x)).shape[-2:] == (3, 4)
    assert Fit().image(x) is x and Fit().map(f, 8, x, x) is f


def test_trial_finds_the_mildest_form():
    def model(takes, shrink=lambda n: -(-n//16)):
        def run(x):
            if not takes(*x.shape[-2:]): raise AssertionError("not this size")
            return [x.new_zeros(1, 8, *map(shrink, x.shape[-2:]))]
        return lambda **arguments: run
    assert find_fit(model(lambda h, w: True), [16], (224, 224)).is_identity
    assert find_fit(model(lambda h, w: h % 32 == w % 32 == 0), [16], (224, 224)) == Fit(multiple=32)
    assert find_fit(model(lambda h, w: h == w == 224), [16], (224, 224)) == Fit(size=(224, 224))
    assert find_fit(model(lambda h, w: h > 70, lambda n: n//16 - 2), [16], (299, 299)) == Fit(minimum=96, resize_maps=True)
    def freed(**arguments): return model(lambda h, w: arguments and h % 16 == 0)()
    assert find_fit(freed, [16], (224, 224)) == Fit(multiple=16, arguments=(("dynamic_img_size", True),))


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "nest_tiny"])
def test_numbers_and_names_of_smp(name):
    depth = 4 if "nest" in name else 5
    theirs = smp.encoders.get_encoder(f"tu-{name}", depth=depth, weights=None).eval()
    ours = get_encoder(f"tu-{name}", depth=depth).eval()
    assert isinstance(ours, TimmUniversalEncoder)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad(): assert all(torch.equal(a, b) for a, b in zip(ours(x), theirs(x), strict=True))


def test_weights_and_channels():
    whole = timm.create_model("vit_tiny_patch16_224")
    encoder = get_encoder("vit_tiny_patch16_224", in_channels=4, weights=whole.state_dict(), indices=[5], bridge="resize")
    assert len(encoder.model.blocks) == 6 and encoder.out_channels == [4, 0, 192, 192, 192, 192] and not list(encoder.bridge.parameters())
    assert torch.equal(encoder.model.blocks[5].mlp.fc1.weight, whole.blocks[5].mlp.fc1.weight)
    assert torch.allclose(encoder.model.patch_embed.proj.weight, whole.patch_embed.proj.weight[:, [0, 1, 2, 0]]*3/4)


@pytest.mark.parametrize("name", ["tu-test_vit2", "tu-swin_tiny_patch4_window7_224"])
def test_arguments_that_cannot_be_keys(name):
    "A list, over a bridge and without: what is found by trial is found anew"
    with torch.device("meta"):
        listed, named = (get_encoder(name, img_size=size) for size in ([64, 64], (64, 64)))
    assert listed.fit == named.fit and listed.out_channels == named.out_channels


def test_freezing_leaves_the_bridge():
    model = segkit.FPN("tu-vit_tiny_patch16_224", encoder_weights=None)
    stages = model.encoder.parameters_by_stage()
    assert sorted(stages) == [1, 2, 3, 4, 5] and all(k.startswith("bridge.") for k in stages[5])
    model.freeze_encoder([1, 2, 3, 4])
    assert {k.split(".")[0] for k, p in model.encoder.named_parameters() if p.requires_grad} == {"bridge"}


def test_choice_of_maps():
    assert choose_maps([12, 17]*3, [2, 3, 4, 5]) == [5]*4
    assert choose_maps([7, 14, 14, 14], [2, 3, 4, 5], spread=True) == [0, 0, 1, 3]


@pytest.mark.parametrize("name", ["test_vit2", "cait_xxs24_224", "swin_tiny_patch4_window7_224"])
def test_no_model_is_built_twice_to_be_asked_the_same(name, monkeypatch):
    "Until its form is found a model is built once for each set of arguments, and then once more, to be used"
    asked, create_model = [], timm.create_model
    def create(name, **kwargs):
        asked.append(tuple(sorted(kwargs.items())))
        return create_model(name, **kwargs)
    get_encoder(f"tu-{name}")  # its facts are known from here on
    monkeypatch.setattr("timm.create_model", create)
    with torch.device("meta"): get_encoder(f"tu-{name}", drop_path_rate=.123)
    assert len(asked) == len(set(asked)) > 1
