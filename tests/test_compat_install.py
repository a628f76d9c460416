"""Programs that say `import segmentation_models_pytorch` and run on segkit: each in a process of its own."""
import json
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


# what else programs do with the module: each snippet raises if it does not work
SNIPPETS = {f"form: {form}": f"{code}\nimport segkit\nassert model is segkit.Unet" for form, code in FORMS.items()} | {
    # mock.patch by path, under either name and in segkit, and what stands there afterwards
    "patch": """
import pkgutil
from unittest import mock
import segkit, segkit.compat.smp, segmentation_models_pytorch as smp
for path in ("segmentation_models_pytorch.Unet", "segkit.compat.smp.Unet", "segkit.Unet", "segmentation_models_pytorch.decoders.unet.model.Unet",
             "segmentation_models_pytorch.encoders.get_encoder", "segmentation_models_pytorch.losses.dice.DiceLoss"):
    before = pkgutil.resolve_name(path)
    with mock.patch(path) as double: assert pkgutil.resolve_name(path) is double, path
    assert pkgutil.resolve_name(path) is before, path
with mock.patch.dict(smp.encoders.encoders, {"mine": {}}): assert "mine" in segkit.encoders.encoders
assert "mine" not in segkit.encoders.encoders
with mock.patch.object(smp, "Unet", 3): assert smp.Unet == 3
assert smp.Unet is segkit.Unet
""",
    # what hydra does with `_target_`: import the first part of the path, then take attributes or import what is below
    "target": """
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
    assert locate(path).__name__ == path.rpartition(".")[2]
""",
    # a pickle that names SMP's modules is read; one written here names segkit's
    "pickle": """
import pickle
import segmentation_models_pytorch as smp
assert pickle.loads(b"csegmentation_models_pytorch.decoders.unet.model\\nUnet\\n.") is smp.Unet
assert pickle.loads(b"csegmentation_models_pytorch.losses.dice\\nDiceLoss\\n.") is smp.losses.DiceLoss
assert b"segmentation_models" not in pickle.dumps(smp.losses.DiceLoss("binary"))
""",
    "threads": """
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
names = ["Unet", "losses.dice.DiceLoss", "decoders.fpn.decoder.FPNDecoder", "encoders.encoders", "utils.train.Epoch", "base.SegmentationModel"]
def take(i):
    module, _, name = f"segmentation_models_pytorch.{names[i % len(names)]}".rpartition(".")
    return getattr(import_module(module), name)
with ThreadPoolExecutor(8) as pool: assert len(set(map(id, pool.map(take, range(60))))) == 6
""",
    # a user's assignment stays, deletion brings the name back, reloading keeps the tree
    "assignment": """
import importlib
import segkit, segmentation_models_pytorch as smp
smp.Unet = 3
assert smp.Unet == 3 and vars(smp)["Unet"] == 3
del smp.Unet
assert smp.Unet is segkit.Unet
assert importlib.reload(smp).Unet is segkit.Unet and importlib.reload(smp.losses).DiceLoss is segkit.losses.DiceLoss
""",
    # tools that look at modules
    "looked at": """
import copy, inspect, pydoc, typing
import segmentation_models_pytorch as smp
assert "Unet" in dir(smp) and "losses" in dir(smp) and "segmentation_models_pytorch" in repr(smp)
assert not hasattr(smp, "__file__") and not hasattr(smp, "__wrapped__") and getattr(smp, "nothing", 3) == 3
assert inspect.getmodule(smp.Unet).__name__ == "segkit.decoders.unet" and inspect.ismodule(smp.losses)
assert "DiceLoss" in pydoc.plain(pydoc.render_doc(smp.losses))
assert set(smp.__all__) <= set(dir(smp))
""",
}


