"""The table of the sweep, and the search in it."""
import random
import warnings

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import segkit
from segkit.encoders import get_encoder, list_encoders
from segkit.encoders.bridge import TimmBridgeEncoder
from segkit.encoders.catalog import permissive, sweep_rows

SMALL = [row for row in sweep_rows() if row["parameters"] < 2e7 and row["multiply_adds"] < 3e9]


@pytest.mark.parametrize("row", random.Random(2026).sample(SMALL, 3), ids=lambda row: row["name"])
def test_models_drawn_from_the_sweep_are_as_the_table_says(row):
    "Built with values and run at a size that no stride divides"
    encoder = get_encoder(f"tu-{row['name']}").eval()
    with torch.no_grad(): maps = encoder(torch.randn(1, 3, 97, 130))
    channels = [int(c) for c in row["channels"].split(",")]
    assert row["ok"] and [tuple(f.shape) for f in maps] == [(1, c, -(-97//2**i), -(-130//2**i)) for i, c in enumerate(channels)]
    assert all(f.isfinite().all() for f in maps)
    assert row["parameters"] == sum(p.numel() for p in encoder.parameters())
    assert row["kind"] == ("bridge" if isinstance(encoder, TimmBridgeEncoder) else "pyramid")
    with torch.device("meta"): weightless = get_encoder(f"tu-{row['name']}").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(): weightless(torch.empty(1, 3, 224, 224, device="meta"))
    assert row["multiply_adds"] == counter.get_total_flops()//2


def test_the_table_is_sorted_and_names_each_model_once():
    names = [row["name"] for row in sweep_rows()]
    assert names == sorted(set(names))


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="the table is of another timm")
def test_every_model_is_in_the_table():
    assert {r["name"] for r in sweep_rows()} == set(timm.list_models())


@pytest.mark.parametrize("name", ["resnet18", "test_vit2", "swin_tiny_patch4_window7_224", "levit_128s"])
def test_rows_are_what_is_built(name):
    row = next(r for r in sweep_rows() if r["name"] == name)
    with torch.device("meta"): encoder = get_encoder(f"tu-{name}")
    assert row["parameters"] == sum(p.numel() for p in encoder.parameters())
    assert row["channels"] == ",".join(map(str, encoder.out_channels))


def test_search():
    frame = list_encoders("*convnext*", pretrained=True, max_params=30e6, license="permissive")
    assert len(frame) and frame.parameters.max() <= 30e6 and frame.name.str.contains("convnext").all()
    assert all(licence in permissive for row in frame.licences for licence in row)
    assert set(list_encoders("*", kind="bridge").kind) == {"bridge"}
    with pytest.raises(ValueError, match="did you mean 'native'"): list_encoders(kind="nativ")


class Small(segkit.encoders.EncoderMixin, torch.nn.Module):
    "Five stages, as wide as asked"
    def __init__(self, width=8, **kwargs):
        super().__init__()
        self._out_channels, self._depth, self._in_channels = [3] + [width]*5, 5, 3
        self.stages = torch.nn.ModuleList(torch.nn.Conv2d(c, width, 2, 2, bias=False) for c in self._out_channels[:5])

    def forward(self, x): return [x, *(x := stage(x) for stage in self.stages[:self._depth])]


def test_a_registered_encoder_appears(monkeypatch):
    entry = {"encoder": Small, "pretrained_settings": {"mine": {"url": "https://example.com/x.pth", "license": "mit"}}, "params": {}}
    monkeypatch.setitem(segkit.encoders.encoders, "catalogued", entry)
    row = list_encoders("catalogued", license="permissive").iloc[0]
    assert (row.tags, row.parameters, row.channels) == (["mine"], 4*8*(3 + 4*8), "3,8,8,8,8,8")
    monkeypatch.setitem(segkit.encoders.encoders, "catalogued", entry | {"params": {"width": 16}})  # entered again
    row = list_encoders("catalogued").iloc[0]
    assert (row.parameters, row.channels) == (4*16*(3 + 4*16), "3,16,16,16,16,16")


def test_an_encoder_that_cannot_be_built_has_a_warning_and_no_numbers(monkeypatch):
    def broken(**kwargs): raise RuntimeError("no such luck")
    monkeypatch.setitem(segkit.encoders.encoders, "broken", {"encoder": broken, "pretrained_settings": {}, "params": {}})
    with pytest.warns(UserWarning, match="encoder 'broken' has no numbers in the catalogue: no such luck") as caught: frame = list_encoders("broken")
    assert frame.parameters.isna().all() and caught[0].filename == __file__


def test_all_native_encoders_have_numbers():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert list_encoders(kind="native").parameters.notna().all()
