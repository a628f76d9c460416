"""Every module and every name of SMP 0.6, one by one: imported from segkit's tree, and under SMP's own name."""
import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import segmentation_models_pytorch as theirs

from segkit.compat import smp
from segkit.compat.tree import MISSING, TREE

HERE = Path(theirs.__file__).parent
SMP = theirs.__name__


def places():
    "Every module of SMP, without SMP's own name -> its file"
    for file in sorted(HERE.rglob("*.py")):
        parts = file.relative_to(HERE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def names_of(file):
    "What a module defines, and what it takes from other modules of SMP; not what it imports from other libraries"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)): yield node.name
        elif isinstance(node, ast.Assign): yield from (t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(SMP)):
            yield from (alias.asname or alias.name for alias in node.names)


# names that begin with an underscore and that public code imports
PRIVATE = {"_MODEL_ARCHITECTURES"}
# incidental names: other modules under a short name, type variables, texts that docstrings are made of
INCIDENTAL = {("base.model", "T"), ("base.model", "init"), ("decoders.manet.decoder", "md"), ("decoders.segformer.decoder", "md"),
              ("decoders.unet.decoder", "md"), ("decoders.unetplusplus.decoder", "md"), ("decoders.linknet.decoder", "modules"),
              ("decoders.pspnet.decoder", "modules"), ("decoders.upernet.decoder", "md"), ("encoders._base", "utils"), ("encoders.mobileone", "utils"),
              ("utils.losses", "base"), ("utils.losses", "F"), ("utils.metrics", "base"), ("utils.metrics", "F")}


def is_asked(place, name):
    if name.startswith("_") and name not in PRIVATE and name != "__version__": return False
    return name != "__all__" and (place, name) not in INCIDENTAL


PLACES = dict(places())
WHOLE_MODULES = {place for place in PLACES if place in MISSING}
NAMES = [(place, name) for place, file in PLACES.items() if place not in WHOLE_MODULES
         for name in dict.fromkeys(names_of(file)) if is_asked(place, name)]
THERE = [(place, name) for place, name in NAMES if f"{place}.{name}".lstrip(".") not in MISSING]


def module_of(top, place): return importlib.import_module(f"{top}.{place}".rstrip("."))


def kind(thing): return "class" if inspect.isclass(thing) else "function" if callable(thing) else "module" if inspect.ismodule(thing) else "value"


def test_the_walk_is_long():
    "The test would be worth nothing if it found no names"
    assert len(PLACES) == 91 and len(NAMES) > 300


def test_every_module():
    missing = [place for place in PLACES if place not in TREE and place not in WHOLE_MODULES]
    assert not missing


@pytest.mark.parametrize("place", [place for place in PLACES if place not in WHOLE_MODULES], ids=lambda p: p or "top")
def test_every_name(place):
    "It is there, and is a class where SMP has a class, a function where it has a function"
    ours, real = module_of("segkit.compat.smp", place), module_of(SMP, place)
    wrong = []
    for there, name in THERE:
        if there != place: continue
        try: value = getattr(ours, name)
        except AttributeError as error: wrong.append(str(error))
        else:
            if kind(value) != kind(getattr(real, name)): wrong.append(f"{place}.{name} is a {kind(value)}")
    assert not wrong


def test_the_same_under_smps_name():
    "In a process of its own, where `install()` was called and SMP was not imported: every name by `from ... import ...`"
    code = """
import importlib, json, sys
from segkit.compat.smp import install
install()
wrong = []
for place, name in json.load(sys.stdin):
    module = f"segmentation_models_pytorch.{place}".rstrip(".")
    scope = {}
    try: exec(f"from {module} import {name}", scope)
    except Exception as error: wrong.append(f"{module}.{name}: {error!r}")
    here = importlib.import_module(f"segkit.compat.smp.{place}".rstrip("."))
    if getattr(here, name) is not scope.get(name) and not isinstance(scope.get(name), type(sys)): wrong.append(f"{module}.{name} is another")
    if sys.modules[module].__name__ != module: wrong.append(module)
print(json.dumps(wrong))
import inspect
assert "segkit" in inspect.getfile(sys.modules["segmentation_models_pytorch"].Unet)
assert not any((getattr(m, "__file__", "") or "").find("segmentation_models_pytorch") > 0 for m in list(sys.modules.values()))
"""
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(THERE), text=True, capture_output=True)
    assert not done.returncode, done.stderr
    assert json.loads(done.stdout) == []


