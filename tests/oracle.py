"""SMP as an oracle: the same weights in, the same numbers out."""
import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import segmentation_models_pytorch as smp

AUX = dict(classes=3, pooling="max", dropout=0.3, activation="sigmoid")


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
