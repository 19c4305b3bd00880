"""Data sets as people have them on their disks: tiny copies of each layout, read by the kit and by other readers of the same layout."""
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dmrs_nb.compat  # before torchvision
from dmrs_nb.data import DATASETS, LCZ, Preprocess, class_words, decode, items_from_split_files, load_items, scan, unpack_so2sat
from dmrs_nb.longtail import longtail_split

NAMES = dict(
    resisc45="""airplane airport baseball_diamond basketball_court beach bridge chaparral church circular_farmland cloud commercial_area
        dense_residential desert forest freeway golf_course ground_track_field harbor industrial_area intersection island lake meadow
        medium_residential mobile_home_park mountain overpass palace parking_lot railway railway_station rectangular_farmland river roundabout
        runway sea_ice ship snowberg sparse_residential stadium storage_tank tennis_court terrace thermal_power_station wetland""".split(),
    rsd46=[n.strip() for n in """Airplane; Airport; Artificial dense forest land; Artificial sparse forest land; Bare land; Basketball court;
        Blue structured factory building; Building; Construction site; Cross river bridge; Crossroads; Dense tall building; Dock; Fish pond;
        Footbridge; Graff; Grassland; Low scattered building; Lrregular farmland; Medium density scattered building;
        Medium density structured building; Natural dense forest land; Natural sparse forest land; Oiltank; Overpass; Parking lot;
        Plasticgreenhouse; Playground; Railway; Red structured factory building; Refinery; Regular farmland; Scattered blue roof factory building;
        Scattered red roof factory building; Sewage plant-type-one; Sewage plant-type-two; Ship; Solar power station; Sparse residential area;
        Square; Steelsmelter; Storage land; Tennis court; Thermal power plant; Vegetable plot; Water""".split(";")],
    aid="""Airport BareLand BaseballField Beach Bridge Center Church Commercial DenseResidential Desert Farmland Forest Industrial Meadow
        MediumResidential Mountain Park Parking Playground Pond Port RailwayStation Resort River School SparseResidential Square Stadium
        StorageTanks Viaduct""".split(),
    ucmerced="""agricultural airplane baseballdiamond beach buildings chaparral denseresidential forest freeway golfcourse harbor intersection
        mediumresidential mobilehomepark overpass parkinglot river runway sparseresidential storagetanks tenniscourt""".split(),
    rsscn7="aGrass bField cIndustry dRiverLake eForest fResident gParking".split(),
    eurosat="AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake".split(),
    firerisk="High Low Moderate Non-burnable Very_High Very_Low Water".split())
LAYOUTS = dict(resisc45=("NWPU-RESISC45/NWPU-RESISC45", "jpg"), rsd46=("RSD46-WHU", "jpg"), aid=("AID_dataset/AID", "jpg"), rsscn7=("RSSCN7-master", "jpg"),
               ucmerced=("UCMerced_LandUse/Images", "tif"), eurosat=("eurosat/2750", "jpg"))


