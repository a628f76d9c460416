"""SMP as an oracle: the same weights in, the same numbers out."""
import copy
import pickle
import warnings

import torch

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
