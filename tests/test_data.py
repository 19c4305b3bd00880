"What the data chapter cannot show: odd files, a full or read-only disk, and several processes at once."
import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
import unicodedata
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dmrs_nb.compat  # before open_clip
import dmrs_nb.data as data
from dmrs_nb.data import (AUGMENTATIONS, DATASETS, OPENAI_MEAN, OPENAI_STD, Batches, Items, Preprocess, backbone_preprocess,
                          check_preprocess, class_words, decode, default_cache_dir, eval_batches, eval_transform, items_from_split_files,
                          load_items, scan, to_rgb, train_transform, unpack_asset, words)

ASSETS = Path(__file__).parents[1] / "dmrs_nb" / "assets"


def picture(size=(40, 30), seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def folder(root, files):
    for k, name in enumerate(files):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=k).save(root/name)
    return root


@pytest.fixture
def small(tmp_path): return scan(folder(tmp_path/"data", ["forest/a.png", "forest/b.png", "river/a.png", "river/b.png", "river/c.png"]))


@pytest.fixture(scope="module")
def ucmerced(tmp_path_factory): return load_items(cache_dir=tmp_path_factory.mktemp("cache"))


def says(match, f, *args, **kwargs):
    with pytest.raises(ValueError) as e: f(*args, **kwargs)
    for part in [match] if isinstance(match, str) else match: assert part in str(e.value), str(e.value)


# ---- folders and split files

def test_order_is_that_of_torchvision_image_folder(ucmerced):
    from torchvision.datasets import ImageFolder
    theirs = ImageFolder(str(ucmerced.root))
    assert [str(ucmerced.root/p) for p in ucmerced.paths] == [p for p, _ in theirs.samples]
    assert ucmerced.targets.tolist() == theirs.targets and ucmerced.classnames == theirs.classes


@pytest.mark.parametrize("make, parts", [
    (lambda r: None, ["no such folder", "class folders"]),
    (lambda r: r.write_text("zip"), ["is a file", "unpack"]),
    (lambda r: r.mkdir(), ["no class folders", "(0 loose images)"]),
    (lambda r: folder(r, ["a.png", "b.png"]), ["no class folders (2 loose images)", "<class>/<image>"]),
    (lambda r: folder(r, ["river/a.png"]), ["one class only, 'river'", "a folder of its own"]),
    (lambda r: [folder(r, ["river/a.png"]), (r/"forest").mkdir()], ["'forest' holds no images", "remove the folder"]),
    (lambda r: folder(r, ["val/river/a.png", "test/river/a.png"]), ["no train folder"]),
    (lambda r: folder(r, ["train/river/a.png", "train/lake/a.png", "val/lake/a.png", "valid/lake/a.png"]), ["one split twice", "valid"]),
    (lambda r: folder(r, ["train/river/a.png", "train/lake/a.png", "test/forest/a.png"]), ["'forest' is not in", "training images"]),
    (lambda r: folder(r, ["train/river/a.png"]), ["one class only"]),
])
def test_a_wrong_folder_gets_a_sentence(tmp_path, make, parts):
    make(tmp_path/"root")
    says(parts, scan, tmp_path/"root")


def test_nested_foreign_and_hidden_files(tmp_path):
    root = folder(tmp_path/"r", ["a/deep/x.PNG", "a/y.png", "b/z.png", "b/.z.png", "__MACOSX/q.png", ".git/q.png"])
    (root/"b"/"Thumbs.db").touch(); (root/"notes.txt").touch()
    assert scan(root).paths == ["a/deep/x.PNG", "a/y.png", "b/z.png"]


def test_a_class_without_images_says_what_it_holds(tmp_path):
    root = folder(tmp_path/"r", ["a/1.png", "b/1.png"])
    (root/"c").mkdir(); (root/"c"/"1.heic").touch(); (root/"c"/"README").touch()
    says(["r/c: class 'c' holds no images (found 2 of other kinds: .heic, README)"], scan, root)


def test_folders_too_deep_or_named_like_a_split_are_explained(tmp_path):
    folder(tmp_path/"r", ["x/y/a/1.png", "x/y/b/1.png"]); folder(tmp_path/"t", ["train/1.png", "river/1.png"])
    says(["one class only, 'x'", f"{tmp_path/'r'/'x'/'y'} holds 2 folders: pass that"], scan, tmp_path/"r")
    says(["1 loose images", "train names a split, not a class"], scan, tmp_path/"t")


