"""Files of strangers: a thousand damaged or hostile ones, each refused in words that name it, in bounded time and memory, with nothing run and nothing written outside."""
import io
import json
import pickle
import random
import resource
import struct
import tarfile
import time
import warnings
import zipfile

import pytest
import torch
from torch import nn

import segkit
from segkit.core.archive import unpack
from segkit.core.files import read_state_dict
from segkit.encoders import EncoderMixin
from segkit.encoders import encoders as registry

REFUSED = (ValueError, KeyError, TypeError, OSError, ImportError, RuntimeError)


class Tiny(nn.Module, EncoderMixin):
    "An encoder that is built in a millisecond"
    def __init__(self, depth=3, in_channels=3, width=4):
        super().__init__()
        self._depth, self._in_channels, self._out_channels = depth, in_channels, [in_channels, *[width]*depth]
        self.convs = nn.ModuleList([nn.Conv2d(c, width, 3, 2, 1) for c in self._out_channels[:-1]])
    def forward(self, x):
        features = [x]
        for conv in self.convs: features.append(conv(features[-1]))
        return features


@pytest.fixture
def tiny(monkeypatch):
    "A model of segkit that is built in a millisecond"
    registry["tiny"] = {"encoder": Tiny, "pretrained_settings": {}, "params": {}}
    yield segkit.Unet("tiny", 3, None, decoder_channels=(8, 4, 4), classes=2).eval()
    del registry["tiny"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder beside which nothing may appear; what would do harm is noted"
    inside = tmp_path/"inside"
    inside.mkdir()
    monkeypatch.chdir(tmp_path)
    ran = []
    for name in ("os.system", "os.abort", "subprocess.Popen", "builtins.eval"):
        if name != "builtins.eval": monkeypatch.setattr(name, lambda *args, name=name, **kwargs: ran.append(name))
    yield inside
    assert not ran
    assert [p.name for p in tmp_path.iterdir()] == ["inside"]


class Bounded:
    "Counts files, and asserts that each took little time and all took little memory"
    def __init__(self): self.n, self.loaded, self.memory = 0, 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    def __call__(self, file, read, same=lambda found: True):
        self.n += 1
        start = time.perf_counter()
        try: found = read()
        except REFUSED as error: assert str(file) in str(error), f"{type(error).__name__} does not name {file}: {str(error)[:300]}"
        else:
            self.loaded += 1
            assert same(found), "loaded as something else"
        assert time.perf_counter() - start < 10
    def close(self, n):
        assert self.n >= n
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory < 600_000  # kilobytes


def damaged(content, rng):
    "One of six accidents"
    kind, at = rng.randrange(6), rng.randrange(max(1, len(content)))
    if kind == 0: return content[:at]
    if kind == 1: return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1:]
    if kind == 2: return content[:at] + rng.randbytes(rng.randrange(1, 40)) + content[at:]
    if kind == 3: return content[:at] + content[at + rng.randrange(1, 40):]
    if kind == 4: return content[:at] + b"\0"*min(64, len(content) - at) + content[at + 64:]
    return rng.randbytes(rng.randrange(200))


VALUES = [10**12, 10**8, -1, 0, 2**63, 2**200, 1e308, 2.5, "", "x"*10_000, "a\0b", "../../etc/passwd", None, True, [], {}, [[]], {"a": {"b": []}}, [10**9]*3, [1]*100_000, [-1, 0, 1],
          ["a", "b"], {"_import": "os:abort"}, {"_import": 3}, {"_import": "torch.hub:load"}, {"_not_saved": "x"}, [{"_import": "subprocess:Popen"}], "tu-hf-hub:nobody/nothing", "tu-local-dir:/etc",
          "tu-resnet18.nope", "mobilenet_vX", "Unett", "os:abort", "segkit.core.files:fetch", "http://127.0.0.1:9/x", 'float("nan")', [[[[[[[[[[0]]]]]]]]]], {"classes": 10**12}, {"type": "os:abort"}]
EXTRA = ["_encoder_class", "_model_class", "checkpoint_path", "pretrained_cfg", "pretrained", "width", "depth", "trust_remote_code", "args", "__class__", "self", "cls", "strict", "encoder_weights"]


