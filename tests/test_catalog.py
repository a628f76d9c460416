"""The table of the sweep, and the search in it."""
import pytest
import timm

import segkit
from segkit.encoders import get_encoder, list_encoders
from segkit.encoders.catalog import permissive, sweep_rows


def test_the_sweep_covers_timm():
    rows = {r["name"]: r for r in sweep_rows()}
    assert set(rows) <= set(timm.list_models()) or timm.__version__ != "1.0.31"
    assert sum(r["ok"] for r in rows.values()) >= .99*len(rows)
    assert list(rows) == sorted(rows) and all(r["reason"] for r in rows.values() if not r["ok"])


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="the table is of another timm")
def test_every_model_is_in_the_table():
    assert {r["name"] for r in sweep_rows()} == set(timm.list_models())


@pytest.mark.parametrize("name", ["resnet18", "test_vit2", "swin_tiny_patch4_window7_224", "levit_128s"])
def test_rows_are_what_is_built(name):
    import torch
    row = next((r for r in sweep_rows() if r["name"] == name), None)
    if row is None: pytest.skip("not in the table yet")
    with torch.device("meta"): encoder = get_encoder(f"tu-{name}")
    assert row["parameters"] == sum(p.numel() for p in encoder.parameters())
    assert row["channels"] == ",".join(map(str, encoder.out_channels))


def test_search():
    frame = list_encoders("*convnext*", pretrained=True, max_params=30e6, license="permissive")
    assert len(frame) and frame.parameters.max() <= 30e6 and frame.name.str.contains("convnext").all()
    assert all(licence in permissive for row in frame.licences for licence in row)
    assert set(list_encoders("*", kind="bridge").kind) == {"bridge"}
    with pytest.raises(ValueError, match="did you mean 'native'"): list_encoders(kind="nativ")


def test_a_registered_encoder_appears():
    class Small(segkit.encoders.EncoderMixin, __import__("torch").nn.Module):
        def __init__(self):
            super().__init__()
            self._out_channels, self._depth, self._in_channels = [3, 8], 1, 3
    segkit.encoders.encoders["catalogued"] = {"encoder": Small, "pretrained_settings": {"mine": {"url": "https://example.com/x.pth", "license": "mit"}}, "params": {}}
    try: assert list_encoders("catalogued", license="permissive").tags.tolist() == [["mine"]]
    finally: del segkit.encoders.encoders["catalogued"]
