"Long-tail profiles and splits against the published numbers, against an independent reading of the published code, and against bad input."
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmrs_nb.longtail import (class_order, cls_num_list, img_num_per_cls, longtail_split, nearest, published_split, read_split_file,
                              shot_groups, shot_thresholds, stratified_split, thin, write_split_file)

settings.register_profile("any machine", deadline=None)  # a busy core is not a failure
settings.load_profile("any machine")

GOLDEN = np.load(Path(__file__).parent / "golden" / "golden.npz")
IMAGES = {"resisc45": 31500, "ucmerced": 2100, "aid_like": 10000, "rsd46_like": 117000}
PROFILES = [key for key in GOLDEN.files if key.startswith("profile/")]
some_targets = st.lists(st.integers(3, 40), min_size=2, max_size=8).map(lambda n: np.repeat(np.arange(len(n)), n))


@pytest.mark.parametrize("key", PROFILES)
def test_profile_is_the_published_one(key):
    _, data, imb_type, imb_factor = key.split("/")
    C = len(GOLDEN[key])
    img_max = int(IMAGES[data] * 0.8) // C if data != "rsd46_like" else int(GOLDEN[key][0])
    assert img_num_per_cls(img_max, C, imb_type, float(imb_factor)) == GOLDEN[key].tolist()


def test_there_are_profiles_to_compare():
    assert len(PROFILES) == 4 * 3 * 4


@given(st.integers(1, 5000), st.integers(2, 100), st.sampled_from(["exp", "step", "none"]), st.floats(0.001, 1))
def test_a_profile_never_rises_and_keeps_its_ends(img_max, C, imb_type, rho):
    n = img_num_per_cls(img_max, C, imb_type, rho)
    assert len(n) == C and n[0] == img_max and all(a >= b for a, b in zip(n, n[1:]))
    assert n[-1] == (img_max if imb_type == "none" else int(img_max * rho ** 1.0))


@pytest.mark.parametrize("args, words", [
    ((10, 3, "expo", .1), "Did you mean 'exp'"), ((10, 3, "exp", 0.), "(0, 1]"), ((10, 3, "exp", 1.5), "imb_factor: found 1.5"),
    ((10, 3, "exp", float("nan")), "imb_factor"), ((10, 1, "exp", .1), "num_classes: found 1"), ((0, 3, "exp", .1), "img_max: found 0")])
def test_a_profile_without_meaning_is_refused(args, words):
    with pytest.raises(ValueError) as error: img_num_per_cls(*args)
    assert words in str(error.value)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=30), st.integers(0, 2**31))
def test_an_order_is_a_permutation_and_size_is_sorted(available, seed):
    for order in ("alphabetical", "size", "random"):
        assert sorted(class_order(available, order, seed)) == list(range(len(available)))
    by_size = np.asarray(available)[class_order(available, "size")]
    assert (np.diff(by_size) <= 0).all()


@pytest.mark.parametrize("name, known, hint", [
    ("mehtod", ["method", "loss"], "; did you mean 'method'?"), ("qwertz", ["method", "loss"], ""), ("x", [], ""),
    (10, [100, "exp"], "; did you mean '100'?"), (None, {"none": 0}, "; did you mean 'none'?")])
def test_the_nearest_name_ends_a_sentence_or_is_silent(name, known, hint): assert nearest(name, known) == hint


# ------------------------------------------------------------------ splits

@given(some_targets, st.floats(0, .45), st.floats(0, .45), st.integers(0, 99))
def test_a_stratified_split_is_a_partition_with_every_class_in_training(targets, val, test, seed):
    parts = stratified_split(targets, val, test, seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(targets)))
    C, n = targets.max() + 1, np.bincount(targets)
    count = {part: np.bincount(targets[idx], minlength=C) for part, idx in parts.items()}
    assert (count["train"] >= 1).all()
    if test: assert (count["test"] >= 1).all()
    big = n >= 10
    assert (np.abs(count["test"] - n * test)[big] <= 1).all() and (np.abs(count["val"] - n * val)[big] <= 1).all()
    assert all((np.diff(idx) > 0).all() for idx in parts.values())


def test_adding_images_to_one_class_leaves_the_others_where_they_were():
    few, more = np.repeat([0, 1, 2], [20, 20, 20]), np.repeat([0, 1, 2], [20, 35, 20])
    test_few, test_more = stratified_split(few)["test"], stratified_split(more)["test"]
    assert test_few[few[test_few] == 0].tolist() == test_more[more[test_more] == 0].tolist()
    assert (test_few[few[test_few] == 2] + 15).tolist() == test_more[more[test_more] == 2].tolist()


def test_the_split_of_a_seed_is_pinned():
    "NumPy promises that RandomState never changes; this is the line that would tell."
    assert stratified_split(np.repeat([0, 1], 10), seed=3)["test"].tolist() == [1, 9, 11, 15]


def test_the_published_test_indices():
    assert published_split(31500)["test"].tolist() == GOLDEN["split/resisc45/test_idx"].tolist()


