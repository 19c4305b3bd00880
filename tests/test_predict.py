"Tomorrow's images: what comes out of a run folder, in Python and from the shell; and every mistake a sentence."
import json
import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dmrs_nb import runs, training
from dmrs_nb.calibration import calibrated, fit_temperature
from dmrs_nb.cli import app
from dmrs_nb.config import make_config
from dmrs_nb.training import answer_shares, find_run, fit, image_sources, load_predictor, predict

CLASSES = ["baseballdiamond", "harbor", "river"]
WORDS = ["baseball diamond", "harbor", "river"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Three classes of 8, 12 and 16 noisy squares, one colour each, and runs beside each other."
    root, rng = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    for c, name in enumerate(CLASSES):
        (root / "images" / name).mkdir(parents=True)
        for i in range(8 + 4 * c):
            pixels = rng.integers(0, 120, (24 + 8 * i, 40, 3)).astype(np.uint8)
            pixels[..., c] += 100
            Image.fromarray(pixels).save(root / "images" / name / f"{name} {i:02}.png")
    tiny = dict(data_root=str(root / "images"), out_dir=str(root / "runs"), batch_size=4, augment="none", val_size=0.25, device="cpu")
    made = {m: fit(make_config(m, **tiny, **kw), progress=False) for m, kw in (("dmrs", dict(steps=2, expert_blocks=1)), ("zero-shot", {}))}
    return root, made


@pytest.fixture(scope="module")
def run(place): return place[1]["dmrs"]


@pytest.fixture(scope="module")
def river(place): return place[0] / "images" / "river"


def dmrs(*arguments):
    "Exit code, output and error stream of `dmrs predict`."
    done = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    return done.exit_code, done.stdout, done.stderr


def judged(table):  # (N, C) probabilities in class order
    order = [table.filter(like=kind).to_numpy() for kind in ("class_", "probability_")]
    return np.array([[dict(zip(*row))[w] for w in WORDS] for row in zip(*order)], float)


@pytest.mark.parametrize("prior, target", [(None, None), ("uniform", [1, 1, 1]), ("train", "cls_num_list"), ({"harbor": 3, "river": 1, "baseball diamond": 0}, [0, 3, 1])])
def test_probabilities_are_the_stored_logits_calibrated(place, run, prior, target):
    stored, data = np.load(run.predictions_path), run.result()["data"]
    target = data["cls_num_list"] if target == "cls_num_list" else target
    effective = None if prior is None else answer_shares(make_config(**run.config), data["cls_num_list"])
    T = fit_temperature(stored["val_logits"], stored["val_targets"], effective)
    table = predict(run, [place[0] / "images" / p for p in stored["test_paths"]], prior=prior)
    assert table.attrs["temperature"] == pytest.approx(T, rel=1e-4) and abs(T - 1) > 0.01
    np.testing.assert_allclose(judged(table), calibrated(stored["test_logits"], T, effective, target), atol=1e-4)


def test_an_estimated_prior_comes_from_the_images_themselves(run, river):
    even, found = predict(run, river, prior="uniform"), predict(run, river, prior="estimate")
    assert sum(found.attrs["prior"].values()) == pytest.approx(1) and even.attrs["prior"] == {w: pytest.approx(1 / 3) for w in WORDS}
    top = max(found.attrs["prior"], key=found.attrs["prior"].get)
    assert judged(found)[:, WORDS.index(top)].mean() > judged(even)[:, WORDS.index(top)].mean()


@pytest.mark.parametrize("fields, odds", [   # of two classes with 90 and 10 images
    (dict(loss="ce"), [9]), (dict(loss="logit-adjusted", tau=1.0), [1]), (dict(loss="logit-adjusted", tau=0.5), [3]), (dict(loss="balanced-softmax", sampler="class"), [1 / 9]),
    (dict(loss="mme", num_experts=2, lambdas=[0, 2]), [9, 1 / 9]), (dict(loss="mme", num_experts=2, lambdas=[0, 1], sampler="class"), [1, 1 / 9]), (dict(loss="ce", num_experts=3, sampler="sqrt"), [3, 3, 3])])
def test_shares_that_a_model_answers_with_follow_from_sampler_and_loss(fields, odds):
    shares = answer_shares(make_config("ce", **fields), [90, 10])
    np.testing.assert_allclose(shares[:, 0] / shares[:, 1], odds, rtol=1e-5)


def test_a_model_that_was_not_trained_has_no_prior_to_move(place, river):
    zero = place[1]["zero-shot"]
    assert predict(zero, river).class_1.notna().all()
    for prior in ("uniform", "estimate"):
        with pytest.raises(ValueError, match="was not trained, so its class shares are not known"): predict(zero, river, prior=prior)


def test_one_answer_for_an_image_however_it_comes(run, river):
    path = sorted(river.iterdir())[5]
    ways = [predict(run, path), predict(run, str(path)), predict(run, Image.open(path)), predict(run, river, batch_size=1).iloc[[5]], predict(load_predictor(run), [path]), load_predictor(run.path)(river, batch_size=5).iloc[[5]]]
    for table in ways: np.testing.assert_allclose(judged(table), judged(ways[0]), atol=1e-4)
    assert [w.image.item() for w in ways] == [str(path), str(path), "image 0", str(path), str(path), str(path)]
    assert list(ways[0].columns) == ["image", *(f"{n}_{k}" for k in (1, 2, 3) for n in ("class", "probability")), "error"]
    assert list(predict(run, path, top_k=1).columns) == ["image", "class_1", "probability_1", "error"] and len(predict(run, [])) == 0


def test_every_kind_of_image_is_read(run, tmp_path):
    rgb = Image.effect_noise((40, 30), 60).convert("RGB")
    kinds = {"grey.png": rgb.convert("L"), "palette.gif": rgb.quantize(8), "cmyk.jpg": rgb.convert("CMYK"), "alpha.webp": rgb.convert("RGBA"), "one.bmp": rgb.resize((1, 1)),
             "deep.tif": Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "bits.png": rgb.convert("1")}
    for name, image in kinds.items(): image.save(tmp_path / name)
    table = predict(run, tmp_path)
    assert len(table) == len(kinds) and table.error.isna().all()
    np.testing.assert_allclose(judged(table).sum(1), 1, atol=1e-5)


def test_folders_are_searched_and_foreign_files_passed_over(run, tmp_path):
    image = Image.new("RGB", (9, 9))
    for name in ("b.png", "deep/down/a.JPG", ".hidden/x.png", "__MACOSX/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    for name in (".DS_Store", "readme.txt", "._b.png", "Thumbs.db"): (tmp_path / name).write_bytes(b"foreign")
    (tmp_path / "dir.png").mkdir()
    assert [Path(p).relative_to(tmp_path).as_posix() for p in image_sources(tmp_path)] == ["b.png", "deep/down/a.JPG"]
    assert image_sources(tmp_path / "readme.txt") == [tmp_path / "readme.txt"], "what is named is tried"
    with pytest.raises(ValueError, match="holds no images"): image_sources([tmp_path / "dir.png"])
    for given in (np.zeros((2, 3, 3)), 7, None, [b"x"]):
        with pytest.raises(ValueError, match="expected paths, folders or PIL images"): image_sources(given)
    for given in ("gone.png", "x" * 5000, "a\0b", ""):
        with pytest.raises(FileNotFoundError, match="there is no such file or folder"): image_sources(given)


@pytest.mark.parametrize("suffix, read", [("csv", pd.read_csv), ("parquet", pd.read_parquet)])
def test_what_is_written_is_what_python_answers(run, river, tmp_path, suffix, read):
    out = tmp_path / "new folder" / f"answers.{suffix}"
    assert dmrs(run.path, river, "--output", out, "--prior", "uniform", "--top-k", 2) == (0, "", "")
    table, same = read(out), predict(run, river, top_k=2, prior="uniform")
    assert list(table.columns) == list(same.columns) and table.error.isna().all()
    for column in ("image", "class_1", "class_2"): assert table[column].tolist() == same[column].tolist()
    np.testing.assert_allclose(table.probability_2, same.probability_2, atol=1e-5)
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_table_is_short_and_csv_on_the_screen_is_whole(run, river, place):
    code, text, err = dmrs(run.path, place[0] / "images", "--top-k", "1")
    lines = text.splitlines()
    assert (code, err) == (0, "") and len(lines) == 21 and lines[-1].startswith("… and 16 more")
    assert all(any(f"  {w} 0." in line for w in WORDS) and str(place[0]) in line for line in lines[:20])
    code, text, _ = dmrs(run.path, river, "--format", "csv")
    assert code == 0 and len(pd.read_csv(StringIO(text))) == 16


def test_unreadable_images_are_listed_at_the_end(run, river, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "empty.png").write_bytes(b"")
    out = tmp_path / "answers.csv"
    code, text, err = dmrs(run.path, river, tmp_path, "--output", out, "--quiet")
    table = pd.read_csv(out)
    assert code == 1 and text == "" and err.splitlines()[0] == "2 of 18 images could not be read:"
    assert [line.split(": cannot be read: ")[0] for line in err.splitlines()[1:]] == [str(tmp_path / "cut.jpg"), str(tmp_path / "empty.png")]
    assert table.error.notna().tolist() == [False] * 16 + [True] * 2 and table.class_1.isna().sum() == 2
    out.unlink()
    code, text, err = dmrs(run.path, tmp_path, "--output", out)
    assert code == 2 and text == "" and "so nothing was written" in err and "empty.png" in err.splitlines()[-1] and not out.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and names of bytes are of POSIX systems")
def test_pipes_and_names_that_are_no_text(run, river, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    name = os.fsencode(tmp_path) + b"/caf\xe9,\n\"x\".png"
    try: shutil.copy(sorted(river.iterdir())[0], name)
    except OSError: pytest.skip("this file system has no such names")
    for kind, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        code, _, err = dmrs(run.path, os.fsdecode(name), tmp_path / "pipe.png", "--output", tmp_path / f"a.{kind}")
        assert code == 1 and "pipe.png: cannot be read: not a regular file" in err
        assert read(tmp_path / f"a.{kind}").image[0].endswith('caf\\udce9,\n"x".png')


def test_a_full_disk_leaves_the_file_that_was_there(run, river, tmp_path, monkeypatch):
    out = tmp_path / "answers.csv"
    out.write_text("before")
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(runs.os, "replace", full)
    code, _, err = dmrs(run.path, river, "--output", out)
    assert code == 2 and "answers.csv (No space left on device)" in err and out.read_text() == "before" and os.listdir(tmp_path) == ["answers.csv"]


@pytest.mark.parametrize("arguments, says", [
    (["--prior", "unifrom"], "did you mean 'uniform'"), (["--prior", "gone.json"], "or a file of class shares"), (["--output", "a.xls"], "expected .csv or .parquet"),
    (["--output", "."], "is a folder"), (["--format", "parquet"], "give --output"), (["--device", "gpu"], "device: found 'gpu'"), (["--device", "cuda:99"], "cuda:99"),
    (["--output", "a.parquet", "--format", "csv"], "--format csv and --output a.parquet: they ask for two kinds of file"), (["--output", "a.csv", "--format", "table"], "they ask for two kinds of file"),
    (["--top-k", "0"], "'--top-k'"), (["--batch-size", "0"], "'--batch-size'"), (["--format", "xml"], "'--format'"), (["gone.png"], "gone.png: there is no such file or folder")])
def test_mistakes_are_sentences_and_nothing_is_computed(run, river, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "_gather", lambda *_: pytest.fail("images were read"))
    code, text, err = dmrs(run.path, river, *arguments)
    assert code == 2 and says in err.strip().splitlines()[-1] and "Traceback" not in err and not text and not os.listdir(tmp_path)


@pytest.mark.parametrize("arguments, says", [(["predict"], "'RUN'"), (["predict", "x"], "'IMAGE…'"), (["run"], "'CONFIG.json'"), (["export"], "'RUN'"), (["predict", "x", "y", "--topk", "3"], "--topk"),
                                             (["predict", "x", "y", "--top-k", "many"], "'--top-k'"), (["rnu"], "'rnu'")])
def test_the_last_line_of_a_wrong_command_names_what_is_wrong(arguments, says):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and says in done.stderr.strip().splitlines()[-1] and not done.stdout


def test_a_wrong_run_names_the_runs_nearby(place, run, river):
    out = run.path.parent
    code, _, err = dmrs(out / (run.name[:-1] + "x"), river)
    assert code == 2 and "no such folder" in err and f"did you mean {run.name!r}?" in err and place[1]["zero-shot"].name in err
    for wrong, says in ((out, f"finished runs in it: {run.name}"), (run.config_path, "found a file"), (place[0] / "images", "without metrics.json; train it first"),
                        (place[0] / "no" / "where", "no such folder; train it first"), ("x" * 5000, "no such folder")):
        with pytest.raises(ValueError) as e: find_run(wrong)
        assert says in str(e.value)
    assert find_run(str(run.path)).path == find_run(run).path == run.path


def test_an_unfinished_or_damaged_run_is_refused(run, river, tmp_path):
    copy = Path(shutil.copytree(run.path, tmp_path / "copy"))
    (copy / "predictions.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="predictions.npz: cannot be read .*; give temperature=1"): predict(copy, river)
    for given, used in ((2, 2), (None, 1)): assert predict(copy, river, temperature=given).attrs["temperature"] == used
    (copy / "predictions.npz").unlink()
    code, _, err = dmrs(copy, river)
    assert code == 0 and err.startswith("note: temperature: copy kept no validation logits")
    (copy / "metrics.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="metrics.json lacks"): predict(copy, river)
    (copy / "metrics.json").unlink()
    with pytest.raises(ValueError, match="found a run that is not finished"): predict(copy, river)


@pytest.mark.parametrize("given", ["vall", 0, -1, float("nan"), float("inf"), [1]])
def test_a_temperature_that_cannot_be_meant_is_refused(run, river, given):
    with pytest.raises(ValueError, match="temperature: found .*, expected 'val', a number above 0, or None"): predict(run, river, temperature=given)


@pytest.mark.parametrize("raised, code, says", [(KeyboardInterrupt(), 130, "stopped\n"), (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "smaller batch size")])
def test_interrupted_and_out_of_memory(run, river, monkeypatch, raised, code, says):
    def fails(*_): raise raised
    monkeypatch.setattr(training, "_gather", fails)
    left, text, err = dmrs(run.path, river)
    assert left == code and says in err and not text


def as_process(*arguments, **kw): return subprocess.run([sys.executable, "-m", "dmrs_nb.cli", *map(str, arguments)], env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, **kw)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file that is always full is of Linux")
def test_answers_on_a_full_disk_end_in_a_sentence(run, river):
    with open("/dev/full", "w") as full: done = as_process("predict", run.path, river, "--format", "csv", "--device", "cpu", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == "standard output: could not be written (No space left on device); free some space and start the same command again, or write it elsewhere\n"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="terminals of another kind")
def test_the_bar_is_for_terminals(run, river):
    import fcntl, struct, termios
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))   # a new terminal has no columns
    done = as_process("predict", run.path, river, "--device", "cpu", "--batch-size", "4", stdout=subprocess.PIPE, stderr=theirs)
    os.set_blocking(ours, False)
    seen = os.read(ours, 100_000).decode()   # before the other end is closed: then it would be gone
    for end in (ours, theirs): os.close(end)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 16 and "predicting" in seen and "/16" in seen and "image/s" in seen
    piped = as_process("predict", run.path, river, "--device", "cpu", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (piped.returncode, piped.stderr, piped.stdout) == (0, "", done.stdout)
