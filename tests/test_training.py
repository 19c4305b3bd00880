"Training as processes: killed and resumed, several at once, through papermill and the command; and every mistake a sentence."
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dmrs_nb.cli import app
from dmrs_nb.config import make_config
from dmrs_nb.data import load_items, unpack_asset
from dmrs_nb.runs import RunFolder
from dmrs_nb.training import Learner, fit, load_model, predict

ROOT = Path(__file__).parents[1]
TINY = dict(batch_size=4, augment="none", expert_blocks=1, device="cpu")
LONG = TINY | dict(method="dmrs", steps=30, eval_every=10, checkpoint_every=2)   # long enough to be killed in the middle
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


pytestmark = pytest.mark.usefixtures("one_thread")   # sums depend on the number of threads in their last bit: the same number here and in every process that is started


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    "A folder of a person's own: four classes of UC Merced, 12 images each."
    source, root = unpack_asset("ucmerced"), tmp_path_factory.mktemp("own") / "my ïmages"
    for name in ("beach", "forest", "harbor", "runway"):
        (root / name).mkdir(parents=True)
        for path in sorted((source / name).glob("*.jpg"))[:12]: (root / name / path.name).write_bytes(path.read_bytes())
    return root


@pytest.fixture(scope="module")
def whole(few_images, tmp_path_factory):
    "The run that nothing disturbed."
    return fit(make_config(**LONG, data_root=str(few_images), out_dir=str(tmp_path_factory.mktemp("whole"))), progress=False)


def write_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(TINY | dict(out_dir=str(folder / "runs")) | fields))
    return path


def dmrs(path, *settings):
    "Exit code and last line of `dmrs run`, in this process."
    done = CliRunner().invoke(app, ["run", str(path), "--quiet", *(x for s in settings for x in ("--set", s))])
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    return done.exit_code, done.output.strip().splitlines()[-1]


def logits_of(run): return np.load(RunFolder(run).predictions_path)["test_logits"]
def files_of(folder): return [p for p in folder.rglob("*") if p.is_file()] if folder.exists() else []


@pytest.mark.parametrize("moment", ["config.json", "checkpoint/last.pt", "adapter/expert_0"])
def test_killed_run_resumes_to_the_uninterrupted_result(few_images, whole, tmp_path, moment):
    path = write_config(tmp_path, **LONG, data_root=str(few_images))
    folder = tmp_path / "runs" / whole.name
    process = subprocess.Popen([sys.executable, "-m", "dmrs_nb.cli", "run", str(path), "--quiet"], env=ONE_THREAD)
    deadline = time.time() + 120
    while not (folder / moment).exists() and process.poll() is None and time.time() < deadline: time.sleep(0.001)
    process.kill(); process.wait()
    assert (folder / moment).exists() and not RunFolder(folder).done, "the run was over before it was killed"
    assert dmrs(path, "workers=1", "checkpoint_every=7")[0] == 0, "where and how often may change"
    assert np.array_equal(logits_of(folder), logits_of(whole.path))
    assert RunFolder(folder).result()["metrics"] == whole.result()["metrics"]
    assert not [p for p in files_of(folder) if p.suffix in (".pt", ".tmp")]


def test_ctrl_c_says_that_the_run_can_go_on_and_it_does(few_images, whole, tmp_path, monkeypatch):
    path, step = write_config(tmp_path, **LONG, data_root=str(few_images)), Learner.step
    def interrupted(self, t, *batch):
        if t == 5: raise KeyboardInterrupt
        return step(self, t, *batch)
    with monkeypatch.context() as m:
        m.setattr(Learner, "step", interrupted)
        assert dmrs(path) == (130, "stopped; the same command goes on from the last checkpoint")
    folder = tmp_path / "runs" / whole.name
    assert RunFolder(folder).load_checkpoint()["step"] == 4
    assert dmrs(folder, f"data_root={few_images}", f"out_dir={tmp_path / 'runs'}")[0] == 0, "a run folder is a config too"
    assert np.array_equal(logits_of(folder), logits_of(whole.path))


@pytest.mark.parametrize("damage, says", [(lambda b: b[:1000], "is damaged"), (lambda b: b"", "is damaged"), (None, "lacks best, optimizer")])
def test_a_checkpoint_that_does_not_fit_is_refused(few_images, whole, tmp_path, damage, says):
    path = write_config(tmp_path, **LONG, data_root=str(few_images))
    run = RunFolder(tmp_path / "runs" / whole.name)
    run.save_checkpoint({"weights": {}}, 3)
    if damage: run.checkpoint_path.write_bytes(damage(run.checkpoint_path.read_bytes()))
    code, line = dmrs(path)
    assert code == 2 and says in line and "last.pt" in line and not run.done


