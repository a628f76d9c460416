"""Arrows run one way: every import against the table of floors in CONTRIBUTING.md, and what importing does to others."""
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]/"tools"))
import house

FILES = house.modules()
FOUND = list(house.arrows(FILES))
FLOORS, BESIDE = house.plan()


def test_every_package_has_a_floor():
    assert {module.split(".")[0] for module in FILES} <= set(FLOORS)


def test_arrows_run_down_and_private_names_stay_at_home():
    assert not list(house.breaches(FOUND, FLOORS, BESIDE))


def test_no_circle():
    assert house.circle(FOUND) is None


def test_the_drawing_is_of_today():
    begin, end = house.MARKS
    text = house.PLAN.read_text(encoding="utf-8")
    assert house.drawing(FOUND, FLOORS) == text.partition(begin)[2].partition(end)[0].strip(), "run `python tools/house.py --write`"


def test_only_the_shims_change_other_libraries():
    found = [effect for file in FILES.values() for effect in house.effects(file)]
    assert not [effect for effect in found if not effect.startswith("data.shims:")]


def test_importing_leaves_the_process_as_it_was():
    "All modules in one fresh process: no filter of warnings, no default of torch or numpy is another afterwards"
    code = """
import importlib, warnings
import numpy as np, torch
def state(): return list(warnings.filters), np.geterr(), torch.get_default_dtype(), torch.initial_seed(), torch.is_grad_enabled()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import fastai.vision.all, fastai.distributed, timm, sklearn.metrics, matplotlib.pyplot, nibabel, pandas  # what they do at import is theirs
before = state()
for name in NAMES: importlib.import_module(name)
assert state() == before, (before, state())
"""
    names = [f"segkit.{module}" for module in FILES]
    subprocess.run([sys.executable, "-c", code.replace("NAMES", repr(names))], check=True)


# the checks themselves: each rule is broken once, and seen to be

TABLE = "| 0 | `core` | | |\n| 1 | `encoders` | | |\n| 1 | `model` | `encoders` | |\n"
BROKEN = {
    "up": ("core", "from ..encoders.net import Net", "core (floor 0) may not import encoders"),
    "up, in a function": ("core", "def f():\n    from segkit.encoders.net import Net", "may not import encoders"),
    "up, for type checkers": ("core", "if TYPE_CHECKING: from segkit.encoders.net import Net", "may not import encoders"),
    "up, as a module": ("core", "import segkit.encoders.net", "may not import encoders"),
    "up, a package": ("core", "from .. import encoders", "may not import encoders"),
    "across": ("encoders", "from ..model.net import Net", "encoders (floor 1) may not import model"),
    "private": ("model", "from ..encoders.net import _net", "_net is private"),
    "private, of the same package": ("model", "from .net import _net", "_net is private"),
    "no floor": ("model", "from ..attic.net import Net", "no floor"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_breach_is_seen(case, tmp_path):
    package, code, message = BROKEN[case]
    (tmp_path/package).mkdir()
    (tmp_path/package/"new.py").write_text(code + "\n")
    found = list(house.arrows(house.modules(tmp_path)))
    assert any(message in breach for breach in house.breaches(found, *house.plan(TABLE)))


def test_what_is_allowed_is_no_breach(tmp_path):
    (tmp_path/"model").mkdir()
    (tmp_path/"model"/"new.py").write_text("from ..encoders.net import Net\nfrom ..core.names import Names\nfrom .config import x\nimport torch\n")
    found = list(house.arrows(house.modules(tmp_path)))
    assert len(found) == 3 and not list(house.breaches(found, *house.plan(TABLE)))


def test_a_circle_is_seen(tmp_path):
    (tmp_path/"core").mkdir()
    (tmp_path/"core"/"a.py").write_text("from .b import x\n")
    (tmp_path/"core"/"b.py").write_text("def f():\n    from . import a\n")
    assert set(house.circle(house.arrows(house.modules(tmp_path)))) == {"core.a", "core.b"}


@pytest.mark.parametrize("line", ["np.inf = 3", "warnings.filterwarnings('ignore')", "torch.manual_seed(0)", "nn.Module.forward = f"])
def test_an_effect_is_seen(line, tmp_path):
    if line.startswith("nn."): line = "nn.forward = f"
    file = tmp_path/"new.py"
    file.write_text(f"import warnings\nimport numpy as np, torch\nfrom torch import nn\n{line}\n")
    assert list(house.effects(file))
