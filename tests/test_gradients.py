"""A training step: SMP's gradients, in float64, for every architecture."""
import warnings

import pytest
import torch
from oracle import randomise, smp
from torch import nn

import segkit
from segkit import MODEL_ARCHITECTURES_MAPPING

CASES = [(arch, {}) for arch in sorted(MODEL_ARCHITECTURES_MAPPING)] + [
    ("unet", {"decoder_attention_type": "scse"}), ("unet", {"decoder_interpolation": "bilinear"}), ("unet", {"decoder_use_norm": "identity"}),
    ("unetplusplus", {"decoder_attention_type": "scse"}), ("segformer", {"encoder_name": "mit_b0"}), ("fpn", {"decoder_merge_policy": "cat"})]
aux = {"classes": 4, "dropout": 0.}


def trained(model, x):
    "Loss, and the gradient of each parameter that has one, after a step in training mode without dropout"
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd): m.p = 0.
        if type(m).__name__ == "DropPath": m.drop_prob = m.rate = 0.
    model.double().train()
    mask, label = model(x)
    loss = mask.cos().square().mean() + label.sin().square().mean()  # no symmetry that would hide an error
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("arch", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())))
def test_gradients_are_those_of_smp(arch, options):
    torch.manual_seed(0)
    vit = arch == "dpt"
    options = {"encoder_name": "tu-vit_tiny_patch16_224" if vit else "resnet18", "encoder_weights": None, "classes": 3, "aux_params": aux} | options
    ours = segkit.create_model(arch, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = randomise(getattr(smp, type(ours).__name__)(**options))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *(224, 224) if vit else (128, 160), dtype=torch.float64)
    (a, got), (b, expected) = trained(ours, x), trained(theirs, x)
    assert a == pytest.approx(b, rel=1e-12)
    assert got and set(got) <= set(expected)
    scale = max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        if name in got: assert (got[name] - gradient).abs().max() <= 1e-10*max(gradient.abs().max().item(), 1e-3*scale), name
        else: assert not gradient.any(), f"{name} has a gradient at SMP alone"