def test_a_folder_of_another_config_and_a_locked_one_are_left_alone(few_images, whole, tmp_path, monkeypatch):
    path = write_config(tmp_path, **LONG, data_root=str(few_images))
    run, lock = RunFolder(tmp_path / "runs" / whole.name), RunFolder.lock
    run.path.mkdir(parents=True)
    run.config_path.write_text(json.dumps(whole.config | {"lr": 5}))
    code, line = dmrs(path)
    assert code == 2 and "lr is 5 there and 0.01 here" in line
    run.config_path.unlink()
    monkeypatch.setattr(RunFolder, "lock", lambda self, timeout=None: lock(self, timeout=0.05))
    with run.lock(): code, line = dmrs(path)
    assert code == 3 and "in use by another process" in line and not run.config_path.exists()


def test_a_run_that_another_process_finished_meanwhile_is_not_trained_again(few_images, whole, tmp_path, monkeypatch):
    config, rows = make_config(**LONG, data_root=str(few_images), out_dir=str(tmp_path)), []
    @contextlib.contextmanager
    def lock(self, timeout):   # held by another process until that has finished
        shutil.copytree(whole.path, self.path)
        yield self
    monkeypatch.setattr(RunFolder, "lock", lock)
    assert fit(config, progress=False, callback=rows.append).done and not rows


def test_batches_do_not_depend_on_the_number_of_workers(few_images, tmp_path):
    runs = [fit(make_config("ce", **TINY | dict(augment="aerial"), steps=4, workers=w, data_root=str(few_images), out_dir=str(tmp_path / str(w))), progress=False)
            for w in (0, 2)]
    assert np.array_equal(*(logits_of(r.path) for r in runs))


def test_a_lost_worker_is_a_sentence(few_images, tmp_path, monkeypatch):
    from dmrs_nb.data import Batches
    monkeypatch.setattr(Batches, "__getitem__", lambda self, step: os._exit(1))
    code, line = dmrs(write_config(tmp_path, method="ce", steps=4, workers=1, data_root=str(few_images)))
    assert code == 2 and line.startswith("workers: a process that prepares batches was lost")


@pytest.mark.parametrize("method", ["dmrs", "linear-probe"])
def test_two_processes_give_the_result_of_one(few_images, tmp_path, method):
    fields = dict(method=method, steps=3, data_root=str(few_images))
    one = fit(make_config(**TINY, **fields, out_dir=str(tmp_path / "one")), progress=False)
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(port),
               "-m", "dmrs_nb.cli", "run", str(write_config(tmp_path, **fields)), "--quiet"]   # `accelerate launch --cpu` starts a single process
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("accuracy") == 1, "one process speaks"
    assert RunFolder(tmp_path / "runs" / one.name).result()["place"]["processes"] == 2
    np.testing.assert_allclose(logits_of(tmp_path / "runs" / one.name), logits_of(one.path), atol=1e-4)