def configurations(config, rng, n):
    "Contents of `config.json`, each wrong in its own way"
    text = json.dumps(config).encode()
    yield from (b"", b"[]", b"7", b"null", b'"x"', text.decode().encode("utf-16"), b"\xef\xbb\xbf" + text, b"[" * 100_000, b'{"a":' * 100_000, b"{" + b" " * 5_000_000 + b"}", text.replace(b"2", b"NaN"),
                text.replace(b"2", b"-Infinity"), b'{"classes": ' + b"9"*5000 + b"}", json.dumps(config | {"aux_params": {"classes": 10**11}}).encode(), json.dumps(config | {"width": 10**6}).encode())
    for i in range(n - 15):
        if i % 3 == 0: yield damaged(text, rng)
        else:
            names = rng.sample([*config, *EXTRA], rng.choice([1, 1, 1, 2]))
            yield json.dumps(config | {name: rng.choice(VALUES) for name in names}).encode()


def test_configurations(tiny, place):
    tiny.save_pretrained(place)
    config = json.loads((place/"config.json").read_text())
    (place/"preprocessing.json").write_text("{}")  # without checksums, which would find each of them at once
    check, rng, x = Bounded(), random.Random(0), torch.ones(1, 3, 16, 16)
    for content in configurations(config, rng, 400):
        (place/"config.json").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(place, lambda: segkit.from_pretrained(place, local_files_only=True), lambda model: isinstance(model, nn.Module))
    check.close(400)
    assert check.loaded < 120  # changes that change nothing
    (place/"config.json").write_text(json.dumps(config))
    assert torch.equal(segkit.from_pretrained(place).predict(x), tiny.predict(x))


def header(entries, length=None, data=b"\0"*24):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HEADERS = [header({}, 2**60), header({}, 2**63), header({}, 0), header({}, 99_999_999), header(b"[" * 50_000), header(b'{"a":' * 50_000), header([1]), header({"a": 3}), header(b"\xff\xfe{}"),
           *(header({"a": {"dtype": d, "shape": s, "data_offsets": o}}) for d, s, o in [
               ("F32", [6], [0, 2**60]), ("F32", [2**60], [0, 24]), ("F32", [2**32, 2**32], [0, 24]), ("F32", [-6], [0, 24]), ("F32", [6], [24, 0]), ("F32", [6], [-24, 0]), ("F99", [6], [0, 24]),
               ("F32", ["6"], [0, 24]), ("F32", [6], [0, 20]), ("I64", [3.5], [0, 24]), (None, [6], [0, 24]), ("F32", None, [0, 24])]),
           header({"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}, "b": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}),
           header({"__metadata__": {"a": [1]}})]


def test_safetensors(tiny, place):
    tiny.save_pretrained(place)
    file, rng, check = place/"model.safetensors", random.Random(1), Bounded()
    whole, x = file.read_bytes(), torch.ones(1, 3, 16, 16)
    expected = tiny.predict(x)
    for content in [*HEADERS, *(damaged(whole, rng) for _ in range(125))]:  # alone
        file.write_bytes(content)
        check(file, lambda: read_state_dict(file), lambda found: all(isinstance(t, torch.Tensor) for t in found.values()))
    for _ in range(125):  # in their folder: never another number
        file.write_bytes(damaged(whole, rng))
        check(place, lambda: segkit.from_pretrained(place), lambda model: torch.equal(model.predict(x), expected))
    check.close(250)


def pickled(*parts): return b"\x80\x02" + b"".join(parts) + b"."


PICKLES = [pickled(b"cos\nsystem\nX\x02\0\0\0ls\x85R"), pickled(b"cbuiltins\neval\nX\x01\0\0\0" + b"1\x85R"), pickled(b"ctorch\nload\nX\x01\0\0\0a\x85R"), pickled(b"]" * 100_000), pickled(b"(" * 100_000, b"t" * 100_000),
           pickled(b"\x8d" + struct.pack("<Q", 2**60)), pickled(b"\x8e" + struct.pack("<Q", 2**40) + b"x"), pickled(b"\x8b" + struct.pack("<I", 2**31 - 1)), pickled(b"X" + struct.pack("<I", 2**31 - 1)),
           pickled(b"]q\0", *(b"]q" + bytes([i + 1]) + b"(" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60))),  # twice the one before, sixty times
           pickled(b"}X\x01\0\0\0aK\x01s"), pickled(b"N"), pickled(b"}"), b"", b".", b"\x80\xff.", b"\x80\x02R."]


def zipped(**records):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, data in records.items(): file.writestr(name.replace("__", "/").replace("_dot_", "."), data)
    return content.getvalue()


def test_checkpoints(place):
    file, rng, check = place/"a.pth", random.Random(2), Bounded()
    state = {"conv.weight": torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)), "conv.bias": torch.ones(4)}
    new, old = io.BytesIO(), io.BytesIO()
    torch.save(state, new)
    torch.save({"state_dict": state, "epoch": 1}, old, _use_new_zipfile_serialization=False)
    hostile = [*PICKLES, *(zipped(a__data_dot_pkl=p, a__version="3", a__byteorder="little") for p in PICKLES), zipped(a="b"), zipped(**{"..__x": "1"}), pickle.dumps(state), pickle.dumps(nn.Linear(1, 1))]
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("a/data.pkl", bytes(10**8))
    def same(found): return set(found) <= set(state) and all(torch.equal(t, state[name]) for name, t in found.items())
    for content in [*hostile, bomb.getvalue(), *(damaged(new.getvalue(), rng) for _ in range(200))]:
        file.write_bytes(content)
        check(file, lambda: read_state_dict(file), same)
    for _ in range(50):  # the old format has no checksums, so a number may be another
        file.write_bytes(damaged(old.getvalue(), rng))
        check(file, lambda: read_state_dict(file))
    check.close(250)


