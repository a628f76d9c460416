"""Build every timm model as an encoder, run it, give its maps to every decoder, and write down what came out.

    python tools/sweep_timm.py                    # go on where the last run stopped
    python tools/sweep_timm.py --only 'levit*'    # some models
    python tools/sweep_timm.py --redo failed      # again what failed (or `all`)
    python tools/sweep_timm.py --part 0/2         # the first half; run the other beside it

Nothing is downloaded and no weight has a value: everything runs on PyTorch's meta device. Each result is a line
of the working file (`--work`). Once no model is missing there, the table (`--table`) is written from it: one row
for each model, sorted by name.
"""
import argparse
import fnmatch
import functools
import json
import signal
import time
import warnings
from pathlib import Path

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segkit import create_model
from segkit.core.registry import architectures
from segkit.encoders import EncoderMixin, get_encoder
from segkit.encoders.bridge import TimmBridgeEncoder
from segkit.encoders.timm_models import no_fill
from segkit.encoders.vit import block_facts, get_vit_encoder

ROOT = Path(__file__).parent.parent
SIZES = [(224, 224), (97, 130)]  # of images; the first is the one that multiply-adds are counted on
COLUMNS = ["name", "module", "kind", "strides", "channels", "fit", "parameters", "multiply_adds", "input_size", "tags", "licences", "ok", "reason"]


def without_values(build):
    "`timm.create_model`, quicker: nothing is gained by filling tensors that hold nothing"
    @functools.wraps(build)
    def quick(*args, **kwargs):
        with no_fill(): return build(*args, **kwargs)
    return quick


