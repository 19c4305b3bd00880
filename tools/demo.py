"""`make demo`: three recipes × two seeds on embedded aerial images, through the notebooks a person would use, and one table.

    python tools/demo.py [--out runs/demo] [--steps 100]

Finished runs are kept: a second call only reads them.
"""
import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "nbs" / "benchmarks"
RECIPES, SEEDS = ("zero-shot", "ce", "dmrs"), (0, 1)
TAIL = dict(imb_type="exp", imb_factor=0.05)


def papermill(notebook, output, parameters):
    "Execute a notebook in a process of its own; on failure show the end of what it said."
    output.parent.mkdir(parents=True, exist_ok=True)
    options = [x for k, v in parameters.items() for x in ("-p", k, str(v))]
    command = [sys.executable, "-m", "papermill", str(notebook), str(output), "--no-progress-bar", "-k", "python3", *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONWARNINGS": "ignore"}, capture_output=True, text=True)
    if done.returncode: sys.exit(f"\n{done.stderr[-2000:]}\n\ndemo: {notebook.name} failed; {output} holds the notebook with the error")


def watch(bar, run, steps, stop):
    "Move the bar with the history that a run writes."
    start, seen = bar.n, 0
    while not stop.wait(0.5):
        try: seen = max(seen, int((run / "history.csv").read_text().splitlines()[-1].split(",")[0]))
        except (OSError, ValueError, IndexError): continue
        bar.n = start + min(seen, steps); bar.refresh()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "runs" / "demo"), type=Path)
    parser.add_argument("--steps", default=100, type=int, help="training steps of ce and dmrs")
    args = parser.parse_args()
    out, clock = args.out.resolve(), time.perf_counter()
    from dmrs_nb.config import make_config
    cells = [(m, s, dict(TAIL, method=m, seed=s, out_dir=out) | ({} if m == "zero-shot" else dict(steps=args.steps, eval_every=max(1, args.steps // 3), expert_blocks=3))) for s in SEEDS for m in RECIPES]
    weight = {"zero-shot": 10, "ce": args.steps, "dmrs": 2 * args.steps}   # what a run costs, roughly
    with tqdm(total=sum(weight[m] for m, _, _ in cells) + 10, bar_format="{l_bar}{bar}| {elapsed}<{remaining}", desc="starting") as bar:
        for method, seed, parameters in cells:
            bar.set_description(f"{method} · seed {seed}")
            begun, run = bar.n, out / make_config(**{k: str(v) if k == "out_dir" else v for k, v in parameters.items()}).run_id
            if not (run / "metrics.json").exists():
                stop = threading.Event()
                thread = threading.Thread(target=watch, args=(bar, run, weight[method], stop), daemon=True)
                thread.start()
                papermill(BENCHMARKS / "01_run.ipynb", run / "run.ipynb", parameters)
                stop.set(); thread.join()
            bar.n = begun + weight[method]; bar.refresh()
        bar.set_description("report")
        papermill(BENCHMARKS / "02_results.ipynb", out / "results.ipynb", dict(runs=out))
        subprocess.run([sys.executable, "-m", "jupyter", "nbconvert", "--to", "html", "--log-level", "ERROR", str(out / "results.ipynb")], check=True)
        bar.n = bar.total; bar.refresh()
    from dmrs_nb.report import results, summary
    print(f"\nTest accuracy in %, mean ± standard deviation over {len(SEEDS)} seeds (UC Merced thinned to 69 → 3 images a class; "
          "a demonstration, not a ranking):\n")
    print(summary(results(out), metrics=("acc1", "many", "medium", "few")).to_string())
    shown = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    print(f"\nReport: {shown}/results.html   ·   one page a run: {shown}/<run>/run.ipynb   ·   {time.perf_counter() - clock:.0f} s")


if __name__ == "__main__": main()
