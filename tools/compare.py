"""Run every cell of a spec and keep its numbers: how the stored comparisons under nbs/benchmarks/results/ were made.

    python tools/compare.py nbs/benchmarks/specs/study_ucmerced.yaml [--workers 2] [--out runs/study_ucmerced]

A second call goes on where the first one stopped, and a spec that has grown trains only what is not stored yet. Beside the book are then kept, in results/<name of the spec>/: runs.csv (a row per run: its
config, its metrics on test and on validation), predictions.npz (the class that each run on the same images gave to each test and validation image), environment.json, and of the
runs that the spec's `chosen` lists, config.json and metrics.json, which is what 02_results.ipynb reads.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from tqdm import tqdm

from dmrs_nb.config import make_config
from dmrs_nb.losses import ensemble
from dmrs_nb.runs import RunFolder

ROOT = Path(__file__).resolve().parents[1]


def cells(spec, out):
    "The configs of a spec: for each group its base, every combination of `each`, each of its runs, each seed; seeds outermost, so that a stopped comparison is balanced."
    found = {}
    for group in spec.get("groups") or [spec]:
        combinations = [dict(zip(group.get("each", {}), values)) for values in product(*group.get("each", {}).values())]
        for seed, combination, run in product(group["seeds"] if "seeds" in group else spec["seeds"], combinations, group["runs"]):
            config = make_config(**spec["base"] | group.get("base", {}) | combination | run | dict(seed=seed, out_dir=str(out)))
            found.setdefault(config.run_id, config)
    return list(found.values())


def train(config, threads):
    "One cell in a process of its own."
    code = "import sys; from dmrs_nb.config import make_config; from dmrs_nb.training import fit; import json; fit(make_config(**json.loads(sys.argv[1])), progress=False)"
    return subprocess.run([sys.executable, "-c", code, config.model_dump_json()], env=os.environ | {"OMP_NUM_THREADS": str(threads)}, cwd=ROOT, capture_output=True, text=True)


def row(result):
    "A run as one line: id, config, metrics on test and validation, seconds of training."
    text = lambda v: json.dumps(v) if isinstance(v, list) else v
    numbers = lambda metrics, prefix="": {prefix + k: v for k, v in (metrics or {}).items() if not isinstance(v, list)}
    return ({"run_id": result["run_id"]} | {k: text(v) for k, v in result["config"].items()} | {"cls_num_list": text(result["data"]["cls_num_list"])}
            | numbers(result["metrics"]) | numbers(result["val"], "val_") | {"trainable": result["parameters"]["trainable"], "train_s": round(result["timings"]["train_s"], 1)})


def stored(folder):
    "What an earlier call kept: the table, and for each run the classes it answered with."
    if not (folder / "runs.csv").exists(): return pd.DataFrame(columns=["run_id"]), {}
    with np.load(folder / "predictions.npz") as kept:
        return pd.read_csv(folder / "runs.csv"), {str(name): (kept["test_preds"][i], kept["val_preds"][i]) for i, name in enumerate(kept["run_id"])}


def keep(configs, out, folder, whole=()):
    "Store the finished runs as one table and one array of answers, beside those kept before; those named in `whole` as run folders too."
    table, said = stored(folder)
    runs = [run for config in configs if (run := RunFolder(out / config.run_id)).done]
    if not runs: return
    folder.mkdir(parents=True, exist_ok=True)
    results, answers = [run.result() for run in runs], [np.load(run.predictions_path) for run in runs]
    first = answers[0]
    for run, a in zip(runs, answers):
        if "val_logits" not in a or not np.array_equal(a["test_paths"], first["test_paths"]): continue   # judged on other images: a row in the table, but no answers to pair
        said[run.name] = tuple(ensemble(torch.from_numpy(a[f"{part}_logits"])).argmax(-1).numpy().astype(np.uint8) for part in ("test", "val"))
    table = pd.concat([table[~table.run_id.isin([run.name for run in runs])], pd.DataFrame([row(r) for r in results])]).set_index("run_id")
    table = table.loc[[c.run_id for c in configs if c.run_id in table.index]].reset_index()
    table.to_csv(folder / "runs.csv", index=False, float_format="%.6g")
    paired = [name for name in table.run_id if name in said]
    said = {f"{part}_preds": np.stack([said[name][i] for name in paired]) for i, part in enumerate(("test", "val"))}
    true = {f"{part}_targets": first[f"{part}_targets"].astype(np.uint8) for part in ("test", "val")}
    np.savez_compressed(folder / "predictions.npz", run_id=paired, words=results[0]["data"]["words"], **said, **true)
    for run in runs:
        if run.name not in whole: continue
        (folder / run.name).mkdir(exist_ok=True)
        for path in (run.config_path, run.metrics_path): shutil.copy(path, folder / run.name / path.name)
    (folder / "environment.json").write_text(json.dumps(results[0]["environment"] | {"place": results[0]["place"]}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; the cores are shared out among them")
    args = parser.parse_args()
    spec, out = yaml.safe_load(args.spec.read_text()), (args.out or ROOT / "runs" / args.spec.stem).resolve()
    os.chdir(ROOT)
    folder = args.spec.resolve().parents[1] / "results" / args.spec.stem
    every, failed, there = cells(spec, out), [], set(stored(folder)[0].run_id)
    todo = [config for config in every if config.run_id not in there]
    threads = max(1, (os.cpu_count() or 1) // args.workers)
    with ThreadPoolExecutor(args.workers) as pool, tqdm(total=len(todo), unit="run") as bar:
        for config, done in zip(todo, pool.map(lambda c: None if RunFolder(out / c.run_id).done else train(c, threads), todo)):
            bar.update(); bar.set_description(config.run_id)
            if done and done.returncode: failed.append(f"{config.run_id}: {(done.stderr.strip().splitlines() or [f'ended with exit code {done.returncode}'])[-1]}")
    chosen = [spec["base"] | fields for fields in spec.get("chosen", [])]
    whole = {make_config(**fields | dict(seed=seed)).run_id for fields in chosen for seed in {config.seed for config in every}}
    keep(every, out, folder, whole)
    if failed: sys.exit("\n".join(failed))


if __name__ == "__main__": main()
