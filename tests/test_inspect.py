"""`segkit.inspect`: lazy, and true for architectures that it has never seen."""
import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from segkit.inspect import cost, draw, profile, trace
from segkit.inspect.costs import multiply_add_counter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import segmentation_models_pytorch as smp

NAMES = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer DPT".split()

@pytest.fixture(scope="module", params=NAMES)
def case(request):
    torch.manual_seed(0)
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
    with multiply_add_counter() as counter, torch.no_grad(): model(image)
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

def state(model):
    "Everything that a run could leave behind: hooks of modules and of all modules, modes, layers that watch, switches"
    hooks = [dict(h) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
    everywhere = [dict(getattr(torch_module, f"_global_{name}")) for name in
                  ("forward_hooks", "forward_pre_hooks", "forward_hooks_always_called", "backward_hooks")]
    methods = [dict(vars(m)).keys() for m in model.modules()]  # a patched `forward` would be one
    functions = torch.conv2d, F.conv2d, F.interpolate, F.scaled_dot_product_attention, nn.Module.__call__
    switches = torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(), torch.is_inference_mode_enabled()
    return (hooks, everywhere, [list(keys) for keys in methods], functions, switches, [m.training for m in model.modules()],
            _get_current_dispatch_mode_stack(), [p.grad for p in model.parameters()],
            {k: v.clone() for k, v in model.state_dict().items()})

class Breaks(nn.Module):
    "A layer that raises at its nth call, in the middle of a decoder"
    def __init__(self, layer, at):
        super().__init__()
        self.layer, self.left = layer, at
    def forward(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0: raise ZeroDivisionError("in the middle")
        return self.layer(*args, **kwargs)

WATCHES = {"trace": lambda m: trace(m, 64), "cost": lambda m: cost(m, 64), "profile": lambda m: profile(m, 64, repeats=1)}

@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])  # 0: never; profile runs the model four times
@pytest.mark.parametrize("name", WATCHES)
def test_nothing_is_left_behind(name, at):
    model = smp.Unet("resnet18", encoder_weights=None)
    model.decoder.blocks[1] = Breaks(model.decoder.blocks[1], at)
    model.decoder.blocks[2].eval()
    calls = []
    hook = model.encoder.register_forward_hook(lambda *_: calls.append(1))  # one's own hook stays, and is called
    before = state(model)
    breaks = 0 < at <= (4 if name == "profile" else 1)
    with pytest.raises(ZeroDivisionError) if breaks else nullcontext(): WATCHES[name](model)
    after = state(model)
    assert all(torch.equal(v, after[-1][k]) for k, v in before[-1].items())
    assert before[:-1] == after[:-1] and calls and len(model.encoder._forward_hooks) == 1
    hook.remove()

def test_watching_changes_no_number():
    model, image = smp.Unet("resnet18", encoder_weights=None).eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        want, seen = model(image), []
        model.segmentation_head.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
        trace(model, image); cost(model, image); profile(model, image, repeats=1)
    assert len(seen) == 6 and all(torch.equal(s, want) for s in seen)

KERNELS = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION

@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_is_counted_whichever_kernel_runs(kernel):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    by_hand = 197*192*192*12 + 2*197*197*192  # a block
    with sdpa_kernel(kernel):
        counted = cost(vit, 224, parts=["patch_embed", "blocks.*", "norm"])
        measured = profile(vit, 224, parts=["patch_embed", "blocks.*", "norm"], repeats=1)
    for i in range(2):
        assert counted[f"blocks.{i}"].multiply_adds == measured[f"blocks.{i}"].multiply_adds == by_hand
    assert counted.parameters == sum(p.numel() for p in vit.parameters())

@pytest.mark.parametrize("name", ["mit_b0", "tu-vit_tiny_patch16_224"])
def test_attention_in_an_encoder_does_not_depend_on_the_kernel(name):
    args = dict(encoder_weights=None)
    model = smp.FPN(name, **args) if name == "mit_b0" else smp.DPT(name, **args)
    bills, traces = [], []
    for kernel in KERNELS:
        with sdpa_kernel(kernel):
            bills.append(cost(model, 224))
            traces.append(trace(model, 224))
    assert bills[0] == bills[1] and traces[0] == traces[1]

def test_the_fast_path_of_torch_hides_nothing():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer
        def forward(self, x): return self.layer(x.flatten(2).mT)
    bill = cost(Tokens(), torch.rand(1, 16, 8, 8))
    assert bill.multiply_adds == 4*64*16*16 + 2*64*64*16 + 2*64*16*32

def run(code): subprocess.run([sys.executable, "-c", code], check=True)

def test_import_is_lazy():
    run("import sys, segkit.inspect; assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)")
    run("import sys; from segkit.inspect import draw, cost, strip, photograph\n"
        "assert not {'timm', 'sklearn', 'scipy', 'IPython', 'fastai', 'torchvision'} & set(sys.modules)")

def test_names_resolve():
    import segkit.inspect
    modules = {"pictures", "recording", "wiring", "drawing", "costs", "profiling"}
    assert not modules & set(segkit.inspect.__all__)   # a name equal to a module's would hide it
    for name in segkit.inspect.__all__: assert getattr(segkit.inspect, name) is not None
