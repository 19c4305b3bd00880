"""`make demo`: three recipes × two seeds on embedded aerial images, through the notebooks a person would use, and one table.

    python tools/demo.py [--out runs/demo] [--steps 80] [--workers 2]

Finished runs are kept: a second call only reads them.
"""
import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "nbs" / "benchmarks"
RECIPES, SEEDS = ("zero-shot", "ce", "dmrs"), (0, 1)
TAIL = dict(imb_type="exp", imb_factor=0.05, data="ucmerced")
COST = {"zero-shot": 0.2, "ce": 1, "dmrs": 2}   # of a run beside the others, roughly: how far it moves the bar


def papermill(notebook, output, parameters, threads):
    "Execute a notebook in a process of its own."
    output.parent.mkdir(parents=True, exist_ok=True)
    options = [x for k, v in parameters.items() for x in ("-p", k, str(v))]
    command = [sys.executable, "-m", "papermill", str(notebook), str(output), "--no-progress-bar", "-k", "python3", *options]
    env = os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def stop(done, notebook):
    "End with the last lines of what a failed notebook said."
    sys.exit(f"\n{done.stderr[-2000:]}\n\ndemo: {notebook} holds the notebook with the error")


def share_done(run, steps):
    "How much of a run is over, from the history it writes: 0 … 1."
    if (run / "metrics.json").exists(): return 1.0
    try: return 0.9 * int((run / "history.csv").read_text().splitlines()[-1].split(",")[0]) / max(1, steps)
    except (OSError, ValueError, IndexError): return 0.0


def train_all(cells, workers):
    "Execute the run notebook for every cell, `workers` at a time, under one bar."
    threads, todo = max(1, (os.cpu_count() or 1) // workers), [c for c in cells if not (c["run"] / "run.ipynb").exists() or not (c["run"] / "metrics.json").exists()]
    total = sum(COST[c["method"]] for c in cells)
    bar = tqdm(total=total, bar_format="{desc} {percentage:3.0f} %|{bar}| {elapsed}<{remaining}", desc="starting")
    with ThreadPoolExecutor(workers) as pool, bar:
        jobs = [(c, pool.submit(papermill, BENCHMARKS / "01_run.ipynb", c["run"] / "run.ipynb", c["parameters"], threads)) for c in todo]
        while any(not job.done() for _, job in jobs):
            time.sleep(0.5)
            now = [f"{c['method']} (seed {c['seed']})" for c, job in jobs if job.running()]
            bar.set_description(" and ".join(now) or "finishing", refresh=False)
            bar.n = sum(COST[c["method"]] * share_done(c["run"], c["steps"]) for c in cells); bar.refresh()
            for c, job in jobs:
                if job.done() and job.result().returncode:
                    pool.shutdown(cancel_futures=True)
                    stop(job.result(), c["run"] / "run.ipynb")
        bar.set_description("trained"); bar.n = total; bar.refresh()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=ROOT / "runs" / "demo", type=Path)
    parser.add_argument("--steps", default=80, type=int, help="training steps of ce and dmrs")
    parser.add_argument("--workers", default=min(2, os.cpu_count() or 1), type=int, help="runs at a time")
    args = parser.parse_args()
    out, clock = args.out.resolve(), time.perf_counter()
    from dmrs_nb.config import make_config
    budget = dict(steps=args.steps, eval_every=max(1, args.steps // 2), batch_size=16, expert_blocks=3)
    cells = [dict(method=m, seed=s, steps=args.steps, parameters=TAIL | dict(method=m, seed=s, out_dir=str(out)) | ({} if m == "zero-shot" else budget)) for s in SEEDS for m in RECIPES]
    for c in cells: c["run"] = out / make_config(**c["parameters"]).run_id
    print(f"{len(cells)} runs, {args.workers} at a time; then the report", flush=True)
    train_all(cells, args.workers)
    done = papermill(BENCHMARKS / "02_results.ipynb", out / "results.ipynb", dict(runs=out), 1)
    if done.returncode: stop(done, out / "results.ipynb")
    subprocess.run([sys.executable, "-m", "jupyter", "nbconvert", "--to", "html", "--log-level", "ERROR", str(out / "results.ipynb")], check=True)
    from dmrs_nb.report import results, summary
    print(f"\nTest accuracy in %, mean ± standard deviation over {len(SEEDS)} seeds (UC Merced thinned to 69 → 3 images a class;\n"
          f"{args.steps} steps are a demonstration, not a ranking):\n")
    print(summary(results(out), metrics=("acc1", "many", "medium", "few")).rename_axis(None).to_string())
    shown = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    print(f"\nReport: {shown}/results.html   ·   one page a run: {shown}/<run>/run.ipynb   ·   {time.perf_counter() - clock:.0f} s")


if __name__ == "__main__": main()
