"""`use_checkpoint=True`: the same step to the last bit, in less memory, through models, copies and saved folders."""
import copy
import pickle

import pytest
import torch

import segkit
from segkit.encoders import get_encoder, parameter_stages
from segkit.encoders.checkpoint import checkpoint_units, recomputed

X = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def step(model, x):
    "Outputs, gradients, buffers, the next random number, and the bytes that autograd holds"
    held, weights = {}, {t.untyped_storage().data_ptr() for t in model.state_dict().values()}

    def pack(t):
        if (place := t.untyped_storage().data_ptr()) not in weights: held[place] = t.untyped_storage().nbytes()
        return t

    torch.manual_seed(0)
    model.train().zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): out = model(x)
    sum(f.square().mean() for f in out if f.numel() and f.requires_grad).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return list(out), gradients, dict(model.named_buffers()), torch.rand(1), sum(held.values())


def assert_same_step(model, x):
    other = copy.deepcopy(model)
    other.encoder.set_gradient_checkpointing() if hasattr(other, "encoder") else other.set_gradient_checkpointing()
    a, b = step(model, x), step(other, x)
    assert all(torch.equal(p, q) for p, q in zip(a[0], b[0], strict=True))
    for one, two in zip(a[1:3], b[1:3], strict=True):
        assert one.keys() == two.keys()
        for k in one: assert torch.equal(one[k], two[k]), k
    assert a[1] and torch.equal(a[3], b[3])   # the random generator is where it would be
    assert b[4] < (1 if hasattr(model, "encoder") else .9)*a[4], (a[4], b[4])


@pytest.mark.parametrize("name, kwargs", [
    ("resnet18", {}),                                  # BatchNorm
    ("resnet18", {"drop_path_rate": .3}),              # and random numbers
    ("mit_b0", {"drop_path_rate": .3}),
    ("tu-densenet121", {"drop_rate": .1}),             # a list that grows
    ("tu-hrnet_w18_small", {}),                        # lists of maps between stages
    ("tu-test_efficientnet", {"drop_path_rate": .3}),
    ("tu-test_convnext", {"drop_path_rate": .3}),
    ("tu-test_mambaout", {}),
    ("tu-vgg11_bn", {}),                               # no blocks: the whole encoder
    ("tu-mobileone_s0", {}),                           # branches
])
def test_same_step(name, kwargs):
    torch.manual_seed(0)
    assert_same_step(get_encoder(name, **kwargs).double(), X)


def test_frozen_norms_and_stages():
    "Norms in evaluation, parameters without gradient: the same with the flag"
    torch.manual_seed(0)
    model = segkit.Unet("resnet18", encoder_weights=None, aux_params={"classes": 2, "dropout": .5}).double()
    model.freeze_encoder([1, 2])
    assert_same_step(model, X)
    assert sum(p.requires_grad for p in model.encoder.parameters()) < len(list(model.encoder.parameters()))


def test_through_models(tmp_path):
    model = segkit.Unet("resnet18", encoder_weights=None, use_checkpoint=True)
    assert len(recomputed(model.encoder)) == 8 and model.config["use_checkpoint"] is True
    model.save_pretrained(tmp_path)
    again = segkit.from_pretrained(tmp_path)
    assert len(recomputed(again.encoder)) == 8 and list(again.state_dict()) == list(segkit.Unet("resnet18", encoder_weights=None).state_dict())
    assert not recomputed(segkit.from_pretrained(tmp_path, use_checkpoint=False).encoder)
    x = torch.randn(1, 3, 64, 64)
    for other in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(other.predict(x), model.predict(x))
        assert all(m.forward.module is m for m in recomputed(other.encoder))
    with pytest.raises(TypeError, match="use_checkpoint='yes': expected True or False"): segkit.Unet("resnet18", encoder_weights=None, use_checkpoint="yes")


def test_dpt():
    torch.manual_seed(0)
    model = segkit.DPT("tu-test_vit", encoder_weights=None, encoder_depth=2, decoder_intermediate_channels=(16, 16), use_checkpoint=True).double()
    assert len(recomputed(model.encoder)) == len(checkpoint_units(model.encoder)) > 1
    other = copy.deepcopy(model); other.encoder.set_gradient_checkpointing(False)
    a, b = step(model, X), step(other, X)
    assert torch.equal(a[0][0], b[0][0]) and all(torch.equal(a[1][k], b[1][k]) for k in b[1]) and a[4] < b[4]


def test_stages_are_measured_as_before():
    encoder = get_encoder("resnet18", use_checkpoint=True)
    assert parameter_stages(encoder) == parameter_stages(get_encoder("resnet18"))
    assert len(recomputed(encoder)) == 8   # the measuring run has put them back


def test_an_input_changed_in_place_is_an_error_not_a_wrong_gradient():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__(); self.a, self.b = (torch.nn.Conv2d(3, 3, 1) for _ in range(2))

        def forward(self, x): return self.b(self.a(torch.nn.functional.silu(x, inplace=True)))
    net = torch.nn.Sequential(Block(), Block())
    segkit.encoders.checkpoint.set_checkpointing(net)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): net(torch.randn(1, 3, 4, 4)*1).sum().backward()
