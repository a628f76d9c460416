"""SMP as an oracle: the same weights in, the same numbers out."""
import copy
import pickle
import warnings
from functools import partial
from unittest import mock

import torch
from torch import nn

from segkit.encoders import get_encoder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import segmentation_models_pytorch as smp

aux = {"classes": 4, "pooling": "avg", "dropout": 0.}
AUX = dict(classes=3, pooling="max", dropout=0.3, activation="sigmoid")


def widths(depth):
    "Narrow `decoder_channels`, one for each stage"
    return (64, 48, 32, 24, 16)[:depth]


def randomise(model, seed=0):
    "Fill every vector of the state dict (biases, norm weights, running statistics), since fresh ones hide mistakes"
    generator = torch.Generator().manual_seed(seed)
    for t in model.state_dict().values():
        if t.dim() == 1: t.copy_(torch.rand(t.shape, generator=generator) + .5)
    return model


def relative_error(a, b):
    "Largest difference, relative to the largest value"
    return ((a - b).abs().max()/b.abs().max().clamp(min=1e-12)).item()


@torch.no_grad()
def assert_same(ours_class, name, size=(64, 96), tolerance=1e-10, **kwargs):
    "Build SMP's model and ours, copy SMP's weights strictly, compare all outputs in evaluation mode, in float64"
    kwargs = {"encoder_name": "resnet18", "encoder_weights": None, "classes": 5} | kwargs
    torch.manual_seed(0)
    theirs = randomise(getattr(smp, name)(**kwargs)).double().eval()
    ours = ours_class(**kwargs).double().eval()
    assert not ours.load_state_dict(theirs.state_dict()).missing_keys
    x = torch.randn(2, kwargs.get("in_channels", 3), *size, dtype=torch.float64)
    a, b = ours(x), theirs(x)
    for p, q in zip(a, b, strict=True) if isinstance(b, tuple) else [(a, b)]:
        assert p.shape == q.shape
        assert relative_error(p, q) <= tolerance, relative_error(p, q)


def without_gradient(model, size=(64, 64)):
    "Names of parameters that a loss on all outputs does not reach"
    model.train().zero_grad()
    out = model(torch.randn(2, model.encoder.in_channels, *size))
    sum(t.square().mean() for t in (out if isinstance(out, tuple) else (out,))).backward()
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def outputs(model, x):
    with torch.no_grad(): out = model.eval()(x)
    return out if isinstance(out, tuple) else (out,)


def same_as_smp(cls, size=(64, 96), theirs=None, **arguments):
    "Load SMP's random checkpoint strictly, and compare all outputs in float64"
    arguments = {"encoder_name": "resnet18", "encoder_weights": None, "classes": 3, "aux_params": aux} | arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = randomise(getattr(smp, cls.__name__)(**arguments | (theirs or {})))
    ours, state = cls(**arguments), other.state_dict()
    names = list(state)
    missing = ours.load_state_dict(state)  # strict
    assert not missing.missing_keys and not missing.unexpected_keys and list(state) == names
    torch.manual_seed(0)
    x = torch.randn(2, arguments.get("in_channels", 3), *size, dtype=torch.float64)
    for a, b in zip(outputs(ours.double(), x), outputs(other.double(), x), strict=True):
        assert a.shape == b.shape and relative_error(a, b) <= 1e-10, relative_error(a, b)
    return ours, other


def trains(cls, size=(64, 64), batch=1, **arguments):
    "One backward pass with both heads: every parameter has a gradient"
    torch.manual_seed(0)
    model = cls(**{"encoder_name": "resnet18", "encoder_weights": None, "classes": 2, "aux_params": aux} | arguments).train()
    mask, label = model(torch.randn(batch, model.encoder.in_channels, *size))
    (mask.square().mean() + label.square().mean()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    return model


def check_sizes(cls, sizes=((64, 96), (65, 71), (100, 260), (33, 224), (1, 1)), **arguments):
    "Any height and width in, the same out"
    model = cls(**{"encoder_name": "resnet18", "encoder_weights": None, "classes": 2} | arguments)
    for size in sizes: assert outputs(model, torch.randn(1, 3, *size))[0].shape == (1, 2, *size)


def shape(cls, size, **arguments):
    model = cls(**{"encoder_name": "resnet18", "encoder_weights": None, "classes": 2} | arguments)
    return tuple(outputs(model, torch.randn(1, 3, *size))[0].shape)


def survives(cls, **arguments):
    "A copy and a pickle have the same outputs"
    model = randomise(cls(encoder_name="resnet18", encoder_weights=None, classes=2, aux_params=aux, **arguments))
    x = torch.randn(2, 3, 33, 50)
    before = outputs(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for a, b in zip(outputs(other, x), before, strict=True): assert torch.equal(a, b)


# encoders

def on_meta(build, *args, **kwargs):
    "Build where weights have a shape and no values: drawing them costs more than the tests"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(*args, **kwargs)


def filled(build, *args, **kwargs):
    "A network in float64 with values for all tensors, statistics of norms among them"
    model, generator = on_meta(build, *args, **kwargs).to_empty(device="cpu").double().eval(), torch.Generator().manual_seed(0)
    for t in model.state_dict().values():
        if not t.is_floating_point(): t.zero_()
        elif t.dim() == 1: t.copy_(torch.rand(t.shape, generator=generator) + .5)
        else: t.normal_(generator=generator).div_(t[0].numel()**.5)
    return model


def with_tensors(state, build, *args, **kwargs):
    "A network of ours that holds these tensors; what it does not build, it must know of"
    model = on_meta(build, *args, **kwargs)
    own = model.state_dict()
    spare = {name: tuple(t.shape) for name, t in state.items() if name not in own}
    assert not spare or spare.items() <= model.unused_tensors().items()
    model.load_state_dict({name: state[name] for name in own}, assign=True)
    return model.eval()


def smp_encoder(name, **arguments):
    "SMP's transformers ask a tensor for its numbers while they are built"
    with mock.patch("torch.linspace", partial(torch.linspace, device="cpu")):
        return smp.encoders.get_encoder(name, weights=None, **arguments)


def pair(name, **arguments):
    "Our encoder and SMP's with the same random tensors, in float64"
    theirs = filled(smp_encoder, name, **arguments)
    return with_tensors(theirs.state_dict(), get_encoder, name, **arguments), theirs


def shapes(state): return {name: tuple(t.shape) for name, t in state.items()}


def settings(encoder):
    "What a state dict does not hold: how each convolution and norm is set"
    found = {}
    for name, m in encoder.named_modules():
        if isinstance(m, nn.Conv2d): found[name] = tuple(m.stride), tuple(m.dilation), m.groups, _cells_before(m)
        if isinstance(m, nn.BatchNorm2d): found[name] = m.eps, round(m.momentum, 9)
        if isinstance(m, nn.LayerNorm): found[name] = m.eps
    return found


def _cells_before(conv):
    "Cells of padding above and left of a map; `static_padding` is SMP's name for it, `early` ours"
    static = getattr(conv, "static_padding", None)
    if isinstance(static, nn.ZeroPad2d): return static.padding[0]
    return conv.padding[0] - (getattr(conv, "early", False) and conv.stride != (1, 1))


@torch.no_grad()
def same_maps(ours, theirs, x, tolerance=1e-10):
    "All levels have SMP's channels and, where there are any, its sizes and numbers"
    levels = list(zip(ours(x), theirs(x), strict=True))
    for a, b in levels: assert a.shape == b.shape or a.shape[1] == b.shape[1] == 0
    assert max(relative_error(a, b) for a, b in levels if a.numel()) < tolerance
