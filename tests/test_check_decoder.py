"""`check_decoder` through the package: each broken promise is named, and a right decoder is left alone."""
import functools

import pytest
import torch
from torch import nn

from segkit.core.geometry import resize
from segkit.model import check_decoder


class Mean(nn.Module):
    "The mean of all maps, at half the picture's size; `change` is the fault"
    def __init__(self, encoder_channels, change=None, out_channels=8):
        super().__init__()
        self.out_channels, self.change = out_channels, change
        self.convs = nn.ModuleList(nn.Conv2d(c, 8, 1) if c else None for c in encoder_channels[1:])

    def forward(self, features):
        size = features[1].shape[-2:]
        if self.change: features = self.change[0](features)
        x = sum(resize(conv(f), size) for conv, f in zip(self.convs, features[1:], strict=True) if conv is not None)/5
        return self.change[1](x) if self.change else x


def same(x): return x

def without_gradient(features): return [*features[:4], features[4].data, features[5]]

def shared(features):
    features[1].add_(1)
    return features

def cleared(features):
    kept = list(features)
    features.clear()
    return kept

FAULTS = {
    "a tuple": ((same, lambda x: (x,)), TypeError, "returned tuple, expected one map"),
    "None": ((same, lambda x: None), TypeError, "returned NoneType"),
    "pooled away": ((same, lambda x: x.mean((2, 3))), ValueError, r"expected \(2, 8, h, w\)"),
    "batch and channels swapped": ((same, lambda x: x.transpose(0, 1)), ValueError, r"expected \(2, 8, h, w\)"),
    "half the channels": ((same, lambda x: x[:, :4]), ValueError, "returned 4 channels, but out_channels is 8"),
    "transposed": ((same, lambda x: x.transpose(2, 3)), ValueError, "96 x 64 gave 32 x 48"),
    "always enlarged": ((same, lambda x: resize(x, (40, 40))), ValueError, "64 x 64 gave 40 x 40"),
    "infinite": ((same, lambda x: x/0), ValueError, "not finite"),
    "the list emptied": ((cleared, same), ValueError, "changes the list"),
    "a map changed": ((shared, same), ValueError, "level 1 in place"),
    "a map without gradient": ((without_gradient, same), ValueError, "reads level 4, but no gradient"),
    "rounded": ((same, torch.round), ValueError, "reads level 1, but no gradient"),
    "constant": ((same, torch.zeros_like), ValueError, "does not depend on any map"),
    "noise": ((same, lambda x: x + torch.rand_like(x)), ValueError, "differently each time"),
    "over the batch": ((same, lambda x: x - x.mean(0)), ValueError, "depends on the others"),
    "one picture squeezed": ((same, lambda x: x.squeeze(0)), ValueError, "batch of one"),
}


def test_a_right_decoder_passes():
    check_decoder(Mean)
    check_decoder(Mean([1, 4, 0, 4]), encoder_channels=[1, 4, 0, 4])  # nothing at stride 4, as ConvNeXt at 2
    check_decoder(Mean([3, 4, 4, 4, 4]).double(), encoder_channels=[3, 4, 4, 4, 4], output_stride=8)


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named(name):
    change, kind, says = FAULTS[name]
    with pytest.raises(kind, match=says): check_decoder(functools.partial(Mean, change=change))


@pytest.mark.parametrize("promised", [None, 0, "8", 8., True])
def test_out_channels_is_a_number(promised):
    with pytest.raises(TypeError, match="out_channels is"): check_decoder(functools.partial(Mean, out_channels=promised))


def test_what_is_no_decoder():
    with pytest.raises(TypeError, match="write `class int"): check_decoder(3)
    with pytest.raises(ValueError, match="needs `encoder_channels=`"): check_decoder(Mean([3, 8, 8]))


def test_by_factor_only_where_the_model_pads():
    class Doubling(Mean):
        "Adds by doubling, so that sizes must be multiples of the stride"
        def forward(self, features):
            x = self.convs[-1](features[-1])
            for conv, f in zip(self.convs[-2::-1], features[-2:0:-1], strict=True): x = nn.functional.interpolate(x, scale_factor=2.) + conv(f)
            return x

    check_decoder(Doubling, any_size=False)
    with pytest.raises(ValueError, match="65, 71.*any_size=False"): check_decoder(Doubling)


def test_it_leaves_no_trace():
    decoder = Mean([3, 8, 8])
    decoder.norm = nn.BatchNorm2d(8)
    decoder.train().norm.eval()
    hooked = []
    handle = decoder.register_forward_hook(lambda *_: hooked.append(torch.is_grad_enabled()))
    state, numbers = {k: t.clone() for k, t in decoder.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad(): check_decoder(decoder, [3, 8, 8])
    handle.remove()
    assert True in hooked  # the gradient was looked at, also within no_grad
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(t, state[k]) for k, t in decoder.state_dict().items())
    assert decoder.training and not decoder.norm.training and all(p.grad is None for p in decoder.parameters())
