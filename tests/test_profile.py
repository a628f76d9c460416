import pytest
import torch
from torch import nn

import segkit


def test_bytes_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False))
    p = segkit.profile(model, torch.rand(2, 3, 16, 32), repeats=1)
    whole = 16*32*4
    assert p.total.kept == 8*whole  # the image is not counted, the first map is not needed, ReLU's answer is
    assert p.total.live == 16*whole  # the two maps of 8 channels, while ReLU runs
    assert p.total.parameters == 56 and p.total.multiply_adds == 56*16*32

@pytest.mark.parametrize("name", ["unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus", "pan", "upernet", "segformer", "dpt"])
def test_every_architecture(name):
    encoder, size = ("tu-vit_tiny_patch16_224", 32) if name == "dpt" else ("resnet18", 64)
    model = segkit.create_model(name, encoder, encoder_weights=None, aux_params={"classes": 2})
    p, counted = segkit.profile(model, size, repeats=1), segkit.inspect.cost(model, size)
    assert {n: (b.parameters, b.multiply_adds) for n, b in counted.bills.items()} == {n: (p.parts[n].parameters, p.parts[n].multiply_adds) for n in counted.bills}
    assert all(p[g].seconds > 0 and p[g].live > 0 for g in ("encoder", "decoder", "heads")) and p["decoder"].kept > 0
    assert "encoder, rest" not in p.parts
