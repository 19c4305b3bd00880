"""What a person gets when something is wrong, through `dmrs`: an exit code, a last line that names file, class or field, and nothing half-written.

Beside this: unreadable images, memory and changed folders in test_path, checkpoints of a run and lost workers in test_training,
single files and the cache in test_data, weights in test_checkpoints, new images in test_predict, a disk that fills up mid-write in test_runs."""
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dmrs_nb
from dmrs_nb.cli import app
from dmrs_nb.config import METHODS, make_config
from dmrs_nb.runs import RunFolder
from dmrs_nb.training import fit, predict

WEIGHTS = Path(dmrs_nb.__file__).parent / "assets" / "tiny-aid-96.safetensors"
CLASSES = ("beach", "forest", "harbor")
TINY = dict(method="ce", steps=2, batch_size=4, augment="none", expert_blocks=1, device="cpu")

ASSETS = Path(__file__).parents[1] / "dmrs_nb" / "assets"


pytestmark = pytest.mark.usefixtures("one_thread")


def make_folder(root, counts):
    for c, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(n):
            pixels = np.random.default_rng(100 * c + i).integers(0, 100, (24, 30, 3)) + 60 * c
            Image.fromarray(pixels.astype("uint8")).save(root / name / f"{i}.png")
            os.utime(root / name / f"{i}.png", (1, 1))
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory): return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def own(place): return make_folder(place / "own", dict.fromkeys(CLASSES, 8))


@pytest.fixture(scope="module")
def run(own, place): return fit(make_config(**TINY | dict(data_root=str(own), out_dir=str(place / "done"), cache_dir=str(place / "cache"))), progress=False)


def dmrs(*arguments):
    "Exit code and last line; what is not turned into a sentence comes through."
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    return done.exit_code, (done.output.strip().splitlines() or [""])[-1]


def ask(folder, root, **fields):
    "Exit code and last line of `dmrs run` with these fields."
    path = folder / "config.json"
    given = TINY | dict(data_root=str(root), out_dir=str(folder / "runs"), cache_dir=str(root.parent / "cache")) | fields
    path.write_text(json.dumps({k: v for k, v in given.items() if v is not ...}))
    return dmrs("run", path, "--quiet")


def files_of(folder): return [p for p in folder.rglob("*") if p.is_file() or p.is_symlink()] if folder.exists() else []


def half_written(folder): return [p for p in folder.rglob("*") if p.name.startswith(".") and p.name not in (".lock",) or p.suffix in (".tmp", ".part")]


# ---- the folder

@pytest.mark.parametrize("change, says", [
    (lambda r: (r / "empty").mkdir(), "class 'empty' holds no images; add images or remove the folder"),
    (lambda r: [shutil.rmtree(r / n) for n in CLASSES[1:]], "found one class only, 'beach'; expected at least two"),
    (lambda r: [shutil.rmtree(r / n) for n in CLASSES], "found no class folders (0 loose images)"),
    (lambda r: make_folder(r, {"Sea Lake": 2, "sea_lake": 2}), "classes 'Sea Lake' and 'sea_lake' both give the words 'sea lake'"),
    (lambda r: make_folder(r, {"___": 2}), "class '___' gives no words"),
    (lambda r: make_folder(r, {"train": 2}), "train names a split, not a class"),
    (lambda r: os.symlink(".", r / "again"), "class 'again' holds no images"),
    (lambda r: os.rename(r / "beach", os.fsencode(r) + b"/\xff"), "is not UTF-8; rename it"),
], ids=["empty", "one", "none", "same words", "no words", "split", "link", "bytes"])
def test_a_folder_that_cannot_be_learnt_from(tmp_path, change, says):
    root = make_folder(tmp_path / "own", dict.fromkeys(CLASSES, 2))
    change(root)
    code, line = ask(tmp_path, root)
    assert code == 2 and says in line and not files_of(tmp_path / "runs")