def test_links_that_lead_back_dead_ones_and_folders_named_like_images(tmp_path):
    root = folder(tmp_path/"r", ["a/1.png", "b/1.png", "b/d.png/1.png", "c/deep/1.png"])
    for name, target in {"a/loop": ".", "a/up": "..", "a/out": "../..", "b/again": "../c/deep", "c/twice": "deep",
                         "c/gone.png": "nowhere.png", "c/self.png": "self.png", "self": "self"}.items(): os.symlink(target, root/name)
    items = scan(root)
    assert items.paths == ["a/1.png", "b/1.png", "b/again/1.png", "b/d.png/1.png", "c/deep/1.png", "c/gone.png", "c/self.png"]
    bad = decode(items, Preprocess(16), tmp_path/"cache", bad_images="skip", progress=False).bad
    assert [p for p, _ in bad] == ["c/gone.png", "c/self.png"] and len(items.fingerprint) == 64, "a run that skips them can be described"
    os.symlink(".", root/"loop")
    says("class 'loop' holds no images", scan, root)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
def test_a_pipe_and_a_device_are_no_images_and_nobody_waits_for_them(small, tmp_path):
    os.mkfifo(small.root/"river"/"pipe.png"); os.symlink("/dev/zero", small.root/"river"/"zero.png")
    says(["river/pipe.png: not a regular file", "river/zero.png: not a regular file"],
         decode, scan(small.root), Preprocess(16), tmp_path, progress=False)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_a_name_that_is_no_text(small):
    os.rename(small.root/"river"/"a.png", os.fsencode(small.root/"river") + b"/\xff.png")
    says([r"'river/\udcff.png' is not UTF-8", "rename it"], scan, small.root)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "a\0b", "x"*300, "x/"*3000])
def test_a_data_root_that_no_system_knows(name): says(["data_root", "no such folder"], scan, name)


@contextmanager
def nobody():
    "Permissions bind everybody but root."
    if os.geteuid(): yield; return
    os.seteuid(65534)
    try:
        if not os.access(ASSETS, os.R_OK | os.X_OK, effective_ids=True): pytest.skip("this clone lies where only root may read")
        yield
    finally: os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of another kind")
def test_what_may_not_be_read(tmp_path, small):
    for part in (tmp_path, *(p for p in tmp_path.parents if "pytest" in str(p))): part.chmod(0o755)
    for p in small.paths: os.utime(small.root/p, (1, 1))
    cache, file, place = tmp_path/"cache", small.root/"river"/"a.png", small.root/"river"
    cache.mkdir(); cache.chmod(0o777)
    with nobody(): os.makedirs(cache/"images", exist_ok=True)
    file.chmod(0)
    with nobody(): says(["1 of 5 images", "river/a.png: Permission denied"], decode, scan(small.root), Preprocess(16), cache, progress=False)
    file.chmod(0o644)
    with nobody(): assert decode(scan(small.root), Preprocess(16), cache, progress=False).keep.all(), "what is mended is read again"
    place.chmod(0)
    with nobody(): says([f"{place}: cannot be listed (Permission denied)", "make it readable"], scan, small.root)
    place.chmod(0o755)


def test_fingerprint_follows_what_it_names(small):
    same = scan(small.root)
    moved = Items(small.root, small.paths, small.targets[::-1].copy(), small.classnames)
    assert same.fingerprint == small.fingerprint != moved.fingerprint
    picture((50, 50)).save(small.root/"forest"/"a.png")
    assert scan(small.root).fingerprint != small.fingerprint


