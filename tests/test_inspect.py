"""`segkit.inspect`: lazy, and true for architectures that it has never seen."""
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from segkit.inspect import cost, draw, photograph, trace

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import segmentation_models_pytorch as smp

NAMES = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer DPT".split()

@pytest.fixture(scope="module", params=NAMES)
def case(request):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    if request.param == "DPT":
        model = smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None, decoder_fusion_channels=32,
                        decoder_intermediate_channels=(32, 32, 32, 32), dynamic_img_size=True)
    else: model = getattr(smp, request.param)("resnet18", encoder_weights=None, aux_params=dict(classes=3))
    return model.eval(), torch.rand(1, 3, 128, 128) if request.param == "PAN" else torch.rand(1, 3, 64, 96)  # SMP's PAN needs 128

def effects(model, image, names, levels):
    "Pairs (a, b): part b answers when what a returned is disturbed and all other parts are frozen; knows nothing of `trace`"
    modules, kept, seen, disturbed = dict(model.named_modules()), {}, {}, None
    def noisy(t, name): return t + torch.randn_like(t) if name == disturbed else t.clone()
    def on_part(name):
        def hook(module, args, output):
            seen[name] = output.clone()
            return noisy(kept.setdefault(name, output.clone()), name)
        return hook
    def on_encoder(module, args, output):
        def copied(tree): return tree.clone() if isinstance(tree, Tensor) else [copied(item) for item in tree]
        def answer(items): return [noisy(t, f"c{i}") if isinstance(t, Tensor) else answer(t) for i, t in enumerate(items)]
        return answer(kept.setdefault("encoder", copied(output)))
    hooks = [modules[name].register_forward_hook(on_part(name)) for name in names] + [model.encoder.register_forward_hook(on_encoder)]
    found = set()
    with torch.no_grad():
        model(image)
        before = dict(seen)
        for disturbed in [*levels, *names]:
            model(image)
            found |= {(disturbed, name) for name in names if not torch.equal(seen[name], before[name])}
    for hook in hooks: hook.remove()
    return found

def test_arrows_are_effects(case):
    model, image = case
    t = trace(model, image)
    names = [p.name for p in t.parts.values() if p.kind in ("part", "head")]
    levels = [p.name for p in t.parts.values() if p.kind == "level"]
    assert len(names) > 2 and levels
    assert effects(model, image, names, levels) == {(a.source, a.target) for a in t.arrows if not a.inside}

def test_costs_sum_up(case):
    model, image = case
    bill = cost(model, image)
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(image)
    assert 2*bill.multiply_adds == counter.get_total_flops()
    assert bill.parameters == sum(p.numel() for p in model.parameters())
    for group in ("encoder", "decoder"):
        assert bill[group].parameters == sum(p.numel() for p in getattr(model, group).parameters())
    assert sum(bill[g].multiply_adds for g in ("encoder", "decoder", "heads")) == bill.multiply_adds

def test_drawing_is_small_and_repeatable(case):
    model, image = case
    t = trace(model, image)
    first = draw(t).data
    assert first == draw(t).data and 4_000 < len(first) < 40_000

def test_the_model_is_left_as_it_was():
    model = smp.Unet("resnet18", encoder_weights=None)
    model.decoder.eval()
    state, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    trace(model, 64); cost(model, 64)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def run(code): subprocess.run([sys.executable, "-c", code], check=True)

def test_import_is_lazy():
    run("import sys, segkit.inspect; assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)")
    run("import sys; from segkit.inspect import draw, cost, strip, photograph\n"
        "assert not {'timm', 'sklearn', 'scipy', 'IPython', 'fastai', 'torchvision'} & set(sys.modules)")

def test_names_resolve():
    import segkit.inspect
    modules = {"pictures", "wiring", "drawing", "costs"}
    assert not modules & set(segkit.inspect.__all__)   # a name equal to a module's would hide it
    for name in segkit.inspect.__all__: assert getattr(segkit.inspect, name) is not None

def test_photograph_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"segkit\[examples\]"): photograph()
