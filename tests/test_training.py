"Training as processes: killed and resumed, several at once, through papermill and the command."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from dmrs_nb.config import make_config
from dmrs_nb.data import load_items, unpack_asset
from dmrs_nb.runs import RunFolder

ROOT = Path(__file__).parents[1]
TINY = dict(imb_type="exp", imb_factor=0.05, batch_size=8, augment="none", expert_blocks=1, device="cpu")


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    "A folder of a person's own: four classes of UC Merced, 12 images each."
    source, root = unpack_asset("ucmerced"), tmp_path_factory.mktemp("own") / "my images"
    for name in ("beach", "forest", "harbor", "runway"):
        (root / name).mkdir(parents=True)
        for path in sorted((source / name).glob("*.jpg"))[:12]: (root / name / path.name).write_bytes(path.read_bytes())
    return root


def dmrs(*arguments, **kw): return subprocess.run([sys.executable, "-m", "dmrs_nb.cli", *map(str, arguments)], capture_output=True, text=True, **kw)


def write_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(TINY | dict(out_dir=str(folder / "runs")) | fields))
    return path


def test_killed_run_resumes_to_the_uninterrupted_result(tmp_path):
    fields = dict(method="dmrs", steps=40, eval_every=20, checkpoint_every=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(); cut.mkdir()
    assert dmrs("run", write_config(whole, **fields), "--quiet").returncode == 0
    path = write_config(cut, **fields)
    run_id = make_config(**TINY, **fields).run_id
    process = subprocess.Popen([sys.executable, "-m", "dmrs_nb.cli", "run", str(path), "--quiet"])
    checkpoint = RunFolder(cut / "runs" / run_id).checkpoint_path
    deadline = time.time() + 120
    while not checkpoint.exists() and process.poll() is None and time.time() < deadline: time.sleep(0.02)
    process.send_signal(signal.SIGKILL); process.wait()
    assert checkpoint.exists() and not (cut / "runs" / run_id / "metrics.json").exists(), "the run was over before it was killed"
    assert dmrs("run", path, "--quiet").returncode == 0
    results = [RunFolder(folder / "runs" / run_id) for folder in (whole, cut)]
    logits = [np.load(r.predictions_path)["test_logits"] for r in results]
    assert np.array_equal(*logits)
    assert results[0].result()["metrics"] == results[1].result()["metrics"]
    assert not results[1].checkpoint_path.exists()


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    logits = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        done = dmrs("run", write_config(folder, method="ce", steps=4, workers=workers) , "--set", 'augment="aerial"', "--quiet")
        assert done.returncode == 0, done.stderr
        logits.append(np.load(next((folder / "runs").iterdir()) / "predictions.npz")["test_logits"])
    assert np.array_equal(*logits)


def test_two_processes_give_the_result_of_one(tmp_path):
    logits = []
    for n in (1, 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        config = write_config(folder, method="dmrs", steps=3)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(n), "--num_machines", "1", "--mixed_precision", "no",
                   "--dynamo_backend", "no", "--main_process_port", "0", "-m", "dmrs_nb.cli", "run", str(config), "--quiet"]
        done = subprocess.run(command if n > 1 else command[:2] + ["dmrs_nb.cli", "run", str(config), "--quiet"], capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        logits.append(np.load(next((folder / "runs").iterdir()) / "predictions.npz")["test_logits"])
    np.testing.assert_allclose(*logits, atol=2e-3)


@pytest.mark.parametrize("method", ["zero-shot", "dmrs"])
def test_run_notebook_on_a_folder_of_ones_own(few_images, tmp_path, method):
    out = tmp_path / "report.ipynb"
    budget = [] if method == "zero-shot" else ["-p", "steps", "2", "-p", "batch_size", "8"]
    done = subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "nbs/benchmarks/01_run.ipynb"), str(out), "--no-progress-bar", "-k", "python3",
                           "-p", "data_root", few_images.name, "-p", "method", method, "-p", "out_dir", "runs", *budget],
                          capture_output=True, text=True, cwd=few_images.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    [run] = (few_images.parent / "runs").glob(f"*-{method}-*")
    result = RunFolder(run).result()
    assert result["data"]["cls_num_list"] == [result["data"]["num_train"] // 4] * 4, "a person's own folder is not thinned"
    assert result["data"]["words"] == ["beach", "forest", "harbor", "runway"]
    notebook = nbformat.read(out, 4)
    pictures = sum("image/png" in o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    assert pictures >= 5


def test_bad_images_stop_a_run_before_it_starts_or_are_recorded(few_images, tmp_path):
    from shutil import copytree
    root = copytree(few_images, tmp_path / "with bad ones")
    (root / "beach" / "broken.jpg").write_bytes(b"not an image")
    Image.new("L", (1, 1), 7).save(root / "forest" / "tiny.png")
    config = write_config(tmp_path, method="ce", steps=1, imb_type="none", imb_factor=1.0, data_root=str(root))
    stopped = dmrs("run", config, "--quiet")
    assert stopped.returncode == 2 and "broken.jpg" in stopped.stderr.strip().splitlines()[-1] and "Traceback" not in stopped.stderr
    assert not list((tmp_path / "runs").glob("*/metrics.json"))
    went_on = dmrs("run", config, "--quiet", "--set", "bad_images=skip")
    assert went_on.returncode == 0, went_on.stderr
    [done] = (tmp_path / "runs").glob("*/metrics.json")
    assert [p for p, _ in json.loads(done.read_text())["data"]["bad_images"]] == ["beach/broken.jpg"]


@pytest.mark.parametrize("fields, says", [(dict(imb_factor=0.01), "would keep 0 images"), (dict(img_max=500), "training images"), (dict(data_root="gone"), "no such folder"),
                                          (dict(data="ucmercd"), "did you mean 'ucmerced'"), (dict(backbone="ViT-B-33"), "ViT-B-33"), (dict(pretrained="gone.pt"), "gone.pt")])
def test_what_cannot_run_is_refused_with_a_sentence(tmp_path, fields, says):
    done = dmrs("run", write_config(tmp_path, method="ce", steps=1, **fields), "--quiet")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert says in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.glob("runs/*/metrics.json"))


def test_a_run_that_diverges_says_at_which_step(tmp_path):
    done = dmrs("run", write_config(tmp_path, method="ce", steps=50, lr=1e30, warmup=0), "--quiet")
    assert done.returncode == 2 and "at step" in done.stderr and "smaller lr" in done.stderr


def test_test_images_are_neither_thinned_nor_trained_on():
    from dmrs_nb.training import split_items
    items = load_items("ucmerced")
    tails = [split_items(items, make_config("ce", imb_type="exp", imb_factor=f)) for f in (0.05, 0.5)]
    assert np.array_equal(tails[0].test, tails[1].test) and np.array_equal(tails[0].val, tails[1].val)
    for s in tails: assert not set(s.train) & (set(s.test) | set(s.val)) and not set(s.val) & set(s.test)
    assert set(tails[0].train) < set(tails[1].train)
