"""What a page shows is what runs, for every architecture: under hooks, traced, exported, and with parts of the user's own."""
import copy
import warnings

import pytest
import torch
from oracle import AUX
from torch import fx, nn

import segkit
from segkit.core.registry import architectures
from segkit.model.model import SegmentationModel

every = pytest.mark.parametrize("arch", sorted(architectures))
SIZES = [(2, 3, 64, 96), (1, 3, 65, 71)]


def build(arch, **options):
    "A model in evaluation mode, whose norms are not fresh"
    encoder = "tu-vit_tiny_patch16_224" if arch == "dpt" else "resnet18"
    torch.manual_seed(0)
    model = segkit.create_model(arch, encoder, encoder_weights=None, **{"classes": 3} | options)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"): buffer.uniform_(.5, 1.5)
    return model.eval()


def answers(model, x):
    with torch.no_grad(): out = model(x)
    return out if isinstance(out, tuple) else (out,)


def assert_equal(ours, theirs):
    "Bit for bit"
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


# ---- hooks

@every
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_hooks_change_nothing_and_see_every_module(arch, size):
    model, x = build(arch, aux_params=AUX), torch.randn(size)
    expected = answers(model, x)
    own, everywhere = set(), set()
    names = {module: name for name, module in model.named_modules()}
    handles = [module.register_forward_hook(lambda m, args, out: own.add(names[m])) for module in model.modules()]
    handles += [module.register_forward_pre_hook(lambda m, args: None) for module in model.modules()]
    handles.append(nn.modules.module.register_module_forward_hook(lambda m, args, out: everywhere.add(names.get(m))))
    try: assert_equal(answers(model, x), expected)
    finally:
        for handle in handles: handle.remove()
    # a container is not called as such; what has weights of its own is
    weighty = {name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    if arch == "dpt": weighty.remove("encoder.model")  # timm's ViT is asked by a method of its own; its blocks are called
    assert own == everywhere
    assert weighty <= own, f"{arch}: not seen by a hook: {sorted(weighty - own)}"


@every
def test_training_under_hooks_is_the_same_training(arch):
    def gradients(watched):
        model = build(arch).train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd): module.p = 0.
            if watched: module.register_forward_hook(lambda m, args, out: None)
        model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))).square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]
    plain, watched = gradients(False), gradients(True)
    assert plain
    assert_equal(plain, watched)


# ---- programs

@every
def test_jit_trace(arch):
    model, x = build(arch, aux_params=AUX), torch.randn(2, 3, 64, 96)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of each size that it writes down
        program = torch.jit.trace(model, x)
    assert_equal(answers(program, x), answers(model, x))


class LeafEncoder(fx.Tracer):
    "timm's vision transformers look at sizes in Python, so the encoder stays one call"
    def is_leaf_module(self, module, name): return name == "encoder" or super().is_leaf_module(module, name)


@every
def test_fx(arch):
    model = build(arch, aux_params=AUX)
    tracer = LeafEncoder() if arch == "dpt" else fx.Tracer()
    program = fx.GraphModule(model, tracer.trace(model))
    for size in SIZES:
        x = torch.randn(size)
        assert_equal(answers(program, x), answers(model, x))
    called = {node.target for node in program.graph.nodes if node.op == "call_module"}
    convs = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and not (arch == "dpt" and name.startswith("encoder"))}
    assert convs <= called  # the program has the modules of the page, all of them


# ---- the user's own parts

def own_heads(model):
    "Heads as people write them, by what they are"
    channels = {"dpt": 256}.get(model.name.split("-")[0]) or model.decoder.out_channels
    return {
        "a convolution": nn.Conv2d(channels, 7, 1),
        "around the old head": nn.Sequential(model.segmentation_head, nn.Conv2d(3, 7, 1)),
        "a sequence": nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 7, 1)),
    }


@every
def test_replaced_heads(arch):
    model = build(arch)
    for what, head in own_heads(model).items():
        model.segmentation_head = head
        for size in SIZES:
            mask = model.eval()(torch.randn(size))
            assert mask.shape == (size[0], 7, *size[2:]), what
        model.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
        assert all(p.grad is not None for p in head.parameters()), what


@every
def test_replaced_heads_of_a_loaded_model(arch):
    "Trained with an own head, saved as a state dict, loaded into a new model with such a head"
    trained, again = build(arch), build(arch)
    for model in (trained, again): model.segmentation_head = own_heads(model)["a sequence"]
    with torch.no_grad():
        for p in trained.parameters(): p.mul_(1.1)
    again.load_state_dict(copy.deepcopy(trained.state_dict()))
    x = torch.randn(SIZES[1])
    assert_equal(answers(again, x), answers(trained, x))


class Enlarged(nn.Module):
    "A decoder without `stride` or `out_channels`: the deepest map alone"
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 1)

    def forward(self, features): return self.conv(features[-1])


@pytest.mark.parametrize("arch", sorted(set(architectures) - {"dpt"}))
def test_replaced_decoder(arch):
    model = build(arch)
    model.decoder = Enlarged(model.encoder.out_channels[-1])
    model.segmentation_head = nn.Conv2d(8, 7, 1)
    for size in SIZES: assert model.eval()(torch.randn(size)).shape == (size[0], 7, *size[2:])


class Mine(SegmentationModel):
    "A subclass as SMP's users write it: all parts by hand"
    def __init__(self, classes=2):
        super().__init__()
        self.encoder = segkit.encoders.get_encoder("resnet18", weights=None)
        self.decoder = Enlarged(self.encoder.out_channels[-1])
        self.segmentation_head = nn.Conv2d(8, classes, 1)
        self.classification_head = None
        self.name = "mine"
        self.initialize()


def test_own_subclass():
    model = Mine(classes=4)
    for size in SIZES: assert model.eval()(torch.randn(size)).shape == (size[0], 4, *size[2:])
    again = Mine(classes=4)
    again.load_state_dict(model.state_dict())
    x = torch.randn(SIZES[1])
    assert_equal(answers(again.eval(), x), answers(model, x))
    assert model.config == {"classes": 4}


def test_a_chosen_scale_is_kept():
    "`upsampling=1` asks for the decoder's scale, as in SMP"
    model = build("fpn", upsampling=1)
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 3, 16, 24)
    assert model(torch.randn(1, 3, 65, 71)).shape == (1, 3, 17, 18)


# ---- what a model keeps of its arguments

def plain_data(value):
    "Whether a value is made of nothing but numbers, text, lists and mappings"
    if isinstance(value, dict): return all(isinstance(k, str) and plain_data(v) for k, v in value.items())
    if isinstance(value, (list, tuple)): return all(map(plain_data, value))
    return value is None or type(value) in (bool, int, float, str)


def test_config_is_plain_data():
    state = segkit.Unet("resnet18", encoder_weights=None).encoder.state_dict()
    given = segkit.encoders.get_encoder("resnet18", weights=None)
    widths = [64, 32, 16, 8, 4]
    models = [segkit.Unet("resnet18", encoder_weights=state, decoder_channels=widths, activation=nn.Sigmoid),
              segkit.Unet(given, encoder_weights=None), segkit.Unet("resnet18", encoder_weights=lambda: state, activation=lambda: nn.Tanh())]
    for model in models: assert plain_data(model.config), model.config
    widths.append(2)  # what the caller does with the list afterwards is his own affair
    assert models[0].config["decoder_channels"] == [64, 32, 16, 8, 4]
