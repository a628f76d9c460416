"""Pictures and masks as people have them: what each kind of file becomes, what is refused, and that files and arrays agree"""
import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from fastai.data.block import DataBlock
from fastai.data.transforms import IndexSplitter, ItemGetter
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageOps

from segkit.data import MaskDataLoaders, SegmentationBlocks, check_items, data_statistics, read_targets, shims
from segkit.data.blocks import VOID, image_block
from segkit.decoders import Unet
from segkit.learner import segmentation_learner

torch.set_num_threads(1)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{hidden.message}") for hidden in shims.HIDDEN.values()]
small = settings(derandomize=True, deadline=None, max_examples=25)
TINY = dict(encoder_name="resnet18", encoder_weights=None, encoder_depth=2, decoder_channels=(8, 8))
HERE = dict(bs=2, num_workers=0, device="cpu")

def batch_of(source, channels, block=None):
    "The validation batch of one picture"
    block = DataBlock((block or image_block(channels),), splitter=IndexSplitter([1]))
    return block.dataloaders([source, source], bs=1, num_workers=0, device="cpu").valid.one_batch()[0]

def write_png(file, array):
    "A PNG of 16 bits a channel, byte by byte"
    h, w, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", w, h, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))

def write(folder, n=6, size=(16, 24), picture=None, mask=None, ending=".png"):
    "Squares, brighter than the ground, and their masks of 0 and 1; `picture` and `mask` change the arrays"
    for name in ("images", "masks"): (folder/name).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        truth = np.zeros(size, np.uint8)
        truth[4:12, 3 + i:13 + i] = 1
        shown = 50 + 100*truth
        if picture: shown = picture(shown)
        else: shown = np.stack([shown]*3, -1)
        if ending == ".npy": np.save(folder/f"images/{i}.npy", shown)
        elif ending == ".tif": tifffile.imwrite(folder/f"images/{i}.tif", shown)
        else: Image.fromarray(shown).save(folder/f"images/{i}{ending}")
        Image.fromarray(mask(truth) if mask else truth).save(folder/f"masks/{i}.png")
    return folder

def load(folder, codes=("ground", "square"), extensions=None, **kwargs):
    return MaskDataLoaders.from_folder(folder, codes=list(codes), seed=0, extensions=extensions, **HERE | kwargs)

# row 4: 16 bits, floats, .npy

