"""A model from each of thirteen unlike encoder families learns something of the real slices in a few steps."""
import pytest
import torch
import torch.nn.functional as F

import segkit
from segkit.data import brain_dataloaders

FAMILIES = {  # encoder -> architecture, so that most decoders are met on the way
    "resnet18": "Unet",                          # residual blocks
    "mit_b0": "Segformer",                       # attention to regions, overlapping patches
    "tu-convnext_atto": "Segformer",             # depthwise 7x7, no stride 2
    "tu-mobilenetv3_small_050": "DeepLabV3Plus", # inverted residuals, squeeze and excitation
    "tu-regnetx_002": "PAN",                     # groups
    "tu-edgenext_xx_small": "Linknet",           # convolutions, then attention over channels
    "tu-pvt_v2_b0": "FPN",                       # pyramid of transformers
    "tu-efficientvit_b0": "Unet",                # linear attention
    "tu-test_mambaout": "Unet",                  # gated convolutions
    "tu-starnet_s050": "Linknet",                # products of features
    "tu-hrnet_w18_small": "FPN",                 # resolutions side by side
    "tu-densenet121": "Unet",                    # maps appended, never replaced
    "tu-test_vit": "DPT",                        # a plain transformer
}


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    dls = brain_dataloaders(bs=4, size=48, labels=None, degraded=False)
    image, mask = (t.as_subclass(torch.Tensor).cpu() for t in dls.train.one_batch())
    return F.interpolate(image, (64, 64)), F.interpolate(mask[:, None].float(), (64, 64)).long()[:, 0]


@pytest.mark.parametrize("name, arch", FAMILIES.items())
def test_the_loss_falls(name, arch, batch):
    image, mask = batch
    torch.manual_seed(0)
    kwargs = {"encoder_depth": 2, "decoder_intermediate_channels": (32, 64), "decoder_fusion_channels": 32} if arch == "DPT" else {}
    model = getattr(segkit, arch)(name, encoder_weights=None, classes=4, **kwargs).train()
    start = [p.detach().clone() for p in model.encoder.parameters()]
    optimizer, losses = torch.optim.AdamW(model.parameters(), 2e-3), []
    for _ in range(6):
        loss = F.cross_entropy(model(image), mask)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < .9*losses[0], losses
    assert any(not torch.equal(p, q) for p, q in zip(start, model.encoder.parameters(), strict=True))
