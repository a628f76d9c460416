"""TorchScript and ONNX: the plain forward, followed by each of PyTorch's ways to write a program down, where SMP has it."""
import functools
import io
import warnings

import onnxruntime
import pytest
import torch
from oracle import AUX, randomise, relative_error

import segkit
from segkit.core.registry import architectures

UNSCRIPTED = {"unetplusplus", "dpt"}  # neither in SMP: a dictionary of nodes, and timm's transformer
TINY = dict(layers=(1, 1, 1, 1))
NARROW = {
    "unet": dict(decoder_channels=(24, 16, 16, 8, 8)), "unetplusplus": dict(decoder_channels=(24, 16, 16, 8, 8)), "manet": dict(decoder_channels=(24, 16, 16, 8, 8)),
    "fpn": dict(decoder_pyramid_channels=16, decoder_segmentation_channels=32), "pspnet": dict(psp_out_channels=16), "deeplabv3": dict(decoder_channels=16),
    "deeplabv3plus": dict(decoder_channels=16), "upernet": dict(decoder_channels=16), "segformer": dict(decoder_segmentation_channels=16),
    "dpt": dict(encoder_depth=2, decoder_intermediate_channels=(8, 8), decoder_fusion_channels=8),
}
every = pytest.mark.parametrize("arch", sorted(architectures))
scripted = pytest.mark.parametrize("arch", sorted(set(architectures) - UNSCRIPTED))


@functools.cache
def build(arch):
    torch.manual_seed(0)
    options = NARROW.get(arch, {}) | ({} if arch == "dpt" else TINY)
    return randomise(segkit.create_model(arch, "tu-test_vit" if arch == "dpt" else "resnet18", encoder_weights=None, classes=2, aux_params=AUX, **options)).eval()


@torch.no_grad()
def assert_same(program, model, sizes, tolerance=0.):
    for size in sizes:
        x = torch.randn(size)
        for ours, theirs in zip(program(x), model(x), strict=True):
            assert ours.shape == theirs.shape and relative_error(ours, theirs) <= tolerance


@scripted
def test_jit_script(arch):
    "One program for every size, saved and loaded again, with the same numbers"
    model, file = build(arch), io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    assert_same(torch.jit.load(file), model, [(1, 3, 64, 64), (2, 3, 65, 97)], 1e-6)


def test_a_script_without_a_second_head_trains():
    model = segkit.Unet("resnet18", encoder_weights=None, decoder_channels=(24, 16, 16, 8, 8), **TINY)
    program, x = torch.jit.script(model), torch.randn(2, 3, 64, 64)
    before = model.decoder.blocks[0].conv1[1].running_mean.clone()
    program.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in program.parameters())
    assert not torch.equal(program.decoder.blocks[0].conv1[1].running_mean, before)
    assert program.decoder.blocks[0].conv1[1].num_batches_tracked == 1


ENCODERS = ["resnet18", "xception", "timm-skresnet18"]  # those whose layers follow each other by name


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_encoders_script(name):
    encoder = segkit.encoders.get_encoder(name, weights=None).eval()
    program = torch.jit.script(encoder)
    for size in ((1, 3, 64, 64), (2, 3, 65, 97)):
        x = torch.randn(size)
        for ours, theirs in zip(program(x), encoder(x), strict=True): assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)


@torch.no_grad()
def test_shallower_encoders_script():
    for name in ("resnet18", "mobileone_s0"):  # MobileOne has 500 branches: two levels will do
        encoder = segkit.encoders.get_encoder(name, weights=None, depth=2).eval()
        x = torch.randn(1, 3, 64, 64)
        assert [f.shape for f in torch.jit.script(encoder)(x)] == [f.shape for f in encoder(x)]


@every
def test_onnx_by_the_first_exporter(arch):
    "torch.onnx.export(dynamo=False), which traces: for the size that it was given; timm's transformer only at its own"
    side, model, file = 160 if arch == "dpt" else 64, build(arch), io.BytesIO()
    x = torch.randn(2, 3, side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "b"}}, opset_version=17)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    assert_same(lambda x: [torch.from_numpy(y) for y in session.run(None, {"x": x.numpy()})], model, [x.shape], 1e-4)