@given(st.integers(10, 400), st.sampled_from([.1, .2, .25, .3]), st.integers(0, 9))
def test_the_published_split_is_random_split_wherever_that_works(n, ratio, seed):
    ours, lengths = published_split(n, ratio, seed), [int(n * (1 - ratio)), int(n * ratio)]
    assert sorted([*ours["train"], *ours["test"]]) == list(range(n)) and len(ours["test"]) == lengths[1]
    if sum(lengths) == n:
        theirs = torch.utils.data.random_split(range(n), lengths, generator=torch.Generator().manual_seed(seed))
        assert ours["train"].tolist() == theirs[0].indices and ours["test"].tolist() == theirs[1].indices


def test_nothing_touches_the_global_random_state():
    np.random.seed(1), torch.manual_seed(1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    longtail_split(np.repeat([0, 1], 30), ["a", "b"], "exp", .5, order="random")
    longtail_split(np.repeat([0, 1], 30), ["a", "b"], "exp", .5, split="published")
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])


# ------------------------------------------------------------------ thinning

def published_thinning(targets, order, counts, seed):
    "An independent reading of the published code: a list of training images in the order of the draw, one global stream."
    rng, listed, kept = np.random.RandomState(seed), [targets[i] for i in order], []
    for c, count in enumerate(counts):
        places = [place for place, label in enumerate(listed) if label == c]
        places = np.array(places)
        rng.shuffle(places)
        kept += [order[place] for place in places[:count]]
    return kept


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_the_published_split_the_same_images_survive(seed):
    targets = np.repeat(np.arange(21), 100)
    order = published_split(2100, seed=seed)["train"]
    counts = img_num_per_cls(80, 21, "exp", .05)
    s = longtail_split(targets, [f"c{c}" for c in range(21)], "exp", .05, split="published", split_seed=seed, seed=seed)
    assert s.train.tolist() == sorted(published_thinning(targets, order, counts, seed))


@given(some_targets, st.integers(0, 99), st.data())
def test_fewer_is_a_subset_of_more(targets, seed, data):
    n = np.bincount(targets)
    more = np.array([data.draw(st.integers(1, int(k))) for k in n])
    fewer = np.array([data.draw(st.integers(1, int(k))) for k in more])
    big, small = (thin(targets, np.arange(len(targets)), counts, seed) for counts in (more, fewer))
    assert np.bincount(targets[big]).tolist() == more.tolist() and np.bincount(targets[small]).tolist() == fewer.tolist()
    assert set(small) <= set(big)


def test_thinning_names_the_class():
    targets = np.repeat([0, 1], [5, 3])
    with pytest.raises(ValueError, match="class 'forest' has 3 training images, but 4"):
        thin(targets, np.arange(8), [5, 4], classnames=["beach", "forest"])
    with pytest.raises(ValueError, match="class 1 would keep 0 images"): thin(targets, np.arange(8), [5, 0])
    assert len(thin(targets, np.arange(8), [5, 4], short="take")) == 8
    with pytest.raises(ValueError, match="Did you mean 'take'"): thin(targets, np.arange(8), [5, 4], short="tak")


# ------------------------------------------------------------------ the whole

@given(some_targets, st.sampled_from(["exp", "step"]), st.sampled_from(["alphabetical", "size", "random"]), st.integers(0, 9))
def test_the_exam_does_not_depend_on_profile_order_or_seed(targets, imb_type, order, seed):
    names = [f"c{c}" for c in range(targets.max() + 1)]
    plain, s = longtail_split(targets, names), longtail_split(targets, names, imb_type, 1., 1, order, seed=seed)
    assert s.test.tolist() == plain.test.tolist() and s.val.tolist() == plain.val.tolist()
    assert set(s.train) <= set(plain.train) and s.cls_num_list == [1] * len(names)
    assert cls_num_list(targets[s.train], len(names)) == s.cls_num_list


def test_by_size_an_unbalanced_archive_keeps_its_largest_class():
    targets = np.repeat([0, 1, 2], [20, 100, 50])
    s = longtail_split(targets, ["a", "b", "c"], "exp", .1, img_max=60, order="size")
    assert s.cls_num_list == [6, 60, 18]
    with pytest.raises(ValueError, match="class 'a' has 14 training images, but 60"):
        longtail_split(targets, ["a", "b", "c"], "exp", .1, img_max=60)


@pytest.mark.parametrize("present", [("train",), ("train", "val"), ("train", "test"), ("train", "val", "test")])
def test_what_folders_fix_stays_fixed(present):
    targets = np.tile(np.repeat([0, 1], 20), len(present))
    fixed = np.repeat(present, 40)
    s = longtail_split(targets, ["a", "b"], given=fixed)
    for part in ("val", "test"):
        if part in present: assert getattr(s, part).tolist() == np.where(fixed == part)[0].tolist()
        else: assert len(getattr(s, part)) > 0 and set(fixed[getattr(s, part)]) == {"train"}
    assert sorted([*s.train, *s.val, *s.test]) == list(range(len(targets)))


