"A person's own folder: its shape, what is chosen for it and why, and what is said when something is wrong with it."
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dmrs_nb.training as training
from dmrs_nb.cli import app
from dmrs_nb.config import make_config
from dmrs_nb.runs import RunFolder
from dmrs_nb.training import Learner, fit, prepare, resolve

RUN_NOTEBOOK = Path(__file__).parents[1] / "nbs" / "benchmarks" / "01_run.ipynb"
TINY = dict(method="ce", steps=2, batch_size=4, augment="none", expert_blocks=1, device="cpu")
CLASSES = ("beach", "forest", "harbor")


def make_folder(root, counts):
    "Noise with a hue for each class: counts images of each."
    for c, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(n):
            pixels = np.random.default_rng(100 * c + i).integers(0, 100, (24, 30, 3)) + [50 * c, 100 - 50 * c, 60]
            Image.fromarray(pixels.astype("uint8")).save(root / name / f"{i:02}.png")
    return root


@pytest.fixture
def own(tmp_path): return make_folder(tmp_path / "my images", dict.fromkeys(CLASSES, 8))


def config_of(root, **fields): return make_config(**TINY | dict(data_root=str(root), out_dir=str(root.parent / "runs"), cache_dir=str(root.parent / "cache")) | fields)
def done_of(root, **fields): return fit(config_of(root, **fields), progress=False)


def dmrs(root, **fields):
    "Exit code and lines of `dmrs run`."
    path = root.parent / "config.json"
    path.write_text(json.dumps(config_of(root, **fields).model_dump(mode="json")))
    done = CliRunner().invoke(app, ["run", str(path), "--quiet"])
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    return done.exit_code, done.output.strip().splitlines()


@pytest.mark.parametrize("parts, counts, says", [
    (dict(train=8, test=3), (21, 3, 9), "train/, test/ as the folder has them; taken out of train/, class by class: 10% for val"),
    (dict(train=8, val=3), (18, 9, 6), "train/, val/ as the folder has them; taken out of train/, class by class: 20% for test"),
    (dict(Train=8, valid=3, TEST=2), (24, 9, 6), "train/, val/, test/ as the folder has them"),
    (None, (15, 3, 6), "drawn class by class: 10% for val, 20% for test, the rest for train")])
def test_every_shape_of_folder_is_read_and_the_report_says_how(tmp_path, parts, counts, says):
    root = tmp_path / "own"
    for part, n in (parts or {"": 8}).items(): make_folder(root / part, dict.fromkeys(CLASSES, n))
    (root / "readme.txt").write_text("mine"); (root / ".DS_Store").write_bytes(b"\0")
    task = prepare(config_of(root), progress=False)
    assert tuple(map(len, (task.split.train, task.split.val, task.split.test))) == counts
    assert task.summary()["parts"] == says
    assert not {*task.split.train} & {*task.split.test} and not {*task.split.train} & {*task.split.val}


def test_classes_of_one_two_and_three_images_are_trained_and_the_rule_is_said(tmp_path):
    root = make_folder(tmp_path / "own", dict(beach=1, forest=2, harbor=3, runway=12))
    data = done_of(root).result()["data"]
    assert data["cls_num_list"] == [1, 1, 1, 9]
    assert "too few images to be in val: 'beach', 'forest'; too few images to be in test: 'beach'; a class gives its first image to train" in data["parts"]


@pytest.mark.parametrize("inner, says", [("photos", "photos holds 3 folders: pass that"), ("a/b", "b holds 3 folders: pass that")])
def test_a_folder_within_a_folder_is_named(tmp_path, inner, says):
    make_folder(tmp_path / "own" / inner, dict.fromkeys(CLASSES, 3))
    code, lines = dmrs(tmp_path / "own")
    assert code == 2 and str(tmp_path / "own" / inner) in lines[-1] and says in lines[-1]


def test_one_image_a_class_cannot_be_judged(tmp_path):
    code, lines = dmrs(make_folder(tmp_path / "own", dict.fromkeys(CLASSES, 1)))
    assert code == 2 and "every class has a single image" in lines[-1] and not (tmp_path / "runs").exists()


def test_every_unreadable_image_is_listed_before_training_and_nothing_is_left(own):
    for i in range(25): (own / "beach" / f"broken {i:02}.jpg").write_bytes(b"no image")
    code, lines = dmrs(own)
    assert code == 2 and [line for line in lines if line.startswith("  beach/broken")] == [f"  beach/broken {i:02}.jpg: not an image that Pillow knows (8 bytes)" for i in range(25)]
    assert "25 of 49 images cannot be read, the first is beach/broken 00.jpg" in lines[-1] and "bad_images=skip" in lines[-1]
    assert not (own.parent / "runs").exists()
    run = done_of(own, bad_images="skip")
    rows = list(csv.reader(open(run.path / "bad_images.csv", encoding="utf-8")))
    assert rows == [["path", "reason"], *run.result()["data"]["bad_images"]] and len(rows) == 26