def picture(path, seed=0, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


def says(parts, f, *args, **kwargs):
    with pytest.raises(ValueError) as e: f(*args, **kwargs)
    for part in [parts] if isinstance(parts, str) else parts: assert part in str(e.value), str(e.value)


def copy_of(name, root, images=2):
    "A tiny copy in the layout of the download; the folder of class folders."
    inside, suffix = LAYOUTS[name]
    for c, folder in enumerate(NAMES[name]):
        for k in range(images): picture(root/inside/folder/f"{folder}_{k + 1}.{suffix}", seed=c*images + k)
    (root/inside.split("/")[0]/"readme.txt").write_text("not an image")
    return root/inside


# ---- class folders

@pytest.mark.parametrize("name", LAYOUTS)
def test_a_download_is_read_from_any_of_its_folders_and_as_image_folder_reads_it(name, tmp_path):
    from torchvision.datasets import ImageFolder
    inner = copy_of(name, tmp_path)
    theirs = ImageFolder(str(inner))
    tops = [inner, *inner.parents][:1 + len(Path(LAYOUTS[name][0]).parts)]
    assert tops[-1] == tmp_path
    for root in tops:
        items = load_items(name, root)
        assert [str(items.root/p) for p in items.paths] == [p for p, _ in theirs.samples] and items.targets.tolist() == theirs.targets
        assert items.classnames == theirs.classes and items.name == name and items.split is None
    assert decode(items, Preprocess(8), tmp_path/"cache", progress=False).keep.all()


@pytest.mark.parametrize("name", NAMES)
def test_every_folder_name_becomes_words_of_its_own(name):
    info, said = DATASETS[name], class_words(NAMES[name], DATASETS[name].words)
    assert len(NAMES[name]) == info.num_classes == len(set(said))
    assert not [w for w in said if w != w.lower() or "_" in w or "-" in w.replace("snow-covered", "")], said


def test_words_that_a_text_encoder_can_read():
    said = {n: dict(zip(NAMES[n], class_words(NAMES[n], DATASETS[n].words))) for n in NAMES}
    assert said["eurosat"]["AnnualCrop"] == "annual crop" and said["eurosat"]["SeaLake"] == "sea or lake"
    assert said["firerisk"]["Very_High"] == "land with very high fire risk" and said["firerisk"]["Water"] == "water"
    assert said["rsd46"]["Lrregular farmland"] == "irregular farmland" and said["rsd46"]["Oiltank"] == "oil tank"
    spelt_otherwise = [dict(zip(["Lrregular farmland", "Graff"], ["Irregular farmland", "Ditch"])).get(n, n) for n in NAMES["rsd46"]]
    assert "irregular farmland" in class_words(spelt_otherwise, DATASETS["rsd46"].words)     # words of a registered set are offers
    says("names no class", class_words, spelt_otherwise, dict(DATASETS["rsd46"].words))     # a person's own are meant


def test_thresholds_are_published_ones_or_none():
    assert {n: i.thresholds for n, i in DATASETS.items() if i.thresholds} == {"ucmerced": (40, 15), "resisc45": (100, 20), "rsd46": (100, 20)}


def test_torchvisions_eurosat_reads_the_same_images(tmp_path):
    from torchvision.datasets import EuroSAT
    copy_of("eurosat", tmp_path)
    theirs, ours = EuroSAT(str(tmp_path)), load_items("eurosat", tmp_path)
    assert [str(ours.root/p) for p in ours.paths] == [p for p, _ in theirs.samples] and ours.targets.tolist() == theirs.targets


def test_firerisk_keeps_its_train_and_val_and_a_test_part_is_carved(tmp_path):
    for part, images in (("train", 5), ("val", 1)):
        for c, folder in enumerate(NAMES["firerisk"]):
            for k in range(images): picture(tmp_path/"FireRisk"/part/folder/f"270{c}{k}_4_-103.43_44.28.png", seed=9*c + k)
    items = load_items("firerisk", tmp_path)
    assert items.fingerprint == load_items("firerisk", tmp_path/"FireRisk").fingerprint and items.classnames == NAMES["firerisk"]
    s = longtail_split(items.targets, items.classnames, given=items.split)
    assert s.cls_num_list == [4]*7 and set(items.split[s.val]) == {"val"} and set(items.split[s.test]) == {"train"} and len(s.test) == 7
    torchgeo = pytest.importorskip("torchgeo.datasets", reason="torchgeo (extra geo) reads the same folders; not installed here")
    for part in ("train", "val"):
        theirs = torchgeo.FireRisk(str(tmp_path), part)
        mine = [i for i in range(len(items)) if items.split[i] == part]
        assert [str(items.root/items.paths[i]) for i in mine] == [p for p, _ in theirs.samples] and [t for _, t in theirs.samples] == items.targets[mine].tolist()


def test_two_ways_down_or_another_number_of_classes_is_no_guess(tmp_path):
    copy_of("eurosat", tmp_path)
    picture(tmp_path/"EuroSATallBands"/"River"/"1.png")
    says(["found 2 classes", "expected the 10 of EuroSAT (RGB)"], load_items, "eurosat", tmp_path)
    picture(tmp_path/"one"/"River"/"1.png")
    says([f"{tmp_path/'one'}: found one class only, 'River'"], load_items, "eurosat", tmp_path/"one")
    says("no such folder", load_items, "eurosat", tmp_path/"nowhere")
    says("one class only, 'eurosat'", load_items, "folder", copy_of("eurosat", tmp_path/"own").parents[1])   # one's own folder is never guessed at


def test_the_embedded_data_is_what_it_was(tmp_path):
    assert load_items(cache_dir=tmp_path).fingerprint == "85ea2627e889c5a1a9be1e55831b01e3dfdbf57be329e24fb4a23e7b0dd766e4"


# ---- lists of other people

THERE = "/data/Datasets/NWPU_RESISC45"


def decor(folder, name, root, parts):
    "Split lists in DECOR's way: absolute paths of their machine, a tab, an order of classes that is not alphabetical."
    for part, rows in parts.items():
        (folder/f"{name}_{part}_imb_0.01.txt").write_text("".join(f"{root}/{p}\t{label}\n" for p, label in rows))
    return {f"{part}_list": folder/f"{name}_{part}_imb_0.01.txt" for part in parts}


@pytest.fixture
def nwpu(tmp_path):
    "45 classes in a shuffled order, 2 images for training in the first and 1 in the others, 1 for testing."
    copy_of("resisc45", tmp_path/"disk", images=3)
    order = [NAMES["resisc45"][i] for i in np.random.default_rng(0).permutation(45)]
    rows = {"train": [(f"{n}/{n}_{k}.jpg", c) for c, n in enumerate(order) for k in range(1, 2 + (c == 0))], "test": [(f"{n}/{n}_3.jpg", c) for c, n in enumerate(order)]}
    for part in rows: np.random.default_rng(1).shuffle(rows[part])
    return tmp_path/"disk", order, {p: [(a, int(b)) for a, b in r] for p, r in rows.items()}


def test_decors_lists_are_read_as_they_are(nwpu, tmp_path):
    root, order, rows = nwpu
    lists = decor(tmp_path, "NWPU", THERE, rows)
    items = load_items("resisc45", root, **lists)
    assert items.name == "resisc45" and items.classnames == order and items.root.name == "NWPU-RESISC45"
    assert items.paths == [p for part in rows.values() for p, _ in part] and items.targets.tolist() == [c for part in rows.values() for _, c in part]
    s = longtail_split(items.targets, items.classnames, val=0, given=items.split)
    assert s.cls_num_list == [2] + [1]*44 and len(s.test) == 45 and not len(s.val)
    own = load_items("folder", root/LAYOUTS["resisc45"][0], **lists)
    assert own.paths == items.paths and own.fingerprint == items.fingerprint
    assert class_words(items.classnames, DATASETS["resisc45"].words)[order.index("cloud")] == "clouds"


def test_lists_may_be_relative_absolute_here_or_begin_at_any_folder(nwpu, tmp_path):
    root, order, rows = nwpu
    inner, read = root/LAYOUTS["resisc45"][0], set()
    for k, start in enumerate((".", "NWPU-RESISC45", inner, "D:/data/NWPU")):
        (tmp_path/str(k)).mkdir()
        lists = decor(tmp_path/str(k), "NWPU", start, rows)
        read.add(items_from_split_files(inner, *lists.values()).fingerprint if k else load_items("resisc45", root, **decor(tmp_path/"0", "NWPU", THERE, rows)).fingerprint)
    assert len(read) == 1
    outside = tmp_path/"elsewhere"; outside.mkdir()
    assert items_from_split_files(outside, *decor(tmp_path/"2", "NWPU", inner, rows).values()).paths[0].startswith("/")   # absolute paths that exist stay usable


def test_lists_that_do_not_fit_get_a_sentence(nwpu, tmp_path):
    root, order, rows = nwpu
    lists = decor(tmp_path, "NWPU", THERE, rows)
    says("train_list is not given, but test_list is; give train_list and test_list together", load_items, "resisc45", root, test_list=lists["test_list"])
    says("test_list is not given", load_items, "resisc45", root, train_list=lists["train_list"])
    (root/LAYOUTS["resisc45"][0]/rows["train"][3][0]).unlink()
    says([f"1 of 46 files are not under", f"first {rows['train'][3][0]}", "is root right?"], load_items, "resisc45", root, **lists)
    copy_of("aid", tmp_path/"b")
    says(["46 of 46 files are not under", f"first {THERE}"], load_items, "aid", tmp_path/"b", **lists)
    few = decor(tmp_path, "few", THERE, {p: [(a, c) for a, c in r if c < 3 and a != rows["train"][3][0]] for p, r in rows.items()})
    says("found 3 classes, expected the 45", load_items, "resisc45", root, **few)


# ---- So2Sat

class _File(dict):
    "Stands in for h5py.File where h5py is not installed: a mapping of arrays, kept as .npz under the same name."
    def __init__(self, path, mode):
        with open(path, "rb") as f: super().__init__(np.load(f))
    def __enter__(self): return self
    def __exit__(self, *_): pass


@pytest.fixture(params=["h5py", "stand-in"])
def write(request, monkeypatch):
    "(path, arrays) -> a file that `import h5py` reads."
    if request.param == "h5py":
        h5py = pytest.importorskip("h5py", reason="h5py (extra geo) is not installed here; the stand-in is tested")
        def save(path, **arrays):
            with h5py.File(path, "w") as f:
                for name, value in arrays.items(): f.create_dataset(name, data=value, compression="gzip")
    else:
        monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=_File))
        def save(path, **arrays):
            with open(path, "wb") as f: np.savez(f, **arrays)
    return save


