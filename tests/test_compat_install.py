"""Programs that say `import segmentation_models_pytorch` and run on segkit: each in a process of its own."""
import os
import subprocess
import sys

import pytest


def run(*arguments, cwd=None, status=0, **env):
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, text=True, capture_output=True, env={**os.environ, **env})
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if not status else done.stderr


def program(code): return run("-c", "from segkit.compat.smp import install\n" + code)


def test_the_import_loads_nothing():
    code = "import sys, segkit.compat.smp, segkit.compat.smp.losses.dice\nprint(*{n.partition('.')[0] for n in sys.modules})"
    loaded = set(run("-c", code).split())
    assert not loaded & {"torch", "numpy", "timm", "fastai", "torchvision", "segmentation_models_pytorch"}


def test_nothing_else_loads_it():
    code = "import sys, segkit\nfrom segkit import Unet, create_model, losses, metrics, base\nlosses.DiceLoss('binary'), base.SegmentationModel"
    assert run("-c", code + "\nprint([n for n in sys.modules if n.startswith('segkit.compat')])").strip() == "[]"


FORMS = {
    "import": "import segmentation_models_pytorch\nmodel = segmentation_models_pytorch.Unet",
    "as": "import segmentation_models_pytorch as smp\nmodel = smp.Unet",
    "from": "from segmentation_models_pytorch import Unet as model",
    "star": "from segmentation_models_pytorch import *\nmodel = Unet",
    "deep": "import segmentation_models_pytorch.decoders.unet.model as m\nmodel = m.Unet",
    "deep, from": "from segmentation_models_pytorch.decoders.unet.model import Unet as model",
    "attributes": "import segmentation_models_pytorch as smp\nmodel = smp.decoders.unet.model.Unet",
    "dict": "import segmentation_models_pytorch as smp\nmodel = smp.__dict__['Unet']",
    "vars": "import segmentation_models_pytorch as smp\nmodel = vars(smp)['Unet']",
    "getattr": "import segmentation_models_pytorch as smp\nmodel = getattr(smp, 'Unet')",
    "import_module": "import importlib\nmodel = importlib.import_module('segmentation_models_pytorch.decoders.unet').Unet",
    "locate": "import pydoc\nmodel = pydoc.locate('segmentation_models_pytorch.decoders.unet.model.Unet')",
    "resolve": "import pkgutil\nmodel = pkgutil.resolve_name('segmentation_models_pytorch:Unet')",
    "members": "import inspect, segmentation_models_pytorch as smp\nmodel = dict(inspect.getmembers(smp, inspect.isclass))['Unet']",
    "mapping": "import segmentation_models_pytorch as smp\nmodel = smp.MODEL_ARCHITECTURES_MAPPING['unet']",
    "list": "from segmentation_models_pytorch import _MODEL_ARCHITECTURES\nmodel = _MODEL_ARCHITECTURES[0]",
    "find_spec": "import importlib.util as u\nassert u.find_spec('segmentation_models_pytorch') and not u.find_spec('segmentation_models_pytorch.nothing')\n"
                 "import segmentation_models_pytorch as smp\nmodel = smp.Unet",
}


def test_import_forms():
    "One process, and for each form SMP's name is free before"
    assert program(f"""
from segkit.compat.smp import uninstall
import segkit
for form, code in {FORMS!r}.items():
    uninstall(); install()
    scope = dict()
    exec(code, scope)
    assert scope["model"] is segkit.Unet, form
print("passed")
""").strip() == "passed"


def test_smp_was_imported_before():
    "The error names the file, and what to do; nothing is half installed"
    out = program("""
import sys
import segmentation_models_pytorch as smp
try: install()
except RuntimeError as error: print(error)
print(smp.__file__, [f for f in sys.meta_path if type(f).__name__ == "TreeFinder" and f.top == "segmentation_models_pytorch"])
import segmentation_models_pytorch.losses
assert segmentation_models_pytorch.losses.__file__
""")
    assert "was imported already" in out and "python -m segkit.compat.smp" in out and out.strip().endswith("[]")


def test_install_twice_and_uninstall():
    assert program("""
import sys
from segkit.compat.smp import installed, uninstall
before = list(sys.meta_path)
a, b = install(), install()
assert a is b and len(sys.meta_path) == len(before) + 1
uninstall(); uninstall()
assert sys.meta_path == before and not [n for n in sys.modules if n.startswith("segmentation_models_pytorch")]
try:
    with installed():
        from segmentation_models_pytorch import FPN
        raise KeyError
except KeyError: pass
assert sys.meta_path == before
import segmentation_models_pytorch as smp  # SMP itself is there again
print("segkit" not in smp.Unet.__module__, FPN.__module__)
""").split() == ["True", "segkit.decoders.fpn"]


