"""The grid under fire: specs that are none, failures of every kind, kills at any moment, two grids at once.

Most tests run a notebook that counts: the grid knows no method, and a cell that takes a tenth of a second can be killed as well as one that takes a day."""
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

import dmrs_nb
from dmrs_nb import grid
from dmrs_nb.cli import app
from dmrs_nb.grid import GridError, clean, collect, open_grid, plan, run, show, status
from dmrs_nb.runs import read_json

ROOT, PATIENCE = Path(__file__).parents[1], 900   # seconds after which a test gives up: only a busy machine comes near
CONFIG = '''
from dataclasses import dataclass
from dmrs_nb.runs import run_id
@dataclass
class Config:
    run_id: str
def make_config(step=1, seed=0, fault="", pause=0.02, out_dir="runs"): return Config(run_id(dict(step=step, seed=seed, fault=fault), ["count", f"by{step}", fault, f"s{seed}"]))
'''
COUNT = '''
import os, signal, time
from pathlib import Path
from counting import make_config
from dmrs_nb.runs import RunFolder, read_json, write_json
run = RunFolder(Path(out_dir) / make_config(step, seed, fault).run_id)
def trace(what):
    with open(Path(out_dir) / "trace.txt", "a") as f: f.write(f"{run.name} {os.getpid()} {what}\\n")
saved, tried = run.path / "total.json", run.path / "tried"
if not run.done:
    with run.lock():
        run.start(dict(step=step, seed=seed, fault=fault))
        total = read_json(saved)["total"] if saved.exists() else 0
        while total < 10 * step: total += step; time.sleep(pause); write_json(saved, {"total": total}); trace(f"step {total}")
        if fault == "raise": raise RuntimeError("the loss is no number")
        if fault == "memory": raise MemoryError("could not have 3 GB")
        if fault == "die": os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang": time.sleep(600)
        if fault == "once" and not tried.exists(): tried.touch(); raise RuntimeError("not yet")
        run.finish({"acc1": (total + seed) / 1000}, timings={"total_s": 0.2}); trace("finish")
run.result()["metrics"]
'''


def notebook(path, front, parameters, code):
    cells = [nbformat.v4.new_raw_cell(front), nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}), path)


