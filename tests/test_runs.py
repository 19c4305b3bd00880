"""Run folders: real processes that die, a disk that is full, folders that are broken."""
import hashlib
import json
import os
import random
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from dmrs_nb import runs
from dmrs_nb.runs import (RunFolder, RunLocked, canonical_json, code_hash, collect, environment, git_commit, hold, list_runs, plain,
                          read_checkpoint, read_json, read_rows, run_id, write_atomic, write_checkpoint, write_json)

posix = pytest.mark.skipif(os.name == "nt", reason="fork, signals and limits of POSIX")
CONFIG = {"method": "ce", "lr": 0.1, "steps": 40, "seed": 0}


def fork(work) -> int:
    "Run `work` in a child process; its id."
    pid = os.fork()
    if pid: return pid
    try: work(); os._exit(0)
    except BaseException: os._exit(1)


def wait(pid) -> int: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def kill_here(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
def strays(folder): return [p for p in Path(folder).rglob("*.tmp")]


def started(path, **changes): return RunFolder(path).start({**CONFIG, **changes})


def finished(path, **changes):
    run = started(path, **changes)
    run.finish({"acc1": 0.5, "few": None}, {"probs": torch.eye(2)}, {"train_s": 1.0})
    return run


# ---- processes that die ----

@posix
def test_kill_9_at_any_time_leaves_a_whole_file(tmp_path):
    path, contents = tmp_path / "f.bin", [bytes([c]) * 300_000 for c in (1, 2)]
    write_atomic(path, contents[0])

    def write_for_ever():
        while True:
            for c in contents: write_atomic(path, c)

    rng, seen = random.Random(0), set()
    for _ in range(25):
        pid = fork(write_for_ever)
        time.sleep(rng.uniform(0.002, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL
        assert path.read_bytes() in contents
        seen.add(path.read_bytes()[0])
    assert seen == {1, 2}


@posix
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_checkpoint_survives_a_kill_before_the_rename(tmp_path, monkeypatch, step):
    run = started(tmp_path / "run")
    run.save_checkpoint({"w": torch.arange(1000.0)}, 10)

    def die():
        monkeypatch.setattr(os, step, kill_here)
        run.save_checkpoint({"w": torch.zeros(1000)}, 20)

    assert wait(fork(die)) == -signal.SIGKILL
    assert len(strays(run.path)) == 1
    state = started(run.path).load_checkpoint()
    assert state["step"] == 10 and torch.equal(state["w"], torch.arange(1000.0))
    assert not strays(run.path)  # swept by the next start


@posix
def test_a_run_killed_while_finishing_is_not_done_and_can_go_on(tmp_path, monkeypatch):
    run = started(tmp_path / "run")
    run.save_checkpoint({"w": torch.ones(3)}, 40)
    replace = os.replace

    def die():
        monkeypatch.setattr(os, "replace", lambda a, b: kill_here() if Path(b).name == "metrics.json" else replace(a, b))
        run.finish({"acc1": 0.5}, {"probs": torch.eye(2)})

    assert wait(fork(die)) == -signal.SIGKILL
    assert run.predictions_path.exists() and not run.done and run.load_checkpoint()["step"] == 40
    started(run.path).finish({"acc1": 0.5}, {"probs": torch.eye(2)})
    assert run.done and run.load_checkpoint() is None and not run.checkpoint_path.parent.exists()


def train(run, config, pause=0.0):
    g = torch.Generator().manual_seed(config["seed"])
    state = run.start(config).load_checkpoint() or {"step": 0, "w": torch.zeros(5), "g": g.get_state()}
    w, _ = state["w"], g.set_state(state["g"])
    for step in range(state["step"] + 1, config["steps"] + 1):
        w = w + config["lr"] * (1 - w + torch.randn(5, generator=g))
        run.append_history({"step": step, "loss": w.square().mean()})
        run.save_checkpoint({"w": w, "g": g.get_state()}, step)
        time.sleep(pause)
    run.finish({"acc1": 0.5}, {"w": w})


@posix
def test_a_run_killed_again_and_again_ends_as_an_uninterrupted_one(tmp_path):
    whole, run, rng = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed"), random.Random(1)
    train(whole, CONFIG)

    def try_again():
        with run.lock(): train(run, CONFIG, pause=0.005)

    kills = 0
    for _ in range(60):
        pid = fork(try_again)
        time.sleep(rng.uniform(0.05, 0.4))
        if os.waitpid(pid, os.WNOHANG)[0] == 0:
            os.kill(pid, signal.SIGKILL); wait(pid); kills += 1
        if run.done: break
    assert run.done and kills >= 1
    assert run.predictions_path.read_bytes() == whole.predictions_path.read_bytes()
    assert read_rows(run.history_path) == read_rows(whole.history_path)


# ---- one process at a time ----

@posix
def test_processes_take_turns(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count():
        for _ in range(5):
            with hold(tmp_path / "run", timeout=30):
                n = int(counter.read_text()); time.sleep(0.002); counter.write_text(str(n + 1))

    assert [wait(pid) for pid in [fork(count) for _ in range(4)]] == [0] * 4
    assert counter.read_text() == "20"


@posix
def test_the_second_process_gets_a_sentence_and_a_killed_holder_lets_go(tmp_path):
    run = RunFolder(tmp_path / "run")

    def sit():
        with run.lock(): time.sleep(60)

    pid = fork(sit)
    deadline = time.time() + 10
    while not (run.path / ".owner.json").exists() and time.time() < deadline: time.sleep(0.01)
    with pytest.raises(RunLocked, match=rf"in use by another process \(process {pid}, since .*nothing to delete"):
        with run.lock(timeout=0.1): pass
    os.kill(pid, signal.SIGKILL); wait(pid)
    with run.lock(timeout=5): assert read_json(run.path / ".owner.json")["pid"] == os.getpid()
    assert not (run.path / ".owner.json").exists()


def test_an_error_inside_lets_go(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with hold(tmp_path / "run"): 1 / 0
    with hold(tmp_path / "run", timeout=0): pass


# ---- a disk that is full, a folder that is read-only ----

def snapshot(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@posix
@pytest.mark.parametrize("what", ["checkpoint", "history", "finish"])
def test_a_full_disk_is_a_sentence_and_changes_nothing(tmp_path, what):
    import resource
    run = started(tmp_path / "run")
    run.save_checkpoint({"w": torch.arange(3.0)}, 1)
    run.append_history({"step": 1, "loss": 1.0})
    before, message = snapshot(run.path), "no error"

    def fill():
        nonlocal message
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))  # Python ignores the signal: the write fails
        try:
            {"checkpoint": lambda: run.save_checkpoint({"w": torch.zeros(10_000)}, 2),
             "history": lambda: run.append_history({"step": 2, "loss": 0.5}),
             "finish": lambda: run.finish({"acc1": 0.5}, {"probs": torch.rand(100, 10)})}[what]()
        except OSError as e: message = str(e)
        os._exit(0 if "could not write" in message and "What was there before is unchanged; free some space" in message else 3)

    assert wait(fork(fill)) == 0
    assert snapshot(run.path) == before


@pytest.mark.parametrize("code, advice", [("ENOSPC", "free some space"), ("EROFS", "choose an out_dir that you may write to"),
                                          ("EIO", "check out_dir")])
def test_what_the_system_says_becomes_advice(tmp_path, monkeypatch, code, advice):
    import errno
    write_atomic(tmp_path / "f", b"old")
    def refuse(*_): raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=f"could not write .*f .*{advice}"): write_atomic(tmp_path / "f", b"new")
    assert snapshot(tmp_path) == {"f": b"old"}


@posix
def test_a_folder_one_may_not_write_to(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(); locked.chmod(0o555)

    def intrude():
        if os.getuid() == 0: os.setuid(65534)
        try: RunFolder(locked / "run").start(CONFIG)
        except PermissionError as e: os._exit(0 if "could not write" in str(e) and "choose an out_dir" in str(e) else 3)
        os._exit(4)

    assert wait(fork(intrude)) == 0
    assert list(locked.iterdir()) == []


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="is a file, expected a folder"): started(tmp_path / "run")


# ---- names and configs ----

values = st.one_of(st.none(), st.booleans(), st.integers(-10**9, 10**9), st.floats(allow_nan=False, allow_infinity=False),
                   st.text(max_size=8), st.lists(st.integers(0, 9), max_size=3))
configs = st.dictionaries(st.text(min_size=1, max_size=6), values, max_size=6)


@settings(max_examples=40, deadline=None)
@given(configs, st.lists(st.text(max_size=30), max_size=4), st.randoms())
def test_run_id_is_a_folder_name_and_knows_no_order(config, prefix, rng):
    keys = list(config); rng.shuffle(keys)
    name = run_id(config, prefix)
    assert name == run_id({k: config[k] for k in keys}, prefix) == run_id(json.loads(json.dumps(config)), prefix)
    assert len(name) <= 92 and not set(name) - set(string.ascii_letters + string.digits + "_.+-") and not name.startswith((".", "-"))


@settings(max_examples=40, deadline=None)
@given(configs, configs)
def test_same_hash_means_same_canonical_form(a, b):
    assert (run_id(a, []) == run_id(b, [])) == (canonical_json(a) == canonical_json(b)) == (not runs.differences(a, b))


def test_hash_is_pinned():  # results on disk depend on it
    assert run_id({"method": "dmrs", "lr": 1e-3, "lambdas": (-0.5, 0, 1.5), "data_root": None}, ["x"]) == "x-" + hashlib.sha256(
        b'{"data_root":null,"lambdas":[-0.5,0,1.5],"lr":0.001,"method":"dmrs"}').hexdigest()[:10]


def test_another_config_is_refused_and_the_same_one_taken_up(tmp_path):
    run = finished(tmp_path / "run")
    before = snapshot(run.path)
    with pytest.raises(ValueError, match="lr is 0.1 there and 0.2 here; seed is 0 there and missing here"):
        run.start({"method": "ce", "lr": 0.2, "steps": 40})
    assert run.start({k: float(v) if k == "steps" else v for k, v in CONFIG.items()}).done and snapshot(run.path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_what_json_cannot_hold_is_named(value):
    with pytest.raises(ValueError, match=r"value\.metrics\.x\[1\] is"): plain({"metrics": {"x": [0, value]}})


# ---- broken folders ----

def breakage(name, run):
    result = json.loads(run.metrics_path.read_text())
    def rewrite(**changes): run.metrics_path.write_text(json.dumps({**result, **changes}))
    {"cut": lambda: run.metrics_path.write_bytes(run.metrics_path.read_bytes()[:50]), "empty": lambda: run.metrics_path.write_bytes(b""),
     "binary": lambda: run.metrics_path.write_bytes(bytes(range(128, 256))), "list": lambda: run.metrics_path.write_text("[]"),
     "lacking": lambda: run.metrics_path.write_text('{"schema_version": 1}'), "newer": lambda: rewrite(schema_version=99),
     "mixed up": lambda: rewrite(config={**CONFIG, "lr": 7}), "percent": lambda: rewrite(metrics={"acc1": 93.0}),
     "text": lambda: rewrite(metrics={"acc1": "0.93"}), "no config": run.config_path.unlink}[name]()


@pytest.mark.parametrize("name, message", [
    ("cut", "metrics.json is damaged: expected JSON, found 50 bytes"), ("empty", "found an empty file"), ("binary", "is damaged"),
    ("list", "expected a JSON object, found a list"), ("lacking", "lacks config, metrics, environment, timings"),
    ("newer", "schema_version 99, expected 1"), ("mixed up", "another config than config.json beside it"),
    ("percent", "acc1 is 93.0, expected a share"), ("text", "acc1 is '0.93'"), ("no config", "config.json is not there")])
def test_a_broken_folder_is_a_sentence_beside_the_table(tmp_path, name, message):
    finished(tmp_path / "a"); breakage(name, finished(tmp_path / "b", seed=1)); started(tmp_path / "c", seed=2)
    (tmp_path / "notes").mkdir()  # not a run at all
    table = collect(tmp_path)
    assert list(table.run_id) == ["a"] and table["config.lr"][0] == 0.1 and table.acc1[0] == 0.5 and table["timings.train_s"][0] == 1.0
    assert table.attrs["unfinished"] == ["c"] and len(table.attrs["problems"]) == 1 and message in table.attrs["problems"][0]
    assert [run.name for run in list_runs(tmp_path)] == ["a", "b", "c"]


def test_no_runs_at_all(tmp_path):
    assert len(collect(tmp_path)) == 0
    with pytest.raises(ValueError, match="is no folder"): collect(tmp_path / "nowhere")


def test_predictions_hold_no_objects_and_nothing_is_written(tmp_path):
    run = started(tmp_path / "run")
    before = snapshot(run.path)
    objects = np.array(["a", None], dtype=object)
    for fault in ({"predictions": {"paths": objects}}, {"extra": {"metrics": 1}}, {"timings": {"s": float("nan")}}):
        with pytest.raises(ValueError): run.finish({"acc1": 0.5}, **fault)
    assert snapshot(run.path) == before
    run.finish({"acc1": 0.5}, {"paths": np.array(["a", "b"])}, extra={"val": {"acc1": 0.4}})
    assert np.load(run.predictions_path, allow_pickle=False)["paths"].tolist() == ["a", "b"] and run.result()["val"] == {"acc1": 0.4}


def test_checkpoints_never_unpickle(tmp_path):
    class Evil:
        def __reduce__(self): return (os.mkdir, (str(tmp_path / "evil"),))
    with pytest.raises(ValueError, match="could only be read back by unpickling"): write_checkpoint(tmp_path / "c.pt", {"x": Evil()})
    torch.save({"x": Evil()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="c.pt is damaged"): read_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "evil").exists()


def test_checkpoint_holds_an_optimizer_and_a_generator(tmp_path):
    model = torch.nn.Linear(3, 2); opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 3)).sum().backward(); opt.step()
    state = {"model": model.state_dict(), "opt": opt.state_dict(), "g": torch.Generator().get_state(), "best": None, "history": [1.0, 2]}
    run = started(tmp_path / "run"); run.save_checkpoint(state, 3)
    back = run.load_checkpoint()
    assert back["step"] == 3 and back["best"] is None and all(torch.equal(back["model"][k], v) for k, v in state["model"].items())
    assert torch.equal(back["opt"]["state"][0]["exp_avg"], state["opt"]["state"][0]["exp_avg"])


def test_history_faults_are_sentences(tmp_path):
    run = started(tmp_path / "run")
    for content in (b"step,loss\n1,2,3\n", bytes(range(128, 200))):
        run.history_path.write_bytes(content)
        with pytest.raises(ValueError, match="history.csv is damaged"): run.append_history({"step": 1})


# ---- environment ----

def test_importing_runs_is_light():
    code = "import sys, dmrs_nb.runs; print([m for m in ('torch', 'pandas', 'matplotlib', 'nbdev', 'fastcore') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_environment_tells_nothing_about_the_person():
    import getpass, socket
    text = json.dumps(plain(environment("cpu")))
    private = [str(Path.home()), str(Path.cwd()), sys.prefix] + [x for x in (socket.gethostname(), getpass.getuser()) if len(x) > 4]
    assert not [x for x in private if x in text]


def test_other_code_on_an_old_checkpoint_warns(tmp_path, monkeypatch):
    run = started(tmp_path / "run"); run.save_checkpoint({}, 1)
    monkeypatch.setattr(runs, "code_hash", lambda *_: "0123456789")
    with pytest.warns(UserWarning, match="other code wrote"): started(run.path)
    run.environment_path.write_text("{")  # damaged: written anew
    started(run.path); assert read_json(run.environment_path)["code"] == "0123456789"


@pytest.mark.skipif(subprocess.run(["git", "--version"], capture_output=True).returncode != 0, reason="no git")
def test_git_commit_of_the_package_and_of_nothing_else(tmp_path):
    def git(*args):
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(tmp_path), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    package = tmp_path / "package"
    write_atomic(package / "__init__.py", "x = 1\n"); before = code_hash(package)
    git("init"); assert git_commit(package) is None  # inside a repository, but not of it
    git("add", "package"); git("commit", "-m", "x")
    assert git_commit(package) == git("rev-parse", "HEAD")
    write_atomic(package / "_modidx.py", "d = {}\n")
    assert git_commit(package) == git("rev-parse", "HEAD") and code_hash(package) == before
    write_atomic(package / "__init__.py", "x = 2\n")
    assert git_commit(package) == git("rev-parse", "HEAD") + "+changes" and code_hash(package) != before


def test_write_json_round_trip_is_readable(tmp_path):
    obj = {"acc1": np.float64(1 / 3), "recall": torch.tensor([1.0, 0.0]), "n": np.int64(3), "few": None, "name": "Flußhafen"}
    text = write_json(tmp_path / "x.json", obj).read_text(encoding="utf-8")
    assert "Flußhafen" in text and len(text.splitlines()) > 5
    assert read_json(tmp_path / "x.json") == {"acc1": 1 / 3, "recall": [1.0, 0.0], "n": 3, "few": None, "name": "Flußhafen"}
