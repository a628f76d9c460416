"""`DPT`: the numbers of SMP with each readout, depth and kind of encoder; any size; patches of 14 pixels."""
import warnings

import pytest
import torch
from oracle import AUX, assert_same, without_gradient

from segkit.decoders.dpt import DPT, ReadoutAddBlock

torch.set_num_threads(1)
TINY = "tu-vit_tiny_patch16_224"
SMALL = {"decoder_intermediate_channels": (16, 24, 32, 32), "decoder_fusion_channels": 24, "encoder_name": TINY, "encoder_weights": None}
pytestmark = pytest.mark.filterwarnings("ignore:.*without a place.*")


def build(**options): return DPT(**SMALL | {"classes": 2} | options)


def check_parity(size=(224, 224), **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(DPT, "DPT", size=size, **SMALL | options)


@pytest.mark.parametrize("options", [
    {"aux_params": AUX}, {"decoder_readout": "add"}, {"decoder_readout": "ignore", "activation": "sigmoid"}, {"in_channels": 1},
    {"encoder_output_indices": [0, 3, -2, -1]}, {"size": (160, 96), "dynamic_img_size": True},
    {"encoder_depth": 2, "decoder_intermediate_channels": (16, 24)}, {"encoder_depth": 5, "decoder_intermediate_channels": (16, 24, 16, 8, 16), "size": (128, 64), "dynamic_img_size": True},
], ids=str)
def test_equals_smp_with_each_option(options): check_parity(**options)


def test_equals_smp_at_default_widths():
    assert_same(DPT, "DPT", size=(64, 96), encoder_name=TINY, dynamic_img_size=True, aux_params=AUX)


@pytest.mark.parametrize("readout", ["cat", "add", "ignore"])
@pytest.mark.parametrize("name", ["tu-resnet18", "tu-vit_tiny_r_s16_p8_224", "tu-vit_small_patch16_dinov3"])
def test_equals_smp_with_other_encoders(name, readout):
    check_parity(encoder_name=name, decoder_readout=readout, size=(256, 256) if name.endswith("dinov3") else (224, 224))


@torch.no_grad()
@pytest.mark.parametrize("name", [TINY, "tu-vit_small_patch14_dinov2", "tu-resnet18", "tu-mixer_s32_224", "tu-eva02_tiny_patch14_224"])
def test_any_size(name):
    model = build(encoder_name=name).eval()
    for size in [(65, 71), (100, 260), (33, 24), (1, 1)]: assert model(torch.randn(1, 3, *size)).shape == (1, 2, *size)


@torch.no_grad()
def test_patches_of_14_pixels_are_resized_to_the_strides_of_the_pyramid():
    model, sizes = build(encoder_name="tu-vit_small_patch14_dinov2").eval(), []
    for block in model.decoder.reassemble_blocks: block.register_forward_hook(lambda m, i, o: sizes.append(tuple(o.shape[-2:])))
    model(torch.randn(1, 3, 224, 112))
    assert sizes == [(56, 28), (28, 14), (14, 7), (7, 4)]


@pytest.mark.parametrize("options", [{}, {"decoder_readout": "add"}, {"decoder_readout": "ignore"}, {"encoder_name": "tu-resnet18"},
                                     {"encoder_name": "tu-vit_small_patch14_dinov2"}, {"encoder_output_indices": [0, 1, 2, 3]}], ids=str)
def test_every_parameter_gets_a_gradient(options): assert without_gradient(build(aux_params=AUX, **options)) == []


def test_batch_of_one_trains():
    mask, label = build(aux_params=AUX).train()(torch.randn(1, 3, 32, 32))
    (mask.square().mean() + label.sum()).backward()


def test_add_takes_the_mean_of_all_tokens():
    x, prefix = torch.randn(2, 6, 3, 4), torch.randn(2, 3, 6)
    torch.testing.assert_close(ReadoutAddBlock()(x, prefix), x + ((prefix[:, 0] + prefix[:, 1] + prefix[:, 2])/3)[..., None, None])
    assert ReadoutAddBlock()(x, None) is x


def test_freezes_by_stage():
    model = build()
    model.freeze_encoder(stages=[1, 2])
    frozen = {n for n, p in model.encoder.named_parameters() if not p.requires_grad}
    assert {n.split(".")[2] for n in frozen if ".blocks." in n} == {"0", "1", "2", "3", "4", "5"} and "model.patch_embed.proj.weight" in frozen


def test_refuses():
    with pytest.raises(ValueError, match="'resnet34' is a pyramid.*use 'tu-resnet34'"): build(encoder_name="resnet34")
    with pytest.raises(KeyError, match="timm has no model 'vit_tin'"): build(encoder_name="tu-vit_tin")
    with pytest.raises(ValueError, match="decoder_readout='concat': expected 'ignore' or 'add' or 'cat'"): build(decoder_readout="concat")
    with pytest.raises(ValueError, match="has 4 numbers, .* but 3 blocks are read"): build(encoder_depth=3)
    with pytest.raises(ValueError, match="DPT has no encoder_output_stride"): build(encoder_output_stride=16)
    with pytest.raises(ValueError, match="there is no block 12; this model has the blocks 0 to 11"): build(encoder_output_indices=[0, 1, 2, 12])
    with pytest.raises(ValueError, match="this model has 12 blocks"): build(encoder_depth=13, decoder_intermediate_channels=(8,)*13)
    with pytest.warns(UserWarning, match="no tokens without a place"): build(encoder_name="tu-resnet18")
