"""Mix Transformers: SMP's tensors load strictly and give SMP's features, level by level."""
import pytest
import torch
from oracle import randomise, relative_error, smp, without_gradient
from timm.layers import DropPath
from torch.export import Dim, export

from segkit import Segformer, Unet
from segkit.core.registry import encoders
from segkit.encoders import check_encoder, get_encoder, parameter_stages

torch.set_num_threads(1)
NAMES = [f"mit_b{i}" for i in range(6)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["mit_b0", "mit_b1"])
@pytest.mark.parametrize("size", [(64, 96), (128, 160), (65, 71)])
def test_features_equal_smp(name, size):
    torch.manual_seed(0)
    theirs = randomise(smp.encoders.get_encoder(name, weights=None)).double().eval()
    ours = get_encoder(name).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    a, b = ours(x), theirs(x)
    assert len(a) == len(b) == 6 and a[0] is x
    for level, (p, q) in enumerate(zip(a, b)):
        if level == 1: assert p.shape[1] == 0
        else: assert p.shape == q.shape and relative_error(p, q) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_tensors_have_the_names_shapes_and_order_of_smp(name):
    with torch.device("meta"): ours = get_encoder(name)
    theirs = smp.encoders.get_encoder(name, weights=None).state_dict()
    assert [(k, t.shape) for k, t in ours.state_dict().items()] == [(k, t.shape) for k, t in theirs.items()]
    assert ours.out_channels == [3, 0, *([32, 64, 160, 256] if name == "mit_b0" else [64, 128, 320, 512])]


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_contract_at_each_depth(depth):
    encoder = get_encoder("mit_b0", depth=depth)
    check_encoder(encoder)
    assert len(parameter_stages(encoder)) == len(list(encoder.parameters()))
    whole = get_encoder("mit_b0").state_dict()
    assert {k: tuple(t.shape) for k, t in whole.items()} == encoder.unused_tensors()


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels(channels):
    encoder = get_encoder("mit_b0", in_channels=channels).eval()
    assert encoder.out_channels[0] == channels and encoder(torch.randn(1, channels, 64, 64))[0].shape[1] == channels


@pytest.mark.parametrize("size", [(1, 1), (8, 100), (33, 47)])
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_any_size(size, depth):
    maps = get_encoder("mit_b0", depth=depth).eval()(torch.randn(1, 3, *size))
    for level, f in enumerate(maps): assert f.shape[-2:] == (-(-size[0]//2**level), -(-size[1]//2**level))


def test_in_a_unet():
    model = Unet("mit_b0", encoder_weights=None, aux_params={"classes": 2})
    assert without_gradient(model) == []
    assert model.eval()(torch.randn(1, 3, 65, 71))[0].shape == (1, 1, 65, 71)


def test_drop_path_grows_with_the_block():
    rates = [m.drop_prob for m in get_encoder("mit_b0").modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([.1*i/7 for i in range(8)])


def test_weights_and_licence():
    for name in NAMES:
        settings = encoders[name]["pretrained_settings"]["imagenet"]
        assert settings["repo_id"] == f"smp-hub/{name}.imagenet" and len(settings["revision"]) == 40 and "no commercial" in settings["license"]


def test_refuses():
    with pytest.raises(ValueError, match="use a depth of 2, 3, 4 or 5"): get_encoder("mit_b0", depth=1)
    with pytest.raises(ValueError, match="cannot be dilated"): get_encoder("mit_b0", output_stride=16)
    with pytest.raises(TypeError, match="has no argument 'widhts'; did you mean 'widths'"): get_encoder("mit_b0", widhts=3)
    with pytest.raises(KeyError, match="imagenet"): get_encoder("mit_b0", weights="imagnet")


def test_exports_with_free_sizes():
    model = Segformer("mit_b0", encoder_weights=None).eval()
    free = {0: Dim("b", min=1, max=64), 2: Dim("h", min=33, max=4096), 3: Dim("w", min=33, max=4096)}
    exported = export(model, (torch.randn(2, 3, 65, 71),), dynamic_shapes=(free,)).module()
    x = torch.randn(3, 3, 96, 130)
    with torch.no_grad(): assert relative_error(exported(x), model(x)) < 1e-4
