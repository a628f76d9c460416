"""Saving and loading: SMP's folders, a user's own classes, interrupted writes, no network."""
import json
import sys

import pytest
import torch
from oracle import AUX, randomise, relative_error, smp

import segkit
from segkit.core.registry import architectures


@pytest.mark.parametrize("arch", sorted(set(architectures) - {"dpt"}))
@torch.no_grad()
def test_reads_folders_of_smp(arch, tmp_path):
    cls = architectures[arch].__name__
    theirs = randomise(getattr(smp, cls)("resnet18", encoder_weights=None, classes=4, aux_params=AUX)).eval()
    theirs.save_pretrained(tmp_path)
    model, x = segkit.from_pretrained(tmp_path).double(), torch.randn(1, 3, 128, 128).double()
    assert type(model).__name__ == cls and not model.training
    for a, b in zip(model(x), theirs.double()(x), strict=True): assert relative_error(a, b) < 1e-10


def test_never_fetches_encoder_weights(tmp_path, monkeypatch):
    model = segkit.Unet("resnet18", encoder_weights=None)
    model.config["encoder_weights"] = "imagenet"
    model.encoder.preprocessing = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "input_range": [0, 1], "input_space": "RGB"}
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("segkit.encoders.weights._fetch_tag", lambda *args: pytest.fail("fetched"))
    assert segkit.from_pretrained(tmp_path).config["encoder_weights"] == "imagenet"
    assert json.loads((tmp_path/"preprocessing.json").read_text())["mean"] == [0.485, 0.456, 0.406]
    assert segkit.from_pretrained(tmp_path).encoder.preprocessing == model.encoder.preprocessing


def test_own_classes_come_back_by_import_path(tmp_path, monkeypatch):
    (tmp_path/"own_net.py").write_text(
        "import torch\nfrom torch import nn\nimport segkit\nfrom segkit.encoders import EncoderMixin\n"
        "class Enc(nn.Module, EncoderMixin):\n"
        "    def __init__(self, depth=2):\n"
        "        super().__init__(); self._depth = depth; self._out_channels = [3, 4, 8]; self._in_channels = 3\n"
        "        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)])\n"
        "    def forward(self, x):\n        out = [x]\n        for c in self.convs: out.append(c(out[-1]))\n        return out\n"
        "segkit.encoders.encoders['own_enc'] = {'encoder': Enc, 'pretrained_settings': {}, 'params': {}}\n"
        "class Net(segkit.Unet): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import own_net
    model = own_net.Net("own_enc", 2, None, decoder_channels=(8, 4))
    model.save_pretrained(tmp_path/"saved")
    config = json.loads((tmp_path/"saved/config.json").read_text())
    assert config["_model_class"] == "own_net:Net" and config["_encoder_class"] == "own_net:Enc"

    # who has the classes can load; nobody else's code is imported unless the caller says so
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(own_net.Net.from_pretrained(tmp_path/"saved").predict(x), model.predict(x))
    del segkit.encoders.encoders["own_enc"], sys.modules["own_net"]
    with pytest.raises(ValueError, match="config.json names code of its own, 'own_net:Enc'.*trust_remote_code=True"):
        segkit.from_pretrained(tmp_path/"saved")
    assert "own_net" not in sys.modules
    again = segkit.from_pretrained(tmp_path/"saved", trust_remote_code=True)   # importing the module registers the encoder again
    assert torch.equal(again.predict(x), model.predict(x))

    del segkit.encoders.encoders["own_enc"], sys.modules["own_net"]
    (tmp_path/"own_net.py").unlink()
    with pytest.raises(ImportError, match="own_net as Enc, which cannot be imported here"):
        segkit.from_pretrained(tmp_path/"saved", trust_remote_code=True)


@pytest.fixture
def saved(tmp_path):
    "A folder of a small model, and a function that changes entries of its config.json"
    segkit.Unet("resnet18", 1, None, decoder_channels=(8,)).save_pretrained(tmp_path)
    file = tmp_path/"config.json"
    config = json.loads(file.read_text())
    return tmp_path, lambda **changes: file.write_text(json.dumps(config | changes))


HOSTILE = {
    "a command as encoder": dict(encoder_name={"_import": "subprocess:Popen"}, args=["touch", "ran"]),
    "an abort as activation": dict(activation={"_import": "os:abort"}),
    "a module as encoder class": dict(_encoder_class="hostile:X", encoder_name="unheard_of"),
    "a module as model class": dict(_model_class="hostile:X"),
    "a function deep inside": dict(aux_params={"classes": 2, "activation": {"_import": "os:abort"}}),
    "a list of functions": dict(decoder_channels=[{"_import": "os:abort"}]),
    "more beside the import": dict(activation={"_import": "os:abort", "dim": 1}),
    "a module of torch that is no activation": dict(activation={"_import": "torch.hub:load"}),
}


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("attack", HOSTILE)
def test_a_strangers_folder_runs_nothing(attack, trust, saved, monkeypatch):
    folder, change = saved
    change(**HOSTILE[attack])
    (folder/"hostile.py").write_text("from pathlib import Path\nPath('ran').touch()\nX = print\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    ran = []
    monkeypatch.setattr("os.abort", lambda: ran.append("abort"))
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: ran.append("command"))
    with pytest.raises((ValueError, KeyError, TypeError, ImportError)) as error: segkit.from_pretrained(folder, trust_remote_code=trust)
    assert not ran
    assert trust or not (folder/"ran").exists()   # with trust a module may be imported, but only a torch module is used
    assert "config.json" in str(error.value) or "resnet18" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", '{"_model_class": "Unet"}'.encode("utf-16"), b"\x00\xff"], ids=repr)
def test_a_damaged_config_is_named(content, saved):
    folder, _ = saved
    (folder/"config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json"): segkit.from_pretrained(folder)


def test_damaged_weights_are_named(saved):
    folder, _ = saved
    file = folder/"model.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[:-7], b"\xff"*8 + whole[8:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors"): segkit.from_pretrained(folder)