def write(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_split_files(small, tmp_path):
    train = write(tmp_path/"train.txt", ["forest/a.png 0", "river/a.png 1"])
    test = write(tmp_path/"test.txt", ["river/b.png 1"])
    items = items_from_split_files(small.root, train, test)
    assert items.classnames == ["forest", "river"] and items.split.tolist() == ["train", "train", "test"]
    assert items_from_split_files(small.root, train, test, classnames=["wood", "water"]).classnames == ["wood", "water"]
    def read(lines, test=test, **kw): return items_from_split_files(small.root, write(tmp_path/"t", lines), test, **kw)
    says(["first forest/zzz.png", "is root right"], read, ["forest/zzz.png 0", "river/a.png 1"])
    says(["label 1 has no training image"], read, ["forest/a.png 0", "river/a.png 2"])
    says(["label 1 found", "classnames names 1"], read, ["forest/a.png 0", "river/a.png 1"], classnames=["forest"])
    says(["forest/a.png is in", "one split only"], read, ["forest/a.png 0", "river/a.png 1"], write(tmp_path/"u", ["forest/a.png 0"]))
    says(["one class only"], read, ["forest/a.png 0"], write(tmp_path/"u", ["forest/b.png 0"]))


def test_class_names_without_class_folders(small, tmp_path):
    flat = folder(tmp_path/"flat", ["train_0.png", "train_1.png", "test_0.png"])
    items = items_from_split_files(flat, write(tmp_path/"a", ["train_0.png 0", "train_1.png 1"]), write(tmp_path/"b", ["test_0.png 0"]))
    assert items.classnames == ["class 0", "class 1"]


# ---- the embedded data

def test_embedded_data(ucmerced):
    assert len(ucmerced) == 2099 and ucmerced.name == "ucmerced" and len(ucmerced.classnames) == DATASETS["ucmerced"].num_classes
    assert set(np.bincount(ucmerced.targets).tolist()) == {99, 100}


def test_a_damaged_copy_heals(tmp_path):
    root = unpack_asset("ucmerced", tmp_path)
    lost = root/"river"/"river00.jpg"
    before = lost.read_bytes()
    lost.unlink()
    assert unpack_asset("ucmerced", tmp_path) == root and lost.read_bytes() == before
    assert not [p for p in (tmp_path/"data").iterdir() if p.name.startswith(".")]


def asset(monkeypatch, tmp_path, members, sha256=None):
    path = tmp_path/"a.zip"
    with zipfile.ZipFile(path, "w") as z:
        for name in members: z.writestr(name, b"x")
    info = replace(DATASETS["ucmerced"], asset=str(path), sha256=sha256 or hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(data.DATASETS, "ucmerced", info)


@pytest.mark.parametrize("name", ["top/../../evil", "/etc/evil", "..\\evil", "C:/evil"])
def test_zip_slip_is_refused_before_anything_is_written(monkeypatch, tmp_path, name):
    asset(monkeypatch, tmp_path, ["top/a/1.jpg", name])
    says(["evil", "outside its folder"], unpack_asset, "ucmerced", tmp_path/"cache")
    assert not (tmp_path/"cache").exists()


def test_wrong_checksum_and_missing_asset(monkeypatch, tmp_path):
    asset(monkeypatch, tmp_path, ["top/a/1.jpg"], sha256="0"*64)
    says(["sha256 is", "expected 000000000000…", "install the package again"], unpack_asset, "ucmerced", tmp_path/"cache")
    (tmp_path/"a.zip").unlink()
    says(["not there", "install the package again"], unpack_asset, "ucmerced", tmp_path/"cache")


def test_load_items_names(small):
    assert load_items(data_root=small.root).paths == small.paths and load_items("folder", small.root).name == "data"
    says("did you mean 'resisc45'", load_items, "resisc-45")
    says("needs data_root", load_items, "folder")
    says(["found 2 classes", "data='folder'"], load_items, "ucmerced", small.root)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DMRS_NB_CACHE", str(tmp_path/"mine"))
    assert default_cache_dir() == tmp_path/"mine"
    monkeypatch.delenv("DMRS_NB_CACHE"); monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path)); monkeypatch.setattr(sys, "platform", "linux")
    assert default_cache_dir() == tmp_path/"dmrs_nb"


# ---- preprocessing

SETTINGS = [(OPENAI_MEAN, OPENAI_STD, "bicubic", "shortest"), ((.5,)*3, (.5,)*3, "bicubic", "squash"),
            ((.485, .456, .406), (.229, .224, .225), "bilinear", "shortest")]


@pytest.mark.parametrize("mean, std, interpolation, mode", SETTINGS)
@pytest.mark.parametrize("size", [(40, 30), (31, 77), (64, 64), (65, 64), (1, 1), (200, 33)])
def test_preprocessing_is_open_clips(mean, std, interpolation, mode, size):
    import open_clip
    image = picture(size)
    theirs = open_clip.image_transform(32, is_train=False, mean=mean, std=std, interpolation=interpolation, resize_mode=mode)(image)
    cfg = dict(size=32, mean=mean, std=std, interpolation=interpolation, resize_mode=mode)
    ours = backbone_preprocess(cfg)
    torch.testing.assert_close(eval_transform(ours)(torch.tensor(ours.fit(image)).permute(2, 0, 1)), theirs, rtol=0, atol=1e-6)