def patches(n, seed, classes=17):
    rng, labels = np.random.default_rng(seed), np.arange(n) % classes
    return dict(sen1=rng.normal(size=(n, 32, 32, 8)), sen2=rng.uniform(0, .6, (n, 32, 32, 10)), label=np.eye(17)[labels])


def so2sat(root, write, **sizes):
    root.mkdir()
    for k, (name, n) in enumerate(sizes.items()): write(root/f"{name}.h5", **patches(n, k))
    return root


def test_so2sat_becomes_class_folders_once(write, tmp_path):
    root, cache = so2sat(tmp_path/"so2sat", write, training=40, validation=17, testing=18), tmp_path/"cache"
    items = load_items("so2sat", root, cache)
    assert items.classnames == list(LCZ) and items.name == "so2sat" and dict(zip(*np.unique(items.split, return_counts=True))) == {"test": 18, "train": 40, "val": 17}
    for part, k, n in (("train", 0, 40), ("val", 1, 17), ("test", 2, 18)):
        given = patches(n, k)
        for i in range(n):   # patch by patch, in the way of a ten-line reader
            path = f"{part}/{list(LCZ)[given['label'][i].argmax()]}/{i:06}.ppm"
            rgb = np.stack([given["sen2"][i, :, :, band] for band in (2, 1, 0)], -1)
            want = np.round(np.minimum(rgb.astype(np.float32)/np.float32(.3), 1)*255)
            seen = np.asarray(Image.open(items.root/path)).astype(int)
            assert items.targets[items.paths.index(path)] == given["label"][i].argmax() and np.abs(seen - want).max() <= 1
    stamp = (items.root/items.paths[0]).stat().st_mtime_ns
    again = load_items("so2sat", root, cache)
    assert again.fingerprint == items.fingerprint and (again.root/again.paths[0]).stat().st_mtime_ns == stamp
    assert decode(items, Preprocess(16), cache, progress=False).keep.all()
    assert class_words(items.classnames, DATASETS["so2sat"].words)[:2] == ["compact high-rise buildings", "compact mid-rise buildings"]
    write(root/"testing.h5", **patches(19, 5))
    assert len(load_items("so2sat", root, cache)) == len(items) + 1 and not [p for p in (cache/"data").iterdir() if p.name.startswith(".")]