class Maps(nn.Module, EncoderMixin):
    "Maps of given channels: what a decoder sees of an encoder"
    def __init__(self, channels, output_stride):
        super().__init__()
        self._out_channels, self._depth, self._in_channels, self._output_stride = list(channels), len(channels) - 1, 3, output_stride

    def forward(self, x):
        stride = lambda level: min(2**level, self._output_stride)
        return [x.new_zeros(len(x), c, -(-x.shape[2]//stride(level)), -(-x.shape[3]//stride(level))) for level, c in enumerate(self._out_channels)]


def promise(encoder, size):
    "Shapes of the maps for an image of this size"
    return [(c, *(-(-n//min(2**level, encoder.output_stride)) for n in size)) for level, c in enumerate(encoder.out_channels)]


def check_maps(encoder, size, device):
    "Raise unless the maps are as promised"
    with torch.no_grad(): maps = encoder(torch.zeros(1, 3, *size, device=device))
    found = [tuple(f.shape[1:]) for f in maps]
    if found != promise(encoder, size): raise ValueError(f"{size[0]} x {size[1]}: maps {found}, expected {promise(encoder, size)}")


decoded: dict = {}  # channels, output stride -> None, or what went wrong

def check_decoders(channels, output_stride):
    "Raise unless each architecture gives a mask of the image's size from such maps"
    key = (tuple(channels), output_stride)
    if key not in decoded:
        decoded[key] = None
        names = {32: set(architectures) - {"dpt", "deeplabv3", "deeplabv3plus"}, 16: {"deeplabv3plus", "deeplabv3", "pan"}}[output_stride]
        for arch in sorted(names):
            try:
                options = {"encoder_output_stride": output_stride} if arch in ("pan", "deeplabv3plus", "deeplabv3") else {}
                extra = {"encoder_depth": len(channels) - 1} | ({"psp_out_channels": 64} if arch == "pspnet" else {})
                with torch.device("meta"), no_fill(): model = create_model(arch, encoder_name=Maps(channels, output_stride), encoder_weights=None, classes=2, **options, **extra).eval()
                size = SIZES[1]
                with torch.no_grad(): mask = model(torch.zeros(1, 3, *size, device="meta"))
                if tuple(mask.shape) != (1, 2, *size): raise ValueError(f"mask {tuple(mask.shape)}")
            except Exception as error:
                decoded[key] = f"{arch}: {error}"
                break
    if decoded[key]: raise ValueError(decoded[key])


def check_dpt(name, device):
    "Raise unless DPT gives a mask of the image's size with the blocks of the model"
    depth = min(4, len(block_facts(name)[0]))
    with torch.device(device):
        encoder = get_vit_encoder(name, depth=depth)
        model = create_model("dpt", encoder_name=encoder, encoder_depth=depth, encoder_weights=None, classes=2, decoder_readout="ignore",
                             decoder_intermediate_channels=(64,)*depth).eval()
    size = SIZES[1]
    with torch.no_grad(): mask = model(torch.zeros(1, 3, *size, device=device))
    if tuple(mask.shape) != (1, 2, *size): raise ValueError(f"mask {tuple(mask.shape)}")


def in_words(fit):
    "What is done to an image before the model sees it, as the table says it"
    if fit.is_identity: return "free"
    if fit.size: return "fixed"
    if fit.resize_maps: return f"loose {fit.minimum}"
    return f"{'stretch' if fit.stretch else 'pad'} {fit.multiple}"


def sweep(name, device="meta"):
    "The row of one model"
    tags = timm.list_pretrained(f"{name}.*") or ([name] if name in timm.list_pretrained(name) else [])
    cfg = get_pretrained_cfg(name)
    row = {"name": name, "tags": "", "licences": "", "ok": 0, "reason": ""}
    known = {t.partition(".")[2]: get_pretrained_cfg(t).license or "unknown" for t in sorted(tags)}
    row |= {"module": timm.model_entrypoint(name).__module__.split(".")[-1], "tags": ",".join(known), "licences": ",".join(known.values())}
    if cfg is not None: row["input_size"] = "x".join(map(str, cfg.input_size))
    step = "build"
    try:
        with torch.device(device): encoder = get_encoder(f"tu-{name}").eval()
        parameters = sum(p.numel() for p in encoder.parameters())
        encoder.requires_grad_(False)  # the counter trips over a token that is a parameter
        bridged = isinstance(encoder, TimmBridgeEncoder)
        fit = encoder.fit
        how = in_words(fit)
        strides = sorted(set(block_facts(name)[0])) if bridged else [2**level for level in encoder._levels]
        row |= {"kind": "bridge" if bridged else "pyramid", "strides": ",".join(map(str, strides)), "channels": ",".join(map(str, encoder.out_channels)),
                "fit": " ".join([how, *(f"{k}={v}" for k, v in fit.arguments)]), "parameters": parameters}
        step = "run"
        with FlopCounterMode(display=False) as counter: check_maps(encoder, SIZES[0], device)
        row["multiply_adds"] = counter.get_total_flops()//2
        check_maps(encoder, SIZES[1], device)
        step = "decoders"
        check_decoders(encoder.out_channels, 32)
        step = "output stride 16"
        if row["module"] not in strided:
            check_stride(name, device)
            step = "DPT"
            if bridged: check_dpt(name, device)
            strided.add(row["module"])
        row["ok"] = 1
    except Exception as error:
        if "meta tensor" in str(error) and device == "meta": return sweep(name, "cpu")  # what reads values cannot run without them
        row["reason"] = " ".join(f"{step}: {type(error).__name__}: {error}".split())[:200]
    return row


strided: set = set()  # modules of which one model was tried at an output stride of 16 and, if it needs a bridge, in DPT

def check_stride(name, device):
    "Raise unless a model comes to an output stride of 16, by timm's dilation or by a bridge"
    with torch.device(device):
        try: encoder = get_encoder(f"tu-{name}", output_stride=16)
        except ValueError as error:
            if "cannot be dilated" not in str(error): raise
            encoder = get_encoder(f"tu-{name}", output_stride=16, bridge="resize")
    check_maps(encoder.eval(), SIZES[1], device)
    check_decoders(encoder.out_channels, 16)


def with_limit(name, seconds):
    "`sweep`, or a row that says it took too long"
    def stop(*_): raise TimeoutError(f"more than {seconds} s")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try: return sweep(name)
    finally: signal.alarm(0)


def write_table(path, rows):
    "One row for each model, sorted by name"
    lines = ["\t".join(COLUMNS)] + ["\t".join(str(rows[n].get(c, "")) for c in COLUMNS) for n in sorted(rows)]
    head = f"# timm {timm.__version__}; multiply-adds on an image of {SIZES[0][0]} x {SIZES[0][1]}; written by tools/sweep_timm.py\n"
    path.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def read_rows(path):
    "Name -> its last row in the working file"
    return {r["name"]: r for r in map(json.loads, path.read_text().splitlines())} if path.exists() else {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern of names")
    parser.add_argument("--skip", default="", help="pattern of names to leave out")
    parser.add_argument("--names", type=Path, help="file with one name a line")
    parser.add_argument("--redo", choices=["failed", "all"], help="run again what is in the working file")
    parser.add_argument("--part", default="0/1", help="k/n: part k, from 0, of n")
    parser.add_argument("--work", type=Path, default=ROOT/"build"/"sweep_timm.jsonl")
    parser.add_argument("--table", type=Path, default=ROOT/"segkit"/"encoders"/"timm_models.tsv")
    parser.add_argument("--seconds", type=int, default=240, help="limit for one model")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    timm.create_model = without_values(timm.create_model)
    every = timm.list_models()
    rows = read_rows(args.work)
    wanted = set(args.names.read_text().split()) if args.names else set(fnmatch.filter(every, args.only))
    k, n = map(int, args.part.split("/"))
    todo = [m for m in every if m in wanted and not fnmatch.fnmatch(m, args.skip) and (m not in rows or args.redo == "all" or (args.redo == "failed" and not rows[m]["ok"]))]
    todo = todo[k*len(todo)//n:(k + 1)*len(todo)//n]  # neighbours have maps of the same channels
    args.work.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for i, name in enumerate(todo, 1):
        rows[name] = row = with_limit(name, args.seconds)
        with open(args.work, "a") as f: f.write(json.dumps(row) + "\n")
        minutes = (time.monotonic() - began)/60
        print(f"{i}/{len(todo)} {minutes:.1f} min, {minutes/i*(len(todo) - i):.0f} to go | {name}: {row['reason'] or 'ok'}", flush=True)
    rows = read_rows(args.work)  # with what other parts have written meanwhile
    missing = set(every) - set(rows)
    print(f"{sum(r['ok'] for r in rows.values())} of {len(rows)} work; " + (f"{len(missing)} not tried yet, so no table is written" if missing else f"{args.table} is written"))
    if not missing: write_table(args.table, {m: rows[m] for m in every})


if __name__ == "__main__": main()