def test_a_wrong_normalisation_is_caught_wherever_it_enters(small, tmp_path):
    right, pixels = Preprocess(16), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    wrongs = dict(mean=(.485, .456, .406), std=(1.,)*3, image_size=17, interpolation="bilinear", resize_mode="squash")
    cache = decode(small, right, tmp_path, progress=False)
    for name, value in wrongs.items():
        wrong = replace(right, **{name: value})
        says([f"preprocess.{name}: found", str(value)], check_preprocess, wrong, right)
        for augmentation in AUGMENTATIONS:
            says(f"preprocess.{name}", Batches, cache, small.targets, [0, 1], 2, train_transform(augmentation, wrong))
        if name in ("mean", "std"): assert not torch.allclose(eval_transform(wrong)(pixels), eval_transform(right)(pixels), atol=1e-3)
    check_preprocess(replace(right, mean=list(OPENAI_MEAN)), right)


def test_unknown_settings_name_the_nearest():
    says("did you mean 'bicubic'", Preprocess, 32, interpolation="bicubc")
    says("did you mean 'shortest'", Preprocess, 32, resize_mode="shortes")
    says("image_size 0", Preprocess, 0)
    says(["(224, 112)", "square"], backbone_preprocess, dict(size=(224, 112)))
    says("did you mean 'autoaugment'", train_transform, "auto-augment", Preprocess(32))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 40), st.sampled_from(["shortest", "squash"]))
def test_any_size_fits(w, h, size, mode): assert Preprocess(size, resize_mode=mode).fit(Image.new("RGB", (w, h))).shape == (size, size, 3)


def test_a_long_strip_takes_no_gigabytes(): assert Preprocess(224).fit(Image.new("L", (1, 60_000))).shape == (224, 224, 3)


def test_kinds_of_image(tmp_path):
    rgb, grey = np.asarray(picture()), picture(mode="L")
    assert np.array_equal(np.asarray(to_rgb(grey))[..., 1], np.asarray(grey))
    deep = Image.fromarray(np.linspace(0, 3000, 1200).astype(np.uint16).reshape(30, 40))
    deep.save(tmp_path/"deep.png"); deep.save(tmp_path/"deep.tif")
    for name in ("deep.png", "deep.tif"):
        seen = np.asarray(to_rgb(Image.open(tmp_path/name)))
        assert seen.min() == 0 and seen.max() == 255 and 110 < seen.mean() < 145
    assert np.asarray(to_rgb(Image.fromarray(np.full((4, 4), 700, np.uint16)))).max() == 0  # constant, no NaN
    assert np.asarray(to_rgb(Image.fromarray(np.array([[0., np.nan], [.5, 1.]], np.float32)))).shape == (2, 2, 3)
    clear = Image.fromarray(np.dstack([rgb, np.full(rgb.shape[:2], 0, np.uint8)]))
    assert np.asarray(to_rgb(clear)).max() == 0
    opaque = Image.fromarray(np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)]))
    assert np.array_equal(np.asarray(to_rgb(opaque)), rgb)
    for mode in ("1", "P", "CMYK", "LA", "YCbCr", "HSV", "LAB", "I", "F"): assert to_rgb(picture(mode=mode)).mode == "RGB"


def kept(tmp_path, image, name, **options):
    image.save(tmp_path/name, **options)
    with Image.open(tmp_path/name) as read: return np.asarray(to_rgb(read))


def test_what_a_file_says_about_its_pixels_is_believed(tmp_path):
    halves = Image.fromarray(np.repeat(np.array([[10], [200]], np.uint8), 8, 1).repeat(4, 0))  # dark above, light below
    upright = Image.Exif(); upright[0x0112] = 3
    for name in ("t.jpg", "t.png", "t.webp", "t.tif"):  # turned by half, and saying so
        rows = kept(tmp_path, halves.convert("RGB").rotate(180), name, exif=upright).mean((1, 2))
        assert rows[0] < 30 and rows[-1] > 180, name
    two = Image.new("P", (4, 4), 1); two.putpalette([250, 250, 250, 90, 80, 70]); two.putpixel((0, 0), 0)
    for name in ("p.png", "p.gif"):  # colour 0 is transparent
        seen = kept(tmp_path, two, name, transparency=0)
        assert seen[0, 0].tolist() == [0, 0, 0] and seen[1, 1].tolist() == [90, 80, 70], name
    assert kept(tmp_path, halves.convert("RGB"), "key.png", transparency=(200, 200, 200)).max() == 10
    assert kept(tmp_path, halves, "one.tif", save_all=True, append_images=[Image.new("L", (9, 9), 99)]).shape == (8, 8, 3)  # the first of two
    for value in (np.nan, np.inf, -np.inf, -3.4e38):  # no data in a third of a height map: black, and the rest keeps its contrast
        heights = np.linspace(5, 6, 900, dtype=np.float32).reshape(30, 30); heights[:10] = value
        seen = kept(tmp_path, Image.fromarray(heights), "h.tif")[..., 0]
        assert seen[:10].max() == 0 and seen.max() == 255 and 100 < seen[10:].mean() < 155, value
    assert kept(tmp_path, Image.fromarray(np.full((4, 4), np.nan, np.float32)), "n.tif").max() == 0
    (tmp_path/"exif.jpg").write_bytes((tmp_path/"t.jpg").read_bytes().replace(b"Exif\0\0MM", b"Exif\0\0??"))
    with Image.open(tmp_path/"exif.jpg") as damaged: assert to_rgb(damaged).size == (8, 8)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(["jpg", "png", "tif", "gif", "bmp", "webp", "jp2", "avif", "qoi", "tga", "pcx", "ppm"]), st.binary(min_size=1, max_size=6),
       st.floats(0, 1), st.booleans())
