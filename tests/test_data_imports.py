"""Importing segkit changes nothing for others: each module alone, in any order, no filter of warnings, no fastai noise"""
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import segkit

ROOT = Path(segkit.__file__).parent
MODULES = [f"segkit.{p.parent.name}.{p.stem}" for folder in ("data", "learner") for p in sorted((ROOT/folder).glob("*.py"))]
MODULES = [name.removesuffix(".__init__") for name in MODULES]

EACH_ALONE = """
import importlib, os, sys, traceback, warnings
{before}
wrong = []
for name in {modules}:
    read, write = os.pipe()
    if not (child := os.fork()):  # a process of its own for each module
        said, filters = [], list(warnings.filters)
        warnings.showwarning = lambda message, *args, **kwargs: said.append(str(message))
        try:
            importlib.import_module(name)
            answer = {answer}
        except BaseException: answer = traceback.format_exc()
        os.write(write, str(answer or "").encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        if answer := file.read(): wrong.append(f"{{name}}: {{answer}}")
    os.waitpid(child, 0)
print("\\n".join(wrong))
"""

def run(code): return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_each_module_alone_is_quiet():
    "Order of imports is no feature: any module may be the first, and what fastai's import says of fastai is not shown"
    code = EACH_ALONE.format(modules=MODULES, before="import torch, torchvision, timm, pandas, matplotlib.pyplot, sklearn.metrics, scipy.stats, plum", answer="[s for s in said if 'jit.script' in s]")
    assert run(code) == ""

@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_no_module_adds_a_filter():
    "Libraries may filter at import; they are imported before, so what is left would be segkit's"
    libraries = "with warnings.catch_warnings():\n    warnings.simplefilter('ignore')\n" \
                "    import fastai.vision.all, fastai.distributed, fastai.callback.all, timm, sklearn.metrics, matplotlib.pyplot, pandas, scipy.stats"
    code = EACH_ALONE.format(modules=MODULES, before=libraries, answer="[f for f in warnings.filters if f not in filters] + [f for f in filters if f not in warnings.filters]")
    assert run(code) == ""

def test_what_libraries_filter_stays():
    "fastai's own filters are there after segkit has imported it, as they are without segkit"
    for code in ("import fastai.vision.all", "import segkit.data.blocks, fastai.vision.all"):
        assert run(f"import warnings\nwith warnings.catch_warnings(record=True): pass\n{code}\nprint(any('grid_sample' in str(f) for f in warnings.filters))") == "True"

SHOWN = """
import warnings
import numpy as np, torch
import segkit.learner.learner, segkit.data.loaders
from fastai.learner import Learner, load_learner
from fastai.data.core import DataLoaders
said = []
warnings.showwarning = lambda message, *args, **kwargs: said.append(str(message))
np.array([]).mean()
torch.save({}, FILE)
try: load_learner(FILE)
except Exception: pass
print(any("empty slice" in s for s in said), any("insecure pickle" in s for s in said))
"""

def test_warnings_of_the_users_own_code_are_shown(tmp_path):
    "numpy's of an empty mean, and fastai's of pickle before a stranger's learner is read"
    assert run(SHOWN.replace("FILE", repr(str(tmp_path/"learner.pkl")))) == "True True"

def test_quietly_hides_what_it_names_and_nothing_else():
    from segkit.data.shims import quietly
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quietly("numpy.core"):
            warnings.warn("numpy.core is deprecated", DeprecationWarning, stacklevel=1)
            warnings.warn("a warning of the user", UserWarning, stacklevel=1)
        warnings.warn("numpy.core is deprecated", DeprecationWarning, stacklevel=1)
    assert [str(w.message) for w in seen] == ["a warning of the user", "numpy.core is deprecated"]
    with pytest.raises(KeyError), quietly("misspelt"): pass
    with pytest.raises(RuntimeError), quietly("numpy.core"): raise RuntimeError
    assert warnings.filters == before
