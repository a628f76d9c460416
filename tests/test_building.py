import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import segkit


class Drawn(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags: self.elements += made.numel()
        return made

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = segkit.Unet("resnet18", encoder_weights=None, aux_params={"classes": 3})
    return model.save_pretrained(tmp_path_factory.mktemp("hub")/"model")

def test_from_pretrained_draws_nothing(folder):
    with Drawn() as drawn: segkit.from_pretrained(folder)
    assert drawn.elements == 0

def test_what_is_not_loaded_is_drawn(folder):
    with Drawn() as drawn: model = segkit.from_pretrained(folder, classes=7, strict=False)
    assert drawn.elements > 1_000_000
    assert model.segmentation_head[0].weight.std() > 0 and model.segmentation_head[0].weight.isfinite().all()

def test_mode_ends_with_the_block_also_after_an_error():
    with pytest.raises(ValueError, match="encoder_depth"), segkit.skip_init(): segkit.Unet("resnet18", encoder_depth=9)
    with Drawn() as drawn: torch.nn.Linear(3, 3)
    assert drawn.elements == 12