@pytest.mark.parametrize("kw, words", [
    (dict(classnames=["a"]), "at least 2 classes"), (dict(classnames=["a", "b", "c"]), "class 'c' has no image"),
    (dict(split="stratifed"), "Did you mean 'stratified'"), (dict(given=["train"] * 3), "found 3 entries"),
    (dict(given=["test"] * 40), "no 'train' image"), (dict(given=["train"] * 39 + ["tset"]), "Did you mean 'test'"),
    (dict(given=["train"] * 20 + ["test"] * 20), "class 'b' has no image"), (dict(val=.5, test=.5), "leave room for training"),
    (dict(imb_type="exp", imb_factor=.5, img_max=0), "img_max: found 0"), (dict(order="sise", imb_type="exp"), "Did you mean 'size'")])
def test_a_sentence_for_every_mistake(kw, words):
    kw = {"classnames": ["a", "b"], **kw}
    with pytest.raises(ValueError) as error: longtail_split(np.repeat([0, 1], 20), **kw)
    assert words in str(error.value)


def test_the_published_split_refuses_a_class_that_it_left_without_training():
    targets = np.array([0] * 60 + [1])
    seed = next(s for s in range(100) if 60 in published_split(61, seed=s)["test"])
    with pytest.raises(ValueError, match="class 'b' has no training image"):
        longtail_split(targets, ["a", "b"], split="published", split_seed=seed)
    with pytest.raises(ValueError, match="too few for a training and a test part"): published_split(4)


# ------------------------------------------------------------------ shot groups

@given(st.lists(st.integers(1, 300), min_size=2, max_size=60))
def test_thresholds_are_ordered_and_groups_follow_them(n):
    many, few, reason = shot_thresholds(n)
    assert many >= few and str(many) in reason and str(few) in reason
    groups = shot_groups(n, many, few)
    for k, group in zip(n, groups): assert (k > many, k < few) == (group == "many", group == "few")
    if len(set(n)) == len(n) >= 3: assert set(groups) == {"many", "medium", "few"}


def test_a_known_pair_wins():
    assert shot_thresholds([500, 50, 5], known=(40, 15))[:2] == (40, 15)


# ------------------------------------------------------------------ split files

safe = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=20).filter(
    lambda p: p == p.strip() and "\\" not in p)

@given(st.lists(st.tuples(safe, st.integers(0, 999)), min_size=1, max_size=8))
def test_split_files_come_back_as_they_went(rows):
    import tempfile
    paths, targets = zip(*rows)
    with tempfile.TemporaryDirectory() as folder:
        found, labels = read_split_file(write_split_file(Path(folder) / "s.txt", paths, targets))
    assert found == list(paths) and labels.tolist() == list(targets) and labels.dtype == np.int64


@pytest.mark.parametrize("text, words", [
    ("a.jpg 0\n\nb.jpg one\n", "line 3: found 'b.jpg one'"), ("a.jpg\n", "line 1"), ("a.jpg -1\n", "line 1"), ("7\n", "line 1"),
    ("a.jpg 1.0\n", "line 1"), ("\n\n", "empty")])
def test_a_broken_line_is_found_by_its_number(tmp_path, text, words):
    file = tmp_path / "train.txt"
    file.write_text(text)
    with pytest.raises(ValueError) as error: read_split_file(file)
    assert str(file) in str(error.value) and words in str(error.value)


def test_foreign_split_files_are_read(tmp_path):
    file = tmp_path / "train.txt"
    file.write_bytes("\ufeffa.jpg 0\r\nb c.jpg\t1\r\n".encode())
    assert read_split_file(file)[0] == ["a.jpg", "b c.jpg"]
    with pytest.raises(ValueError, match="no such split file"): read_split_file(tmp_path / "missing.txt")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = write_split_file(tmp_path / "s.txt", ["a.jpg"], [0])
    with pytest.raises(ValueError, match="line breaks"): write_split_file(file, ["a.jpg", "b\n.jpg"], [0, 1])
    with pytest.raises(ValueError, match="1 paths and 2 targets"): write_split_file(file, ["a.jpg"], [0, 1])
    assert file.read_text() == "a.jpg 0\n" and [p.name for p in tmp_path.iterdir()] == ["s.txt"]


def test_windows_paths_become_portable(tmp_path):
    assert read_split_file(write_split_file(tmp_path / "s.txt", ["beach\\a.jpg"], [0]))[0] == ["beach/a.jpg"]


def test_counting_images_does_not_load_torch():
    code = "import sys, dmrs_nb.longtail as l; l.img_num_per_cls(9, 3); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("fields, says", [
    (dict(img_max=500, imb_factor=.1), r"^img_max: class 'a' has 450 training images, but 500 are asked for; choose a smaller img_max, .*class_order=size.*order='size'.*or add images\.$"),
    (dict(img_max=20, imb_factor=.01), r"^imb_factor: class 'c' would keep 0 images, expected at least 1; choose a larger imb_factor or img_max\.$")])
def test_a_profile_that_asks_too_much_names_what_a_person_gave(fields, says):
    with pytest.raises(ValueError, match=says): longtail_split(np.repeat([0, 1, 2], [600, 40, 40]), ["a", "b", "c"], "exp", val=0, test=.25, **fields, given=None)