# ---- signatures: what SMP's users pass by name and by place

BY_NAME = "built by name, with get_encoder; its class takes what segkit's table holds"
SIGNATURES = {  # name of SMP -> why its arguments differ
    **dict.fromkeys(["DPNEncoder", "VGGEncoder", "SENetEncoder", "DenseNetEncoder", "InceptionResNetV2Encoder", "InceptionV4Encoder",
                     "EfficientNetEncoder", "EfficientNetBaseEncoder", "EfficientNetLiteEncoder", "MobileNetV2Encoder",
                     "XceptionEncoder", "SkNetEncoder", "MixVisionTransformerEncoder", "MobileOne", "MobileOneBlock"], BY_NAME),
    "SMPHubMixin": "huggingface_hub's mixin has arguments of its own; segkit's models are not built on it",
}
DEFAULTS = {  # argument -> why its default differs
    "upsampling": "None brings every depth to the image's size; SMP's numbers are right for one depth",
}


def arguments(thing):
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try: parameters = inspect.signature(thing).parameters.values()
    except ValueError: return {}
    return {p.name: p.default for p in parameters if p.kind in kinds}


def differences(name, ours, real):
    have, want = arguments(ours), arguments(real)
    if lacking := [argument for argument in want if argument not in have]: yield f"{name} lacks {lacking}"
    elif list(have)[:len(want)] != list(want): yield f"{name} has another order: {list(have)}, not {list(want)}"
    for argument, default in want.items():
        if argument in DEFAULTS or argument not in have or default is inspect.Parameter.empty: continue
        if have[argument] != default and not (argument == "reduction" and not default): yield f"{name}: {argument}={have[argument]!r}, not {default!r}"


@pytest.mark.parametrize("place", dict.fromkeys(place for place, _ in THERE), ids=lambda p: p or "top")
def test_arguments(place):
    "Every argument of SMP is taken under its name, at its place, with its default"
    ours, real = module_of("segkit.compat.smp", place), module_of(SMP, place)
    wrong = []
    for there, name in THERE:
        if there != place or name in SIGNATURES: continue
        thing = getattr(real, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)): continue
        if not thing.__module__.startswith(SMP): continue
        wrong += differences(name, getattr(ours, name), thing)
        if place.endswith(".decoder") or place.startswith(("utils", "losses")):  # these are called, and derived from
            if inspect.isclass(thing) and "forward" in vars(thing): wrong += differences(f"{name}.forward", getattr(ours, name).forward, thing.forward)
    assert not wrong, "\n".join(wrong)


# ---- what is missing says where to look

@pytest.mark.parametrize("path", MISSING)
def test_what_is_missing_says_where_to_look(path):
    place, _, name = path.rpartition(".")
    if path in PLACES:
        with pytest.raises(ImportError) as raised: module_of("segkit.compat.smp", path)
    else:
        assert name in set(names_of(PLACES[place])), "SMP has no such name: take it out of the table"
        with pytest.raises(ImportError) as raised: exec(f"from segkit.compat.smp.{place} import {name}")
        with pytest.raises(AttributeError) as asked: getattr(module_of("segkit.compat.smp", place), name)
        assert MISSING[path] in str(asked.value)
    assert MISSING[path] in str(raised.value)


def test_a_wrong_name_proposes_the_right_one():
    with pytest.raises(AttributeError, match="did you mean 'DiceLoss'"): smp.losses.DiceLos  # noqa: B018
    with pytest.raises(ImportError): exec("from segkit.compat.smp.losses import DiceLos")
    with pytest.raises(ModuleNotFoundError): importlib.import_module("segkit.compat.smp.losses.nothing")
    assert importlib.util.find_spec("segkit.compat.smp.losses.nothing") is None