def archives(rng, n):
    "Archives of a stranger"
    def tar(members, mode):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode=mode) as archive:
            for name, kind, data in members:
                info = tarfile.TarInfo(name)
                info.type, info.size, info.linkname = kind, len(data), "../../outside"
                archive.addfile(info, io.BytesIO(data))
        return content.getvalue()
    good = [("set", tarfile.DIRTYPE, b""), ("set/a.txt", tarfile.REGTYPE, b"one"*50), ("set/b.txt", tarfile.REGTYPE, bytes(range(256)))]
    names = ["../outside", "/outside", "a/../../outside", "..", "x/../../../outside", "..\\outside", "C:\\outside", "\\outside", "//outside", "a\n/../../b"]
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.BLKTYPE]
    for name in names: yield tar([(name, tarfile.REGTYPE, b"1")], "w")
    for kind in kinds: yield tar([("link", kind, b""), ("link/x", tarfile.REGTYPE, b"1")], "w:gz")
    yield tar([*good, good[1]], "w")  # twice
    yield tar([("a", tarfile.REGTYPE, b"1"), ("a/b", tarfile.REGTYPE, b"1")], "w")
    yield tar([("zeros", tarfile.REGTYPE, bytes(150_000_000))], "w:gz")
    pax = tarfile.TarInfo("x")
    pax.type, pax.size = tarfile.XHDTYPE, 2**40  # a name of a terabyte
    yield pax.tobuf() + bytes(5000)
    for name in names: yield zipped(**{name: "1"})
    whole = [tar(good, mode) for mode in ("w", "w:gz", "w:bz2", "w:xz")] + [zipped(set__a="one"*50)]
    for i in range(n - 29): yield damaged(whole[i % len(whole)], rng)


def test_archives(place):
    check, rng = Bounded(), random.Random(3)
    for i, content in enumerate(archives(rng, 120)):
        (place/"a.bin").write_bytes(content)
        check(place/"a.bin", lambda i=i: unpack(place/"a.bin", place/str(i), progress=False))
    check.close(120)
    assert not list(place.rglob("outside*"))


def test_facts(tiny, place):
    "Entries of `preprocessing.json`, among them those that a predictor reads"
    tiny.save_pretrained(place, preprocessing={"mean": [.5]*3, "std": [.25]*3, "input_range": [0, 1], "input_space": "RGB"}, class_names=["a", "b"])
    facts = json.loads((place/"preprocessing.json").read_text())
    text, rng, check = (place/"preprocessing.json").read_bytes(), random.Random(4), Bounded()
    for i in range(100):
        if i % 3 == 0: content = damaged(text, rng)
        else: content = json.dumps(facts | {rng.choice([*facts, "resize", "mode", "label_mode", "threshold", "void", "label_names"]): rng.choice(VALUES)}).encode()
        (place/"preprocessing.json").write_bytes(content)
        check(place, lambda: segkit.load_predictor(place)(torch.zeros(3, 16, 16)))
    check.close(100)