WIDE = (np.arange(12, dtype=np.uint16)*5000).reshape(3, 4)
KINDS = {
    "16-bit grey PNG": (".png", WIDE), "16-bit grey TIFF": (".tif", WIDE), "floating TIFF of 0 to 1": (".tif", (WIDE/2**16).astype(np.float32)),
    "int32 TIFF": (".tif", WIDE.astype(np.int32) - 9), ".npy of one channel": (".npy", WIDE[..., None]), ".npy of three": (".npy", np.dstack([WIDE, WIDE//2, WIDE//3])),
    # further members
    "16-bit colour PNG": ("wide", np.dstack([WIDE, WIDE//2, WIDE//3])), "16-bit colour with alpha": ("wide", np.dstack([WIDE, WIDE//2, WIDE//3, WIDE])),
    "16-bit colour TIFF": (".tif", np.dstack([WIDE, WIDE//2, WIDE//3])), "BigTIFF in tiles": ("big", np.tile(WIDE, (8, 8))), "uint32 above its half": (".tif", WIDE.astype(np.uint32) + 2**31),
    "int8": (".tif", (WIDE//1000 - 20).astype(np.int8)), "float16 .npy": (".npy", WIDE.astype(np.float16)), "big-endian .npy": (".npy", WIDE.astype(">u2")), "float64 TIFF": (".tif", WIDE/7)}

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_values_of_a_file_arrive(kind, channels, tmp_path):
    ending, numbers = KINDS[kind]
    file = tmp_path/f"x{ending if ending[0] == '.' else '.tif' if ending == 'big' else '.png'}"
    if ending == ".npy": np.save(file, numbers)
    elif ending == "wide": write_png(file, numbers)
    elif ending == "big": tifffile.imwrite(file, numbers, bigtiff=True, tile=(16, 16))
    elif ending == ".tif": tifffile.imwrite(file, numbers)
    else: Image.fromarray(numbers).save(file)
    expected = np.atleast_3d(numbers).astype(np.float32)[..., :3]
    if channels == 3: expected = np.broadcast_to(expected, (*expected.shape[:2], 3))
    elif expected.shape[-1] == 3: expected = (expected @ np.float32([.299, .587, .114]))[..., None]
    batch = batch_of(file, channels)
    assert batch.dtype == torch.float32 and torch.equal(torch.as_tensor(batch[0].numpy()), torch.as_tensor(expected.transpose(2, 0, 1).copy()))
    assert torch.equal(batch, batch_of(numbers[..., :3] if numbers.ndim == 3 else numbers, channels))

@small
@given(st.data(), st.sampled_from(["uint8", "uint16", "int32", "float32"]), st.sampled_from([1, 2, 3, 5]), st.tuples(st.integers(1, 9), st.integers(6, 9)))
def test_files_and_arrays_of_the_same_numbers_give_the_same_batch(data, dtype, channels, size):
    elements = {"allow_nan": False, "allow_infinity": False, "min_value": -2.0**30, "max_value": 2.0**30} if dtype == "float32" else {}
    numbers = data.draw(arrays.arrays(dtype, (*size, channels), elements=elements or None))
    tiff, npy = io.BytesIO(), io.BytesIO()
    how = {"photometric": "rgb" if channels == 3 else "minisblack", **({"planarconfig": "contig"} if channels > 1 else {})}
    tifffile.imwrite(tiff, numbers.squeeze(-1) if channels == 1 else numbers, **how)
    np.save(npy, numbers)
    first = batch_of(numbers, channels)
    assert torch.equal(first.cpu(), torch.as_tensor(numbers.astype(np.float32).transpose(2, 0, 1)/np.float32(255 if dtype == "uint8" else 1))[None])
    for source in (tiff.getvalue(), npy.getvalue()): assert torch.equal(batch_of(source, channels), first)
    if dtype == "uint8" and channels in (1, 3):
        png = io.BytesIO()
        Image.fromarray(numbers if channels == 3 else numbers[..., 0]).save(png, "png")
        assert torch.equal(batch_of(png.getvalue(), channels), first)

def test_bytes_stay_fastais(tmp_path):
    "Also from palettes, single bits, alpha: what fastai's own block makes of them, and its type"
    numbers = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for name, image in {"rgb.png": Image.fromarray(numbers), "p.png": Image.fromarray(numbers).quantize(8), "rgba.png": Image.fromarray(numbers).convert("RGBA"),
                        "la.png": Image.fromarray(numbers).convert("LA"), "1.png": Image.fromarray(numbers).convert("1"), "x.jpg": Image.fromarray(numbers)}.items():
        image.save(tmp_path/name)
        ours, theirs = batch_of(tmp_path/name, 3), batch_of(tmp_path/name, 3, ImageBlock)
        assert torch.equal(ours, theirs) and type(ours) is type(theirs)

def test_one_scale_in_a_data_set(tmp_path):
    "A 16-bit picture among bytes is named, with a way out; with it all are trained"
    write(tmp_path)
    Image.fromarray(np.full((16, 24), 40000, np.uint16)).save(tmp_path/"images/3.png")
    with pytest.raises(ValueError, match=r"uint16.*3\.png|3\.png.*uint16"): list(load(tmp_path).train), list(load(tmp_path).valid)

def test_light_of_pictures_with_their_own_scale_is_an_error():
    wide = np.full((8, 8, 3), 9000, np.uint16)
    block = DataBlock((image_block(3),), splitter=IndexSplitter([1]), batch_tfms=aug_transforms(p_lighting=1.))
    with pytest.raises(ValueError, match="0 to 1.*9000.*scale="): block.dataloaders([wide, wide], bs=1, num_workers=0, device="cpu").train.one_batch()

@pytest.mark.parametrize("bits, of_weights", [(8, True), (16, False)])
def test_statistics_of_weights_are_for_bytes(tmp_path, bits, of_weights):
    "ImageNet's mean is one of bytes; 16-bit pictures get their own"
    wide = lambda shown: np.stack([shown.astype(f"uint{bits}")*(1 if bits == 8 else 300)]*3, -1)
    write(tmp_path, picture=wide, ending=".npy")
    weights = Unet("resnet18", encoder_weights=None).encoder.state_dict()
    learn = segmentation_learner(load(tmp_path, extensions=[".npy"]), "Unet", "resnet18", weights)
    (normalize,) = [t for t in learn.dls.after_batch.fs if type(t).__name__ == "Normalize"]
    assert torch.allclose(normalize.mean.flatten(), torch.tensor([.485, .456, .406])) == of_weights
    picture = learn.dls.train.one_batch()[0]
    assert picture.abs().max() < 10

# row 6: orientation

@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "packed.tif", "pillow"])
@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_object_and_mask_overlap_where_the_camera_lay_on_its_side(tmp_path, name, orientation):
    "A bright corner, drawn upright in the mask; also where the mask itself has an orientation"
    stored, exif = np.zeros((64, 64), np.uint8), Image.Exif()
    stored[:16, :32] = 255
    exif[274] = orientation
    file = tmp_path/(name if "." in name else "x.png")
    how = {"quality": 95} if name == "x.jpg" else {"compression": "tiff_lzw"} if name == "packed.tif" else {}
    Image.fromarray(stored).save(file, exif=exif, **how)
    upright = Image.fromarray(stored)
    upright.getexif()[274] = orientation
    mask = np.asarray(ImageOps.exif_transpose(upright)) > 0
    shown = batch_of(Image.open(file) if name == "pillow" else file, 3)[0, 0].numpy() > .5
    assert shown.shape == mask.shape and (shown & mask).sum() == mask.sum() == shown.sum() == 512
    from segkit.data.reading import read_mask
    if name != "x.jpg": assert np.array_equal(read_mask(file) > 0, mask)

# row 7: numbers that are none

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -3.4e38])
def test_a_value_that_is_none_is_named_or_void(tmp_path, value):
    def holed(shown): return np.where(np.arange(24) == 23, np.float32(value), shown.astype(np.float32))
    write(tmp_path, picture=lambda shown: shown.astype(np.float32), ending=".npy")
    np.save(tmp_path/"images/3.npy", holed(np.load(tmp_path/"images/3.npy")))
    def train(**kwargs): return segmentation_learner(load(tmp_path, extensions=[".npy"], in_channels=1, **kwargs), "Unet", check=None, **TINY)
    with pytest.raises(ValueError, match=r"3\.npy.*nodata="): train()
    learn = train(nodata=float(value))
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    learn.fit(1)
    assert learn.task.ignore_index == VOID and all(p.isfinite().all() for p in learn.model.parameters())
    masks = torch.cat([batch[1] for dl in learn.dls.loaders for batch in dl.new(shuffle=False, drop_last=False)])
    assert (masks == VOID).sum() == 16 and np.isfinite(learn.recorder.values[-1]).all()
    found = data_statistics(learn.dls, progress=False)
    assert found.mean.isfinite().all() and 50 < found.mean < 150

def test_further_values_of_no_data(tmp_path):
    "GDAL's tag in a TIFF; -9999 in one band of five, with `Resize`; black of bytes"
    five = np.random.default_rng(0).random((5, 16, 24)).astype(np.float32)
    five[2, :, 20:] = -9999
    tifffile.imwrite(tmp_path/"x.tif", five, photometric="minisblack", extratags=[(42113, "s", 6, "-9999", True)])
    items = [(tmp_path/"x.tif", np.ones((16, 24), np.uint8))]*4
    def batch(items, **kwargs):
        blocks = SegmentationBlocks(["a", "b"], **kwargs)
        block = DataBlock(blocks, n_inp=1, get_x=ItemGetter(0), get_y=ItemGetter(1), splitter=IndexSplitter([2, 3]), item_tfms=Resize((32, 48)))
        return block.dataloaders(items, **HERE).valid.one_batch()
    with pytest.raises(ValueError, match=r"x\.tif.*nodata=-9999"): batch(items, in_channels=5)
    picture, mask = batch(items, in_channels=5, nodata=-9999)
    assert (mask[..., 42:] == VOID).all() and (mask[..., :38] == 1).all() and 0 <= picture.min() and picture.max() <= 1
    black = np.full((16, 24, 3), 90, np.uint8)
    black[:4], black[8, 8, 0] = 0, 0  # one dark channel is no hole
    picture, mask = batch([(black, np.zeros((16, 24), np.uint8))]*4, nodata=0)
    assert (mask[:, :8] == VOID).all() and (mask[:, 8:] == 0).all() and picture.max() < .5

# row 9: lossy masks; row 10: white on black

def test_a_mask_saved_as_jpeg_is_refused_whatever_its_name(tmp_path):
    "JPEG; JPEG under the name of a PNG, in a TIFF, opened by Pillow; lossy WebP"
    mask = np.kron(np.random.default_rng(0).integers(0, 6, (4, 6), dtype=np.uint8), np.ones((8, 8), np.uint8))
    write(tmp_path, size=mask.shape)
    (tmp_path/"masks/2.png").unlink()
    Image.fromarray(mask).save(tmp_path/"masks/2.jpg")
    with pytest.raises(ValueError, match=r"2\.jpg.*JPEG"): segmentation_learner(load(tmp_path, range(6)), "Unet", check=None, **TINY)
    from segkit.data.reading import read_mask
    (tmp_path/"named.png").write_bytes((tmp_path/"masks/2.jpg").read_bytes())
    Image.fromarray(mask).save(tmp_path/"in.tif", compression="jpeg")
    Image.fromarray(np.dstack([mask]*3)).save(tmp_path/"lossy.webp")
    for source in (tmp_path/"named.png", tmp_path/"in.tif", tmp_path/"lossy.webp", Image.open(tmp_path/"named.png")):
        with pytest.raises(ValueError, match="JPEG|WebP"): read_mask(source)
    Image.fromarray(np.dstack([mask]*3)).save(tmp_path/"exact.webp", lossless=True)
    assert np.array_equal(read_mask(tmp_path/"exact.webp"), mask)

def test_white_on_black_is_told_what_to_type_and_following_it_is_right(tmp_path):
    write(tmp_path, mask=lambda truth: truth*255)
    def check(**kwargs):
        dls = load(tmp_path, **kwargs)
        check_items(dls, read_targets(dls))
        return dls
    with pytest.raises(ValueError, match=r"\.png.*values=\[0, 255\]"): check()
    assert check(values=[0, 255]).valid.one_batch()[1].unique().tolist() == [0, 1]
    with pytest.raises(ValueError, match="'ground' or void.*nothing to learn"): check(void=255)  # the old advice

def test_void_everywhere_is_refused_and_rare_classes_are_not(tmp_path):
    def check(folder, **kwargs):
        dls = load(folder, void=255, **kwargs)
        check_items(dls, read_targets(dls), n=1)
    write(tmp_path/"void", mask=lambda truth: truth*0 + 255)
    with pytest.raises(ValueError, match="is void everywhere"): check(tmp_path/"void")
    write(tmp_path/"rare", n=9, mask=lambda truth: truth*0 + np.uint8([0]*23 + [255]))
    with pytest.raises(ValueError, match="'ground' or void"): check(tmp_path/"rare")
    for i in range(9):
        if i % 2: Image.fromarray(np.ones((16, 24), np.uint8)).save(tmp_path/f"rare/masks/{i}.png")
    check(tmp_path/"rare")  # found by going on
    write(tmp_path/"empty", mask=lambda truth: truth*0)
    dls = load(tmp_path/"empty")
    check_items(dls, read_targets(dls))  # without void pixels: nothing there, which may be so

# rows 36 and 42: broken files are named before the first epoch

BROKEN = {"a picture cut in half": ("images/3.png", lambda data: data[:len(data)//2]), "a mask cut in half": ("masks/3.png", lambda data: data[:len(data)//2]),
          "an empty file": ("images/3.png", lambda data: b""), "a page of the web": ("images/3.png", lambda data: b"<!DOCTYPE html><html>not found</html>"),
          "only a header": ("masks/3.png", lambda data: data[:33])}

@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_before_the_first_epoch(tmp_path, case):
    name, damage = BROKEN[case]
    write(tmp_path)
    (tmp_path/name).write_bytes(damage((tmp_path/name).read_bytes()))
    with pytest.raises(ValueError, match=r"3\.png"): segmentation_learner(load(tmp_path), "Unet", check=None, **TINY)

@pytest.mark.parametrize("ending", [".npy", ".tif"])
def test_broken_files_of_other_kinds(tmp_path, ending):
    write(tmp_path, picture=lambda shown: shown.astype(np.float32), ending=ending)
    file = tmp_path/f"images/3{ending}"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"3\{ending}"): segmentation_learner(load(tmp_path, extensions=[ending], in_channels=1), "Unet", check=None, **TINY)
    from segkit.data.reading import read_picture
    np.save(tmp_path/"objects.npy", np.array([{}, None]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects\.npy"): read_picture(tmp_path/"objects.npy")  # nothing is unpickled

# row 37: what can be predicted

@pytest.fixture(scope="module")
def learner(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("predict"))
    return segmentation_learner(load(folder), "Unet", **TINY), folder/"images/0.png"

def test_everything_that_is_the_same_picture_is_predicted_alike(learner):
    learn, file = learner
    image = Image.open(file)
    array = np.asarray(image)
    sources = {"path": file, "text": str(file), "Pillow, from a file": Image.open(file), "Pillow": Image.fromarray(array), "fastai's": PILImage.create(file), "RGBA": image.convert("RGBA"),
               "grey": image.convert("L"), "palette": image.convert("P", palette=Image.Palette.ADAPTIVE), "array": array, "tensor": torch.tensor(array).movedim(-1, 0),
               "tensor, channels last": torch.tensor(array), "grey array": array[..., 0], "bytes of the file": file.read_bytes()}
    expected = learn.predict(file)
    for what, source in sources.items():
        answer = learn.predict(source)
        assert torch.equal(answer[1], expected[1]) and torch.equal(answer[2], expected[2]), what
        if what in ("text", "RGBA", "tensor"): assert torch.equal(learn.predict_tiled(source, tile=16), learn.predict_tiled(file, tile=16)), what

def test_what_cannot_be_predicted_is_told_what_form_is_expected(learner):
    learn, file = learner
    array = np.asarray(Image.open(file))
    for source, message in ((array/255, "float64 from .* bytes from 0 to 255.*astype"), (np.dstack([array, array]), r"shape \(16, 24, 6\), expected \(h, w, 3\)"),
                            (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"shape \(1, 3, 8, 8\)"), (array.astype(np.uint16)*257, "uint16")):
        with pytest.raises(ValueError, match=message): learn.predict(source)

# row 38: colours

def test_masks_of_colours_and_of_a_file_of_colours_train(tmp_path):
    colours = np.uint8([[0, 0, 0], [128, 64, 0]])
    write(tmp_path, mask=lambda truth: colours[truth])
    plain = write(tmp_path/"plain")
    (tmp_path/"colours.txt").write_text("0 0 0\tground\n128 64 0\tsquare\n")
    expected = load(plain).valid.one_batch()[1]
    for values in ({(0, 0, 0): 0, (128, 64, 0): 1}, tmp_path/"colours.txt", str(tmp_path/"colours.txt")):
        assert torch.equal(load(tmp_path, values=values).valid.one_batch()[1], expected)
    with pytest.raises(ValueError, match=r"values=\{\(0, 0, 0\): 0"): load(tmp_path).valid.one_batch()
    Image.fromarray(np.full((16, 24, 3), (128, 64, 1), np.uint8)).save(tmp_path/"masks/1.png")
    with pytest.raises(ValueError, match=r"1\.png.*\(128, 64, 1\)"): segmentation_learner(load(tmp_path, values=values), "Unet", check=None, **TINY)

@small
@given(st.data(), st.integers(2, 12))
def test_colours_give_back_the_classes_they_were_painted_with(data, classes):
    from segkit.data.reading import MaskReader
    colour = st.tuples(*[st.integers(0, 255)]*3)
    palette = data.draw(st.lists(colour, min_size=classes + 1, max_size=classes + 1, unique=True))
    mask = data.draw(arrays.arrays("uint8", st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.integers(0, classes)))
    read = MaskReader(list(map(str, range(classes))), {c: k for k, c in enumerate(palette[:-1])}, palette[-1])
    expected = np.where(mask == classes, VOID, mask)
    painted = np.uint8(palette)[mask]
    image = Image.fromarray(mask).convert("P")
    image.putpalette([*np.uint8(palette).ravel().tolist(), *[0]*(768 - 3*len(palette))])
    for source in (painted, Image.fromarray(painted), Image.fromarray(painted).convert("RGBA"), image): assert np.array_equal(read(source), expected)

@small
@given(st.data())
def test_the_later_layer_lies_over_the_earlier(data):
    from segkit.data.reading import MaskReader
    size = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    names = data.draw(st.permutations(["a", "b", "c"]))
    layers = {name: data.draw(arrays.arrays("uint8", size, elements=st.sampled_from([0, 255]))) for name in names}
    slow = np.zeros(size, np.uint8)
    for y, x in np.ndindex(*size):
        for name in names:
            if layers[name][y, x]: slow[y, x] = 1 + "abc".index(name)
    assert np.array_equal(MaskReader(["ground", "a", "b", "c"])(layers), slow)

@small
@given(arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))), st.sampled_from(["columns", "rows"]))
def test_runs_are_the_mask(mask, order):
    from pycocotools import mask as coco

    from segkit.data.outlines import mask_of_runs, runs_of_mask
    assert np.array_equal(mask_of_runs(runs_of_mask(mask, order), mask.shape, order), mask)
    packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert np.array_equal(mask_of_runs(packed), mask)
    lengths = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(mask.ravel("F"), prepend=False)), [mask.size]])).tolist()
    assert np.array_equal(mask_of_runs({"size": mask.shape, "counts": lengths}), mask)

@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.text(max_size=40))
def test_runs_of_strangers_are_refused_or_fit(text):
    from segkit.data.outlines import mask_of_runs
    try: assert mask_of_runs({"size": [3, 4], "counts": text}).shape == (3, 4)
    except (ValueError, OverflowError): pass

# row 44: large pictures

def test_a_large_picture_is_read_on_the_callers_word(learner, tmp_path, monkeypatch):
    from segkit.data.reading import read_picture
    learn, _ = learner
    large = np.random.default_rng(0).integers(0, 256, (90, 110, 3), dtype=np.uint8)
    Image.fromarray(large).save(tmp_path/"large.png")
    tifffile.imwrite(tmp_path/"large.tif", large.astype(np.uint16))
    expected = learn.predict_tiled(large, tile=32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"large\.png.*9900.*`read_picture\(file, max_pixels="): learn.predict_tiled(tmp_path/"large.png")
    assert torch.equal(learn.predict_tiled(read_picture(tmp_path/"large.png", max_pixels=9900), tile=32), expected)
    assert Image.MAX_IMAGE_PIXELS == 1000
    for name in ("large.png", "large.tif"):
        with pytest.raises(ValueError, match="max_pixels=9899"): read_picture(tmp_path/name, max_pixels=9899)
    with pytest.raises(ValueError, match=r"large\.tif.*limit"): read_picture(tmp_path/"large.tif")
    assert read_picture(tmp_path/"large.tif", max_pixels=9900).shape == large.shape
