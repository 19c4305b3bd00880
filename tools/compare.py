"""Run every cell of a spec and keep its numbers: how the stored comparisons under nbs/benchmarks/results/ were made.

    python tools/compare.py nbs/benchmarks/specs/recipes_ucmerced.yaml [--workers 2] [--out runs/recipes_ucmerced]

A second call goes on where the first one stopped. config.json and metrics.json of every run are then copied beside the book.
"""
import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


def cells(spec, out):
    "The configs of a spec: for each group its base, every combination of `each`, each of its runs, each seed; seeds outermost, so that a stopped comparison is balanced."
    from dmrs_nb.config import make_config
    found = {}
    for group in spec.get("groups") or [spec]:
        combinations = [dict(zip(group.get("each", {}), values)) for values in product(*group.get("each", {}).values())]
        for seed, combination, run in product(group.get("seeds", spec["seeds"]), combinations, group["runs"]):
            config = make_config(**spec["base"] | group.get("base", {}) | combination | run | dict(seed=seed, out_dir=str(out)))
            found.setdefault(config.run_id, config)
    return list(found.values())


def train(config, threads):
    "One cell in a process of its own."
    code = "import sys; from dmrs_nb.config import make_config; from dmrs_nb.training import fit; import json; fit(make_config(**json.loads(sys.argv[1])), progress=False)"
    return subprocess.run([sys.executable, "-c", code, config.model_dump_json()], env=os.environ | {"OMP_NUM_THREADS": str(threads)}, cwd=ROOT, capture_output=True, text=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; the cores are shared out among them")
    args = parser.parse_args()
    spec, out = yaml.safe_load(args.spec.read_text()), (args.out or ROOT / "runs" / args.spec.stem).resolve()
    os.chdir(ROOT)
    todo, failed = cells(spec, out), []
    threads = max(1, (os.cpu_count() or 1) // args.workers)
    with ThreadPoolExecutor(args.workers) as pool, tqdm(total=len(todo), unit="run") as bar:
        for config, done in zip(todo, pool.map(lambda c: train(c, threads), todo)):
            bar.update(); bar.set_description(config.run_id)
            if done.returncode: failed.append(f"{config.run_id}: {(done.stderr.strip().splitlines() or [f'ended with exit code {done.returncode}'])[-1]}")
    stored = args.spec.resolve().parents[1] / "results" / args.spec.stem
    for config in todo:
        for name in ("config.json", "metrics.json"):
            if (out / config.run_id / "metrics.json").exists():
                (stored / config.run_id).mkdir(parents=True, exist_ok=True)
                shutil.copy(out / config.run_id / name, stored / config.run_id / name)
    if failed: sys.exit("\n".join(failed))


if __name__ == "__main__": main()