def test_a_folder_with_everything_people_have_in_it_is_learnt_from(tmp_path):
    root = make_folder(tmp_path / "Мои снимки 2024", {"Ünïcode näme": 6, " spaces  in it ": 6, "CamelCase": 6})
    here, picture = root / "CamelCase", Image.open(root / "CamelCase" / "0.png")
    for mode in ("L", "1", "P", "RGBA", "LA"): picture.convert(mode).save(here / f"{mode}.png")
    for mode in ("CMYK", "L"): picture.convert(mode).save(here / f"{mode}.JPG")
    turned = Image.Exif(); turned[0x0112] = 6
    picture.save(here / "turned.jpeg", exif=turned)
    Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70).save(here / "deep.tif")
    Image.fromarray(np.linspace(-1, 1, 900, dtype=np.float32).reshape(30, 30)).save(here / "float.tiff")
    Image.new("RGB", (1, 1), 9).save(here / "pixel.bmp"); Image.new("L", (3, 2000), 9).save(here / "strip.webp")
    picture.save(here / "frames.gif", save_all=True, append_images=[picture.rotate(90)])
    for foreign in (".DS_Store", "readme.txt", "._0.png", "Thumbs.db", "index.html"): (here / foreign).write_text("not an image")
    (root / ".git").mkdir(); (root / "__MACOSX").mkdir(); (root / "notes.txt").touch(); os.symlink("..", here / "up")
    assert ask(tmp_path, root)[0] == 0
    [result] = (tmp_path / "runs").glob("*/metrics.json")
    data = json.loads(result.read_text(encoding="utf-8"))["data"]
    assert data["classnames"] == [" spaces  in it ", "CamelCase", "Ünïcode näme"] and data["words"] == ["spaces in it", "camel case", "ünïcode näme"]
    assert sum(data[f"num_{part}"] for part in ("train", "val", "test")) == 18 + 12 and not data["bad_images"]


def test_an_image_that_vanishes_while_training_spoils_no_run(tmp_path):
    root = make_folder(tmp_path / "own", dict.fromkeys(CLASSES, 6))
    config = make_config(**TINY | dict(data_root=str(root), out_dir=str(tmp_path / "runs"), cache_dir=str(tmp_path / "cache")))
    done = fit(config, progress=False, callback=lambda row: (root / "beach" / "0.png").unlink(missing_ok=True))
    assert done.done and done.result()["data"]["num_train"] > 0
    code, line = ask(tmp_path, root)
    assert code == 2 and "the run is finished, but the images in" in line


# ---- the config

@pytest.mark.parametrize("fields, says", [
    (dict(method="dmsr"), f"method: found 'dmsr', expected one of {', '.join(METHODS)}; did you mean 'dmrs'?"),
    (dict(mehtod="dmrs"), "mehtod: unknown parameter; did you mean 'method'?"),
    (dict(imb_type="exp", imb_factor=0), "imb_factor: found 0, expected greater than 0"),
    (dict(imb_type="exp", imb_factor=1.5), "imb_factor: found 1.5, expected less than or equal to 1"),
    (dict(imb_factor=0.1), "imb_factor=0.1 does nothing while imb_type is none"),
    (dict(steps=10**30), "steps: found"), (dict(steps=..., epochs=1e300), "epochs: found 1e+300"), (dict(lr=1e300), "lr: found 1e+300"),
    (dict(workers=10**6), "workers: found 1000000"), (dict(batch_size=10**12), "batch_size: found"),
    (dict(templates="\ud800"), r"templates: found '\ud800', which is no text"), (dict(backbone="a\ud800"), "backbone: found"),
    (dict(templates="arial"), "templates='arial' is not one of"), (dict(data="resisc45", data_root=...), "data 'resisc45' is not in the package; pass data_root"),
    (dict(data="aid"), "found 3 classes, expected the 30 of AID"), (dict(class_words="gone.yaml"), "gone.yaml: cannot read the override file"),
    (dict(data_root="~nobody-of-that-name/x"), "there is no user '~nobody-of-that-name' here"), (dict(out_dir="x" * 300), "out_dir: found a path with"),
    (dict(out_dir=__file__), "test_faults.py"), (dict(pretrained=__file__), "test_faults.py: cannot be read as weights")])
def test_a_config_that_cannot_run(own, tmp_path, fields, says):
    code, line = ask(tmp_path, own, **fields)
    assert code == 2 and says in line and len(line) < 700 and not files_of(tmp_path / "runs")


@pytest.mark.parametrize("text, says", [
    ("[" * 99_999, "expected JSON, but"), ('{"steps": ' + "9" * 5000 + "}", "expected JSON, but"), ("\0", "expected JSON"), (b"\xff\xfe{\0}\0", "expected JSON"),
    ("[]", "expected a JSON object of parameters, found list"), ('{"lr": NaN}', "lr: found nan"), ('{"a\\u0000b": 1}', "unknown parameter")])