def test_damaged_files_give_an_image_or_a_reason(tmp_path_factory, kind, junk, where, cut):
    path = tmp_path_factory.getbasetemp()/f"damaged.{kind}"
    try: picture().save(path)
    except (KeyError, OSError): return  # a Pillow without this format
    whole = path.read_bytes()
    at = int(where*len(whole))
    path.write_bytes(whole[:at] if cut else whole[:at] + junk + whole[at + len(junk):])
    image, reason = data._read_one(path, Preprocess(16))
    assert (image is None and reason) or (image.shape == (16, 16, 3) and reason is None)


# ---- the cache

def test_cache_is_keyed_by_content(small, tmp_path):
    first = decode(small, Preprocess(16), tmp_path, progress=False)
    assert decode(small, Preprocess(16, mean=(0.,)*3), tmp_path, progress=False).path == first.path  # statistics are applied later
    assert decode(small, Preprocess(16, resize_mode="squash"), tmp_path, progress=False).path != first.path
    elsewhere = folder(tmp_path/"copy", small.paths)
    assert decode(scan(elsewhere), Preprocess(16), tmp_path, progress=False).path == first.path
    file = small.root/small.paths[0]
    size = file.stat().st_size
    changed = bytearray(file.read_bytes()); changed[-20] ^= 255  # same size, other bytes
    file.write_bytes(changed)
    assert file.stat().st_size == size
    with pytest.raises(ValueError, match="forest/a.png"): decode(small, Preprocess(16), tmp_path, progress=False)


def test_known_content_is_not_read_again(small, tmp_path, monkeypatch):
    for p in small.paths: os.utime(small.root/p, (1, 1))
    first = decode(small, Preprocess(16), tmp_path, progress=False)
    monkeypatch.setattr(data, "_digest", lambda path: pytest.fail("read again"))
    assert decode(small, Preprocess(16), tmp_path, progress=False).path == first.path


def test_a_damaged_cache_is_rebuilt(small, tmp_path):
    first = decode(small, Preprocess(16), tmp_path, progress=False)
    want, path = first.images.copy(), first.path
    del first
    (path/"images.npy").write_bytes((path/"images.npy").read_bytes()[:-100])
    assert np.array_equal(decode(small, Preprocess(16), tmp_path, progress=False).images, want)
    for name, text in (("meta.json", "{"), ("meta.json", "[]"), ("meta.json", '{"bad": [[9, "x"]]}'), ("images.npy", "")):  # "": a power cut
        (path/name).write_text(text)
        assert np.array_equal(decode(small, Preprocess(16), tmp_path, progress=False).images, want), (name, text)


def test_a_damaged_note_of_known_content_is_not_believed(small, tmp_path):
    for p in small.paths: os.utime(small.root/p, (1, 1))
    first = decode(small, Preprocess(16), tmp_path, progress=False)
    [note] = (tmp_path/"images"/"seen").iterdir()
    for content in (b"", b"\xff", note.read_bytes()[:5]):
        note.write_bytes(content)
        assert decode(small, Preprocess(16), tmp_path, progress=False).path == first.path


