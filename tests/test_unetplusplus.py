"""`UnetPlusPlus`: the numbers of SMP for every option, any size, training with one picture, and errors in words."""
import pytest
import torch
from oracle import AUX, assert_same, check_sizes, randomise, smp, trains, widths, without_gradient
from torch.testing import assert_close

import segkit
from segkit.decoders.unetplusplus import UnetPlusPlus


def build(encoder="resnet18", **options): return UnetPlusPlus(encoder, **{"encoder_weights": None, "classes": 3} | options)


def check_parity(encoder="resnet18", **options): assert_same(UnetPlusPlus, "UnetPlusPlus", encoder_name=encoder, **options)


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_parity_at_each_depth(depth): check_parity(encoder_depth=depth, decoder_channels=widths(depth))


@pytest.mark.parametrize("options", [
    {"decoder_attention_type": "scse"}, {"decoder_use_norm": False}, {"encoder_name": "tu-convnext_atto", "decoder_attention_type": "scse"}, {"decoder_interpolation": "bilinear"}, {"activation": "sigmoid", "aux_params": AUX}],
    ids=str)
def test_parity_of_options(options): assert_same(UnetPlusPlus, "UnetPlusPlus", encoder_depth=4, decoder_channels=widths(4), **options)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_parity_without_stride_2(depth): check_parity("tu-convnext_atto", encoder_depth=depth, decoder_channels=widths(depth))


def test_parity_of_timm(): check_parity("tu-resnet18")


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_any_size(depth): check_sizes(UnetPlusPlus, encoder_depth=depth, decoder_channels=widths(depth))


@pytest.mark.parametrize("norm", ["batchnorm", "groupnorm", "layernorm", "instancenorm", "identity", {"type": "batchnorm", "affine": False}], ids=str)
def test_norms(norm):
    assert without_gradient(build(encoder_depth=3, decoder_channels=(32, 32, 32), decoder_use_norm=norm)) == []


@pytest.mark.parametrize("encoder", ["resnet18", "tu-convnext_atto"])
def test_every_parameter_gets_a_gradient(encoder):
    assert without_gradient(build(encoder, decoder_attention_type="scse", aux_params=AUX)) == []


def test_one_picture(): trains(UnetPlusPlus, aux_params=AUX)


@pytest.mark.parametrize("encoder, depth, count", [("resnet18", 5, 4), ("resnet18", 3, 2), ("tu-convnext_atto", 5, 3), ("tu-convnext_atto", 4, 2)])
def test_deep_supervision(encoder, depth, count):
    torch.manual_seed(0)
    model = randomise(build(encoder, encoder_depth=depth, decoder_channels=widths(depth), deep_supervision=True)).eval()
    x = torch.randn(2, 3, 65, 71)
    with torch.no_grad(): single = model(x)
    assert single.shape == (2, 3, 65, 71)
    masks = model.train()(x)
    assert isinstance(masks, list) and [m.shape for m in masks] == [(2, 3, 65, 71)]*count
    sum(m.square().mean() for m in masks).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("encoder, count", [("resnet18", 4), ("tu-convnext_atto", 3)])
def test_prune(encoder, count):
    torch.manual_seed(0)
    model = randomise(build(encoder, decoder_channels=widths(5), deep_supervision=True)).eval()
    x = torch.randn(1, 3, 65, 71)
    # in training mode all masks are seen; norms that stay in evaluation make the numbers comparable
    model.train()
    for m in model.modules(): m.training = m is model
    with torch.no_grad(): masks = model(x)
    model.eval()
    sizes = []
    for level in range(1, count + 1):
        small = model.prune(level)
        assert not small.training
        with torch.no_grad(): assert torch.equal(small(x), masks[count - level])
        sizes.append(sum(p.numel() for p in small.parameters()))
        again = UnetPlusPlus(**small.config)
        again.load_state_dict(small.state_dict())
    assert sizes == sorted(set(sizes))
    with pytest.raises(ValueError, match="level=5"): model.prune(5)
    with pytest.raises(ValueError, match="deep_supervision"): build().prune(1)


def test_prune_with_parts_that_are_no_plain_data():
    "An encoder that was built already, an activation without a name; on both sides the same numbers"
    encoder = segkit.encoders.get_encoder("resnet18", weights=None)
    model = randomise(build(encoder, decoder_channels=widths(5), deep_supervision=True,
                            activation=lambda: torch.nn.Tanh())).double()
    x = torch.randn(1, 3, 65, 71, dtype=torch.float64)
    for m in model.modules(): m.training = m is model
    with torch.no_grad(): masks = model(x)
    model.eval()
    for level in (1, 3):
        small = model.prune(level)
        with torch.no_grad(): assert torch.equal(small(x), masks[4 - level])
    with torch.no_grad(): assert torch.equal(model(x), masks[0])  # pruning leaves the large one as it was


def test_prune_keeps_the_label():
    model = randomise(build(decoder_channels=widths(5), deep_supervision=True, aux_params=AUX))
    x, small = torch.randn(1, 3, 64, 64), model.eval().prune(1)
    with torch.no_grad(): assert torch.equal(small(x)[1], model(x)[1])


def test_levels_with_smps_weights():
    theirs = randomise(smp.UnetPlusPlus("resnet18", 3, None, decoder_channels=widths(3), classes=3)).eval()
    ours = build(encoder_depth=3, decoder_channels=widths(3), deep_supervision=True).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and set(k.split(".")[0] for k in missing) == {"deep_heads"}
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("options, error", [
    ({"decoder_channels": (64, 32)}, "decoder_channels has 2 numbers"), ({"encoder_depth": 2, "decoder_channels": (8, 8), "deep_supervision": True}, "one mask only"),
    ({"level": 5}, "level=5: expected 1 or 2 or 3 or 4"), ({"encoder_name": "tu-convnext_atto", "encoder_depth": 1, "decoder_channels": (8,)}, "at least 2"),
    ({"decoder_attention_type": "se"}, "decoder_attention_type|attention_type='se'")])
def test_refused(options, error):
    with pytest.raises(ValueError, match=error): UnetPlusPlus(**{"encoder_name": "resnet18", "encoder_weights": None} | options)


def test_old_argument():
    with pytest.warns(DeprecationWarning, match="decoder_use_batchnorm"): build(decoder_use_batchnorm=False)
