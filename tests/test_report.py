"""The report on made-up run folders: what is missing, damaged, degenerate or badly spread over seeds."""
import json
import subprocess
import sys

import matplotlib
matplotlib.use("Agg")
import numpy as np
import pytest
from PIL import Image

from dmrs_nb import report
from dmrs_nb.longtail import SHOT_COLORS
from dmrs_nb.losses import ensemble
from dmrs_nb.metrics import compute_metrics

import torch

WORDS = ["forest", "dense residential", "runway", "golf course", "harbor"]
COUNTS = [120, 60, 50, 12, 8]
GROUPS = ["many", "medium", "medium", "few", "few"]
BASE = dict(data="toy", data_root=None, imb_type="exp", imb_factor=0.05, split_seed=0, backbone="tiny-aid-96", num_experts=1, lambdas=None,
            mixing="none", mix_partner="similar", loss="cross-entropy", sampler="instance", epochs=None, steps=10, device="cpu")


def make_run(out, name, method="ce", seed=0, E=1, n=50, strength=2.0, predictions=True, history=True, data=None, **config):
    "A finished run folder with random logits that lean to the truth."
    rng = np.random.default_rng([seed, len(name)])
    targets = np.arange(n) % len(WORDS)
    logits = rng.normal(size=(E, n, len(WORDS))).astype(np.float32)
    logits[:, np.arange(n), targets] += strength
    paths = np.array([f"{WORDS[t]}/{i:03d}.jpg" for i, t in enumerate(targets)])
    groups = np.array(GROUPS)
    metrics = compute_metrics(ensemble(torch.as_tensor(logits)).numpy(), targets, groups)
    experts = [compute_metrics(ensemble(torch.as_tensor(z)).numpy(), targets, groups) for z in logits] if E > 1 else []
    config = BASE | dict(method=method, seed=seed, num_experts=E) | config
    record = {"schema_version": 1, "run_id": name, "config": config, "metrics": metrics, "val": metrics, "experts": experts,
              "data": {"name": "toy", "fingerprint": "f0", "classnames": WORDS, "words": WORDS, "cls_num_list": COUNTS, "shot_groups": GROUPS,
                       "thresholds": [100, 20], "thresholds_reason": "published", "num_train": 250, "num_val": 0, "num_test": n} | (data or {}),
              "parameters": {"trainable": 10, "total": 100}, "steps": 10, "environment": {}, "timings": {"total_s": 1.0}}
    run = out / name
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config))
    if predictions: np.savez(run / "predictions.npz", test_logits=logits, test_targets=targets, test_paths=paths)
    if history: (run / "history.csv").write_text(HISTORY)
    (run / "metrics.json").write_text(json.dumps(record))
    return run


HISTORY = ("step,epoch,lr,loss,val_acc1,val_mean_per_class_recall,val_many,val_medium,val_few\n"
           "1,0,0.1,2.0,,,,,\n2,0,0.1,1.5,0.5,0.4,0.8,0.5,0.1\n3,1,0.05,1.2,,,,,\n4,1,0.0,1.0,0.6,0.5,0.9,0.6,0.2\n")
EMPTY_HISTORY = HISTORY.splitlines()[0] + "\n"


def edit(run, change):
    record = json.loads((run / "metrics.json").read_text())
    change(record)
    (run / "metrics.json").write_text(json.dumps(record))


def texts(fig): return [t.get_text() for ax in fig.axes for t in [ax.title, ax._left_title, *ax.texts]]