def test_bad_files(small, tmp_path):
    river, whole = small.root/"river", tmp_path/"whole.jpg"
    picture((64, 64)).save(whole)
    (river/"cut.jpg").write_bytes(whole.read_bytes()[:900])
    (river/"page.jpg").write_text("<html>not found</html>")
    (river/"empty.png").touch()
    picture((1, 1)).save(river/"pixel.png")
    items = scan(small.root)
    says(["3 of 9 images", "river/cut.jpg: image file is truncated", "river/empty.png: not an image", "bad_images=skip"],
         decode, items, Preprocess(16), tmp_path, progress=False)
    cache = decode(items, Preprocess(16), tmp_path, bad_images="skip", progress=False)
    assert [p for p, _ in cache.bad] == ["river/cut.jpg", "river/empty.png", "river/page.jpg"]
    assert cache.keep.sum() == 6 and not cache.images[~cache.keep].any() and cache.images[items.paths.index("river/pixel.png")].any()
    everything, transform = np.arange(len(items)), train_transform("none", Preprocess(16))
    says(["could not be read", "cache.keep"], Batches, cache, items.targets, everything, 2, transform)
    says("did you mean 'skip'", decode, items, Preprocess(16), tmp_path, bad_images="skp")
    for k in range(30): (river/f"no{k:02}.png").touch()
    with pytest.raises(ValueError) as e: decode(scan(small.root), Preprocess(16), tmp_path, progress=False)
    *every, last = str(e.value).splitlines()
    assert sum("not an image" in line for line in every) == 32 and "33 of 39 images cannot be read, the first is river/cut.jpg" in last


def test_a_file_that_vanished_and_a_bomb(small, tmp_path, monkeypatch):
    (small.root/"river"/"a.png").unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    cache = decode(small, Preprocess(16), tmp_path, bad_images="skip", progress=False)
    assert dict(cache.bad)["river/a.png"] == "No such file or directory" and "decompression bomb" in dict(cache.bad)["river/b.png"]
    assert "Cut it into tiles" in dict(cache.bad)["river/b.png"]


def test_cache_folder_that_cannot_be_written(small, tmp_path):
    (tmp_path/"file").touch()
    says(["cannot write 5 decoded images", "DMRS_NB_CACHE"], decode, small, Preprocess(16), tmp_path/"file", progress=False)
    says(["cannot write UC Merced", "DMRS_NB_CACHE"], unpack_asset, "ucmerced", tmp_path/"file")


def test_a_finished_read_only_cache_is_used(small, tmp_path, monkeypatch):
    first = decode(small, Preprocess(16), tmp_path, progress=False)
    def refuse(*args, **kwargs): raise PermissionError(errno.EACCES, "Permission denied")
    for where, name in ((data, "FileLock"), (Path, "mkdir"), (Path, "write_text")): monkeypatch.setattr(where, name, refuse)
    assert decode(small, Preprocess(16), tmp_path, progress=False).path == first.path
    says(["Permission denied", "make it writable"], decode, small, Preprocess(17), tmp_path, progress=False)


def left_behind(cache): return [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"] if cache.exists() else []


@contextmanager
def files_up_to(size):
    "A disk that is full after `size` bytes of a file."
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 3000])  # nothing, the header only, a part of the images
def test_full_disk_leaves_nothing_behind(small, tmp_path, size):
    for p in small.paths: os.utime(small.root/p, (1, 1))
    with files_up_to(size):
        says(["cannot write 5 decoded images (File too large)", "make room"], decode, small, Preprocess(32), tmp_path/"cache", progress=False)
        says(["cannot write UC Merced", "make room"], unpack_asset, "ucmerced", tmp_path/"cache")
    assert not [p for p in left_behind(tmp_path/"cache") if p.parent.name != "seen" or p.name.startswith(".")]
    assert decode(small, Preprocess(32), tmp_path/"cache", progress=False).keep.all()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_by_its_own_name(small, tmp_path, monkeypatch, number):
    def full(temp, *args): (temp/"images.npy").write_bytes(b"half"); raise OSError(number, os.strerror(number))
    monkeypatch.setattr(data, "_write_images", full)
    says([os.strerror(number), "make room"], decode, small, Preprocess(16), tmp_path/"cache", progress=False)
    assert not [p for p in left_behind(tmp_path/"cache") if p.parent.name != "seen"]


CHILD = """
import sys, time, torch; torch.set_num_threads(1)
import dmrs_nb.data as data
from dmrs_nb.data import *
if sys.argv[2:]:  # slow enough to be killed in the middle
    read = data._read_one
    data._read_one = lambda *args: time.sleep(.02) or read(*args)
items = load_items(cache_dir=sys.argv[1])
few = Items(items.root, items.paths[:600], items.targets[:600], items.classnames)
cache = decode(few, Preprocess(32), cache_dir=sys.argv[1], progress=False, workers=1)
print(cache.path, len(items), int(cache.images.sum(dtype="int64")))
"""


