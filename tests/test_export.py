"Exports in processes that cannot import the kit, in other people's libraries, and when the disk, the folder or the check says no."
import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from typer.testing import CliRunner

import dmrs_nb.compat   # before open_clip
import dmrs_nb.export as module
import open_clip
from dmrs_nb.cli import app
from dmrs_nb.clip import load_clip
from dmrs_nb.config import make_config
from dmrs_nb.experts import MultiExpertCLIP
from dmrs_nb.export import READERS, bundle, export, open_clip_config, predict_script, read_pixels, summary, write_open_clip
from dmrs_nb.training import fit, load_predictor, predict

CLASSES, TINY = ("beach", "forest", "harbor"), dict(steps=2, batch_size=4, augment="none", device="cpu", val_size=0.25)
PRIOR = dict(beach=0, forest=1, harbor=3)
WITHOUT_KIT = """
import contextlib, io, json, runpy, sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "dmrs_nb": raise ImportError("refused")
sys.meta_path.insert(0, Refuse())
try: import dmrs_nb
except ImportError: pass
else: sys.exit("the kit is there")
script, formats, images = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]
for name in formats:
    sys.argv = [script, "--format", name, "--top-k", "9", *images]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try: runpy.run_path(script, run_name="__main__")
        except SystemExit as e: code = e.code
    print(json.dumps([name, code, out.getvalue()]))
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Three classes of eight images, each class in a colour of its own."
    root, noise = tmp_path_factory.mktemp("own") / "images", np.random.default_rng(0)
    for c, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(8):
            pixels = noise.integers(0, 120, (40 + 8 * i, 64, 3)); pixels[..., c] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def trained(folder, tmp_path_factory, method, **fields):
    return fit(make_config(method, data_root=str(folder), out_dir=str(tmp_path_factory.mktemp(method)), **TINY | fields), progress=False)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory): return trained(folder, tmp_path_factory, "dmrs", expert_blocks=2, lr=0.02)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    "Files whose pixels depend on how they are read: 16 bits, turned by EXIF, transparent, a long strip, CMYK."
    root, noise = tmp_path_factory.mktemp("odd files"), np.random.default_rng(1)
    rgb = Image.fromarray(noise.integers(0, 255, (70, 120, 3)).astype(np.uint8))
    Image.fromarray(noise.integers(200, 4000, (80, 60)).astype(np.uint16)).save(root / "deep.tif")
    exif = Image.Exif(); exif[0x0112] = 6
    rgb.save(root / "türned.jpg", exif=exif)
    alpha = rgb.convert("RGBA"); alpha.putalpha(Image.linear_gradient("L").resize(rgb.size)); alpha.save(root / "clear, half.png")
    rgb.resize((600, 20)).save(root / "strip.bmp")
    rgb.convert("CMYK").save(root / "inks.jpg")
    return sorted(root.iterdir())


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("export") / "all", formats=("safetensors", "onnx", "torch-export", "peft"), prior=PRIOR)


def in_order(row): return [dict((row[f"class_{i}"], float(row[f"probability_{i}"])) for i in (1, 2, 3))[name] for name in CLASSES]


def table(run, images, **kw):
    "(N, C) probabilities of `predict`, in class order."
    answers = predict(run, images, top_k=len(CLASSES), **kw)
    assert answers.error.isna().all()
    return np.array([in_order(row) for row in answers.to_dict("records")])


def test_every_format_answers_as_predict_where_the_kit_cannot_be_imported(run, whole, odd, tmp_path):
    expected = table(run, odd, prior=PRIOR)
    assert (expected[:, 0] == 0).all() and expected[:, 1:].min() > 0      # a class that does not occur there
    assert np.abs(expected - table(run, odd)).max() > 0.01
    broken = tmp_path / "broken.jpg"; broken.write_bytes(b"no image")
    done = subprocess.run([sys.executable, "-c", WITHOUT_KIT, str(whole / "predict.py"), ",".join(READERS), *map(str, odd[:2]), str(broken), *map(str, odd[2:])],
                          capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in answers] == list(READERS)
    for name, code, text in answers:
        rows = list(csv.DictReader(text.splitlines()))
        assert code == 1 and "broken.jpg: cannot be read" in done.stderr and [r["image"] for r in rows] == list(map(str, odd))
        np.testing.assert_allclose([in_order(r) for r in rows], expected, atol=1e-4, err_msg=name)


def test_graphs_take_any_batch(run, whole):
    info, x = json.loads((whole / "classes.json").read_text()), np.random.default_rng(0).normal(size=(5, 3, 96, 96)).astype(np.float32)
    readers = {name: reader(whole, info) for name, reader in READERS.items()}
    for n in (1, 5):
        expected = readers["safetensors"](x[:n])
        assert expected.shape == (n, 3)
        for name in ("onnx", "torch-export"): np.testing.assert_allclose(readers[name](x[:n]), expected, atol=1e-5, err_msg=name)


def test_open_clip_prepares_and_encodes_as_the_kit_does(run, whole, odd):
    experts = load_predictor(run).model
    plain, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{whole / 'expert_2'}")
    picture = next(p for p in odd if p.suffix == ".bmp").with_name("plain.png")
    Image.fromarray(np.random.default_rng(2).integers(0, 255, (70, 120, 3)).astype(np.uint8)).save(picture)
    theirs, mine = prepare(Image.open(picture)), read_pixels(picture, json.loads((whole / "classes.json").read_text())["preprocess"])
    picture.unlink()
    assert np.abs(theirs.numpy() - mine).max() < 1e-5
    with torch.no_grad():
        features = plain.eval().encode_image(theirs[None], normalize=True)
        assert (features - experts.image_features(theirs[None])[2]).abs().max() < 1e-5
        assert (features - experts.clip_model.encode_image(theirs[None], normalize=True)).abs().max() > 1e-3    # it is not the frozen one


def test_an_export_is_a_backbone_of_the_kit(run, whole):
    clip, original = load_clip(f"local-dir:{whole / 'expert_0'}"), load_predictor(run).clip
    assert clip.preprocess == original.preprocess
    tokens = original.tokenizer(["a harbor"])
    assert torch.equal(clip.tokenizer(["a harbor"]), tokens) and torch.equal(clip.model.encode_text(tokens), original.model.encode_text(tokens))


@pytest.mark.parametrize("adapter, targets", [("lora", ("q", "k", "v")), ("lora", ("c_fc", "c_proj")), ("dense", ("out_proj",))])
def test_every_projection_merges_into_default_blocks(tmp_path, adapter, targets):
    clip, generator = load_clip(), torch.Generator().manual_seed(0)
    model = MultiExpertCLIP(clip, torch.eye(clip.embed_dim)[:3], num_experts=2, r=2, expert_blocks=2, target_modules=targets, adapter=adapter).eval()
    with torch.no_grad():
        for p in model.adapters.parameters(): p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    images = torch.randn(2, 3, 96, 96, generator=generator)
    write_open_clip(model.merged(1), open_clip_config(clip), tmp_path / "one")
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'one'}").eval()
    assert isinstance(plain.visual.transformer.resblocks[-1].attn, torch.nn.MultiheadAttention)
    with torch.no_grad(): found, both = plain.encode_image(images, normalize=True), model.image_features(images)
    assert (found - both[1]).abs().max() < 1e-5 < 1e-3 < (found - both[0]).abs().max()


def test_peft_loads_an_expert_onto_the_base_that_comes_with_it(run, whole):
    from peft import PeftModel
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    base = open_clip.create_model(f"local-dir:{whole / 'peft' / 'base'}").eval()
    with torch.no_grad():
        frozen = F.normalize(base.visual(images), dim=-1)
        adapted = F.normalize(PeftModel.from_pretrained(base.visual, str(whole / "peft" / "expert_1"))(images), dim=-1)
        assert (adapted - load_predictor(run).model.image_features(images)[1]).abs().max() < 1e-5 < 1e-3 < (adapted - frozen).abs().max()


def test_the_average_has_the_mean_weights_and_says_what_it_costs(run, folder, odd, tmp_path):
    out = export(run, tmp_path / "average", average=True, prior="uniform")
    name = "visual.transformer.resblocks.5.attn.out_proj.weight"
    model = load_predictor(run).model
    mean = torch.stack([model.merged(e).state_dict()[name] for e in range(3)]).mean(0)
    assert torch.allclose(load_file(out / "model" / "open_clip_model.safetensors")[name], mean, atol=1e-7)
    cost = json.loads((out / "classes.json").read_text())["cost_of_average"]
    assert cost["images"] == 6 and cost["ensemble"]["acc1"] == pytest.approx(run.result()["val"]["acc1"])
    assert "On 6 validation images" in (out / "README.md").read_text() and "(ensemble" in summary(out)
    correction = load_file(out / "classifier.safetensors")["correction"]
    each = module.log_correction(load_predictor(run, prior="uniform").effective, np.ones(3) / 3, 3, 3)
    assert correction.shape == (1, 3) and torch.allclose(correction.softmax(1), each.mean(0, keepdim=True).softmax(1))
    away = folder.rename(folder.with_name("away"))
    try: unknown = export(run, tmp_path / "unknown", average=True)
    finally: away.rename(folder)
    assert json.loads((unknown / "classes.json").read_text())["cost_of_average"] == {} and "is not known" in (unknown / "README.md").read_text()


@pytest.mark.parametrize("method, fields", [("zero-shot", dict(steps=0)), ("linear-probe", dict(lr=0.5)), ("ce", dict(expert_blocks=1, lr=0.05))])
def test_runs_without_experts(folder, tmp_path_factory, odd, tmp_path, method, fields):
    run = trained(folder, tmp_path_factory, method, **fields)
    out = export(run, tmp_path / method, dtype="fp16" if method == "ce" else "fp32")
    info = json.loads((out / "classes.json").read_text())
    weights = load_file(out / info["models"][0] / "open_clip_model.safetensors")
    assert info["models"] == ["model"] and {w.dtype for w in weights.values()} == {torch.float16 if method == "ce" else torch.float32}
    pixels = np.stack([read_pixels(p, info["preprocess"]) for p in odd])
    np.testing.assert_allclose(READERS["safetensors"](out, info)(pixels), table(run, odd), atol=1e-2 if method == "ce" else 1e-4)
    if method == "linear-probe": assert load_file(out / "classifier.safetensors")["bias"].abs().max() > 0.1
    if method != "ce":
        with pytest.raises(ValueError, match=f"format peft: run {run.name} has no low-rank adapters"): export(run, tmp_path / "x", formats="peft")
    if method == "zero-shot":
        with pytest.raises(ValueError, match="not trained"): export(run, tmp_path / "x", prior="uniform")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device"),
                                   RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"), KeyboardInterrupt(), AssertionError("a bug")])
def test_what_cannot_be_finished_leaves_nothing(run, tmp_path, monkeypatch, error):
    def fail(plan):   # the last file but one, when the weights are there
        assert len(list(tmp_path.rglob("open_clip_model.safetensors"))) == 3
        raise error
    monkeypatch.setattr(module, "_readme", fail)
    expected, sentence = (type(error), None) if isinstance(error, (KeyboardInterrupt, AssertionError)) else (OSError, "could not be written .* Nothing was left behind")
    with pytest.raises(expected, match=sentence): export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_a_new_or_empty_folder_is_written(run, tmp_path):
    (tmp_path / "mine").mkdir(); (tmp_path / "mine" / "notes.txt").write_text("keep")
    for there in ("mine", "mine/notes.txt"):
        with pytest.raises(ValueError, match="expected a new or empty folder"): export(run, tmp_path / there)
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "notes.txt"]
    (tmp_path / "empty").mkdir()
    assert (export(run, tmp_path / "empty") / "README.md").exists()
    with pytest.raises(OSError, match="notes.txt/x: the export could not be written .Not a directory"): export(run, tmp_path / "mine" / "notes.txt" / "x")


def test_a_check_that_fails_exports_nothing(run, odd, tmp_path, monkeypatch):
    wrong = predict_script().replace('info["temperature"]', '(3 * info["temperature"])')
    assert wrong != predict_script()
    monkeypatch.setattr(module, "predict_script", lambda: wrong)
    with pytest.raises(ValueError, match="disagrees with the run: safetensors by 0"): export(run, tmp_path / "out", check=odd[:1])
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="broken.png: cannot be read.*check the export with other images"): export(run, tmp_path / "out", check=tmp_path / "broken.png")
    assert [p.name for p in tmp_path.iterdir()] == ["broken.png"]


def test_the_command(run, tmp_path):
    def dmrs(*arguments):
        done = CliRunner().invoke(app, ["export", *map(str, arguments)])
        if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
        return done.exit_code, done.output.strip().splitlines()
    code, lines = dmrs(run.path, "--out", tmp_path / "files")
    assert code == 0 and lines[-2].startswith("safetensors: 3 experts, 3 classes") and lines[-1] == str(tmp_path / "files")
    assert sorted(p.name for p in (tmp_path / "files").iterdir()) == ["README.md", "classes.json", "classifier.safetensors", "expert_0", "expert_1", "expert_2", "predict.py"]
    for arguments, sentence in {(run.path, "--format", "onxx"): "Did you mean 'onnx'?", (run.path, "--dtype", "fp8"): "expected one of fp32, fp16, bf16",
                                (run.path, "--prior", "estimate"): "write the shares into a file", (run.path, "--prior", "unifrom"): "did you mean 'uniform'?",
                                (run.path.parent,): "expected a finished run's folder"}.items():
        code, lines = dmrs(*arguments, "--out", tmp_path / "no")
        assert code == 2 and sentence in lines[-1]
    assert not (tmp_path / "no").exists()


def test_a_missing_library_is_named_before_anything_is_done(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name, find=module.importlib.util.find_spec: None if name == "onnxscript" else find(name))
    with pytest.raises(ValueError, match=r"pip install 'dmrs_nb\[export\]'"): export(tmp_path / "no run", formats=("onnx",))


LIMIT, ODD = 3, object()
def _helper(x): return min(x, LIMIT)
def uses_helpers(x): return [_helper(np.float64(y)) for y in x], Path("a").name
def uses_odd(): return ODD


def test_bundle_takes_helpers_along_and_refuses_what_source_cannot_say(monkeypatch):
    for f in (_helper, uses_helpers, uses_odd): monkeypatch.setattr(f, "__module__", "dmrs_nb.test")
    exec(bundle(uses_helpers), alone := {})
    assert alone["uses_helpers"]([1, 5]) == ([1, 3], "a") and "from pathlib import Path" in bundle(uses_helpers)
    with pytest.raises(ValueError, match="the constant ODD .* cannot be written down"): bundle(uses_odd)


def test_a_folder_is_searched_as_the_kit_searches_it_and_an_empty_one_is_named(run, tmp_path):
    out, place = export(run, tmp_path / "out"), tmp_path / "new images"
    for name in ("b.png", "deep/down/a.JPG", ".hidden/x.png", "__MACOSX/y.png", "notes.txt", "@eaDir/z.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(place / name, format="png") if name != "notes.txt" else (place / name).write_text("mine")
    (tmp_path / "empty").mkdir()
    def ask(*images):
        done = subprocess.run([sys.executable, str(out / "predict.py"), *map(str, images)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return done.returncode, [Path(r["image"]).relative_to(tmp_path).as_posix() for r in csv.DictReader(done.stdout.splitlines())], done.stderr.strip().splitlines()[-1:]
    assert ask(place) == (0, ["new images/b.png", "new images/deep/down/a.JPG"], [])
    assert [Path(p).relative_to(tmp_path).as_posix() for p in predict(run, place).image] == ask(place)[1]
    assert ask(tmp_path / "empty", place / "b.png", tmp_path / "gone.png")[:2] == (1, ["new images/b.png"])
    assert ask(place / "b.png", tmp_path / "empty")[2] == [f"{tmp_path / 'empty'}: the folder holds no images"]
    assert ask(tmp_path / "gone.png") == (1, [], [f"{tmp_path / 'gone.png'}: cannot be read (No such file or directory)"])


@pytest.mark.skipif(not hasattr(os, "umask"), reason="modes of another kind")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664)])
def test_every_file_of_an_export_has_the_mode_of_the_umask(run, tmp_path, umask, mode):
    before = os.umask(umask)
    try: out = export(run, tmp_path / "out", formats=("safetensors", "peft", "torch-export"))
    finally: os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in out.rglob("*") if p.is_file()} == {mode}
