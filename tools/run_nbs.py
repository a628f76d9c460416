"""Run every notebook, or those that are named, each in a process of its own: `python tools/run_nbs.py [nbs/losses ...]`.

A page defines its classes again and registers them, so a page that ran before in the same process would leave its `Unet` in
the tables that the next page reads. `nbdev-test` shares processes; here each page gets a fresh fork of one that has
imported the large libraries, which is quick. Large pages start first. Two pages run at a time, each on one thread:
where a page asks for two, they would wait for each other."""
import multiprocessing
import sys
import time
import warnings
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2

def pages(names):
    "Notebooks at or below the paths `names`, the largest first"
    found = set()
    for path in [Path(name).resolve() for name in names] or [ROOT/"nbs"]:
        if not path.exists(): raise SystemExit(f"no notebook or folder {path}")
        found |= {path} if path.is_file() else {p for p in path.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(path).parts)}
    return sorted(found, key=lambda p: p.stat().st_size, reverse=True)

def run(page):
    "Run one notebook; the exit code says how it went"
    import torch
    torch.set_num_threads(1)
    torch.set_num_threads = lambda n: None
    from nbdev.config import get_config
    from nbdev.test import test_nb
    config = get_config(page)
    passed, _ = test_nb(page, skip_flags=config.tst_flags.split(), basepath=ROOT, cell_timeout=config.cell_timeout)
    sys.exit(not passed)

def main(names):
    if "--help" in names: return print(__doc__)
    todo = pages(names)
    total, begin, running, failed = len(todo), time.monotonic(), {}, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # the forks need not import these again
        import fastai.vision.all, IPython, matplotlib.pyplot, nbdev.test, scipy.stats, sklearn.metrics, timm  # noqa: E401, F401, I001
    context = multiprocessing.get_context("spawn" if sys.platform in ("darwin", "win32") else "fork")
    while todo or running:
        while todo and len(running) < WORKERS:
            process = context.Process(target=run, args=(page := todo.pop(0),))
            process.start()
            running[process.sentinel] = process, page, time.monotonic()
        for sentinel in wait(running):
            process, page, start = running.pop(sentinel)
            process.join()
            if process.exitcode: failed.append(str(page))
            print(f"{total - len(todo) - len(running):3}/{total} {'FAILED' if process.exitcode else 'ok    '} {time.monotonic() - start:4.0f} s  "
                  f"{page.parent.name}/{page.name}", flush=True)
    print(f"{total} notebooks, {time.monotonic() - begin:.0f} s")
    if failed: raise SystemExit("failed: " + ", ".join(failed))

if __name__ == "__main__": main(sys.argv[1:])