def test_a_config_file_that_is_none(tmp_path, text, says):
    (tmp_path / "c.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, line = dmrs("run", tmp_path / "c.json")
    assert code == 2 and says in line and str(tmp_path / "c.json") in line


@pytest.mark.parametrize("name, says", [("gone.json", "there is no such file"), ("x" * 300, "cannot be read (File name too long)"), ("", "config.json: there is no such file")])
def test_a_config_file_that_is_not_there(tmp_path, name, says):
    code, line = dmrs("run", tmp_path / name)
    assert code == 2 and says in line and str(tmp_path) in line


def test_a_config_from_an_editor_that_marks_its_files_is_read(own, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(dict(method="x")), encoding="utf-8-sig")
    assert "method: found 'x'" in dmrs("run", tmp_path / "c.json")[1]


@pytest.mark.parametrize("setting, says", [("lr", "--set lr: expected name=value"), ("=3", "unknown parameter"), ("steps=" + "9" * 5000, "steps: found"),
                                           ("lambdas=" + "[" * 99_999, "lambdas"), ("lr=NaN", "lr: found nan"), ("method=", "method: found ''")])
def test_a_setting_that_is_none(own, tmp_path, setting, says):
    (tmp_path / "c.json").write_text(json.dumps(TINY | dict(data_root=str(own), out_dir=str(tmp_path / "runs"))))
    code, line = dmrs("run", tmp_path / "c.json", "--set", setting)
    assert code == 2 and says in line and len(line) < 700 and not files_of(tmp_path / "runs")


@pytest.mark.parametrize("text, says", [("beach: sand\nforst: wood\n", "override 'forst' names no class; did you mean 'forest'?"), ("beach: Wood\nforest: wood\n", "both give the words"),
                                        ("beach: [sand]", "words as text"), ("{" * 2000, "not JSON or YAML"), ("beach: 2001-99-99", "not JSON or YAML")])
def test_class_words_that_do_not_fit(own, tmp_path, text, says):
    (tmp_path / "words.yaml").write_text(text)
    code, line = ask(tmp_path, own, class_words=str(tmp_path / "words.yaml"))
    assert code == 2 and says in line and not files_of(tmp_path / "runs")


def test_weights_that_were_cut(own, tmp_path):
    for size in (0, 100, 200_000):
        (tmp_path / "cut.safetensors").write_bytes(WEIGHTS.read_bytes()[:size])
        code, line = ask(tmp_path, own, pretrained=str(tmp_path / "cut.safetensors"))
        assert code == 2 and "cut.safetensors" in line and not files_of(tmp_path / "runs")


# ---- the disk

@contextmanager
def files_up_to(size):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("method, warm, size, says", [
    ("ce", False, 100_000, "make room"),   # the cache of images
    ("ce", True, 0, "free some space"), ("ce", True, 200, "config.json"), ("ce", True, 22_000, "last.pt"),
    ("linear-probe", True, 8000, "last.pt"), ("zero-shot", True, 2000, "adapter")])
@pytest.mark.filterwarnings("ignore:temperature")
def test_a_full_disk_and_the_same_command_once_there_is_room(own, run, tmp_path, method, warm, size, says):
    cache = own.parent / "cache" if warm else tmp_path / "cache"
    fields = dict(method=method, steps=0 if method == "zero-shot" else 2, checkpoint_every=1, cache_dir=str(cache))
    ask(tmp_path, own, **fields | dict(seed=-1))   # writes the config while there is room, and stops at the seed
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"seed": -1', '"seed": 0'))
    with files_up_to(size): code, line = dmrs("run", tmp_path / "config.json", "--quiet")
    assert code == 2 and says in line and "File too large" in line
    assert not half_written(tmp_path) and not list(tmp_path.rglob("metrics.json")) and not list(tmp_path.rglob("predictions.npz"))
    assert dmrs("run", tmp_path / "config.json", "--quiet")[0] == 0
    assert predict(next(tmp_path.glob("runs/*")), own / "beach", top_k=1).error.isna().all()


def test_a_prediction_and_an_export_on_a_full_disk(run, own, tmp_path):
    (tmp_path / "a.csv").write_text("what was there before")
    with files_up_to(30): code, line = dmrs("predict", run.path, own / "beach", "--output", tmp_path / "a.csv", "--quiet")
    assert code == 2 and "a.csv (File too large)" in line and (tmp_path / "a.csv").read_text() == "what was there before"
    with files_up_to(20_000): code, line = dmrs("export", run.path, "--out", tmp_path / "files")
    assert code == 2 and "files: the export could not be written" in line and [p.name for p in tmp_path.iterdir()] == ["a.csv"]


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
@pytest.mark.parametrize("closed, says", [("config.json", "config.json: cannot be read (Permission denied)"), ("own/beach", "own/beach: cannot be listed (Permission denied)"),
                                          ("own", "cannot be listed (Permission denied)"), ("own/beach/0.png", "the first is beach/0.png (Permission denied)"),
                                          ("runs", "choose an out_dir that you may write to"), ("cache", "make it writable"), ("words.yaml", "cannot read the override file (Permission denied)")])
def test_what_one_may_not_read_or_write(tmp_path, closed, says):
    for folder in (tmp_path, *(p for p in tmp_path.parents if "pytest" in str(p))): folder.chmod(0o755)
    root = make_folder(tmp_path / "own", dict.fromkeys(CLASSES, 2))
    for name in ("runs", "cache"): (tmp_path / name).mkdir(); (tmp_path / name).chmod(0o777)
    (tmp_path / "words.yaml").write_text("beach: sand")
    ask(tmp_path, root, class_words=str(tmp_path / "words.yaml"), seed=-1)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"seed": -1', '"seed": 0'))
    (tmp_path / closed).chmod(0o555 if closed in ("runs", "cache") else 0)
    with nobody(): code, line = dmrs("run", tmp_path / "config.json", "--quiet")
    (tmp_path / closed).chmod(0o755)
    assert code == 2 and says in line and not files_of(tmp_path / "runs")


def test_a_user_without_a_home_is_told_where_to_keep_the_cache(own, tmp_path, monkeypatch):
    def homeless(): raise RuntimeError("Could not determine home directory.")
    for name in ("DMRS_NB_CACHE", "XDG_CACHE_HOME"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    code, line = ask(tmp_path, own, cache_dir=...)
    assert code == 2 and "Set DMRS_NB_CACHE (or cache_dir)" in line and not files_of(tmp_path / "runs")


# ---- using a run

@pytest.mark.parametrize("file, content, says", [
    ("adapter/classes.json", "{}", "adapter: the saved model is damaged"), ("adapter/classes.json", "{", "classes.json is damaged"),
    ("adapter/text_features.safetensors", "x", "the saved model is damaged"), ("adapter/expert_0/adapter_model.safetensors", "", "adapter/expert_0"),
    ("predictions.npz", "x", "predictions.npz: cannot be read (it is damaged)"), ("metrics.json", "[]", "metrics.json is damaged"), ("config.json", "{", "config.json is damaged")])
@pytest.mark.parametrize("command", ["predict", "export"])
def test_a_damaged_run_is_not_used(run, own, tmp_path, command, file, content, says):
    shutil.copytree(run.path, tmp_path / "damaged")
    (tmp_path / "damaged" / file).write_text(content)
    code, line = dmrs("predict", tmp_path / "damaged", own, "--quiet") if command == "predict" else dmrs("export", tmp_path / "damaged", "--out", tmp_path / "files")
    assert code == 2 and says in line and str(tmp_path / "damaged") in line and not (tmp_path / "files").exists()


def test_an_export_is_checked_on_images_that_are_there(run, tmp_path):
    code, line = dmrs("export", run.path, "--out", tmp_path / "files", "--check", tmp_path / "gone.png")
    assert (code, line) == (2, f"{tmp_path / 'gone.png'}: there is no such file or folder") and not (tmp_path / "files").exists()


# ---- training that diverges

@pytest.mark.parametrize("fields, says", [
    (dict(steps=4), "lr: found 1e+15, and training diverged: after step 1 of 4 the answers to val images hold NaN or infinity; give a smaller lr, such as 0.01"),
    (dict(steps=4, val_size=0), "lr: found 1e+15, and training diverged: the loss of step"),
    (dict(steps=1, val_size=0), "lr: found 1e+15, and training diverged: after step 1 of 1 the answers to test images hold NaN or infinity; give a smaller lr, such as 0.01"),
    (dict(steps=4, method="linear-probe", lr=1e30, eval_every=4, checkpoint_every=1), "lr: found 1e+30, and training diverged:")])
def test_a_rate_that_diverges_is_named_and_the_same_command_works_with_another(own, tmp_path, fields, says):
    fields = dict(lr=1e15, warmup=0.0) | fields
    code, line = ask(tmp_path, own, **fields)
    assert code == 2 and line.startswith(says) and "give a smaller lr" in line
    assert not half_written(tmp_path) and not list(tmp_path.rglob("metrics.json")) and not list(tmp_path.rglob("adapter"))
    for kept in tmp_path.rglob("*.pt"): assert all(w.isfinite().all() for w in torch.load(kept, weights_only=True)["weights"].values())
    assert ask(tmp_path, own, **fields) == (code, line), "the same command says the same again"
    assert ask(tmp_path, own, **fields | dict(lr=0.01))[0] == 0


@pytest.mark.filterwarnings("ignore:.*hold NaN or infinity; the run begins again")
def test_a_checkpoint_of_no_numbers_does_not_stop_a_run_for_ever(own, tmp_path):
    config = make_config(**TINY | dict(steps=3, checkpoint_every=1, data_root=str(own), out_dir=str(tmp_path / "runs"), cache_dir=str(own.parent / "cache")))
    def stop(row):
        if row["step"] == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(config, progress=False, callback=stop)
    [path] = tmp_path.rglob("last.pt")
    state = torch.load(path, weights_only=True)
    for w in state["weights"].values(): w.fill_(float("nan"))
    torch.save(state, path)
    done = fit(config, progress=False)
    other = fit(config.model_copy(update=dict(out_dir=str(tmp_path / "again"))), progress=False)
    assert np.array_equal(np.load(done.predictions_path)["test_logits"], np.load(other.predictions_path)["test_logits"]), "begun again from the start"


# ---- who is to blame, and who may read

@pytest.mark.parametrize("content, settings, says, blamed", [
    ({}, ["imb_factor=2"], "imb_factor: found 2, expected less than or equal to 1", False), ({"imb_factor": 2}, [], "imb_factor: found 2", True),
    ({"lr": -1}, ["imb_factor=2"], "lr: found -1", True), ({"lr": -1}, ["lr=0.1", "imb_factor=2"], "imb_factor: found 2", False),
    ({"imb_factor": 0.1}, ["imb_type=none"], "imb_factor=0.1 does nothing", True), ({"steps": 3}, ["epochs=2"], "epochs=2 and steps=3 are both given", False),
    ({}, ["target_modules=mlp_"], "target_modules: found 'mlp_', expected 'q', 'k', 'v', 'out_proj', 'c_fc' or 'c_proj'", False),
    ({}, ["target_modules=5"], "target_modules: found 5, expected one or more values with commas between, such as q,v", False)])
def test_what_is_given_beside_a_file_is_not_the_file_s_fault(tmp_path, content, settings, says, blamed):
    (tmp_path / "c.json").write_text(json.dumps(content))
    code, line = dmrs("run", tmp_path / "c.json", "--set", f"out_dir={tmp_path / 'runs'}", *(x for s in settings for x in ("--set", s)))
    assert code == 2 and line.startswith(f"{tmp_path / 'c.json'}: {says}" if blamed else says) and not files_of(tmp_path / "runs")


def test_class_words_that_are_not_there_are_named_by_their_field(own, tmp_path):
    code, line = ask(tmp_path, own, class_words="/nope.json")
    assert code == 2 and line.startswith("class_words: ") and "cannot read the override file /nope.json" in line.replace("/nope.json: cannot read the override file", "cannot read the override file /nope.json")
    assert not files_of(tmp_path / "runs")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of another kind")
def test_every_file_of_a_run_and_an_export_may_be_read_by_those_whom_the_umask_lets(own, tmp_path):
    for method, adapter in (("ce", {}), ("linear-probe", {}), ("tip-adapter", {}), ("coop", {}), ("ce", dict(classifier="linear"))):
        assert ask(tmp_path, own, method=method, **adapter | (dict(steps=0) if method == "tip-adapter" else {}))[0] == 0
    run = next((tmp_path / "runs").glob("*-ce-*"))
    assert dmrs("export", run, "--out", tmp_path / "files", "--format", "safetensors", "--format", "peft")[0] == 0
    modes = {str(p.relative_to(tmp_path)): p.stat().st_mode & 0o777 for p in files_of(tmp_path) if p.suffix == ".safetensors" or p.suffix == ".json"}
    assert len(modes) > 20 and set(modes.values()) == {0o644}, modes


def test_a_profile_that_asks_too_much_names_the_fields(own, tmp_path):
    code, line = ask(tmp_path, own, imb_type="exp", imb_factor=0.1, img_max=500)
    assert code == 2 and line.startswith("img_max: class 'beach' has") and "class_order=size" in line and "counts" not in line and not files_of(tmp_path / "runs")