@pytest.mark.parametrize("method", ["zero-shot", "dmrs"])
def test_run_notebook_on_a_folder_of_ones_own(few_images, tmp_path, method):
    out = tmp_path / "report.ipynb"
    budget = [] if method == "zero-shot" else ["-p", "steps", "2", "-p", "batch_size", "8", "-p", "lambdas", "[0,1,2]"]
    done = subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "nbs/benchmarks/01_run.ipynb"), str(out), "--no-progress-bar", "-k", "python3",
                           "-p", "data_root", few_images.name, "-p", "method", method, "-p", "out_dir", "runs", *budget],
                          capture_output=True, text=True, cwd=few_images.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    [run] = (few_images.parent / "runs").glob(f"*-{method}-*")
    result = RunFolder(run).result()
    assert result["data"]["cls_num_list"] == [result["data"]["num_train"] // 4] * 4, "a person's own folder is not thinned"
    assert result["data"]["words"] == ["beach", "forest", "harbor", "runway"]
    assert method == "zero-shot" or result["config"]["lambdas"] == [0, 1, 2], "papermill passes a list as text"
    outputs = [o for c in nbformat.read(out, 4).cells if c.cell_type == "code" for o in c.outputs]
    assert sum(bool({"image/png", "image/jpeg"} & set(o.get("data", {}))) for o in outputs) >= 6
    assert not [o for o in outputs if o.output_type == "stream" and o.name == "stderr" and "Warning" in o.text]


def test_bad_images_stop_a_run_before_it_starts_or_are_recorded(few_images, tmp_path):
    root = shutil.copytree(few_images, tmp_path / "with bad ones")
    (root / "beach" / "broken.jpg").write_bytes(b"not an image")
    Image.new("L", (1, 1), 7).save(root / "forest" / "tiny.png")
    path = write_config(tmp_path, method="ce", steps=1, data_root=str(root))
    code, line = dmrs(path)
    assert code == 2 and "broken.jpg" in line and not files_of(tmp_path / "runs")
    assert dmrs(path, "bad_images=skip")[0] == 0
    [done] = (tmp_path / "runs").glob("*/metrics.json")
    assert [p for p, _ in json.loads(done.read_text())["data"]["bad_images"]] == ["beach/broken.jpg"]
    for image in (root / "harbor").iterdir(): image.write_bytes(b"")
    code, line = dmrs(path, "bad_images=skip", "seed=1")
    assert code == 2 and "none of the images of class 'harbor' can be read" in line


@pytest.mark.parametrize("fields, says", [
    (dict(data_root="gone"), "no such folder"), (dict(data_root=__file__), "is a file"), (dict(data="ucmercd", data_root=None), "did you mean 'ucmerced'"),
    (dict(imb_type="exp", imb_factor=0.01), "would keep 0 images"), (dict(img_max=500, imb_type="exp"), "training images"),
    (dict(backbone="ViT-B-33"), "ViT-B-33"), (dict(pretrained="gone.pt"), "gone.pt"), (dict(expert_blocks=99), "expert_blocks is 99"),
    (dict(device="gpu"), "device: found 'gpu'"), (dict(device="cuda:99"), "device: found cuda:99"), (dict(test_size=0), "test part: found no image"),
    (dict(val_size=0, select="best-val"), "no validation part"), (dict(adapter="dense", target_modules="q,v"), "trains out_proj only"),
    (dict(lr=1e30, warmup=0, steps=50), "smaller lr"), (dict(path="x"), "path: unknown parameter"), (dict(method=["ce"]), "method: found ['ce']")])
def test_what_cannot_run_is_refused_with_one_sentence_and_leaves_nothing(few_images, tmp_path, fields, says):
    code, line = dmrs(write_config(tmp_path, **dict(method="ce", steps=1, data_root=str(few_images)) | fields))
    assert code == 2 and says in line
    left = [p for p in files_of(tmp_path / "runs") if "lr" not in fields]   # a run that diverged had begun
    assert not left and not list(tmp_path.glob("runs/*/metrics.json"))


def test_the_command_keeps_its_manners_as_a_process(tmp_path):
    done = subprocess.run([sys.executable, "-m", "dmrs_nb.cli", "run", str(write_config(tmp_path, sampler="clas"))], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'class'?" in done.stderr and "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize("fields", [dict(target_modules=["q", "k", "v", "c_fc"]), dict(adapter="dense"), dict(num_experts=5), dict(steps=0), dict(steps=None, epochs=0.2),
                                    dict(optimizer="sgd"), dict(precision="bf16"), dict(select="best-val", val_size=0.2), dict(tensorboard=True), dict(val_size=0)],
                         ids=lambda f: "-".join(f"{k}={v}" for k, v in f.items()))
def test_what_can_be_configured_runs_and_loads_again(few_images, tmp_path, fields):
    run = fit(make_config("dmrs", **TINY | dict(steps=2, data_root=str(few_images), out_dir=str(tmp_path)) | fields), progress=False)
    stored, paths = logits_of(run.path), np.load(run.predictions_path)["test_paths"]
    sure = predict(run, [few_images / p for p in paths], top_k=1, temperature=1.0)
    answers = torch.as_tensor(stored).softmax(-1).mean(0).max(-1)
    np.testing.assert_allclose(sure.probability_1, answers.values, atol=0.03 if fields.get("precision") == "bf16" else 1e-4)
    assert run.result()["parameters"]["trainable"] > 0 or fields.get("steps") == 0


def test_a_damaged_model_is_refused(whole, tmp_path):
    run = RunFolder(shutil.copytree(whole.path, tmp_path / "run"))
    (run.adapter_path / "text_features.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="the saved model is damaged"): load_model(run)


def test_test_images_are_neither_thinned_nor_trained_on():
    from dmrs_nb.training import split_items
    items = load_items("ucmerced")
    tails = [split_items(items, make_config("ce", imb_type="exp", imb_factor=f)) for f in (0.05, 0.5)]
    assert np.array_equal(tails[0].test, tails[1].test) and np.array_equal(tails[0].val, tails[1].val)
    for s in tails: assert not set(s.train) & (set(s.test) | set(s.val)) and not set(s.val) & set(s.test)
    assert set(tails[0].train) < set(tails[1].train)