def test_so2sats_third_version_has_no_validation(write, tmp_path):
    items = load_items("so2sat", so2sat(tmp_path/"random", write, training=34, testing=17), tmp_path/"cache")
    assert sorted(set(items.split)) == ["test", "train"]


def test_so2sat_files_that_are_not_get_a_sentence(write, tmp_path):
    says(["found no HDF5 files", "training.h5"], load_items, "so2sat", tmp_path)
    root = so2sat(tmp_path/"a", write, training=17)
    says(["found training.h5; expected", "testing.h5"], load_items, "so2sat", root)
    (root/"testing.h5").write_bytes(b"<html>404</html>")
    says(["testing.h5: cannot be read", "sen2 (N, 32, 32, 10)"], load_items, "so2sat", root, tmp_path/"c")
    write(root/"testing.h5", sen2=np.zeros((3, 32, 32, 10)), label=np.zeros((3, 5)))
    says(["label of shape (3, 5)"], load_items, "so2sat", root, tmp_path/"c")
    write(root/"testing.h5", label=np.zeros((3, 17)))
    says(["testing.h5: cannot be read", "sen2"], load_items, "so2sat", root, tmp_path/"c")
    assert not [p for p in (tmp_path/"c"/"data").iterdir() if p.suffix != ".lock"], "nothing half-written"


