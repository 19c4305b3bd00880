"Whatever a person has in a folder, a file or a field: an answer or a sentence of ours, never a library's error and never a wait without end."
import json
import os
import shutil
import signal
import traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import dmrs_nb
from dmrs_nb.calibration import read_prior
from dmrs_nb.cli import parse_settings
from dmrs_nb.config import METHODS, RunConfig, load_config, make_config
from dmrs_nb.data import Preprocess, class_words, decode, items_from_split_files, scan, words
from dmrs_nb.longtail import shot_thresholds
from dmrs_nb.runs import read_json, read_rows, run_id
from dmrs_nb.training import find_run, image_sources, read_image, split_items

PACKAGE = str(Path(dmrs_nb.__file__).parent)


def fuzz(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def patience():
    "A test that waits without end fails instead."
    if not hasattr(signal, "SIGALRM"): yield; return
    def hang(*_): raise TimeoutError("this hangs")
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(600)
    try: yield
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, before)


@contextmanager
def sentence(*must_say):
    "Lets through what is raised by the kit itself, for a person: a ValueError or OSError with a sentence."
    try: yield
    except Exception as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        assert frame.filename.startswith(PACKAGE) and frame.line and "raise" in frame.line or isinstance(e, FileNotFoundError) and e.errno is None, f"raised in {frame}: {e!r}"
        assert isinstance(e, (ValueError, OSError)) and not isinstance(e, UnicodeError), repr(e)
        assert len(str(e)) > 10, repr(e)
        assert all(part in str(e) for part in must_say), (must_say, str(e))


# ---- folders

def png(seed, size=(9, 7), mode="RGB"):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


TYPICAL = st.sampled_from(["forest", "Forest", "FOREST", "river", "sea lake", "sea_lake", "SeaLake", " river ", ".forest", "..x", "@eaDir", "__MACOSX", "train", "Train", "test", "val",
                           "valid", "мост", "森林", "🌊", "e\u0301t\u00e9", "\u00e9te\u0301", "a.png", "1", "-", "___", "{}", "{0}", "%s", "$HOME", "~", "con", "a'b\"c", "a\\b", "a\nb", "\u202eabc"])
NAME = TYPICAL | st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda s: s not in (".", ".."))
FILE_NAME = st.tuples(NAME, st.sampled_from([".png", ".PNG", ".jpg", ".tif", ".gif", ".txt", "", ".heic"])).map("".join)
CONTENT = st.sampled_from(["good", "good", "good", "grey", "alpha", "empty", "cut", "html", "link", "loop", "gone", "pipe", "folder"]) | st.binary(max_size=40)
FOLDER = st.recursive(st.dictionaries(FILE_NAME, CONTENT, max_size=3), lambda inner: st.dictionaries(NAME, inner, min_size=1, max_size=4), max_leaves=6)


def write_file(path, content, k):
    if isinstance(content, bytes): path.write_bytes(content)
    elif content in ("good", "grey", "alpha"): png(k, mode=dict(good="RGB", grey="L", alpha="RGBA")[content]).save(path, format="PNG")
    elif content == "cut": png(k).save(path, format="PNG"); path.write_bytes(path.read_bytes()[:60])
    elif content == "html": path.write_text("<html>404</html>")
    elif content == "link": os.symlink("../" * (k % 4) or ".", path)
    elif content == "loop": os.symlink(path.name, path)
    elif content == "gone": os.symlink("nowhere.png", path)
    elif content == "pipe" and hasattr(os, "mkfifo"): os.mkfifo(path)
    elif content == "folder": path.mkdir()
    else: path.touch()


def build(root, tree):
    "Write a tree; what the file system has no room for (a name too long, two that it takes for one) is left out."
    root.mkdir(exist_ok=True)
    for k, (name, inside) in enumerate(tree.items()):
        try: build(root / name, inside) if isinstance(inside, dict) else write_file(root / name, inside, k)
        except (FileExistsError, NotADirectoryError): pass
        except OSError as e: assert e.errno in (36, 22), e   # a name too long for this system, or not allowed on it


@pytest.fixture(scope="module")
def place(tmp_path_factory): return tmp_path_factory.mktemp("fuzz")


GOOD = {f"{i}.png": "good" for i in range(3)}


@fuzz(200)
@given(tree=FOLDER, sound=st.booleans())
@example(tree={"a": GOOD, "b": {"up": "link", "x.png": "pipe", "again": {"y.png": "loop"}}}, sound=False)
@example(tree={"train": {"a": GOOD, "b": GOOD}, "test": {"a": {}}}, sound=False)
@example(tree={"a\nb": GOOD, "a b": {"c\n.png": "cut"}}, sound=False)
def test_folders(place, tree, sound):
    root = place / "folder"
    shutil.rmtree(root, ignore_errors=True)
    build(root, tree | {"beach": GOOD, "harbor": GOOD} if sound else tree)
    with sentence():
        items = scan(root)
        assert len(items) == len(items.targets) == len(set(items.paths)) and set(items.targets.tolist()) == set(range(len(items.classnames))) and len(items.fingerprint) == 64
        assert not [p for p in items.paths for part in Path(p).parts if part.startswith(".")], "hidden files are passed over"
        with sentence():
            cache = decode(items, Preprocess(8), place / "cache", workers=1, bad_images="skip", progress=False)
            assert [items.paths[i] for i in np.flatnonzero(~cache.keep)] == [p for p, _ in cache.bad] and all(reason for _, reason in cache.bad)
        with sentence("images cannot be read", "bad_images=skip"): decode(items, Preprocess(8), place / "cache", workers=1, progress=False)
        with sentence("class"): assert len(set(class_words(items.classnames))) == len(items.classnames)
        with sentence(): split_items(items, make_config("ce", data_root=str(root), out_dir=str(place)), cache.keep)