@pytest.fixture(scope="module")
def count(tmp_path_factory):
    "A notebook that counts, and its config."
    folder = tmp_path_factory.mktemp("count")
    (folder / "counting.py").write_text(CONFIG)
    notebook(folder / "count.ipynb", "---\ngrid-config: counting:make_config\n---", 'step = 1\nseed = 0\nfault = ""\npause = 0.02\nout_dir = "runs"', COUNT)
    before, path = os.environ.get("PYTHONPATH"), os.pathsep.join(filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ["PYTHONPATH"] = path
    sys.path.insert(0, str(folder))
    yield folder / "count.ipynb"
    sys.path.remove(str(folder))
    if before is None: del os.environ["PYTHONPATH"]
    else: os.environ["PYTHONPATH"] = before


def spec_of(count, **fields): return dict(notebook=str(count)) | fields


def quiet(spec, out, **how): return run(spec, out, progress=False, **{"in_process": True} | how)


def traced(out): return [line.split(" ", 2) for line in (out / "trace.txt").read_text().splitlines()] if (out / "trace.txt").exists() else []


def finished(out): return Counter(name for name, _, what in traced(out) if what == "finish")


def alive(pid):
    try: return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError: return False


def until(true, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(.01)


def start(spec, out, *how):
    "A grid in a process of its own."
    code = f"from dmrs_nb.grid import run; import json, sys; print(run(json.loads(sys.argv[1]), sys.argv[2], progress=False, in_process=True, {', '.join(how)}))"
    return subprocess.Popen([sys.executable, "-c", code, json.dumps(spec), str(out)], stdout=subprocess.PIPE, text=True)


# ---- the spec

@pytest.mark.parametrize("text, says", [
    ("matrx: {lr: [1]}", "matrx: unknown key; did you mean 'matrix'?"), ("groups: [{seedz: [0]}]", "groups[0].seedz: unknown key; did you mean 'seeds'?"),
    ("claims: [{figur: 1}]", "claims[0].figur: unknown key; did you mean 'figure'?"), ("resources: {gpu: 1}", "resources.gpu: unknown key; did you mean 'gpus'?"),
    ("overrides: [{if: {}, set: {}}]", "overrides[0].when: is missing"), ("seeds: [a]", "seeds[0]: found 'a', expected a valid integer"), ("matrix: {lr: 0.1}", "matrix.lr: found 0.1, expected a valid list"),
    ("- 1", "found list"), ("", "found NoneType"), ("a: [", "expected YAML, but"), ("base: {lr: 1, lr: 2}", "line 1: 'lr' is written twice"), ("base: {d: 2001-01-01}", "base.d"),
    ("groups: [{}]\nruns: [{}]", "groups and runs stand side by side"), ("base: {mehtod: ce}", "mehtod: unknown parameter; did you mean 'method'?"), ("base: {method: dmsr}", "did you mean 'dmrs'?"),
    ("base: {method: ce}", "give them"), ("runs: [{method: ce, steps: 1, batch_size: 1}]\nexclude: [{method: dmrs}]", 'exclude: no cell fits {"method": "dmrs"}'),
    ("runs: [{method: ce, steps: 1, batch_size: 1}]\noverrides: [{when: {metod: ce}, set: {}}]", "overrides: no cell fits"), ("notebook: 01_rum.ipynb", "did you mean '01_run.ipynb'?"),
    ("runs: [{method: ce, steps: 1, batch_size: 1}]\nexclude: [{seed: 0}]", "there is no cell"), ("notebook: 02_results.ipynb", "no grid-config")])
def test_a_spec_that_cannot_run_gets_a_sentence_and_nothing_is_written(tmp_path, text, says):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(GridError) as e: run(tmp_path / "s.yaml", tmp_path / "out", progress=False)
    assert says in str(e.value) and not (tmp_path / "out").exists()


def test_a_spec_that_is_not_there():
    with pytest.raises(GridError, match="gone.yaml: there is no such file"): open_grid("gone.yaml")


def test_expansion_order_precedence_and_double_cells(count, tmp_path):
    cells = open_grid(spec_of(count, base=dict(step=5), matrix=dict(step=[1, 2]), runs=[{}, dict(step=3)], seeds=[0, 1], exclude=[dict(step=2, seed=1)],
                              overrides=[dict(when=dict(step=[2]), set=dict(step=4))]), tmp_path).cells
    assert [(c.parameters["step"], c.parameters["seed"]) for c in cells] == [(1, 0), (3, 0), (4, 0), (1, 1), (3, 1)]
    two = open_grid(spec_of(count, base=dict(step=5), seeds=[3], groups=[dict(base=dict(fault="a")), dict(seeds=[1], runs=[dict(step=2, fault=None)])]), tmp_path).cells
    assert [c.parameters for c in two] == [dict(step=5, fault="a", seed=3), dict(step=2, seed=1)]


def test_the_schema_beside_the_specs_is_the_specs():
    assert json.loads((ROOT / "nbs" / "benchmarks" / "specs" / "grid.schema.json").read_text()) == grid.schema()


# ---- two hundred cells

@pytest.fixture(scope="module")
def finished_200(tmp_path_factory):
    out = tmp_path_factory.mktemp("many")
    spec = dict(base=dict(steps=10, batch_size=8, imb_type="exp"), matrix=dict(method=["ce", "focal", "mixup", "dmrs", "ride"], imb_factor=[.01, .1]), seeds=list(range(20)))
    for i, cell in enumerate(open_grid(spec, out).cells):
        cell.run.path.mkdir()
        cell.run.config_path.write_text(json.dumps(cell.fields))
        result = dict(schema_version=1, config=cell.fields, metrics=dict(acc1=.5), environment=dict(code=dmrs_nb.runs.code_hash()), timings=dict(total_s=10. + (cell.fields["method"] == "dmrs") * 20))
        if i >= 20: cell.run.metrics_path.write_text(json.dumps(result))
        else: cell.run.config_path.unlink(); cell.run.path.rmdir()
    return spec, out


def test_planning_200_cells_takes_no_time_and_estimates_from_like_runs(finished_200):
    spec, out = finished_200
    clock = time.process_time()
    table = plan(spec, out, workers=2)
    assert time.process_time() - clock < 2 and len(table) == 200
    assert table.attrs["counts"] == {"done": 180, "left": 20} and table.attrs["unknown"] == 0
    assert table[table.state == "left"].estimate_s.tolist() == [{"dmrs": 30.}.get(m, 10.) for m in table[table.state == "left"].method]
    assert table.attrs["seconds"] == table.estimate_s.sum() / 2


def test_a_finished_grid_is_skipped_in_no_time_and_on_a_folder_that_is_only_read(finished_200, monkeypatch):
    spec, out = finished_200
    spec = spec | dict(exclude=[dict(seed=[0, 1])])
    monkeypatch.setattr(subprocess, "Popen", None)
    clock = time.process_time()
    done = quiet(spec, out)
    assert time.process_time() - clock < 3 and len(done.skipped) == 180 and not (done.trained or done.failed) and not (out / ".grid").exists()


def test_a_result_of_other_code_is_stale_and_run_again_only_on_request(count, tmp_path):
    spec = spec_of(count)
    quiet(spec, tmp_path)
    [cell] = open_grid(spec, tmp_path).cells
    cell.run.metrics_path.write_text(cell.run.metrics_path.read_text().replace(dmrs_nb.runs.code_hash(), "0123456789"))
    assert status(spec, tmp_path).state.tolist() == ["stale"] and len(quiet(spec, tmp_path).skipped) == 1
    assert len(quiet(spec, tmp_path, rerun_stale=True).trained) == 1 and status(spec, tmp_path).state.tolist() == ["done"]
    assert finished(tmp_path)[cell.run_id] == 2 and len(clean(spec, tmp_path, failed=False, stale=True)) == 1


# ---- failures

def test_a_failure_keeps_its_notebook_its_last_lines_and_its_reason_and_stops_no_other(count, tmp_path):
    faults = ["raise", "memory", "die", ""]
    spec = spec_of(count, matrix=dict(fault=faults), base=dict(pause=0))
    done = quiet(spec, tmp_path)
    cells = {c.parameters["fault"]: c for c in open_grid(spec, tmp_path).cells}
    assert done.trained == [cells[""].run_id] and set(done.failed) == {cells[f].run_id for f in faults if f}
    said = {f: read_json(cells[f].failure) for f in faults if f}
    assert {f: s["reason"] for f, s in said.items()} == {"raise": "exception", "memory": "out of memory", "die": "killed"}
    assert said["raise"]["message"] == "RuntimeError: the loss is no number" and said["raise"]["tail"][-1] == "RuntimeError: the loss is no number" and len(said["raise"]["tail"]) <= 50
    assert "SIGKILL" in said["die"]["message"]
    assert "the loss is no number" in cells["raise"].run.notebook_path.read_text() and "**This run failed**: killed" in cells["die"].run.notebook_path.read_text()
    assert nbformat.read(cells[""].run.notebook_path, 4).cells[-1].outputs and not [c for c in cells.values() if c.part.exists()]
    table = status(spec, tmp_path)
    assert table.state.tolist() == ["failed", "failed", "failed", "done"] and "no number" in table.said[0]
    assert show(cells["raise"].run_id[:14], tmp_path)["failed"]["reason"] == "exception"
    assert len(clean(spec, tmp_path)) == 3 and status(spec, tmp_path).attrs["counts"] == {"done": 1, "left": 3}


def test_another_attempt_goes_on_from_the_checkpoint(count, tmp_path):
    done = quiet(spec_of(count, base=dict(fault="once", pause=0)), tmp_path, retries=1)
    [name] = done.trained
    assert sum(what.startswith("step") for _, _, what in traced(tmp_path)) == 10 and read_json(tmp_path / name / "cell.json")["attempts"] == 2 and not (tmp_path / name / "failed.json").exists()


def test_a_run_that_takes_too_long_is_ended_and_the_first_failure_can_stop_a_grid(count, tmp_path):
    spec = spec_of(count, runs=[dict(fault="hang", pause=0), dict(step=2)])
    done = quiet(spec, tmp_path, timeout=6, fail_fast=True)
    [(name, said)] = done.failed.items()
    assert said == "time limit: it ran longer than 6 s" and read_json(tmp_path / name / "failed.json")["reason"] == "time limit" and not done.trained
    assert not [pid for _, pid, _ in traced(tmp_path) if alive(pid)]


def test_damaged_results_and_checkpoints_are_named_and_the_rest_goes_on(count, tmp_path):
    spec = spec_of(count, seeds=[0, 1, 2], base=dict(pause=0))
    cells = open_grid(spec, tmp_path).cells
    for cell, name in zip(cells, ("metrics.json", "total.json")):
        cell.run.path.mkdir(parents=True); (cell.run.path / name).write_text('{"total"')
    done = quiet(spec, tmp_path)
    assert done.trained == [cells[2].run_id] and all("is damaged" in said for said in done.failed.values()) and len(done.failed) == 2
    assert f"{cells[0].run.metrics_path} is damaged: expected JSON" in done.failed[cells[0].run_id] and "total.json is damaged" in done.failed[cells[1].run_id]
    assert cells[0].run.metrics_path.read_text() == '{"total"' and status(spec, tmp_path).state.tolist() == ["damaged", "failed", "done"]
    assert collect(spec, tmp_path).attrs["problems"]
    clean(spec, tmp_path)
    assert len(quiet(spec, tmp_path).trained) == 2


@contextmanager
def nobody():
    "Permissions bind everybody but root."
    if os.geteuid(): yield; return
    os.seteuid(65534)
    try: yield
    finally: os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of another kind")
def test_a_folder_that_cannot_be_written(count, tmp_path):
    for folder in (tmp_path, *(p for p in tmp_path.parents if "pytest" in str(p))): folder.chmod(0o755)
    opened = open_grid(spec_of(count), tmp_path / "out")
    (tmp_path / "out").mkdir(); (tmp_path / "out").chmod(0o555)
    with nobody(), pytest.raises(OSError, match="choose an out_dir that you may write to"): quiet(opened, None)


def test_a_full_disk_is_a_failure_with_a_sentence_and_goes_on_when_there_is_room(count, tmp_path):
    resource = pytest.importorskip("resource")
    spec, before = spec_of(count, base=dict(pause=0)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try: done = quiet(spec, tmp_path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in list(done.failed.values())[0] and not list(tmp_path.glob("*/metrics.json"))
    assert len(quiet(spec, tmp_path).trained) == 1


# ---- the command

def test_the_command_says_what_it_did_and_its_exit_code_agrees(count, tmp_path):
    (tmp_path / "s.yaml").write_text(json.dumps(spec_of(count, matrix=dict(fault=["", "raise"]), base=dict(pause=0))))
    def dmrs(command, *words, code=0):
        done = CliRunner().invoke(app, ["grid", command, *map(str, words), "--out", str(tmp_path / "out")])
        assert done.exit_code == code, done.output
        return done.output
    spec = tmp_path / "s.yaml"
    assert "2 left; to run: 2, no like run to estimate from" in dmrs("plan", spec) and not (tmp_path / "out").exists()
    said = dmrs("run", spec, "--in-process", "--quiet", code=1)
    assert "1 trained, 1 failed" in said and "RuntimeError: the loss is no number" in said
    assert "1 done, 1 failed; to run: 1, about" in dmrs("plan", spec)
    assert "1 done, 1 failed" in dmrs("status", spec) and "1 runs, 1 not finished" in dmrs("collect", spec)
    assert "acc1 = 0.01" in dmrs("show", "count-by1-s0") and "last lines:" in dmrs("show", "raise") and "no number" in dmrs("show", "raise")
    assert "found none of" in dmrs("show", "nothing", code=2) and "--failed or --stale" in dmrs("clean", spec, code=2)
    assert "1 removed" in dmrs("clean", spec, "--failed") and "there is no such file" in dmrs("plan", tmp_path / "gone.yaml", code=2)


# ---- kills

@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_grid_that_is_killed_three_times_ends_in_the_same_table_and_trains_nothing_twice(count, tmp_path):
    spec, draws = spec_of(count, matrix=dict(step=[1, 2, 3]), seeds=[0, 1]), random.Random(6)
    quiet(spec, tmp_path / "calm", workers=2)
    out, moments = tmp_path / "killed", sorted(draws.sample(range(3, 55), 3))
    for moment in moments:
        process = start(spec, out, "workers=2")
        until(lambda: len(traced(out)) >= moment or process.poll() is not None)
        process.kill(); process.wait()
        until(lambda: not [pid for pid in {p for _, p, _ in traced(out)} if alive(pid)])
        until(lambda: not status(spec, out).attrs["counts"].get("running"))   # whoever had not written a trace yet dies with its parent, too
    result = quiet(spec, out, workers=2)
    assert not result.failed
    tables = [collect(spec, f).drop(columns="train_s") for f in (tmp_path / "calm", out)]
    pd.testing.assert_frame_equal(*tables)
    names = [c.run_id for c in open_grid(spec, out).cells]
    assert finished(out).total() >= len(names) - 3 and all(n == 1 for n in finished(out).values())   # killed between its last file and its trace, a run says nothing
    steps = Counter(name for name, _, what in traced(out) if what.startswith("step"))
    assert all(steps[n] <= 10 + len(moments) for n in names) and sum(steps.values()) <= 60 + 2 * len(moments)
    assert not [c for c in open_grid(spec, out).cells if c.part.exists() or not c.run.notebook_path.exists()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_kernel_that_is_killed_costs_one_cell_one_attempt(count, tmp_path):
    spec, victims = spec_of(count, matrix=dict(step=[1, 2]), base=dict(pause=.05)), []
    def assassin():
        until(lambda: len(traced(tmp_path)) >= 4)
        victims.append(traced(tmp_path)[0][1]); os.kill(int(victims[0]), signal.SIGKILL)
    thread = threading.Thread(target=assassin); thread.start()
    done = quiet(spec, tmp_path, in_process=False)
    thread.join()
    first, second = (c.run for c in open_grid(spec, tmp_path).cells)
    assert done.trained == [second.name] and done.failed == {first.name: "killed: the kernel's process was ended"}
    assert "**This run failed**: killed" in first.notebook_path.read_text() and int(victims[0]) != int(traced(tmp_path)[-1][1])
    assert quiet(spec, tmp_path).trained == [first.name] and all(n == 1 for n in finished(tmp_path).values())
    assert sum(name == first.name and what.startswith("step") for name, _, what in traced(tmp_path)) <= 11


def test_two_grids_on_one_folder_run_every_cell_exactly_once(count, tmp_path):
    spec = spec_of(count, matrix=dict(step=[1, 2, 3, 4, 5, 6, 7, 8]))
    both = [start(spec, tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(finished(tmp_path).values()) == [1] * 8 and status(spec, tmp_path).attrs["counts"] == {"done": 8}
    assert sum(int(part.split()[0]) for text in said for part in text.strip().split(", ") if part.endswith("trained")) == 8


def test_a_notebook_that_was_cut_after_its_result_is_finished_without_training(count, tmp_path):
    spec = spec_of(count, base=dict(pause=0))
    quiet(spec, tmp_path)
    [cell] = open_grid(spec, tmp_path).cells
    os.replace(cell.run.notebook_path, cell.part)
    assert status(spec, tmp_path).state.tolist() == ["trained"]
    quiet(spec, tmp_path)
    assert cell.run.notebook_path.exists() and not cell.part.exists() and finished(tmp_path)[cell.run_id] == 1


# ---- the machine

def test_workers_share_threads_and_gpus(count, monkeypatch, tmp_path):
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [grid.worker_env(i, 3, [])["OMP_NUM_THREADS"] for i in range(3)] == ["2"] * 3
    assert [grid.worker_env(i, 3, ["0", "1"])["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["0", "1", "0"]
    assert [grid.worker_env(i, 2, list("0123"), 2)["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["0,1", "2,3"] and grid.worker_env(0, 1, ["0"], 0)["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("OMP_NUM_THREADS", "1"); monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert grid.worker_env(0, 2, [])["OMP_NUM_THREADS"] == "1" and grid.gpus_here() == ["3", "5"]
    need = lambda **r: open_grid(spec_of(count, resources=r), tmp_path)
    with pytest.raises(GridError, match="a run needs 3, found 2 here"): grid.Local(need(gpus=3))
    assert grid.Local(need(gpus=1), workers=9).free == 2 and grid.Local(need(memory_gb=1e6), workers=4).free == 1 and grid.Local(need(), workers=4).free == 4


# ---- real runs

@pytest.fixture(scope="module")
def own(tmp_path_factory):
    root = tmp_path_factory.mktemp("own") / "images"
    for c, name in enumerate(("beach", "forest", "harbor")):
        (root / name).mkdir(parents=True)
        for i in range(8): Image.fromarray(np.random.default_rng(8 * c + i).integers(0, 255, (32, 32, 3), np.uint8)).save(root / name / f"{i}.png")
    return root


def real(own, **fields):
    base = dict(data_root=str(own), cache_dir=str(own.parent / "cache"), method="zero-shot", device="cpu", precision="fp32", batch_size=8)
    return dict(base=base) | fields


def test_the_run_notebook_goes_through_a_grid_into_one_table(own, tmp_path):
    spec = real(own, runs=[{}, dict(method="linear-probe", steps=2)], chosen=[dict(method="linear-probe", steps=2)])
    done = run(spec, tmp_path, progress=False)
    assert len(done.trained) == 2 and not done.failed
    cells = open_grid(spec, tmp_path).cells
    assert all(nbformat.read(c.run.notebook_path, 4).cells[-1].outputs and c.run.result()["run_id"] == c.run_id for c in cells)
    table = collect(spec, tmp_path)
    kept = tmp_path / "collected"
    assert table.run_id.tolist() == [c.run_id for c in cells] == pd.read_parquet(kept / "runs.parquet").run_id.tolist() and {"acc1", "val_acc1", "trainable", "train_s", "cls_num_list"} <= set(table)
    with np.load(kept / "predictions.npz") as f: assert f["run_id"].tolist() == table.run_id.tolist() and f["test_preds"].shape == (2, len(f["test_targets"])) and f["words"].tolist() == ["beach", "forest", "harbor"]
    assert [p.name for p in kept.iterdir() if p.is_dir()] == [cells[1].run_id] and read_json(kept / "environment.json")["place"]["device"] == "cpu"
    grown = spec | dict(seeds=[0, 1])   # the table knows the first two, wherever their folders are
    assert plan(grown, tmp_path / "elsewhere", results=kept).state.tolist() == ["kept", "kept", "left", "left"]
    assert collect(grown, tmp_path / "elsewhere", to=kept).run_id.tolist() == table.run_id.tolist()


def test_fifty_cells_in_one_process_end_with_the_memory_that_they_began_with(own, tmp_path):
    notebook(tmp_path / "fit.ipynb", "---\ngrid-config: dmrs_nb.config:make_config\n---", 'method = "zero-shot"\nseed = 0\nout_dir = "runs"',
             "from dmrs_nb.config import config_from_notebook\nfrom dmrs_nb.training import fit\nconfig, explicit = config_from_notebook(globals())\nfit(config, progress=False)")
    spec = real(own, notebook=str(tmp_path / "fit.ipynb"), seeds=list(range(50)))
    done = quiet(spec, tmp_path / "runs")
    used = [read_json(tmp_path / "runs" / c.run_id / "cell.json")["rss_mb"] for c in open_grid(spec, tmp_path / "runs").cells]
    assert len(done.trained) == 50 and max(used[-5:]) < used[4] + 60, used   # a CLIP that stays in memory is as much for each cell