def test_processes_that_start_at_once_agree_and_one_that_is_killed_spoils_nothing(tmp_path):
    def start(*slow): return subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), *slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    def half_written(): return [p for p in tmp_path.glob("images/.*/images.npy") if p.stat().st_size]
    victim, deadline = start("slow"), time.time() + 100
    while not half_written() and victim.poll() is None and time.time() < deadline: time.sleep(.01)
    others = [start(), start()]  # they come to the lock while it is held
    time.sleep(.5)
    assert victim.poll() is None and half_written(), "the victim was done before it was killed"
    victim.kill(); victim.communicate()
    said = [p.communicate(timeout=120) for p in others]
    assert all(p.returncode == 0 for p in others), said
    [(out, _), again] = said
    items = load_items(cache_dir=tmp_path)
    want = sum(int(Preprocess(32).fit(Image.open(items.root/p)).sum(dtype="int64")) for p in items.paths[:600])
    assert out == again[0] and int(out.split()[-1]) == want
    assert not [p for sub in ("data", "images") for p in (tmp_path/sub).iterdir() if p.name.startswith(".")]


def test_what_a_killed_process_left_is_swept(small, tmp_path):
    first = decode(small, Preprocess(16), tmp_path, progress=False)
    left = first.path.parent/f".{first.path.name}.abc"
    left.mkdir(); (first.path/"meta.json").unlink()
    decode(small, Preprocess(16), tmp_path, progress=False)
    assert not left.exists()


def test_cache_travels_as_a_path(small, tmp_path):
    big = decode(small, Preprocess(256), tmp_path, progress=False)
    sent = pickle.dumps(big)
    assert len(sent) < 5_000 and np.array_equal(pickle.loads(sent).images, big.images) and isinstance(pickle.loads(sent).images, np.memmap)
    with pytest.raises(ValueError): big.images[0] = 0  # read-only
    assert json.loads((big.path/"meta.json").read_text())["preprocess"]["image_size"] == 256


# ---- randomness

@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_a_batch_is_a_function_of_seed_and_step(small, tmp_path, name):
    p = Preprocess(24)
    cache, stream = decode(small, p, tmp_path, progress=False), np.arange(5).repeat(4)
    def make(seed): return Batches(cache, small.targets, stream, 6, train_transform(name, p), seed)
    torch.manual_seed(0); a = [x for x, _ in make(1)]
    torch.manual_seed(9); before = torch.get_rng_state()
    b = {k: make(1)[k] for k in (3, 1, 0, 2)}
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(x) for x in a] == [6, 6, 6, 2] and all(torch.equal(a[k], x) for k, (x, _) in b.items())
    assert a[0].dtype == torch.float32 and a[0].shape == (6, 3, 24, 24) and torch.isfinite(torch.cat(a)).all()
    assert torch.equal(torch.cat([b[k][1] for k in range(4)]), torch.as_tensor(small.targets[stream]))
    other = torch.cat([x for x, _ in make(2)])
    assert torch.equal(other, torch.cat(a)) == (name == "none")


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_one_image_and_another_draw_for_each(name):
    transform, image = train_transform(name, Preprocess(24)), torch.tensor(np.asarray(picture((24, 24)))).permute(2, 0, 1)
    torch.manual_seed(0)
    many = [transform(image) for _ in range(12)]
    assert many[0].shape == (3, 24, 24)
    assert (len({m.numpy().tobytes() for m in many}) > 3) == (name != "none")
    if transform.batched and name != "none":
        x = transform(image.expand(8, 3, 24, 24))
        assert len({m.numpy().tobytes() for m in x}) == 8


def test_aerial_without_chance_is_the_evaluation_transform_up_to_symmetry():
    p, image = Preprocess(24), torch.tensor(np.asarray(picture((24, 24)))).permute(2, 0, 1)
    still = data.AerialAugment(p, scale=(1, 1), ratio=(1, 1), brightness=0, contrast=0, saturation=0)
    torch.manual_seed(0)
    seen = still(image.expand(64, 3, 24, 24))
    eight = [torch.rot90(f, k, (1, 2)) for f in (image, image.flip(2)) for k in range(4)]
    distance = torch.stack([(seen - p.normalize(e)).abs().amax((1, 2, 3)) for e in eight])
    assert distance.min(0).values.max() < 1e-3 and len(set(distance.argmin(0).tolist())) == 8


def test_a_transform_of_ones_own(small, tmp_path):
    cache = decode(small, Preprocess(8), tmp_path, progress=False)
    x, _ = Batches(cache, small.targets, [0, 1], 2, lambda image: image.float() + torch.rand(()))[0]
    assert x.shape == (2, 3, 8, 8)