def test_without_h5py_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    for name in ("training", "testing"): (tmp_path/f"{name}.h5").touch()
    monkeypatch.setitem(sys.modules, "h5py", None)
    says(["needs h5py", "pip install h5py"], unpack_so2sat, tmp_path, tmp_path/"cache")


def test_torchgeo_sees_the_same_so2sat(tmp_path):
    pytest.importorskip("h5py", reason="h5py (extra geo) is not installed here")
    torchgeo = pytest.importorskip("torchgeo.datasets", reason="torchgeo (extra geo) is not installed here")
    import h5py
    def save(path, **arrays):
        with h5py.File(path, "w") as f:
            for name, value in arrays.items(): f.create_dataset(name, data=value)
    items = load_items("so2sat", so2sat(tmp_path/"s", save, training=34, validation=17, testing=17), tmp_path/"cache")
    for part, theirs in (("train", "train"), ("val", "validation"), ("test", "test")):
        data = torchgeo.So2Sat(str(tmp_path/"s"), split=theirs, bands=("S2_B02", "S2_B03", "S2_B04"))   # they keep the file's order of bands
        for i in range(len(data)):
            sample = data[i]
            path = f"{part}/{list(LCZ)[int(sample['label'])]}/{i:06}.ppm"
            want = (sample["image"].numpy()[::-1].transpose(1, 2, 0)/.3).clip(0, 1)*255
            assert np.abs(np.asarray(Image.open(items.root/path)) - want).max() <= 1, path
    assert [c.lower().split()[0] for c in torchgeo.So2Sat.classes][:8] == [w.split()[0] for w in LCZ.values()][:8]


def test_split_lists_reach_a_run_as_fields_of_its_config(tmp_path):
    from dmrs_nb.config import ConfigError, make_config
    from dmrs_nb.training import fit, prepare
    for name, grey in (("beach", 40), ("forest", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6): Image.new("RGB", (24, 24), (grey, grey + 5 * i, grey)).save(tmp_path / "images" / name / f"{i}.png")
    lines = lambda rows: "".join(f"images/{c}/{i}.png {k}\n" for k, c, i in rows)
    (tmp_path / "NWPU_train_imb_0.1.txt").write_text(lines([(0, "beach", i) for i in range(4)] + [(1, "forest", 0)]))
    (tmp_path / "NWPU_test_imb_0.1.txt").write_text(lines([(k, c, i) for k, c in enumerate(("beach", "forest")) for i in (4, 5)]))
    lists = dict(data_root=str(tmp_path / "images"), train_list=str(tmp_path / "NWPU_train_imb_0.1.txt"), test_list=str(tmp_path / "NWPU_test_imb_0.1.txt"),
                 cache_dir=str(tmp_path / "cache"), out_dir=str(tmp_path / "runs"), device="cpu")
    task = prepare(make_config("zero-shot", val_size=0, **lists), progress=False)
    assert list(task.split.cls_num_list) == [4, 1] and len(task.split.test) == 4 and not len(task.split.val) and "as the lists have them" in task.parts
    run = fit(make_config("linear-probe", val_size=0, steps=2, batch_size=2, **lists), progress=False)
    assert run.result()["data"]["cls_num_list"] == [4, 1] and run.config["train_list"] == lists["train_list"]
    assert fit(make_config("linear-probe", val_size=0, steps=2, batch_size=2, **lists), progress=False).path == run.path   # found again
    (tmp_path / "NWPU_train_imb_0.1.txt").write_text("images/beach/99.png 0\nimages/forest/0.png 1\n")
    with pytest.raises(ValueError, match="99.png"): prepare(make_config("zero-shot", **lists), progress=False)
    with pytest.raises(ConfigError, match="go together"): make_config("zero-shot", **{k: v for k, v in lists.items() if k != "test_list"})