def test_an_interrupted_save_leaves_the_old_model(tmp_path, monkeypatch):
    first, second = (segkit.Unet("resnet18", 1, None, decoder_channels=(8,)) for _ in range(2))
    first.save_pretrained(tmp_path)
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): second.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors", "preprocessing.json"]
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(segkit.from_pretrained(tmp_path).predict(x), first.predict(x))


def test_push_to_hub_uploads_the_folder(monkeypatch, tmp_path):
    seen = {}
    class Api:
        def __init__(self, token=None): seen["token"] = token
        def create_repo(self, repo_id, private=None, exist_ok=False): seen["private"] = private; return type("R", (), {"repo_id": "me/" + repo_id})
        def upload_folder(self, repo_id, folder_path, commit_message):
            from pathlib import Path
            seen.update(repo_id=repo_id, files=sorted(p.name for p in Path(folder_path).iterdir()))
            return "https://example.com"
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = segkit.Unet("resnet18", 1, None, decoder_channels=(8,))
    model.push_to_hub("net", private=True, token="t")
    assert seen == {"token": "t", "private": True, "repo_id": "me/net", "files": ["README.md", "config.json", "model.safetensors", "preprocessing.json"]}
    model.save_pretrained(tmp_path/"mine", push_to_hub=True)
    assert (seen["repo_id"], seen["private"]) == ("me/mine", None)
    model.save_pretrained(tmp_path/"mine", push_to_hub=True, repo_id="net", private=True, token="u")
    assert (seen["repo_id"], seen["private"], seen["token"]) == ("me/net", True, "u")


def test_errors(tmp_path):
    with pytest.raises(OSError, match="there is no such folder"): segkit.from_pretrained("nobody/nothing", local_files_only=True)
    with pytest.raises(FileNotFoundError, match="has no config.json"): segkit.from_pretrained(tmp_path)
    model = segkit.Unet("resnet18", 1, None, decoder_channels=(8,))
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'clas_names'"): model.save_pretrained(tmp_path, clas_names=["sky"])
    with pytest.raises(ValueError, match="holds a Unet, not a FPN"): segkit.FPN.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="did you mean 'classes'"): segkit.from_pretrained(tmp_path, clases=3)
    config = json.loads((tmp_path/"config.json").read_text())
    (tmp_path/"config.json").write_text(json.dumps(config | {"_model_class": "Unett"}))
    with pytest.raises(KeyError, match="no architecture 'Unett'; did you mean 'unet'"): segkit.from_pretrained(tmp_path)
