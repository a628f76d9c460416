"""Void pixels, overlapping and binary masks, and pictures with many channels, from file to learner"""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from fastai.callback.core import Callback
from fastai.data.block import DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.learner import load_learner
from fastai.vision.augment import PadMode, RandomResizedCrop, Resize, ResizeMethod, Rotate, aug_transforms
from fastai.vision.data import ImageBlock, MaskBlock
from PIL import Image
from torch import nn

import segkit
from segkit.data import MaskDataLoaders, SegmentationBlocks, data_statistics, shims
from segkit.data.blocks import VOID, TensorChannels, TensorVoidMask
from segkit.data.reading import read_picture
from segkit.learner import MaskScore, segmentation_learner

torch.set_num_threads(1)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{hidden.message}") for hidden in shims.HIDDEN.values()]
CODES = ["ground", "square", "edge"]
SMALL = dict(encoder_name="resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8))

def write(folder, n=6, size=(30, 40), void=None):
    "Squares with edges: colours from 60 upwards, so that black is padding"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        mask = np.zeros(size, np.uint8)
        y, x, s = rng.integers(2, 12), rng.integers(2, 20), rng.integers(10, 16)
        mask[y:y+s, x:x+s] = 2
        mask[y+3:y+s-3, x+3:x+s-3] = 1
        Image.fromarray(np.stack([60 + mask*60, 200 - mask*50, 90 + mask*20], -1).astype(np.uint8)).save(folder/f"{i}.bmp")
        if void is not None: mask[-5:] = void
        Image.fromarray(mask).save(folder/f"{i}.png")
    return sorted(folder.glob("*.bmp"))

def mask_of(path): return path.with_suffix(".png")

def loaders(files, blocks, **kwargs):
    block = DataBlock(blocks, n_inp=1, get_y=mask_of, splitter=IndexSplitter([4, 5]), **kwargs)
    return block.dataloaders(files, bs=2, path=files[0].parent, device="cpu", num_workers=0)

def quiet(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn

PADDED = {"item": dict(item_tfms=Resize(40, ResizeMethod.Pad, pad_mode=PadMode.Zeros)),
          "batch": dict(batch_tfms=Rotate(30, p=1, draw=30, pad_mode=PadMode.Zeros)),
          "usual": dict(item_tfms=RandomResizedCrop(24), batch_tfms=aug_transforms(pad_mode=PadMode.Zeros, max_rotate=45, p_affine=1., max_lighting=0.))}

@pytest.mark.parametrize("how", PADDED)
def test_padding_is_void_and_with_stock_blocks_it_is_a_class(tmp_path, how):
    files, black, marked = write(tmp_path), [], []
    for blocks in ((ImageBlock, MaskBlock(CODES)), SegmentationBlocks(CODES, void=255)):
        torch.manual_seed(0)
        picture, mask = loaders(files, blocks, **PADDED[how]).train.one_batch()
        inside = picture.as_subclass(torch.Tensor).amin(1) == 0
        black.append(inside.sum().item())
        marked.append((mask.as_subclass(torch.Tensor)[inside] == VOID).sum().item())
    assert black[0] > 20 and marked[0] == 0
    assert black[1] > 20 and marked[1] == black[1] and type(mask) is TensorVoidMask

def test_an_oracle_is_perfect_whatever_it_says_on_void(tmp_path):
    class Oracle(nn.Module):
        "The class from the first channel; on black and on the last rows always class 1"
        def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.ones(1))
        def forward(self, x):
            true = -(x[:, :1]*255 - torch.tensor([60., 120., 180.])[:, None, None]).abs()*self.scale
            return torch.where(x.amax(1, keepdim=True) == 0, torch.tensor([0., 9., 0.])[:, None, None], true)
    for void in (255, 11):
        dls = loaders(write(tmp_path/str(void), void=void), SegmentationBlocks(CODES, void=void), **PADDED["item"])
        learn = quiet(segmentation_learner(dls, Oracle()))
        assert learn.task.ignore_index == VOID and (dls.valid.one_batch()[1] == VOID).float().mean() > .2
        assert learn.evaluate(metrics=[MaskScore("miou", learn.task)])["mask_miou"] == 1

def test_a_value_that_nobody_announced_is_an_error_with_the_file(tmp_path):
    files = write(tmp_path, void=11)
    with pytest.raises(ValueError, match=r"\.png: the mask has the value \[11\], neither a class nor void"):
        loaders(files, SegmentationBlocks(CODES, void=255)).one_batch()
    with pytest.raises(ValueError, match=r"\.bmp.*value 11, which is no code"): segmentation_learner(loaders(files, SegmentationBlocks(CODES)), "Unet", **SMALL)

def test_pictures_and_masks_of_different_sizes_are_named(tmp_path):
    files = write(tmp_path)
    Image.open(files[2]).resize((44, 30)).save(files[2])
    with pytest.raises(ValueError, match=r"2\.bmp.*\(30, 44\).*\(30, 40\)"):
        segmentation_learner(loaders(files, SegmentationBlocks(CODES), item_tfms=Resize(32)), "Unet", **SMALL)

def test_binary_masks_in_black_and_white(tmp_path):
    files = write(tmp_path)
    for f in files: Image.fromarray((np.array(Image.open(mask_of(f))) > 0)).save(mask_of(f))  # one bit a pixel
    learn = quiet(segmentation_learner(loaders(files, SegmentationBlocks(["square"])), "Unet", **SMALL))
    learn.fit(1)
    assert learn.task.mask == "binary" and learn.model(torch.zeros(1, 3, 30, 40)).shape == (1, 1, 30, 40)
    assert learn.show_results().legends[0].get_texts()[0].get_text() == "square"
    learn.dls.show_batch()

def test_overlapping_masks_from_files(tmp_path):
    files = write(tmp_path)
    for f in files:
        mask = np.array(Image.open(mask_of(f)))
        for name, layer in (("any", mask > 0), ("inner", mask == 1)): Image.fromarray(layer.astype(np.uint8)*255).save(f.with_name(f"{f.stem}_{name}.png"))
    def layers(f): return [f.with_name(f"{f.stem}_{name}.png") for name in ("any", "inner")]
    dls = MaskDataLoaders.from_items(files, None, layers, ["any", "inner"], splitter=IndexSplitter([4, 5]), values={0: 0, 255: 1}, overlapping=True,
                                     bs=2, num_workers=0, device="cpu", path=tmp_path)
    learn = quiet(segmentation_learner(dls, "Unet", **SMALL))
    learn.fit(1)
    expected = np.stack([np.stack([np.array(Image.open(p)) > 0 for p in layers(f)]) for f in files[4:]])
    assert learn.task.mask == "multilabel" and np.array_equal(dls.valid.one_batch()[1].numpy(), expected)
    learn.dls.show_batch(), learn.show_results()
    present = MaskDataLoaders.from_items(files, None, layers, ["any", "inner"], labels="present", splitter=IndexSplitter([4, 5]), values={0: 0, 255: 1},
                                         overlapping=True, bs=2, num_workers=0, device="cpu")
    assert present.valid.one_batch()[2].tolist() == [[1, 1], [1, 1]]

# many channels

def bands_of(path, channels=6):
    picture = np.array(Image.open(path)).astype(np.float32)
    return np.concatenate([picture, picture*100][:2], -1)[..., :channels]

@pytest.mark.parametrize("ending", [".npy", ".tif"])
def test_six_bands_from_files_to_a_learner(tmp_path, ending):
    files = write(tmp_path, void=255)
    for f in files:
        bands = bands_of(f)
        if ending == ".npy": np.save(f.with_suffix(".npy"), bands)
        else:
            pages = [Image.fromarray(bands[..., i]) for i in range(6)]
            pages[0].save(f.with_suffix(".tif"), save_all=True, append_images=pages[1:])
    dls = MaskDataLoaders.from_label_func(tmp_path, sorted(tmp_path.glob(f"*{ending}")), mask_of, codes=CODES, void=255, in_channels=6, bands=(5, 4, 3), seed=0,
                                          item_tfms=Resize((24, 32)), batch_tfms=aug_transforms(max_lighting=0.), bs=2, num_workers=0, device="cpu")
    found = data_statistics(dls, progress=False)
    dls.add_tfms([found.normalize()], "after_batch")
    learn = quiet(segmentation_learner(dls, "Unet", **SMALL))
    learn.fit(1)
    assert learn.task.in_channels == learn.model.encoder.in_channels == 6
    picture, mask = dls.valid.one_batch()
    assert picture.shape[1:] == (6, 24, 32) and mask.shape[1:] == (24, 32) and picture.abs().max() < 10
    assert found.std[3:].numpy() == pytest.approx(100*found.std[:3].numpy())
    learn.show_results(), dls.show_batch()
    assert learn.predict(files[0].with_suffix(ending))[1].shape == (24, 32)
    learn.export("six.pkl")
    again = load_learner(tmp_path/"six.pkl")
    assert torch.equal(again.predict(files[0].with_suffix(ending))[1], learn.predict(files[0].with_suffix(ending))[1])

def test_a_wrong_number_of_bands_is_named(tmp_path):
    files = write(tmp_path)
    for f in files: np.save(f.with_suffix(".npy"), bands_of(f, 5 if f.stem == "3" else 6))
    dls = MaskDataLoaders.from_label_func(tmp_path, sorted(tmp_path.glob("*.npy")), mask_of, codes=CODES, in_channels=6, bs=2, num_workers=0, device="cpu", seed=0)
    with pytest.raises(ValueError, match=r"3\.npy: shape \(30, 40, 5\), expected \(h, w, 6\)"): segmentation_learner(dls, "Unet", **SMALL)

def test_tiff_by_tifffile(tmp_path):
    bands = np.random.default_rng(0).integers(0, 60000, (7, 9, 5)).astype(np.uint16)
    tifffile.imwrite(tmp_path/"last.tif", bands, photometric="minisblack")
    tifffile.imwrite(tmp_path/"first.tif", bands.transpose(2, 0, 1), photometric="minisblack")
    for name in ("last", "first"): assert np.array_equal(read_picture(tmp_path/f"{name}.tif", 5), bands)
    assert TensorChannels.create(tmp_path/"last.tif", 5).dtype == torch.float32

def test_two_workers_read_void_masks(tmp_path):
    write(tmp_path/"images", void=255)
    (tmp_path/"masks").mkdir()
    for f in (tmp_path/"images").glob("*.png"): f.rename(tmp_path/"masks"/f.name)
    batches = [list(MaskDataLoaders.from_folder(tmp_path, codes=CODES, void=255, labels="present", bs=2, seed=0, num_workers=n, device="cpu").valid)
               for n in (0, 2)]
    for a, b in zip(*batches, strict=True):
        assert all(x.equal(y) and type(x) is type(y) for x, y in zip(a, b, strict=True))

def test_a_batch_is_shown_in_our_colours_without_the_learner_being_imported():
    code = "from segkit.data import shapes_dataloaders; import matplotlib; matplotlib.use('agg'); from matplotlib import pyplot as p;" \
           "shapes_dataloaders(n=4, n_valid=2, bs=2, size=32, device='cpu').show_batch(); print(len(p.gcf().legends))"
    environment = os.environ | {"PYTHONPATH": str(Path(segkit.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.strip() == "1"

def test_a_mask_found_wrong_in_the_first_epoch_is_named(tmp_path):
    files = write(tmp_path)
    mask = np.array(Image.open(mask_of(files[1])))
    mask[0, 0] = 9
    Image.fromarray(mask).save(mask_of(files[1]))
    learn = quiet(segmentation_learner(loaders(files, SegmentationBlocks(CODES)), "Unet", check=0, **SMALL))
    class Count(Callback):
        steps = 0
        def after_step(self): self.steps += 1
    count = Count()
    with pytest.raises(ValueError, match=r"1\.bmp.*value 9"): learn.fit(1, cbs=count)
    assert count.steps < 2
