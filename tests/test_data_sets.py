"""Downloads, Oxford-IIIT Pet and CamVid on small trees that are written here, and loaders that travel"""
import hashlib
import http.server
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from fastai.learner import load_learner
from fastai.vision.augment import RandomCrop, RandomResizedCropGPU
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

from segkit.core.archive import Archive, download
from segkit.data import MaskDataLoaders, camvid_dataloaders, data_statistics, pets_dataloaders, shims
from segkit.data.camvid import CAMVID, camvid_table
from segkit.data.loaders import read_codes
from segkit.data.pets import PETS, pets_table
from segkit.learner import segmentation_learner

torch.set_num_threads(1)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{hidden.message}") for hidden in shims.HIDDEN.values()]
SMALL = dict(encoder_name="resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8))
LOCAL = dict(num_workers=0, device="cpu")

# downloads

class Server(http.server.BaseHTTPRequestHandler):
    "Serves `data`, by ranges; breaks off the first answer in the middle"
    data, asked = b"", []
    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
        self.asked.append(start)
        part = self.data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[:len(part)//2] if len(self.asked) == 1 else part)
    def log_message(self, *args): pass

@pytest.fixture
def server(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path/"set").mkdir()
    (tmp_path/"set/a.bin").write_bytes(rng.bytes(3_000_000))
    with tarfile.open(tmp_path/"set.tgz", "w:gz") as archive: archive.add(tmp_path/"set", "set")
    handler = type("Handler", (Server,), {"data": (tmp_path/"set.tgz").read_bytes(), "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/set.tgz", handler
        running.shutdown()

def test_a_broken_download_goes_on_and_is_checked(server, tmp_path):
    url, handler = server
    archive = Archive(url, md5=hashlib.md5(handler.data).hexdigest(), size=len(handler.data))
    cache = tmp_path/"cache"
    with pytest.raises(OSError, match="could not be fetched"): download([archive], "it", cache, progress=False)
    assert not (cache/"it").exists() and handler.asked == [0]
    folder = download([archive], "it", cache, progress=False)
    assert handler.asked[1] == len(handler.data)//2  # not from the beginning
    assert (folder/"set/a.bin").read_bytes() == (tmp_path/"set/a.bin").read_bytes()
    assert download([archive], "it", cache) == folder and len(handler.asked) == 2

def test_a_damaged_download_is_refused_and_fetched_anew(server, tmp_path):
    url, handler = server
    handler.asked.append(0)  # no break this time
    right, handler.data = handler.data, handler.data[:-9] + b"x"*9
    archive = Archive(url, md5=hashlib.md5(right).hexdigest())
    with pytest.raises(ValueError, match="damaged or has changed"): download([archive], "it", tmp_path/"cache", progress=False)
    handler.data = right
    assert (download([archive], "it", tmp_path/"cache", progress=False)/"set/a.bin").stat().st_size == 3_000_000

def test_addresses_and_checksums_are_those_of_fastai_and_torchvision():
    import fastai.data
    from fastai.data.external import URLs
    from fastdownload import core
    from torchvision.datasets import OxfordIIITPet
    assert CAMVID[0].url == URLs.CAMVID
    assert core.read_checks(core.checks_module(fastai.data))[URLs.CAMVID] == (CAMVID[0].size, CAMVID[0].start_md5)
    assert [(a.url, a.md5) for a in PETS] == list(OxfordIIITPet._RESOURCES)

# pets

@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    "Layout: images/NAME.jpg, annotations/trimaps/NAME.png, annotations/{trainval,test}.txt; 22 and 4 pictures"
    folder = tmp_path_factory.mktemp("pets")/"oxford-iiit-pet"
    for place in ("images", "annotations/trimaps"): (folder/place).mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    for i in range(26):
        name, number, species = [("Birman", 1, 1), ("saint_bernard", 2, 2)][i % 2]
        trimap = rng.integers(1, 4, (20, 24)).astype(np.uint8)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)).save(folder/f"images/{name}_{i}.jpg")
        Image.fromarray(trimap).save(folder/f"annotations/trimaps/{name}_{i}.png")
        lines.append(f"{name}_{i} {number} {species} 1")
    (folder/"annotations/trainval.txt").write_text("\n".join(lines[:22]) + "\n")
    (folder/"annotations/test.txt").write_text("\n".join(lines[22:]) + "\n")
    return folder

def test_pets_split_is_that_of_the_published_number(pets):
    table = pets_table(pets)
    assert table.split.tolist() == ["valid" if i % 10 == 0 else "train" for i in range(22)] + ["test"]*4
    assert set(zip(table.species, table.breed)) == {("cat", "Birman"), ("dog", "Saint Bernard")}

@pytest.mark.parametrize("border, expected", [("pet", [0, 1, 0, 1]), ("void", [0, 1, 0, 255]), ("class", [0, 1, 0, 2])])
def test_pets_borders(pets, border, expected):
    dls = pets_dataloaders(pets, "breed", (20, 24), 4, border, **LOCAL)
    _, mask, label = dls[2].one_batch()
    raw = np.stack([np.array(Image.open(pets/"annotations/trimaps"/f"{n}.png")) for n in ("Birman_22", "saint_bernard_23", "Birman_24", "saint_bernard_25")])
    assert np.array_equal(mask.numpy(), np.array(expected)[raw])
    assert [dls.vocab[i] for i in label] == ["Birman", "Saint Bernard"]*2

def test_pets_train_with_both_heads_and_predict_a_file(pets, tmp_path):
    dls = pets_dataloaders(pets, border="void", size=32, bs=4, **LOCAL)
    learn = segmentation_learner(dls, "Unet", aux_params={}, path=tmp_path, **SMALL)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    learn.fit(1)
    assert np.isfinite(list(learn.evaluate(dls[2]).values())).all()
    file = pets/"images/Birman_22.jpg"
    learn.export("pets.pkl")
    (mask, label), *_ = load_learner(tmp_path/"pets.pkl").predict(file)  # trained on rows of a table, asked about a file
    assert mask.shape == Image.open(file).size[::-1] and label in ("cat", "dog") and torch.equal(mask, learn.predict(file)[0][0])

# camvid

NAMES = ["Animal", "Archway", "Bicyclist", "Bridge", "Building", "Car", "CartLuggagePram", "Child", "Column_Pole", "Fence", "LaneMkgsDriv",
         "LaneMkgsNonDriv", "Misc_Text", "MotorcycleScooter", "OtherMoving", "ParkingBlock", "Pedestrian", "Road", "RoadShoulder", "Sidewalk",
         "SignSymbol", "Sky", "SUVPickupTruck", "TrafficCone", "TrafficLight", "Train", "Tree", "Truck_Bus", "Tunnel", "VegetationMisc", "Void", "Wall"]
GROUP = dict(zip(NAMES, [9, 1, 10, 1, 1, 8, 9, 9, 2, 7, 3, 3, 6, 10, 8, 4, 9, 3, 4, 4, 6, 0, 8, 2, 6, 8, 5, 8, 1, 5, 255, 1]))  # of the published table
FRAMES = {"train": ["0001TP_006690", "0001TP_008520", "0006R0_f00930", "0016E5_00390", "0016E5_08640", "0016E5_07980"],
          "valid": ["0016E5_07959", "0016E5_08159"], "test": ["0001TP_008550", "0001TP_010380", "Seq05VD_f00000", "Seq05VD_f05100"]}

@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    "Layout: images/FRAME.png, labels/FRAME_P.png with the numbers of codes.txt"
    folder = tmp_path_factory.mktemp("data")/"camvid"
    for place in ("images", "labels"): (folder/place).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for frame in sum(FRAMES.values(), []):
        mask = np.kron(rng.integers(0, 32, (4, 5)), np.ones((8, 8))).astype(np.uint8)
        Image.fromarray(rng.integers(0, 256, (32, 40, 3)).astype(np.uint8)).save(folder/f"images/{frame}.png")
        Image.fromarray(mask).save(folder/f"labels/{frame}_P.png")
    (folder/"codes.txt").write_text("\n".join(NAMES))
    return folder

def test_camvid_split_and_classes(camvid):
    table = camvid_table(camvid.parent)
    assert {s: sorted(f[7:-4] for f in table.image[table.split == s]) for s in FRAMES} == {s: sorted(f) for s, f in FRAMES.items()}
    dls = camvid_dataloaders(camvid, size=(32, 40), bs=4, **LOCAL)
    _, mask, label = dls[2].one_batch()
    raw = np.stack([np.array(Image.open(camvid/f"labels/{f}_P.png")) for f in sorted(FRAMES["test"])])
    expected = np.array([GROUP[n] for n in NAMES])[raw]
    assert np.array_equal(mask.numpy(), expected)
    assert np.array_equal(label.numpy(), [[(m == k).any() for k in range(11)] for m in expected])

@pytest.mark.parametrize("where", [dict(item_tfms=RandomCrop(8)), dict(batch_tfms=RandomResizedCropGPU(16, min_scale=.02, max_scale=.05))])
def test_camvid_labels_follow_the_crop(camvid, where):
    dls = camvid_dataloaders(camvid, **{"size": (32, 40), "bs": 6, **where}, **LOCAL)
    _, mask, label = dls.train.one_batch()
    assert np.array_equal(label.numpy(), [[(m == k).any() for k in range(11)] for m in mask.numpy()])
    whole = torch.stack([dls.train_ds[i][2] for i in range(6)])
    assert label.sum() < .7*whole.sum()

def test_an_incomplete_camvid_is_refused(tmp_path):
    for place in ("images", "labels"): (tmp_path/place).mkdir()
    (tmp_path/"codes.txt").write_text("\n".join(NAMES))
    for i in range(650): (tmp_path/f"images/0006R0_f{i:05}.png").touch()
    with pytest.raises(ValueError, match="'train': 650.*official split"): camvid_table(tmp_path)

def test_class_weights_are_those_of_scikit_learn(camvid):
    dls = camvid_dataloaders(camvid, size=(32, 40), bs=4, **LOCAL)
    masks = np.concatenate([np.array([GROUP[n] for n in NAMES])[np.array(Image.open(camvid/f"labels/{f}_P.png"))].ravel() for f in FRAMES["train"]])
    known = masks[masks != 255]
    there = np.unique(known)
    theirs = compute_class_weight("balanced", classes=there, y=known)
    ours = data_statistics(dls, progress=False).weights("inverse").numpy()
    assert ours[there] == pytest.approx(theirs/theirs.mean(), rel=1e-5) and ours[~np.isin(np.arange(11), there)].sum() == 0

# heads and labels that do not fit

def test_labels_and_heads_must_agree_and_say_so(pets):
    table = pets_table(pets)
    def loaders(**kwargs): return MaskDataLoaders.from_df(table, pets, "image", "mask", ["pet"], values={2: 0, 1: 1, 3: 1}, seed=0, bs=4, **LOCAL, **kwargs)
    with pytest.raises(ValueError, match="the data has none"): segmentation_learner(loaders(), "Unet", aux_params={}, **SMALL)
    with pytest.raises(ValueError, match=r"label \(2 values\).*aux_params=\{\}"): segmentation_learner(loaders(label_col="species"), "Unet", **SMALL)
    assert segmentation_learner(loaders(label_col="species"), "Unet", aux_params={}, **SMALL).task.vocab == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"trimaps.*has the value \[3\]"):
        MaskDataLoaders.from_df(table, pets, "image", "mask", ["pet"], values={2: 0, 1: 1}, bs=4, **LOCAL).one_batch()

def test_a_csv_written_by_hand(pets, tmp_path):
    pets_table(pets).assign(is_valid=lambda t: t.split == "valid").to_csv(tmp_path/"labels.csv", index=False)
    with pytest.raises(FileNotFoundError, match="26 of 26 pictures are not there"):
        MaskDataLoaders.from_csv(tmp_path, image_col="image", mask_col="mask", codes=["pet"], bs=4, **LOCAL)
    (tmp_path/"images").symlink_to(pets/"images"); (tmp_path/"annotations").symlink_to(pets/"annotations")
    dls = MaskDataLoaders.from_csv(tmp_path, image_col="image", mask_col="mask", codes=["pet"], values={2: 0, 1: 1, 3: 1}, label_col="breed", valid_col="is_valid",
                                   bs=4, **LOCAL)
    assert [dls.train.n, dls.valid.n] == [23, 3] and list(dls.vocab) == ["Birman", "Saint Bernard"]

# folders

FIGURE = np.kron(np.array([[0, 1], [1, 0]], np.uint8), np.ones((16, 16), np.uint8))

@pytest.fixture
def folders(tmp_path):
    "Four pictures with masks of their names, and two classes"
    for place in ("images", "masks"): (tmp_path/place).mkdir()
    for name in ("quay", "pier", "lock", "weir"):
        Image.fromarray(np.stack([100*FIGURE]*3, -1)).save(tmp_path/f"images/{name}.png")
        Image.fromarray(FIGURE).save(tmp_path/f"masks/{name}.png")
    (tmp_path/"codes.txt").write_text("ground\nfigure\n")
    return tmp_path

def from_folder(folder, **kwargs): return MaskDataLoaders.from_folder(folder, seed=0, valid_pct=.5, bs=1, **LOCAL, **kwargs)

@pytest.mark.parametrize("text", [b"traffic light\nroad marking\n", b"\xef\xbb\xbftraffic light\r\nroad marking", b"traffic light \n\nroad marking\n\n"])
def test_codes_are_one_a_line(tmp_path, text):
    (tmp_path/"codes.txt").write_bytes(text)
    assert read_codes(tmp_path) == ["traffic light", "road marking"]

def test_two_masks_for_a_picture_are_named(folders):
    Image.fromarray(1 - FIGURE).save(folders/"masks/pier.tif")
    with pytest.raises(ValueError, match=r"pier\.png: more than one file may be its mask, .*pier\.png, .*pier\.tif"): from_folder(folders)

def test_two_pictures_with_one_mask_are_named(folders):
    Image.open(folders/"images/pier.png").save(folders/"images/pier.jpg")
    with pytest.raises(ValueError, match=r"pier\.jpg and .*pier\.png differ in their endings alone"): from_folder(folders)

def test_what_is_no_picture_is_no_mask(folders):
    for ending in ("txt", "svg", "json"): (folders/f"masks/pier.{ending}").write_text("notes")
    loaders = from_folder(folders)
    for dl in loaders.loaders:
        for _, mask in dl: assert mask.unique().tolist() == [0, 1]

def test_an_exported_learner_has_no_names_of_files(folders, tmp_path):
    learn = segmentation_learner(from_folder(folders), "Unet", path=tmp_path, **SMALL)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    learn.fit(1)
    learn.export("folder.pkl")
    with zipfile.ZipFile(tmp_path/"folder.pkl") as file: content = b"".join(file.read(name) for name in file.namelist())
    assert not [name for name in ("quay", "pier", "lock.", "weir") if name.encode() in content]
    assert load_learner(tmp_path/"folder.pkl").predict(folders/"images/quay.png")[1].shape == (32, 32)