@pytest.fixture(scope="module")
def outcomes():
    "Each snippet in one process, with SMP's name free before it"
    code = f"""
import json, traceback
from segkit.compat.smp import uninstall
outcomes = dict()
for name, code in {SNIPPETS!r}.items():
    uninstall(); install()
    try: exec(code, dict())
    except BaseException: outcomes[name] = traceback.format_exc()
    else: outcomes[name] = "passed"
print(json.dumps(outcomes))
"""
    return json.loads(program(code))


@pytest.mark.parametrize("name", SNIPPETS)
def test_program(name, outcomes): assert outcomes[name] == "passed"


def test_smp_was_imported_before():
    "The error names the file and what to do, nothing is half installed; and `uninstall` gives SMP its name back"
    out = program("""
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
assert sys.meta_path == before and FPN.__module__ == "segkit.decoders.fpn"
import segmentation_models_pytorch as smp  # SMP itself
assert "segkit" not in smp.Unet.__module__
try: install()
except RuntimeError as error: print(error)
assert sys.meta_path == before and sys.modules["segmentation_models_pytorch"] is smp
uninstall()
assert sys.modules["segmentation_models_pytorch"] is smp
""")
    assert "was imported already, from" in out and "__init__.py" in out and "python -m segkit.compat.smp" in out


# ---- python -m segkit.compat.smp

def test_run_a_program(tmp_path):
    "As `python program.py` would: arguments, folder, `__main__`, `__file__`, exit status"
    (tmp_path/"beside.py").write_text("here = 3\n")
    (tmp_path/"job.py").write_text("import sys, beside, __main__, os\nimport segmentation_models_pytorch as smp\n"
                                   "print(type(smp).__module__, sys.argv, beside.here, __name__, os.path.basename(__file__), __main__.beside is beside, sys.path[0])\nsys.exit(5)\n")
    done = subprocess.run([sys.executable, "-m", "segkit.compat.smp", tmp_path/"job.py", "--x", "-m"], text=True, capture_output=True)
    assert done.returncode == 5, done.stderr
    assert done.stdout.split() == ["segkit.compat.tree", f"['{tmp_path/'job.py'}',", "'--x',", "'-m']", "3", "__main__", "job.py", "True", str(tmp_path)]


def test_run_a_module(tmp_path):
    (tmp_path/"pack").mkdir()
    (tmp_path/"pack"/"__init__.py").write_text("")
    (tmp_path/"pack"/"__main__.py").write_text("import sys\nfrom segmentation_models_pytorch import losses, __version__\nprint(losses.__name__, __version__, sys.argv[1:], __name__)\n")
    assert run("-m", "segkit.compat.smp", "-m", "pack", "a", cwd=tmp_path).split() == ["segmentation_models_pytorch.losses", "0.6.0", "['a']", "__main__"]


def test_run_a_program_that_spawns(tmp_path):
    "A worker that starts a Python of its own finds segkit as well, before an SMP that is installed"
    (tmp_path/"job.py").write_text("""
import multiprocessing, sys
import segmentation_models_pytorch as smp
from segmentation_models_pytorch.losses import constants
def work(_): return type(sys.modules["segmentation_models_pytorch"]).__module__, constants.__name__, __name__
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool: print(*pool.map(work, [0])[0])
""")
    assert run("-m", "segkit.compat.smp", tmp_path/"job.py").split() == ["segkit.compat.tree", "segmentation_models_pytorch.losses.constants", "__mp_main__"]


@pytest.mark.parametrize("arguments", [(), ("-m",), ("--help",), ("nowhere.py",)])
def test_run_nothing(arguments):
    assert "usage: python -m segkit.compat.smp PROGRAM" in run("-m", "segkit.compat.smp", *arguments, status=1)


def test_an_error_of_the_program_is_its_own(tmp_path):
    (tmp_path/"job.py").write_text("import segmentation_models_pytorch.encoders._dpn\n")
    assert "timm.models.dpn" in run("-m", "segkit.compat.smp", tmp_path/"job.py", status=1)