def test_the_last_line_under_papermill_is_the_sentence(own):
    (own / "forest" / "00.png").write_bytes(b"no image")
    done = subprocess.run([sys.executable, "-m", "papermill", str(RUN_NOTEBOOK), str(own.parent / "out.ipynb"), "--no-progress-bar", "-k", "python3", "-p", "data_root", own.name,
                           "-p", "out_dir", "runs"], capture_output=True, text=True, cwd=own.parent)
    last = [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert done.returncode != 0 and "1 of 24 images cannot be read, the first is forest/00.png" in last
    assert not (own.parent / "runs").exists()


def test_what_is_left_open_follows_from_the_data_and_what_is_given_stays(own):
    task = prepare(config_of(own), progress=False)
    chosen, reasons = resolve(config_of(own, steps=None, batch_size=None), task)
    assert (chosen.batch_size, chosen.steps) == (8, 300), "15 training images: the largest power of two below"
    assert "there are 15 training images" in reasons["batch_size"] and reasons["steps"].startswith("15 training images at batch 8 are 2 steps a pass; 15 passes would be 30 steps")
    for given in (dict(steps=7, batch_size=None), dict(steps=None, epochs=2, batch_size=None), dict(steps=None, batch_size=3), dict(steps=7, batch_size=64)):
        kept, reasons = resolve(config_of(own, **given), task)
        assert all(getattr(kept, f) == v for f, v in given.items() if v is not None)
        assert set(reasons) & {"steps", "batch_size"} == set(config_of(own, **given).open)


@pytest.mark.parametrize("images, size, says", [(10_000, 8, "there are 15 training images"), (4, 2, "more would not fit"), (0.1, 1, "even one image may be too much")])
def test_the_batch_follows_from_free_memory(own, monkeypatch, images, size, says):
    task, config = prepare(config_of(own), progress=False), config_of(own, batch_size=None)
    monkeypatch.setattr(training, "free_memory", lambda device: images * training.image_memory(config, task.clip))
    chosen, reasons = resolve(config, task)
    assert chosen.batch_size == size and says in reasons["batch_size"]


def test_the_same_command_goes_on_with_its_run_when_less_memory_is_free(own, monkeypatch):
    config = config_of(own, batch_size=None)
    run = fit(config, progress=False)
    assert run.config["batch_size"] == 8
    monkeypatch.setattr(training, "free_memory", lambda device: 0)
    assert fit(config, progress=False, callback=lambda row: pytest.fail("trained again")).path == run.path


def test_preprocessing_of_the_config_reaches_the_images_and_a_loaded_model(own):
    given = dict(mean="0.5,0.4,0.3", std="0.2,0.2,0.2", interpolation="bilinear")
    run = done_of(own, **given)
    preprocess = training.load_model(run)[1].preprocess
    assert (preprocess.mean, preprocess.std, preprocess.interpolation) == ((.5, .4, .3), (.2, .2, .2), "bilinear")
    usual = done_of(own)
    assert not np.allclose(np.load(run.predictions_path)["test_logits"], np.load(usual.predictions_path)["test_logits"], atol=1e-3)


def test_a_share_of_the_training_images_is_nested_and_never_empty(tmp_path):
    root = make_folder(tmp_path / "own", dict(beach=20, forest=10, harbor=3))
    splits = [training.split_items(training.load_items("folder", root), config_of(root, train_fraction=f)) for f in (0.1, 0.5, 1.0, None)]
    assert [s.cls_num_list for s in splits] == [[1, 1, 1], [7, 4, 1], [14, 7, 1], [14, 7, 1]]
    assert set(splits[0].train) < set(splits[1].train) < set(splits[2].train) and np.array_equal(splits[2].train, splits[3].train)
    assert all(np.array_equal(s.test, splits[3].test) and np.array_equal(s.val, splits[3].val) for s in splits)


def test_a_finished_run_is_not_passed_off_as_one_of_other_images(own):
    run = done_of(own)
    shutil.copy(own / "beach" / "00.png", own / "beach" / "new.png")
    code, lines = dmrs(own)
    assert code == 2 and "the run is finished, but the images in" in lines[-1] and "delete that folder" in lines[-1] and run.path.name in lines[-1]
    (own / "beach" / "new.png").unlink()
    assert dmrs(own)[0] == 0
    own.rename(own.parent / "moved away")
    assert done_of(own).result() == run.result(), "nothing to compare with: the result is still there"


def test_an_interrupted_run_does_not_go_on_with_other_images(own):
    def stop(row):
        if row["step"] == 3: raise KeyboardInterrupt
    config = config_of(own, steps=5, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt): fit(config, progress=False, callback=stop)
    shutil.copy(own / "beach" / "00.png", own / "forest" / "new.png")
    with pytest.raises(ValueError, match="the images in .* are not those"): fit(config, progress=False)
    (own / "forest" / "new.png").unlink()
    assert fit(config, progress=False).done


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_full_memory_is_a_sentence_and_no_result(own, monkeypatch, error):
    def full(self, *batch): raise error
    monkeypatch.setattr(Learner, "step", full)
    code, lines = dmrs(own)
    assert code == 2 and lines[-1].startswith("batch_size: 4 images a step do not fit") and "(2)" in lines[-1]
    assert not list(own.parent.glob("runs/*/metrics.json"))


def test_other_errors_of_a_step_stay_what_they_are(own, monkeypatch):
    def broken(self, *batch): raise RuntimeError("a bug")
    monkeypatch.setattr(Learner, "step", broken)
    with pytest.raises(RuntimeError, match="a bug"): done_of(own)


@pytest.mark.parametrize("fields, looks", [(dict(), ["val", "test"]), (dict(steps=0), ["val", "test"]), (dict(select="best-val", eval_every=1, lr=0.3), None)])
def test_validation_is_not_looked_at_twice_with_the_same_weights(own, monkeypatch, fields, looks):
    asked, evaluate = [], training.evaluate
    def counted(model, task, part, *rest): asked.append(part); return evaluate(model, task, part, *rest)
    monkeypatch.setattr(training, "evaluate", counted)
    run = done_of(own, **dict(eval_every=2) | fields)
    assert looks is None or asked == looks
    model, clip, _ = training.load_model(run)
    task = prepare(config_of(own), progress=False)
    metrics, logits = evaluate(model, task, "val", 32)
    np.testing.assert_allclose(np.load(run.predictions_path)["val_logits"], logits, atol=1e-4)
    assert run.result()["val"]["acc1"] == metrics["acc1"]
