"""Every architecture against segmentation_models_pytorch: time and memory, as a table.

    python tools/benchmark.py                       # writes nbs/benchmarks/inference.tsv
    python tools/benchmark.py --archs unet fpn --no-compile --out /tmp/some.tsv

Both networks have the same random weights. The forms take turns, round after round, so that what else
the machine does falls on all of them; the median counts. Memory is what PyTorch's CPU allocator holds at
most during one run, beyond what it held before. Run it on a machine that does nothing else.
"""
import argparse
import copy
import csv
import math
import os
import platform
import warnings
from pathlib import Path

import torch
from torch.utils.benchmark import Measurement, Timer

from segkit import create_model, fuse
from segkit.core.registry import architectures
from segkit.inference import fold_norms

OUT = Path(__file__).parents[1]/"nbs/benchmarks/inference.tsv"
# encoder and size of architectures that do not take a ResNet of any size
ENCODERS = {"dpt": ("tu-vit_tiny_patch16_224", 224)}
FORMS = {
    "smp": "SMP as its users run it: eager, float32, NCHW",
    "smp channels last": "SMP with the channels last in memory",
    "smp compiled": "SMP after torch.compile",
    "ours": "segkit's plain form, NCHW",
    "ours channels last": "segkit's plain form with the channels last",
    "folded": "the same with its norms folded",
    "fused": "segkit.fuse",
}


def build(arch, encoder, classes):
    "SMP's model and ours, with equal weights in which no norm is trivial"
    import segmentation_models_pytorch as smp
    torch.manual_seed(0)
    options = dict(encoder_name=encoder, encoder_weights=None, classes=classes)
    ours = create_model(arch, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(smp, type(ours).__name__)(**options)
    for tensor in theirs.state_dict().values():
        if tensor.dim() == 1 and tensor.is_floating_point(): tensor.copy_(torch.rand(tensor.shape) + .5)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval().requires_grad_(False), ours.eval().requires_grad_(False)


def forms_of(theirs, ours, x, compiled):
    "Name -> what to run"
    last = torch.channels_last
    def runner(model, memory_format=torch.contiguous_format):
        model = copy.deepcopy(model).to(memory_format=memory_format)
        images = x.contiguous(memory_format=memory_format)
        return lambda: model(images)

    folded = copy.deepcopy(ours)
    fold_norms(folded)
    fused = fuse(ours, x)
    forms = {
        "smp": runner(theirs), "smp channels last": runner(theirs, last),
        "ours": runner(ours), "ours channels last": runner(ours, last),
        "folded": runner(folded, last), "fused": lambda: fused(x),
    }
    if compiled:
        torch._dynamo.reset()
        compiled_model = torch.compile(theirs)
        forms["smp compiled"] = lambda: compiled_model(x)
    return {name: forms[name] for name in FORMS if name in forms}


def seconds_of(forms, rounds):
    "Median seconds of each form; they take turns"
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        for name, run in forms.items()
    }
    taken = {name: [] for name in forms}
    for _ in range(rounds):
        for name, timer in timers.items(): taken[name].append(timer.timeit(1))
    return {name: next(iter(Measurement.merge(parts))).median for name, parts in taken.items()}


def peak_memory(run):
    "Most bytes that the CPU allocator holds during a run, beyond what it held before"
    run()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of its start and stop
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile: kept = run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@torch.no_grad()
def measure(arch, options):
    "One row of the table: milliseconds, MiB, and how far the fused masks are from SMP's"
    encoder, size = ENCODERS.get(arch, (options.encoder, options.size))
    theirs, ours = build(arch, encoder, options.classes)
    x = torch.randn(options.batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    forms = forms_of(theirs, ours, x, not options.no_compile)
    expected, got = theirs(x), forms["fused"]()
    row = {"architecture": arch, "encoder": encoder, "images": f"{options.batch}x3x{size}x{size}"}
    with torch.inference_mode():
        if not options.memory_only:
            for name, s in seconds_of(forms, options.rounds).items(): row[f"{name}, ms"] = f"{1e3*s:.1f}"
        for name in ("smp", "smp compiled", "ours", "fused"):
            if name in forms: row[f"{name}, MiB"] = f"{peak_memory(forms[name])/2**20:.1f}"
    row["difference"] = f"{(got - expected).abs().max()/expected.abs().max():.0e}"
    return row


def mean_row(rows):
    "Geometric means of SMP's numbers divided by each form's: times as fast, times less memory"
    means = dict.fromkeys(rows[0], "") | {"architecture": "times better than smp"}
    for column in rows[0]:
        unit = column.rpartition(", ")[2]
        if unit not in ("ms", "MiB"): continue
        ratios = [float(row[f"smp, {unit}"])/float(row[column]) for row in rows]
        means[column] = f"{math.exp(sum(map(math.log, ratios))/len(ratios)):.2f}"
    return means


def write(rows, path):
    "The table, below a line that says what ran"
    version = torch.__version__.split("+")[0]
    capability = torch.backends.cpu.get_cpu_capability()
    machine = f"torch {version}, {torch.get_num_threads()} threads, {platform.machine()}, {capability}"
    with open(path, "w", newline="") as file:
        file.write(f"# {machine}\n")
        table = csv.DictWriter(file, rows[0], delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows([*rows, mean_row(rows)])


def main():
    parser = argparse.ArgumentParser(description="Fused models against SMP: time and memory.")
    add = parser.add_argument
    add("--archs", nargs="+", choices=sorted(architectures), default=list(architectures), metavar="NAME")
    add("--encoder", default="resnet34")
    add("--batch", type=int, default=4)
    add("--size", type=int, default=256)
    add("--classes", type=int, default=21)
    add("--rounds", type=int, default=9, help="turns of each form")
    add("--threads", type=int, help="threads of PyTorch")
    add("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    add("--memory-only", action="store_true", help="leave out the times: memory is the same on a busy machine")
    add("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.threads: torch.set_num_threads(options.threads)
    rows = []
    for arch in options.archs:
        rows.append(measure(arch, options))
        print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
        write(rows, options.out)
    print("  ".join(f"{k} {v}" for k, v in mean_row(rows).items() if v))


if __name__ == "__main__": main()
