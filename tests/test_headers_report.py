"""All headers before the first epoch, a report on what is doubtful, loaders of functions, without validation or without some masks"""
import gc
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import DataBlock
from fastai.data.transforms import IndexSplitter, ItemGetter
from fastai.vision.augment import Resize
from PIL import Image

from segkit.data import MaskDataLoaders, SegmentationBlocks, data_report, data_statistics, shims
from segkit.data.display import show_masks, show_predictions
from segkit.data.headers import check_files, item_files, read_header, watched
from segkit.learner import segmentation_learner

torch.set_num_threads(1)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{hidden.message}") for hidden in shims.HIDDEN.values()]
SMALL = dict(encoder_name="resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8))
OPTIONS = dict(codes=["ground", "thing"], bs=4, num_workers=0, device="cpu", seed=0)

def write(path, n=8, size=(24, 32), ending="png"):
    "Folders `images` and `masks`: each picture is another one"
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"): (path/kind).mkdir(parents=True)
    for i in range(n):
        picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        mask = (picture[..., 0] > 127).astype(np.uint8)
        if ending == "npy": np.save(path/f"images/{i:03}.npy", np.dstack([picture, mask]))  # four channels
        else: Image.fromarray(picture).save(path/f"images/{i:03}.{ending}")
        Image.fromarray(mask).save(path/f"masks/{i:03}.png")
    return path

def quiet(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn

# headers: a mask of another size (fault 8)

def test_a_mask_of_another_size_anywhere_is_named_with_both_files(tmp_path):
    "In the middle of 80 items, where no sample of 32 looks, and a `Resize` hides it"
    write(tmp_path, 80)
    file = tmp_path/"masks/041.png"
    Image.fromarray(np.zeros((25, 32), np.uint8)).save(file)
    with pytest.raises(ValueError, match=r"images/041\.png.*\(24, 32\).*masks/041\.png.*\(25, 32\)"):
        MaskDataLoaders.from_folder(tmp_path, item_tfms=Resize(16), **OPTIONS)
    assert MaskDataLoaders.from_folder(tmp_path, item_tfms=Resize(16), check=False, **OPTIONS).train.n == 64

def test_the_learner_looks_at_data_of_any_origin(tmp_path):
    write(tmp_path, 80)
    Image.fromarray(np.zeros((32, 24), np.uint8)).save(tmp_path/"masks/041.png")  # turned
    block = DataBlock(SegmentationBlocks(["ground", "thing"]), n_inp=1, get_y=lambda f: tmp_path/"masks"/f.name,
                      splitter=IndexSplitter(range(70, 80)), item_tfms=Resize(16))
    dls = block.dataloaders(sorted((tmp_path/"images").iterdir()), bs=4, num_workers=0, device="cpu")
    with pytest.raises(ValueError, match=r"images/041\.png.*masks/041\.png.*\(32, 24\)"): segmentation_learner(dls, "Unet", **SMALL)

def test_one_of_several_masks_of_an_item_is_too_small(tmp_path):
    write(tmp_path)
    Image.fromarray(np.zeros((23, 32), np.uint8)).save(tmp_path/"odd.png")
    files = sorted((tmp_path/"images").iterdir())
    def layers(file): return [tmp_path/"masks"/file.name, tmp_path/"odd.png" if file.stem == "005" else tmp_path/"masks"/file.name]
    with pytest.raises(ValueError, match=r"005\.png.*\(24, 32\).*odd\.png.*\(23, 32\)"):
        MaskDataLoaders.from_label_func(tmp_path, files, layers, overlapping=True, **OPTIONS)

def test_an_array_and_its_mask_differ(tmp_path):
    write(tmp_path, ending="npy")
    bands = dict(in_channels=4, extensions=[".npy"], **OPTIONS)
    for file in (tmp_path/"images").iterdir(): np.save(file, np.zeros((24, 32, 4), np.float32))
    assert MaskDataLoaders.from_folder(tmp_path, **bands).train.n == 7
    np.save(tmp_path/"images/003.npy", np.zeros((4, 24, 30), np.float32))  # channels first
    with pytest.raises(ValueError, match=r"003\.npy.*\(24, 30\).*003\.png \(24, 32\)"): MaskDataLoaders.from_folder(tmp_path, **bands)

# headers: damaged files

@pytest.mark.parametrize("ending, share", [("png", .6), ("png", 0), ("jpg", .6), ("jpg", .01), ("tif", .6), ("bmp", .01), ("npy", .6)])
def test_a_damaged_picture_is_named_when_the_loaders_are_built(tmp_path, ending, share):
    write(tmp_path, ending=ending)
    file = tmp_path/f"images/005.{ending}"
    file.write_bytes(file.read_bytes()[:int(share*file.stat().st_size)])
    kwargs = OPTIONS | (dict(in_channels=4, extensions=[".npy"]) if ending == "npy" else {})
    with pytest.raises(ValueError, match=rf"005\.{ending}: (cannot be read|the file is empty|this is no picture)"):
        MaskDataLoaders.from_folder(tmp_path, **kwargs)

def test_a_damaged_mask_is_named(tmp_path):
    write(tmp_path)
    file = tmp_path/"masks/005.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"masks/005\.png: cannot be read"): MaskDataLoaders.from_folder(tmp_path, **OPTIONS)

def test_several_faults_are_listed(tmp_path):
    write(tmp_path)
    for i in (3, 5): (tmp_path/f"images/00{i}.png").write_bytes(b"")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path/"masks/006.png")
    with pytest.raises(ValueError, match=r"(?s)3 of 8 items.*the file is empty.*\(9, 9\)"): MaskDataLoaders.from_folder(tmp_path, **OPTIONS)

def test_pictures_of_8_and_of_16_bits_do_not_mix(tmp_path):
    write(tmp_path)
    Image.fromarray(np.full((24, 32), 40000, np.uint16)).save(tmp_path/"images/005.png")
    with pytest.raises(ValueError, match=r"005\.png \(uint16, as 1 of them\).*\(uint8, as 7 of them\).*`scale=`"): MaskDataLoaders.from_folder(tmp_path, **OPTIONS)
    assert MaskDataLoaders.from_folder(tmp_path, scale=65535, **OPTIONS).one_batch()[0].max() <= 1

@pytest.mark.parametrize("mode, expected", [("1", "uint8"), ("L", "uint8"), ("LA", "uint8"), ("P", "uint8"), ("RGBA", "uint8"), ("I;16", "uint16"), ("I", "int32"), ("F", "float32")])
def test_headers_of_all_modes(tmp_path, mode, expected):
    "As TIFF, which takes them all; and the decoded picture has the size that the header says"
    Image.new(mode, (7, 5)).save(tmp_path/"a.tif")
    header = read_header(tmp_path/"a.tif")
    assert (header.size, header.dtype, header.format) == ((5, 7), expected, "TIFF")
    with Image.open(tmp_path/"a.tif") as image: assert image.size[::-1] == header.size

def test_a_deep_colour_png_is_known_by_its_header(tmp_path):
    "Pillow calls it RGB of 8 bits"
    import struct
    import zlib
    def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    rows = b"".join(b"\0" + bytes(6*4) for _ in range(3))
    (tmp_path/"deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert read_header(tmp_path/"deep.png").dtype == "uint16"

def test_data_are_looked_at_once(tmp_path, monkeypatch):
    dls = MaskDataLoaders.from_folder(write(tmp_path), **OPTIONS)
    for file in (tmp_path/"images").iterdir(): file.rename(file.with_suffix(".gone"))
    check_files(dls)  # nothing is opened

def test_items_without_files_have_no_headers():
    pictures = [(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8))]*4
    block = DataBlock(SegmentationBlocks(["a", "b"]), n_inp=1, get_x=ItemGetter(0), get_y=ItemGetter(1), splitter=IndexSplitter([3]))
    dls = block.dataloaders(pictures, bs=1, num_workers=0, device="cpu")
    assert [list(item_files(dl)) for dl in dls.loaders] == [[], []]

# functions in place of files (fault 26)

def test_pictures_of_functions_are_not_held(tmp_path):
    "However many items: only a few of their pictures are alive at once, and few were made"
    alive, made, most = set(), [], []
    class Picture(np.ndarray): pass
    def read(row):
        picture = np.full((16, 16, 3), row["number"] % 256, np.uint8).view(Picture)
        made.append(row["number"])
        alive.add(row["number"])
        weakref.finalize(picture, alive.discard, row["number"])
        most.append(len(alive))
        return picture
    def decode(row): return np.full((16, 16), row["number"] % 2, np.uint8)
    df = pd.DataFrame({"number": range(300)})
    dls = MaskDataLoaders.from_items(df, read, decode, **OPTIONS)
    gc.collect()
    assert len(made) < 15 and max(most) < 10
    assert dls.train.n == 240 and dls.one_batch()[0].shape == (4, 3, 16, 16)
    assert dls.report(n=5).table.train["height x width"] == "16 x 16"

def test_some_functions_of_files_give_files(tmp_path):
    "Paths are all looked at; a mask from a function beside pictures from files"
    files = sorted((write(tmp_path)/"images").iterdir())
    def decode(file): return np.zeros((24, 32), np.uint8)
    assert MaskDataLoaders.from_label_func(tmp_path, files, decode, **OPTIONS).train.n == 7
    df = pd.DataFrame({"image": [str(f) for f in files] + ["nowhere.png"]})
    with pytest.raises(FileNotFoundError, match="1 of 9 pictures are not there, such as nowhere.png"):
        MaskDataLoaders.from_items(df, lambda row: row["image"], lambda row: decode(None), **OPTIONS)

# without validation (fault 40)

@pytest.mark.parametrize("how", [dict(valid_pct=0), dict(splitter=lambda items: [list(range(len(items)))]), dict(splitter=lambda items: (list(range(len(items))), []))])
def test_training_without_validation(tmp_path, how):
    dls = MaskDataLoaders.from_folder(write(tmp_path), **OPTIONS | how)
    assert [dl.n for dl in dls.loaders] == [8, 0]
    learn = quiet(segmentation_learner(dls, "Unet", **SMALL))
    before = learn.model.segmentation_head[0].weight.detach().clone()
    for fit in (lambda: learn.fit(1), lambda: learn.fit_one_cycle(1), lambda: learn.fine_tune(1)): fit()
    assert not torch.equal(before, learn.model.segmentation_head[0].weight)
    assert np.isfinite(learn.recorder.values[-1][0]) and all(v is None or np.isnan(v) for v in learn.recorder.values[-1][1:])
    assert dls.report().table.valid["pictures"] == 0

def test_validation_that_was_asked_for_must_have_pictures(tmp_path):
    files = sorted((write(tmp_path, 3)/"images").iterdir())
    with pytest.raises(ValueError, match="valid set has no pictures.*`valid_pct=0`"): MaskDataLoaders.from_folder(tmp_path, **OPTIONS | dict(bs=1))
    one = MaskDataLoaders.from_label_func(tmp_path, files[:1], lambda f: tmp_path/"masks"/f.name, valid_pct=0, **OPTIONS | dict(bs=1))
    assert one.train.n == 1

# without some masks (fault 52)

def test_items_without_a_mask_can_be_left_out(tmp_path):
    write(tmp_path, 12)
    for i in (2, 9): (tmp_path/f"masks/{i:03}.png").unlink()
    with pytest.raises(FileNotFoundError, match='2 of 12 masks are not there.*`missing="skip"`'): MaskDataLoaders.from_folder(tmp_path, **OPTIONS)
    dls = MaskDataLoaders.from_folder(tmp_path, missing="skip", **OPTIONS)
    assert dls.train.n + dls.valid.n == 10 and [f[-7:] for f in dls.left_out] == ["002.png", "009.png"]
    assert dls.report().doubts.what.tolist() == ["this mask is not there; its picture is left out"]*2

def test_leaving_out_keeps_each_item_in_its_set(tmp_path):
    "A table with a column for validation; a splitter of one's own; a random split is that of all items"
    write(tmp_path, 12)
    for i in (2, 9): (tmp_path/f"masks/{i:03}.png").unlink()
    df = pd.DataFrame([[f"images/{i:03}.png", f"masks/{i:03}.png", i >= 8] for i in range(12)], columns=["image", "mask", "held"])
    dls = MaskDataLoaders.from_df(df, tmp_path, valid_col="held", missing="skip", **OPTIONS)
    assert [dl.dataset.items.image.tolist() for dl in dls.loaders] == [[f"images/{i:03}.png" for i in range(8) if i != 2], [f"images/{i:03}.png" for i in (8, 10, 11)]]
    files = sorted((tmp_path/"images").iterdir())
    own = MaskDataLoaders.from_label_func(tmp_path, files, lambda f: tmp_path/"masks"/f.name, splitter=lambda items: ([0, 1, 2], [9, 10]), missing="skip", **OPTIONS | dict(bs=1))
    assert [[f.stem for f in dl.dataset.items] for dl in own.loaders] == [["000", "001"], ["010"]]
    for file in (tmp_path/"masks").iterdir(): file.unlink()
    with pytest.raises(FileNotFoundError, match="12 of 12 masks"): MaskDataLoaders.from_folder(tmp_path, missing="skip", **OPTIONS)

# the report

def test_the_report_counts_what_numpy_counts(tmp_path):
    dls = MaskDataLoaders.from_folder(write(tmp_path), **OPTIONS)
    report = dls.report()
    masks = np.stack([np.array(item[1]) for item in dls.train_ds])
    assert report.shares.train.tolist() == pytest.approx((np.bincount(masks.ravel())/masks.size).tolist())
    assert report.table.train["pictures"] == 7 and report.doubts.empty and len(report.figure.axes) == 3

def test_the_report_calls_a_picture_of_a_table_by_its_file(tmp_path):
    "Whatever stands in the first column: the same picture in both sets, a black one, one that is damaged in its middle"
    write(tmp_path, 12)
    for kind in ("images", "masks"): (tmp_path/f"{kind}/011.png").write_bytes((tmp_path/f"{kind}/003.png").read_bytes())
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(tmp_path/"images/005.png")
    damaged = bytearray((tmp_path/"images/007.png").read_bytes())
    damaged[500:600] = bytes(100)
    (tmp_path/"images/007.png").write_bytes(damaged)
    df = pd.DataFrame([[f"masks/{i:03}.png", f"images/{i:03}.png", i >= 8] for i in range(12)], columns=["mask", "image", "held"])
    dls = MaskDataLoaders.from_df(df, tmp_path, image_col="image", mask_col="mask", valid_col="held", **OPTIONS)
    doubts = dls.report().doubts
    assert sorted(doubts.file) == [f"images/{i:03}.png" for i in (3, 5, 7)], doubts
    assert not doubts.what.str.contains("007").any(), "the name stands once"

def test_the_report_finds_a_picture_in_both_sets(tmp_path):
    "The same file, the same pixels in another format, the same picture twice in training; and no other"
    write(tmp_path, 10)
    images = tmp_path/"images"
    for old, new in (("001.png", "020.png"), ("002.png", "021.bmp"), ("003.png", "022.png")):
        Image.open(images/old).save(images/new)
        Image.open(tmp_path/"masks"/old).save(tmp_path/"masks"/f"{new[:3]}.png")
    def split(items): return [i for i, f in enumerate(items) if f.stem not in ("020", "021")], [i for i, f in enumerate(items) if f.stem in ("020", "021")]
    doubts = MaskDataLoaders.from_folder(tmp_path, splitter=split, **OPTIONS | dict(bs=2)).report().doubts
    assert {(row.file, row.what) for row in doubts.itertuples()} == {
        ("images/001.png", "in two sets: the same bytes as images/020.png (valid)"),
        ("images/002.png", "in two sets: the same pixels as images/021.bmp (valid)"),
        ("images/003.png", "twice in one set: the same bytes as images/022.png (train)")}

def test_the_report_needs_no_reading_of_pixels_for_equal_files(tmp_path):
    write(tmp_path, 30)
    for kind in ("images", "masks"): (tmp_path/kind/"029.png").write_bytes((tmp_path/kind/"011.png").read_bytes())
    what = MaskDataLoaders.from_folder(tmp_path, **OPTIONS).report(n=2).doubts.what
    assert what.str.contains("the same bytes").sum() == 1

@pytest.mark.parametrize("value, said", [(np.nan, "no numbers to learn from"), (np.inf, "no numbers to learn from"), (1e9, "highest value is 1e")])
def test_the_report_names_strange_values(tmp_path, value, said):
    write(tmp_path, 8, ending="npy")
    rng = np.random.default_rng(0)
    for file in (tmp_path/"images").iterdir(): np.save(file, rng.random((24, 32, 4), dtype=np.float32))
    picture = np.load(tmp_path/"images/004.npy")
    picture[3, 3, 1] = value
    np.save(tmp_path/"images/004.npy", picture)
    dls = MaskDataLoaders.from_folder(tmp_path, in_channels=4, extensions=[".npy"], splitter=IndexSplitter([0]), **OPTIONS)
    doubts = dls.report().doubts
    assert doubts.file.tolist() == ["images/004.npy"] and said in doubts.what[0]
    if not np.isfinite(value):
        with pytest.raises(ValueError, match=r"004\.npy"): data_statistics(dls, progress=False)
        known = MaskDataLoaders.from_folder(tmp_path, in_channels=4, extensions=[".npy"], nodata=value, splitter=IndexSplitter([0]), **OPTIONS)
        report = known.report()
        assert report.doubts.empty and report.table.train["void"] == f"{1/(7*24*32):.1%}"

def test_the_report_of_other_loaders(tmp_path):
    "Overlapping masks, labels, one class, no codes"
    def block(blocks, get_y): return DataBlock(blocks, n_inp=1, get_x=ItemGetter(0), get_y=get_y, splitter=IndexSplitter([3])).dataloaders(items, bs=1, num_workers=0, device="cpu")
    rng = np.random.default_rng(0)
    items = [(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), rng.integers(0, 2, (8, 8), dtype=np.uint8), ["few", "many"][i % 2]) for i in range(4)]
    labels = data_report(block(SegmentationBlocks(["a", "b"], ["few", "many"]), [ItemGetter(1), ItemGetter(2)]))
    assert labels.table.train[["label few", "label many"]].tolist() == [2, 1]
    binary = data_report(block(SegmentationBlocks(["thing"]), ItemGetter(1)))
    assert binary.shares.index.tolist() == ["not thing", "thing"]
    items = [(picture, np.stack([mask, np.ones_like(mask)], -1)) for picture, mask, _ in items]
    layers = data_report(block(SegmentationBlocks(["a", "b"], overlapping=True), ItemGetter(1)))
    assert layers.shares.train["b"] == 1

# figures fit a page (fault 43)

@pytest.mark.parametrize("size", [(48, 640), (640, 48), (4, 4000), (48, 48)])
def test_figures_fit_a_page(size):
    sample = (torch.rand(3, *size), torch.zeros(size).long())
    sample[1][0, 0] = 1
    for n in (1, 4, 9):
        figures = [show_predictions([sample]*n, [sample[1:]]*n), show_masks([sample]*n)[0].figure, show_masks([sample]*n, nrows=1)[0].figure]
        for figure in figures:
            assert figure.get_size_inches()[0] <= 12.01 and figure.get_size_inches()[1] < 13
            import matplotlib.pyplot as plt
            plt.close(figure)

@pytest.mark.parametrize("n", [0, 1, 2, 7])
@pytest.mark.parametrize("after", [0, 1e9])
def test_watching_loses_nothing(capsys, n, after):
    assert list(watched(iter(range(n)), n, after)) == list(range(n))
