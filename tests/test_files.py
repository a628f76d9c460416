"""Files: names of wrapped weights, damage named, writing whole or not at all, several processes on one cache, one download, one folder."""
import contextlib
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import segkit
from segkit.core.cache import build_once, cache_folder
from segkit.core.files import fetch, read_state_dict, write_atomically

fork = multiprocessing.get_context("fork")
SMALL = dict(encoder_weights=None, encoder_depth=3, decoder_channels=(8, 8, 8), classes=2)


@pytest.fixture(scope="module")
def trained():
    "A small model whose weights are not those of another"
    torch.manual_seed(1)
    return segkit.Unet("resnet18", **SMALL).eval()


def fresh(): return segkit.Unet("resnet18", **SMALL).eval()


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


# names (row 39 of the list of faults: `module.`, `model.`, `_orig_mod.`, `n_averaged`; further: one in another, Lightning's checkpoint with a loss,
# a wrapper nobody knows, a parent module that loads, an encoder's weights, two models in one file, a whole checkpoint in place of its weights)

class Wrapper(nn.Module):
    def __init__(self, model, **others):
        super().__init__()
        self.model = model
        for name, other in others.items(): setattr(self, name, other)


WRAPPERS = {
    "DataParallel": nn.DataParallel, "compiled": torch.compile, "averaged": AveragedModel, "in model": Wrapper, "one in another": lambda m: nn.DataParallel(torch.compile(m)),
    "with a loss": lambda m: Wrapper(m, loss=nn.Linear(2, 2)), "unheard of": lambda m: nn.ModuleDict({"our_net": m}),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("strict", [True, False])
def test_wrapped_weights_load(wrapper, strict, trained):
    state, model = WRAPPERS[wrapper](trained).state_dict(), fresh()
    names = list(state)
    with pytest.warns(UserWarning, match="the names begin with .* it was taken off"): result = model.load_state_dict(state, strict)
    assert str(result) == "<All keys matched successfully>" and equal(model.state_dict(), trained.state_dict())
    assert list(state) == names  # the caller's dictionary stays


def test_what_lies_outside_is_named(trained):
    with pytest.warns(UserWarning, match="AveragedModel puts before them; it was taken off. Left out, because they lie outside: n_averaged"):
        fresh().load_state_dict(AveragedModel(trained).state_dict())


def test_a_parent_that_loads(trained):
    "Each of its models takes its own part, whatever stands before it"
    parent = nn.ModuleDict({"a": fresh(), "b": nn.Linear(1, 1), "c": fresh()})
    state = {f"a.{k}": t for k, t in torch.compile(trained).state_dict().items()} | {f"c.{k}": t for k, t in trained.state_dict().items()} | {f"b.{k}": t for k, t in parent["b"].state_dict().items()}
    with pytest.warns(UserWarning, match="torch.compile"): parent.load_state_dict(state)
    assert all(equal(parent[name].state_dict(), trained.state_dict()) for name in "ac")
    averaged = AveragedModel(fresh())
    averaged.load_state_dict(AveragedModel(trained).state_dict())  # a wrapper's own, without a word
    assert equal(averaged.module.state_dict(), trained.state_dict())
    deeper = segkit.Unet("resnet18", **SMALL | dict(encoder_depth=4, decoder_channels=(8,)*4))
    encoder = {f"model.{k}": t for k, t in deeper.state_dict().items() if k.startswith("encoder.")}
    Wrapper(fresh()).load_state_dict(encoder | {f"model.{k}": t for k, t in trained.state_dict().items() if not k.startswith("encoder.")})  # stages it does not build


def test_an_encoders_weights_under_a_wrapper(trained):
    encoder = segkit.encoders.get_encoder("resnet18", depth=3)
    for weights in (nn.DataParallel(encoder).state_dict(), trained.state_dict()):
        expected = {k.removeprefix("module.").removeprefix("encoder."): t for k, t in weights.items() if k.startswith(("module.", "encoder."))}
        with pytest.warns(UserWarning, match="it was taken off"): found = segkit.encoders.get_encoder("resnet18", depth=3, weights=weights)
        assert equal(found.state_dict(), expected)


WRONG = {
    "two models": (lambda s: {f"{w}.{k}": t for w in ("student", "teacher") for k, t in s.items()}, "more than one model: 'student.' .* 'teacher.'"),
    "a whole checkpoint": (lambda s: {"epoch": 1, "state_dict": s}, "none of the 2 tensors .* may lie under one of the keys 'state_dict'"),
    "nothing": (lambda s: {}, "none of the 0 tensors"),
    "a stranger's": (lambda s: {f"x{i}.weight": t for i, t in enumerate(s.values())}, "none of the"),
    "other shapes": (lambda s: {k: torch.ones(7) for k in s}, "size mismatch|none of the 0 tensors"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", WRONG)
def test_a_load_that_matches_nothing_is_an_error(case, strict, trained):
    spoil, message = WRONG[case]
    model, before = fresh(), None
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((RuntimeError, ValueError), match=message) as error: model.load_state_dict(spoil(trained.state_dict()), strict)
    assert len(str(error.value)) < 900 and equal(model.state_dict(), before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_strict_load_that_fails_changes_nothing(assign, trained):
    model, state = fresh(), trained.state_dict()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    given = {k.replace("bias", "bais"): t.clone() for k, t in state.items()}
    kept = {k: t.clone() for k, t in given.items()}
    with pytest.raises(RuntimeError, match=r"Missing key.* and \d+ more\n\tUnexpected key.*bais") as error: model.load_state_dict(given, assign=assign)
    assert len(str(error.value)) < 600 and equal(model.state_dict(), before) and equal(given, kept)


# damage (row 41; further: a full pickle and the way to convert it, a checkpoint with its settings, a folder in place of a file, no checksums)

class Settings: "An object in a checkpoint"


def test_a_full_pickle_is_named_with_the_way_to_convert_it(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content, rest in ((trained, "for a model"), ({"state_dict": trained.state_dict(), "args": Settings()}, "for a checkpoint")):
        torch.save(content, "full.pth")
        with pytest.raises(ValueError, match="'full.pth' holds more than tensors: it names .*weights_only=False") as error: read_state_dict("full.pth")
        convert = "found = " + str(error.value).partition("found = ")[2].partition(", then ")[0]
        save = str(error.value).partition(", then ")[2].split(" for a model, " if rest == "for a model" else "for a model, ")[0 if rest == "for a model" else 1].removesuffix(" for a checkpoint")
        exec(f"import torch\n{convert}\n{save}")  # what the error says
        assert equal(read_state_dict("weights.pth"), trained.state_dict())
    with pytest.raises(FileNotFoundError, match="there is no file"): read_state_dict(tmp_path)


def test_a_flipped_bit_is_no_weight(tmp_path, trained):
    file = tmp_path/"a.pth"
    torch.save(trained.state_dict(), file)
    content = bytearray(file.read_bytes())
    content[len(content)//2] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match="a.pth.*the checksum of its record .* is wrong"): read_state_dict(file)
    torch.serialization.set_crc32_options(False)
    try: torch.save(trained.state_dict(), file)
    finally: torch.serialization.set_crc32_options(True)
    assert equal(read_state_dict(file), trained.state_dict())  # without checksums it is read all the same


# writing (rows 15, 42; further: a kill at any moment, a full disk, a link, a device, a user's own files)

def test_a_full_disk_leaves_the_old_file(tmp_path):
    file = write_atomically(tmp_path/"a.pth", b"old")
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        for content in (bytes(20_000), lambda f: torch.save(torch.ones(9000), f)):
            try: write_atomically(file, content)
            except OSError as error: assert "a.pth could not be written" in str(error) and "as it was" in str(error)
            else: os._exit(1)
        os._exit(0)
    process = fork.Process(target=child)
    process.start(); process.join()
    assert process.exitcode == 0 and file.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.pth"]


def test_links_and_devices(tmp_path):
    (tmp_path/"disk").mkdir()
    (tmp_path/"best.pth").symlink_to(tmp_path/"disk/best.pth")
    write_atomically(tmp_path/"best.pth", b"new")
    assert (tmp_path/"best.pth").is_symlink() and (tmp_path/"disk/best.pth").read_bytes() == b"new"
    with pytest.raises(OSError, match="is no file"): write_atomically("/dev/null", b"")


def test_a_kill_at_any_moment_leaves_one_model(tmp_path, trained):
    other, x = fresh(), torch.ones(1, 3, 16, 16)
    trained.save_pretrained(tmp_path, class_names=["a", "b"])
    (tmp_path/"notes.txt").write_text("the user's own")
    def child():
        while True:
            other.save_pretrained(tmp_path, class_names=["c", "d"])
            trained.save_pretrained(tmp_path, class_names=["a", "b"])
    for i in range(6):
        process = fork.Process(target=child)
        process.start()
        time.sleep(.05 + .03*i)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = segkit.from_pretrained(tmp_path)
        names = json.loads((tmp_path/"preprocessing.json").read_text())["class_names"]
        expected = trained if names == ["a", "b"] else other
        assert torch.equal(found.predict(x), expected.predict(x))
    assert (tmp_path/"notes.txt").read_text() == "the user's own"


def test_readers_and_writers_of_one_folder(tmp_path, trained):
    other, x = fresh(), torch.ones(1, 3, 16, 16)
    answers = {name: model.predict(x) for name, model in (("a", trained), ("b", other))}
    trained.save_pretrained(tmp_path, class_names=["a", "a"])
    end = time.time() + 1.5
    def write():
        while time.time() < end:
            for name, model in (("a", trained), ("b", other)): model.save_pretrained(tmp_path, class_names=[name]*2)
        os._exit(0)
    def read():
        ok = True
        while time.time() < end:
            predictor = segkit.load_predictor(tmp_path, mean=[0], std=[1])
            ok = ok and torch.equal(predictor.model(x), answers[predictor.classes[0]])
        os._exit(0 if ok else 1)
    processes = [fork.Process(target=target) for target in (write, write, read)]
    for process in processes: process.start()
    for process in processes: process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors", "preprocessing.json"]


# one cache, one download (rows 16, 42; further: a download that changed at its source, one damaged in the cache, eight processes, an empty folder)

@contextlib.contextmanager
def server(contents, tags=True):
    "Serves `contents[0]`; notes what it sent"
    sent = []
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content, tag = contents[0], f'"{hashlib.md5(contents[0]).hexdigest()}"'
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            if tags and self.headers.get("If-Range") not in (None, tag): start = 0
            if start >= len(content):
                self.send_response(416); self.send_header("Content-Range", f"bytes */{len(content)}"); self.end_headers()
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if tags: self.send_header("ETag", tag)
            self.end_headers()
            time.sleep(.1)
            self.wfile.write(content[start:]); sent.append(len(content) - start)
        def log_message(self, *args): pass
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{httpd.server_port}/weights.pth", sent
    finally: httpd.shutdown()


def test_eight_processes_one_download(tmp_path):
    content = os.urandom(300_000)
    with server([content]) as (url, sent):
        def child(): os._exit(0 if fetch(url, folder=tmp_path).read_bytes() == content else 1)
        processes = [fork.Process(target=child) for _ in range(8)]
        for process in processes: process.start()
        for process in processes: process.join()
    assert [process.exitcode for process in processes] == [0]*8 and len(sent) == 1


@pytest.mark.parametrize("tags", [True, False])
def test_half_of_a_download_that_has_changed(tmp_path, tags):
    "The second half of the new file never follows the first half of the old one"
    old, new = b"a"*1000, b"b"*1200
    contents = [old]
    with server(contents, tags) as (url, _):
        target = fetch(url, folder=tmp_path)
        for part in (old[:500], old, old*2):
            target.unlink()
            target.with_name(target.name + ".part").write_bytes(part)
            target.with_name(target.name + ".part.tag").write_text(f'"{hashlib.md5(old).hexdigest()}"' if tags else "")
            contents[0] = new
            assert fetch(url, folder=tmp_path).read_bytes() == new


def test_a_damaged_file_of_the_cache_is_fetched_again(tmp_path):
    content = os.urandom(1000)
    with server([content]) as (url, sent):
        for damage in (b"", content[:500], content[:-1] + bytes([content[-1] ^ 1])):
            fetch(url, folder=tmp_path).write_bytes(damage)
            with pytest.warns(UserWarning, match="is not what it was, so it is fetched again"): assert fetch(url, folder=tmp_path).read_bytes() == content
    assert len(sent) == 4


def test_an_empty_variable_or_folder_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGKIT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path/"segkit"
    (tmp_path/"set").mkdir()
    assert (build_once(tmp_path/"set", lambda f: (f/"a").write_text("1"))/"a").read_text() == "1"


def test_a_cache_repairs_itself(tmp_path):
    "A file cut in half, one that is gone, a note cut in half: in two processes at once"
    def build(folder):
        for name in "abc": (folder/name).write_text(name*1000)
    target = build_once(tmp_path/"set", build)
    for damage in (lambda: (target/"b").write_text("b"), lambda: (target/"c").unlink(), lambda: (target/".built.json").write_text('{"a"')):
        damage()
        def child():
            warnings.simplefilter("ignore")
            folder = build_once(target, build)
            os._exit(0 if all((folder/name).read_text() == name*1000 for name in "abc") else 1)
        processes = [fork.Process(target=child) for _ in range(2)]
        for process in processes: process.start()
        for process in processes: process.join()
        assert [process.exitcode for process in processes] == [0, 0]
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["set"]