def test_patch():
    "mock.patch by path, under either name and in segkit, and what stands there afterwards"
    assert program("""
install()
from unittest import mock
import segkit, segkit.compat.smp, segmentation_models_pytorch as smp
for path in ("segmentation_models_pytorch.Unet", "segkit.compat.smp.Unet", "segkit.Unet", "segmentation_models_pytorch.decoders.unet.model.Unet",
             "segmentation_models_pytorch.encoders.get_encoder", "segmentation_models_pytorch.losses.dice.DiceLoss"):
    import pkgutil
    before = pkgutil.resolve_name(path)
    with mock.patch(path) as double:
        assert pkgutil.resolve_name(path) is double, path
    assert pkgutil.resolve_name(path) is before, path
with mock.patch.dict(smp.encoders.encoders, {"mine": {}}): assert "mine" in segkit.encoders.encoders
assert "mine" not in segkit.encoders.encoders
with mock.patch.object(smp, "Unet", 3): assert smp.Unet == 3
assert smp.Unet is segkit.Unet
print("passed")
""").strip() == "passed"


def test_target_by_path():
    "What hydra does with `_target_`: import the longest module of the path, then take attributes"
    assert program("""
install()
from importlib import import_module
def locate(path):
    parts = path.split(".")
    found = import_module(parts[0])
    for n, part in enumerate(parts[1:], 1):
        try: found = getattr(found, part)
        except AttributeError: found = import_module(".".join(parts[:n + 1]))
    return found
for path in ("segmentation_models_pytorch.Unet", "segmentation_models_pytorch.decoders.unet.model.Unet", "segmentation_models_pytorch.losses.DiceLoss",
             "segmentation_models_pytorch.utils.train.TrainEpoch", "segmentation_models_pytorch.create_model", "segkit.compat.smp.decoders.fpn.FPN"):
    print(locate(path).__name__)
""").split() == ["Unet", "Unet", "DiceLoss", "TrainEpoch", "create_model", "FPN"]


def test_pickle_by_path(tmp_path):
    "A pickle that names SMP's modules is read under install(); one written there is read without it"
    code = f"""
install()
import pickle, torch
import segmentation_models_pytorch as smp
by_name = b"csegmentation_models_pytorch.decoders.unet.model\\nUnet\\n."  # protocol 0: module, name
assert pickle.loads(by_name) is smp.Unet
assert pickle.loads(b"csegmentation_models_pytorch.losses.dice\\nDiceLoss\\n.") is smp.losses.DiceLoss
torch.save(smp.losses.DiceLoss("binary"), r"{tmp_path/'loss.pt'}")
"""
    program(code)
    import torch

    import segkit
    assert type(torch.load(tmp_path/"loss.pt", weights_only=False)) is segkit.losses.DiceLoss


def test_threads_import_at_once():
    assert program("""
install()
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
names = ["Unet", "losses.dice.DiceLoss", "decoders.fpn.decoder.FPNDecoder", "encoders.encoders", "utils.train.Epoch", "base.SegmentationModel"]
def take(i):
    module, _, name = f"segmentation_models_pytorch.{names[i % len(names)]}".rpartition(".")
    return getattr(import_module(module), name)
with ThreadPoolExecutor(8) as pool: found = list(pool.map(take, range(60)))
print(len(set(map(id, found))))
""").strip() == "6"


# ---- python -m segkit.compat.smp

def test_run_a_program(tmp_path):
    "As `python program.py` would: arguments, folder, `__main__`, `__file__`, exit status"
    (tmp_path/"beside.py").write_text("here = 3\n")
    (tmp_path/"job.py").write_text("import sys, beside, __main__, os\nimport segmentation_models_pytorch as smp\n"
                                   "print(smp.Unet.__module__, sys.argv, beside.here, __name__, os.path.basename(__file__), __main__.beside is beside, sys.path[0])\nsys.exit(5)\n")
    done = subprocess.run([sys.executable, "-m", "segkit.compat.smp", tmp_path/"job.py", "--x", "-m"], text=True, capture_output=True)
    assert done.returncode == 5, done.stderr
    assert done.stdout.split() == ["segkit.decoders.unet", f"['{tmp_path/'job.py'}',", "'--x',", "'-m']", "3", "__main__", "job.py", "True", str(tmp_path)]


def test_run_a_module(tmp_path):
    (tmp_path/"pack").mkdir()
    (tmp_path/"pack"/"__init__.py").write_text("")
    (tmp_path/"pack"/"__main__.py").write_text("import sys\nfrom segmentation_models_pytorch.losses import DiceLoss\nprint(DiceLoss.__module__, sys.argv[1:], __name__)\n")
    assert run("-m", "segkit.compat.smp", "-m", "pack", "a", cwd=tmp_path).split() == ["segkit.losses.region", "['a']", "__main__"]


@pytest.mark.parametrize("arguments", [(), ("-m",), ("--help",), ("nowhere.py",)])
def test_run_nothing(arguments):
    assert "usage: python -m segkit.compat.smp PROGRAM" in run("-m", "segkit.compat.smp", *arguments, status=1)


def test_an_error_of_the_program_is_its_own(tmp_path):
    (tmp_path/"job.py").write_text("import segmentation_models_pytorch.encoders._dpn\n")
    assert "timm.models.dpn" in run("-m", "segkit.compat.smp", tmp_path/"job.py", status=1)
