"""Each architecture as one program for all sizes: `torch.export`, ONNX and `torch.compile`."""
import functools
import io
import warnings

import onnxruntime
import pytest
import torch
from oracle import AUX, randomise, relative_error
from torch.export import Dim, export

import segkit
from segkit.core.registry import architectures

SIZES = [(1, 3, 64, 64), (3, 3, 97, 130)]  # other than the traced one; the second is odd and no multiple of any stride
SHALLOW = dict.fromkeys(["unet", "unetplusplus", "manet", "linknet"], {"encoder_depth": 4}) # levels of one kind: one less is quicker
for name in ("unet", "unetplusplus", "manet"): SHALLOW[name] = SHALLOW[name] | {"decoder_channels": (32, 16, 16, 8)}
every = pytest.mark.parametrize("arch", sorted(architectures))


def build(arch, encoder=None, **options):
    "A small model with both heads"
    if arch == "dpt": options = dict(encoder_depth=3, encoder_output_indices=[0, 1, 2], decoder_intermediate_channels=(16, 24, 32), decoder_fusion_channels=24) | options
    elif encoder is None: options = dict(layers=(1, 1, 1, 1)) | SHALLOW.get(arch, {}) | options
    encoder = encoder or ("tu-test_vit" if arch == "dpt" else "resnet18")
    torch.manual_seed(0)
    return randomise(segkit.create_model(arch, encoder, encoder_weights=None, classes=2, aux_params=AUX, **options)).eval()


def trace(model):
    "The model as a program whose batch, height and width are free"
    free = {0: Dim("b", min=1, max=64), 2: Dim("h", min=33, max=4096), 3: Dim("w", min=33, max=4096)}
    return export(model, (torch.randn(2, 3, 65, 71),), dynamic_shapes=(free,))


@functools.cache
def traced(arch):
    model = build(arch)
    return model, trace(model)


def onnx_of(program):
    "A function that runs the program in onnxruntime"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
    file = io.BytesIO()
    converted.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


@torch.no_grad()
def check(run, model, sizes=SIZES):
    for size in sizes:
        x = torch.randn(size)
        for ours, expected in zip(run(x), model(x), strict=True):
            assert ours.shape == expected.shape
            assert relative_error(ours, expected) < 1e-4


@every
def test_exports_with_free_sizes(arch):
    model, program = traced(arch)
    check(program.module(), model)


@every
def test_runs_in_onnx_with_free_sizes(arch):
    model, program = traced(arch)
    check(onnx_of(program), model)


def test_runs_in_onnx_without_a_map_of_stride_2():
    model = build("unet", "tu-test_convnext", encoder_depth=3, decoder_channels=(16, 8, 8))
    check(onnx_of(trace(model)), model)


@every
@torch.no_grad()
def test_compiles_once_for_all_sizes(arch):
    "For PAN from 256 pixels on, since a pooled map of one row is a case of its own; DPT's encoder asks for its size, and is compiled again"
    torch.compiler.reset()
    model, least = traced(arch)[0], 192*(arch == "pan")
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    compiled(torch.randn(2, 3, 65 + least, 71 + least))
    with torch.compiler.set_stance("default" if arch == "dpt" else "fail_on_recompile"): check(compiled, model, [(3, 3, 97 + least, 130 + least)])