@fuzz(60)
@given(content=st.binary(max_size=300), name=FILE_NAME)
def test_new_images(place, content, name):
    path = place / "new" / name
    path.parent.mkdir(exist_ok=True)
    with sentence(): image_sources(path)
    try: path.write_bytes(content)
    except OSError: return   # no name for a file here
    [found] = image_sources(path)
    pixels, why = read_image(found, Preprocess(8))
    assert (pixels is None) == bool(why) and (pixels is None or pixels.shape == (3, 8, 8))
    with sentence("expected a finished run"): find_run(path)
    path.unlink()


# ---- names

@fuzz(300)
@given(st.lists(NAME | st.text(max_size=20), min_size=1, max_size=4, unique=True))
def test_names(names):
    for name in names:
        text = words(name)
        assert text == " ".join(text.split()) and words(text) == text and "_" not in text
        assert run_id({"a": 1}, [name, "ce"]).isascii()
    with sentence("class"):
        text = class_words(names)
        assert all(text) and len({t.lower() for t in text}) == len(names)


# ---- configs

VALUE = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(["none", "all", "auto", "q,v", "[0, 1]", "0.5,0.5,0.5", "cuda:1", "/", "~", ".."]),
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=4)
FIELDS = st.dictionaries(st.sampled_from([*RunConfig.model_fields, "methd", ""]) | st.text(max_size=5), VALUE, max_size=4)


@fuzz(250)
@given(FIELDS)
def test_configs(place, fields):
    path = place / "config.json"
    path.write_text(json.dumps(fields), encoding="utf-8", errors="surrogatepass")
    with sentence(str(path)):
        config = load_config(path)
        if not config.open: assert len(config.run_id) < 120 and config.run_id.isascii()
    with sentence(): make_config(**{k: v for k, v in fields.items() if k.isidentifier()})


@fuzz(120)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda s: s.encode(errors="surrogatepass")))
@example(b"[" * 1500)
@example(b'{"a":' * 1500)
@example(b"9" * 9999)
@example(b"\xef\xbb\xbf[]")
def test_files_that_are_no_config_no_words_no_shares_no_split(place, content):
    for suffix in ("json", "yaml", "csv", "txt"):
        path = place / f"any.{suffix}"
        path.write_bytes(content)
        with sentence(path.name): load_config(path)
        with sentence(path.name): read_json(path)
        with sentence(path.name): assert all(isinstance(row, dict) for row in read_rows(path))
        with sentence(): class_words(["beach", "forest"], path)
        with sentence(path.name): assert read_prior(str(path), ["beach", "forest"], [3, 1]).sum() > 0
        with sentence(): items_from_split_files(place, path, path)


@fuzz(150)
@given(st.dictionaries(st.sampled_from(["beach", "forest", "sea lake", "Beach", "class", ""]) | st.text(max_size=4), VALUE, max_size=3), st.sampled_from(["json", "yaml", "csv"]))
def test_shares_of_classes(place, shares, suffix):
    path = place / f"prior.{suffix}"
    text = "".join(f"{k},{v}\n" for k, v in shares.items()) if suffix == "csv" else json.dumps(shares)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    for given_as in (str(path), shares):
        with sentence():
            found = read_prior(given_as, ["beach", "forest", "SeaLake"], [5, 3, 1], ["beach", "forest", "sea lake"])
            assert found.shape == (3,) and (found >= 0).all() and np.isclose(found.sum(), 1)


@fuzz(150)
@given(st.lists(st.text(max_size=12) | st.tuples(st.sampled_from([*RunConfig.model_fields]), st.text(max_size=6)).map("=".join), max_size=3))
def test_settings(texts):
    with sentence():
        chosen = parse_settings(texts)
        with sentence(): make_config(**{k: v for k, v in chosen.items() if k.isidentifier()})


# ---- what a valid config asks of few images

@fuzz(150)
@given(counts=st.lists(st.integers(1, 9), min_size=2, max_size=4),
       given_parts=st.none() | st.lists(st.sampled_from(["train", "val", "test"]), min_size=36, max_size=36),
       fields=st.fixed_dictionaries(dict(method=st.sampled_from(sorted(METHODS)), val_size=st.floats(0, .6), test_size=st.floats(0, .6)),
                                    optional=dict(imb_type=st.sampled_from(["none", "exp", "step"]), imb_factor=st.floats(0.001, 1), img_max=st.integers(1, 20), split=st.sampled_from(["stratified", "published"]),
                                                  class_order=st.sampled_from(["alphabetical", "size", "random"]), train_fraction=st.floats(0.01, 1), split_seed=st.integers(0, 2**63))))
def test_splits_of_few_images(place, counts, given_parts, fields):
    from dmrs_nb.data import Items
    targets = np.repeat(np.arange(len(counts)), counts)
    names = [f"class {c}" for c in range(len(counts))]
    items = Items(place, [f"{i}.png" for i in range(len(targets))], targets, names, None if given_parts is None else np.array(given_parts[:len(targets)]))
    with sentence():
        config = make_config(data_root=str(place), out_dir=str(place), **fields)
        split = split_items(items, config)
        parts = [set(p.tolist()) for p in (split.train, split.val, split.test)]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2]) and min(split.cls_num_list) >= 1
        assert np.bincount(targets[split.train], minlength=len(counts)).tolist() == list(split.cls_num_list)
        many, few, reason = shot_thresholds(split.cls_num_list)
        assert many >= few and reason
