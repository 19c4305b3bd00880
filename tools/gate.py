"""The gate: notebooks clean, export changes nothing, all notebooks run, pytest.

    python tools/gate.py [notebooks-clean | notebooks-run | pytest]

Works in a tarball without git, and leaves the working tree as it is.
"""
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
WORKERS = os.environ.get("GATE_WORKERS", "2")   # processes, each with one thread: the gate is sized for two cores
ENV = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
                    "MPLBACKEND": "module://matplotlib_inline.backend_inline", "TOKENIZERS_PARALLELISM": "false"}


def run(*command, cwd=ROOT, env=ENV):
    "Run a command; stop the gate when it fails."
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env)
    if done.returncode: sys.exit(f"gate: {' '.join(Path(str(c)).name for c in command[:3])} failed with exit code {done.returncode}")


def changed(kind, before, after, pattern):
    "Files of two folders that differ."
    names = {p.relative_to(f) for f in (before, after) for p in f.rglob(pattern) if not {".ipynb_checkpoints", "__pycache__"} & set(p.parts)}
    return [f"{kind}/{n}" for n in sorted(names) if not ((before / n).exists() and (after / n).exists() and filecmp.cmp(before / n, after / n, shallow=False))]


def notebooks_clean():
    "Clean and export a copy of the book; what differs from the working tree was committed unclean or stale."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ROOT.name
        skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.zip", "*.safetensors")
        for name in ("nbs", "dmrs_nb"): shutil.copytree(ROOT / name, copy / name, ignore=skip)
        for name in ("settings.ini", "pyproject.toml", "setup.py", "_quarto.yml"): shutil.copy(ROOT / name, copy / name)
        run(BIN / "nbdev_clean", cwd=copy)
        run(BIN / "nbdev_export", cwd=copy)
        unclean, stale = changed("nbs", ROOT / "nbs", copy / "nbs", "*.ipynb"), changed("dmrs_nb", ROOT / "dmrs_nb", copy / "dmrs_nb", "*.py")
    if unclean: sys.exit(f"gate: not clean: {', '.join(unclean)}; run nbdev_clean")
    if stale: sys.exit(f"gate: export changes {', '.join(stale)}; run nbdev_export (and never edit dmrs_nb/*.py by hand)")


def notebooks_run():
    "Run every notebook but those whose front matter says skip_exec (they are run by pytest)."
    run(BIN / "nbdev_test", "--n_workers", WORKERS, "--timing", "--do_print")


def pytest():
    "What a notebook cannot show."
    run(sys.executable, "-m", "pytest", "-q", "-n", WORKERS, "--dist", "worksteal", "--durations=10", "tests")


STEPS = {"notebooks-clean": notebooks_clean, "notebooks-run": notebooks_run, "pytest": pytest}

if __name__ == "__main__":
    for name in sys.argv[1:] or STEPS:
        if name not in STEPS: sys.exit(f"gate: no step {name!r}; expected {', '.join(STEPS)}")
        start = time.perf_counter()
        STEPS[name]()
        print(f"gate: {name} passed in {time.perf_counter() - start:.0f} s", flush=True)
