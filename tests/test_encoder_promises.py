"""Every kind of encoder against every promise: what is traced, hooked, shared or given twice stays what it was."""
import copy
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from segkit import FPN, Unet
from segkit.encoders import EncoderMixin, get_encoder, list_encoders
from segkit.encoders.timm_models import build_with_weights, once_for_each
from segkit.encoders.universal import pyramid_fit
from segkit.encoders.vit import get_vit_encoder

CONVOLUTIONAL = [  # one of each class
    "resnet18", "vgg11_bn", "densenet121", "se_resnet50", "dpn68", "inceptionv4", "inceptionresnetv2", "xception",
    "efficientnet-b0", "timm-efficientnet-b0", "mobilenet_v2", "mobileone_s0", "timm-skresnet18"]
OTHERS = ["mit_b0", "tu-test_resnet", "tu-test_convnext2", "tu-test_vit"]
IMAGES = [torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)) for size in ((64, 96), (97, 65))]


@pytest.fixture(scope="module", params=CONVOLUTIONAL + OTHERS)
def built(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.manual_seed(0)
        return request.param, get_encoder(request.param).eval()


def equal(a, b): return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def test_torch_fx_sees_the_same(built):
    "One program, equal numbers at two sizes"
    name, encoder = built
    if name not in CONVOLUTIONAL: pytest.skip("fx follows no Python that depends on a size")
    traced = torch.fx.symbolic_trace(encoder)
    for x in IMAGES: assert equal(traced(x), encoder(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torch_jit_trace_gives_the_same(built):
    _, encoder = built
    assert equal(torch.jit.trace(encoder, IMAGES[0], check_trace=False)(IMAGES[0]), encoder(IMAGES[0]))


@torch.no_grad()
def test_hooks_change_nothing(built):
    "Under a global hook and one on each module, and each module with weights is seen"
    _, encoder = built
    before, seen = encoder(IMAGES[1]), set()
    everywhere = register_module_forward_hook(lambda module, *_: seen.add(module))
    hooks = [m.register_forward_hook(lambda *_: None) for m in encoder.modules()]
    try: after = encoder(IMAGES[1])
    finally:
        for hook in [everywhere, *hooks]: hook.remove()
    assert equal(before, after)
    convs = {m for m in encoder.modules() if isinstance(m, nn.Conv2d)}
    assert convs <= seen or not isinstance(encoder, EncoderMixin)


# a module that was given

CHANGES = [{"depth": 4}, {"in_channels": 5}, {"output_stride": 8}, {"use_checkpoint": True},
           {"depth": 3, "in_channels": 1, "use_checkpoint": True}]


@pytest.mark.parametrize("options", CHANGES, ids=str)
def test_a_given_encoder_stays_what_it_was(options):
    mine = get_encoder("resnet18").eval()
    with torch.no_grad(): before = mine(IMAGES[0])
    facts = mine.depth, mine.in_channels, mine.output_stride, mine.out_channels
    theirs = get_encoder(mine, **options)
    assert theirs.depth == options.get("depth", 5) and theirs.in_channels == options.get("in_channels", 3)
    assert (mine.depth, mine.in_channels, mine.output_stride, mine.out_channels) == facts
    assert not any("forward" in vars(m) for m in mine.modules())
    with torch.no_grad(): assert equal(mine(IMAGES[0]), before)
    adapted = {"conv1.weight"} if "in_channels" in options else set()
    assert {name for name, p in theirs.named_parameters() if p is not mine.get_parameter(name)} == adapted


def test_two_models_on_one_encoder():
    mine = get_encoder("resnet18").eval()
    first = Unet(mine, classes=2).eval()
    with torch.no_grad():
        before = first(IMAGES[0])
        second, third = FPN(mine, encoder_depth=4).eval(), Unet(mine, in_channels=4).eval()
        assert torch.equal(first(IMAGES[0]), before)
        assert second(IMAGES[0]).shape == (1, 1, 64, 96) and third(torch.randn(1, 4, 64, 96)).shape == (1, 1, 64, 96)
    first.train()(torch.randn(2, 3, 64, 64)).mean().backward()
    assert second.encoder.layer1[0].conv1.weight.grad is mine.layer1[0].conv1.weight.grad is not None


def test_hooks_of_a_given_encoder_are_called_in_a_shallower_model():
    mine, seen = get_encoder("resnet18").eval(), []
    mine.layer1.register_forward_hook(lambda *_: seen.append("layer1"))
    FPN(mine, encoder_depth=4).eval()(IMAGES[0])
    assert "layer1" in seen


@pytest.mark.parametrize("build", [lambda: timm.create_model("test_resnet", features_only=True), lambda: timm.create_model("test_convnext2")],
                         ids=["pyramid", "classifier"])
def test_a_given_module_stays_what_it_was(build):
    mine = build().eval()
    state, before = copy.deepcopy(mine.state_dict()), mine(IMAGES[0])
    get_encoder(mine, in_channels=5, use_checkpoint=True)
    get_encoder(mine, weights={name: torch.zeros_like(t) for name, t in state.items()})
    assert all(torch.equal(t, state[name]) for name, t in mine.state_dict().items())
    after = mine(IMAGES[0])
    assert equal(after, before) if isinstance(before, list) else torch.equal(after, before)


def test_a_given_vit_stays_what_it_was():
    mine = get_vit_encoder("tu-test_vit", depth=2)
    other = get_vit_encoder(mine, in_channels=5, depth=2, use_checkpoint=True)
    assert (mine.in_channels, other.in_channels) == (3, 5) and not any("forward" in vars(m) for m in mine.modules())


# names, weights, numbers

@pytest.mark.parametrize("channels", [1, 3, 5, 64])
def test_the_first_map_of_vgg_is_not_the_image(channels):
    encoder = get_encoder("vgg11", in_channels=channels, depth=2)
    encoder.set_in_channels(5)
    assert encoder.out_channels[0] == encoder(torch.randn(1, 5, 32, 32))[0].shape[1] == 64


def test_an_error_of_timm_is_not_taken_for_a_missing_network():
    def misfit(pretrained): raise RuntimeError("size mismatch for head.weight")
    with pytest.raises(RuntimeError, match="size mismatch for head.weight"): build_with_weights(misfit, "tu-test_vit", "test_vit", True)


def test_answers_are_kept_by_value_and_type():
    assert pyramid_fit("test_resnet") is pyramid_fit("test_resnet")
    asked = once_for_each(lambda name, **kwargs: object())
    assert asked("a", x=1) is asked("a", x=1) is not asked("a", x=True)
    assert asked("a", x=[1]) is not asked("a", x=[1])


def test_list_encoders_lists_what_was_asked():
    assert list_encoders("tu-resnet34").name.tolist() == ["tu-resnet34"]
    assert list_encoders("resnet34").name.tolist() == ["resnet34", "tu-resnet34"]
    assert list_encoders(["tu-test_vit", "vgg11"]).name.tolist() == ["vgg11", "tu-test_vit", "tu-vgg11"]
    assert list_encoders("*", max_params=0).empty and list_encoders("resnet18", max_multiply_adds=0).name.tolist() == ["resnet18"]


def test_random_weights_say_nothing_of_preprocessing(tmp_path):
    assert get_encoder("resnet18").preprocessing == get_encoder("tu-test_resnet").preprocessing == {}
    state = get_encoder("resnet18").state_dict()
    torch.save(state, tmp_path/"a.pth")
    assert get_encoder("resnet18", weights=tmp_path/"a.pth").preprocessing == {}


def test_preprocessing_of_a_tag(monkeypatch):
    state = get_encoder("resnet18").state_dict()
    monkeypatch.setattr("segkit.encoders.weights._fetch_tag", lambda *_: state)
    for tag in ("imagenet", True, "ssl"):
        found = get_encoder("resnet18", weights=tag, in_channels=4).preprocessing
        assert found == {"input_space": "RGB", "input_range": [0, 1], "mean": [.485, .456, .406], "std": [.229, .224, .225]}


# freezing

WAYS = {  # by which a norm may be told to train, and what then runs
    "model": lambda model: model.train(),
    "encoder": lambda model: model.encoder.train() and model,
    "stage": lambda model: model.encoder.layer2.train() and model.encoder.layer1.train() and model,
    "norm": lambda model: model.encoder.bn1.train() and model,
    "each module": lambda model: model.apply(lambda module: module.train()),
    "as any module": lambda model: nn.Module.train(model),
    "another model around the encoder": lambda model: FPN(model.encoder, classes=2).train(),
    "another depth": lambda model: FPN(model.encoder, encoder_depth=4).train(),
    "a copy around the same tensors": lambda model: get_encoder(model.encoder, use_checkpoint=True).train(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stages", [None, [1, 2]], ids=["whole", "stages"])
def test_a_frozen_encoder_keeps_its_statistics_whatever_train_is_called_on(way, stages):
    model = Unet("resnet18", encoder_weights=None, decoder_channels=(8,)*5)
    model.freeze_encoder(stages)
    frozen = [m for name, m in model.encoder.named_modules() if isinstance(m, nn.BatchNorm2d) and (stages is None or name.startswith(("bn1", "layer1")))]
    before = [copy.deepcopy(m.state_dict()) for m in frozen]
    WAYS[way](model)(torch.randn(2, 3, 64, 64) + 1)
    assert all(torch.equal(t, old[k]) for m, old in zip(frozen, before, strict=True) for k, t in m.state_dict().items())
    model.unfreeze_encoder()
    assert all(m.training for m in model.train().modules())