def test_batches_refuse_what_cannot_be(small, tmp_path):
    cache, t = decode(small, Preprocess(8), tmp_path, progress=False), train_transform("none", Preprocess(8))
    says("found 4, expected 5", Batches, cache, small.targets[:4], [0], 1, t)
    says("0…5, expected 0…4", Batches, cache, small.targets, [0, 5], 1, t)
    says("batch_size 0", Batches, cache, small.targets, [0], 0, t)
    says("no indices", Batches, cache, small.targets, [], 1, t)
    with pytest.raises(IndexError): Batches(cache, small.targets, [0], 1, t)[1]
    assert [len(b) for b in eval_batches(cache, [4, 0, 1], 2, t)] == [2, 1]


# ---- words

UCMERCED = """agricultural,airplane,baseball diamond,beach,buildings,chaparral,dense residential,forest,freeway,golf course,harbor,
intersection,medium residential,mobile home park,overpass,parking lot,river,runway,sparse residential,storage tanks,tennis court"""
RESISC45 = """airplane,airport,baseball_diamond,basketball_court,beach,bridge,chaparral,church,circular_farmland,cloud,commercial_area,
dense_residential,desert,forest,freeway,golf_course,ground_track_field,harbor,industrial_area,intersection,island,lake,meadow,
medium_residential,mobile_home_park,mountain,overpass,palace,parking_lot,railway,railway_station,rectangular_farmland,river,
roundabout,runway,sea_ice,ship,snowberg,sparse_residential,stadium,storage_tank,tennis_court,terrace,thermal_power_station,wetland"""
UCMERCED, RESISC45 = (names.replace("\n", "").split(",") for names in (UCMERCED, RESISC45))


def test_words_of_ucmerced(ucmerced): assert class_words(ucmerced.classnames) == UCMERCED


def test_words_survive_any_spelling():
    for name in RESISC45:
        want = name.replace("_", " ")
        camel = "".join(part.capitalize() for part in name.split("_"))
        assert {words(n) for n in (name, name.replace("_", ""), name.replace("_", "-"), want, camel, name.upper())} == {want}, name
    assert len(class_words(RESISC45)) == 45
    assert words("мост") == "мост" and words("Forêt dense") == "forêt dense" and words("harbor2") == "harbor 2"
    assert words(unicodedata.normalize("NFD", "Forêt")) == "forêt" and words("नदी_किनारा") == "नदी किनारा"  # as macOS writes it; marks are letters
    assert class_words([unicodedata.normalize("NFD", "Forêt"), "b"], {"Forêt": "wood"}) == ["wood", "b"]


@pytest.mark.parametrize("info", DATASETS.values(), ids=list(DATASETS))
def test_registered_words_are_all_different(info): assert len(set(info.words.values())) == len(info.words)


def test_override_files(tmp_path):
    (tmp_path/"w.json").write_text('{"aGrass": "grassland"}')
    (tmp_path/"list.yaml").write_text("- aGrass\n"); (tmp_path/"broken.yaml").write_text("aGrass: [")
    assert class_words(["aGrass", "bField"], tmp_path/"w.json") == ["grassland", "b field"]
    assert class_words(["aGrass", "bField"], str(tmp_path/"w.json")) == ["grassland", "b field"]
    says("cannot read the override file", class_words, ["aGrass"], tmp_path/"none.yaml")
    says("not JSON or YAML", class_words, ["aGrass"], tmp_path/"broken.yaml")
    for name in ("list.yaml", "number.yaml", "empty.yaml"):
        (tmp_path/name).write_text(dict(number="aGrass: 3", empty="").get(name[:-5], "- aGrass"))
        says([name, "one `folder name: words` pair a line"], class_words, ["aGrass"], tmp_path/name)
    says("one `folder name: words` pair a line", class_words, ["aGrass"], {"aGrass": 3})
    for name, text in {"deep.json": "["*9999, "date.yaml": "aGrass: 2001-99-99", "latin.yaml": "aGrass: Gr\xe4ser"}.items():
        (tmp_path/name).write_text(text, encoding="latin-1")
        says([name, "not JSON or YAML"], class_words, ["aGrass"], tmp_path/name)
    says(["'river' and 'River'", "'river'"], class_words, ["River", "river"][::-1])
    says(["'a' and 'b'", "'forest'"], class_words, ["a", "b"], {"a": "Forest", "b": "forest"})  # one prompt to a tokenizer
    says("gives no words", class_words, ["___", "river"])
    says(["'Sea_Lake' and 'SeaLake'", "sea lake"], class_words, ["Sea_Lake", "SeaLake"])
