"Every recipe from beginning to end on sixty images: what it keeps and exports, what two share, where one is another, and each fault of the published code."
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dmrs_nb.clip import encode_images
from dmrs_nb.config import METHODS, OFFICIAL, make_config
from dmrs_nb.data import AutoAugment, unpack_asset
from dmrs_nb.experts import MultiExpertCLIP
from dmrs_nb.export import export
from dmrs_nb.longtail import published_split, shot_groups
from dmrs_nb.mixing import PARTNERS, MixUp
from dmrs_nb.runs import RunFolder, list_runs, read_rows
from dmrs_nb.tip_adapter import tune
from dmrs_nb.training import (Learner, build_model, fit, load_model, lr_at, make_batches, make_optimizer, mixing_of, predict, predict_logits, prepare,
                              score)

SIZES = dict(beach=28, forest=16, mobilehomepark=10, runway=6)   # mobilehomepark: words that a folder name does not show
TINY = dict(batch_size=8, expert_blocks=1, device="cpu", tip_views=2)
UNTRAINED, MEANS = ("zero-shot", "tip-adapter"), ("ride", "sade", "balpoe")
DATA = ("templates", "class_words", "split", "val_size", "thresholds", "split_seed")   # the fields that a task depends on


pytestmark = pytest.mark.usefixtures("one_thread")


class Bench:
    "A long-tailed folder, and runs on it; what was prepared or trained once is there for all tests."
    def __init__(self, root):
        self.root, self.tasks, self.runs = root / "images", {}, {}
        self.places, source = dict(data_root=str(self.root), cache_dir=str(root / "cache"), out_dir=str(root / "runs")), unpack_asset("ucmerced")
        for name, size in SIZES.items():
            (self.root / name).mkdir(parents=True)
            for path in sorted((source / name).glob("*.jpg"))[:size]: (self.root / name / path.name).write_bytes(path.read_bytes())

    def config(self, method, **fields):
        fields = dict(val_size=METHODS[method]["fields"].get("val_size", 0.2)) | fields
        return make_config(method, **TINY | self.places | ({} if method in UNTRAINED else dict(steps=3)) | fields)

    def task(self, config):
        key = tuple(str(getattr(config, f)) for f in DATA)
        if key not in self.tasks: self.tasks[key] = prepare(config, progress=False)
        return replace(self.tasks[key])

    def fit(self, method, callback=None, **fields):
        config = self.config(method, **fields)
        return fit(config, progress=False, callback=callback, task=self.task(config))

    def __call__(self, method):   # the recipe as it is, trained once
        if method not in self.runs: self.runs[method] = self.fit(method)
        return self.runs[method]

    def losses(self, method, out_dir, **fields):
        rows = []
        self.fit(method, rows.append, out_dir=str(out_dir), **fields)
        return [r["loss"] for r in rows]


@pytest.fixture(scope="module")
def bench(tmp_path_factory): return Bench(tmp_path_factory.mktemp("methods"))


def stored(run):
    with np.load(RunFolder(run.path).predictions_path) as f: return dict(f)


def logits_again(bench, run, part="test"):
    "(E, N, C) of the loaded model, on images that are only normalised."
    (model, clip, _), task = load_model(run), bench.task(make_config(**run.config | bench.places))
    return predict_logits(model, [clip.preprocess.normalize(task.cache.tensor(getattr(task.split, part)))]), getattr(model, "expert_weights", None), task


# ---- every recipe

@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_trains_is_judged_kept_and_answers_again(bench, method):
    frozen = {k: v.clone() for k, v in bench.task(bench.config(method)).clip.model.state_dict().items()}
    run = bench(method)
    result, kept = run.result(), stored(run)
    again, weights, task = logits_again(bench, run)
    assert all(torch.equal(v, frozen[k]) for k, v in task.clip.model.state_dict().items()), "CLIP itself is never trained"
    mean = again if weights is None else (weights.numpy()[:, None, None] * again).sum(0, keepdims=True)
    np.testing.assert_allclose(kept["test_logits"], mean, atol=1e-4, rtol=1e-5)
    assert kept["test_targets"].tolist() == task.items.targets[task.split.test].tolist()
    assert len(kept["test_paths"]) == len(task.split.test) == result["data"]["num_test"] and sum(result["data"]["cls_num_list"]) == len(task.split.train)
    if result["config"].get("test_draw", "all") == "all":
        expected = score(kept["test_logits"], kept["test_targets"], task.groups)[0]
        assert expected.pop("per_class_recall") == pytest.approx(result["metrics"].pop("per_class_recall")) and expected == pytest.approx(result["metrics"])
    assert (result["parameters"]["trainable"] > 0) == (method not in UNTRAINED) and result["steps"] == (0 if method in UNTRAINED else 3)
    rows = read_rows(run.history_path)
    assert [r["step"] for r in rows] == ([] if method in UNTRAINED or METHODS[method]["fields"].get("stage2") else [1, 2, 3])
    table = predict(run, [bench.root / p for p in kept["test_paths"]], top_k=1, temperature=1.0)
    answers = torch.as_tensor(kept["test_logits"]).softmax(-1).mean(0).max(-1)
    assert table.error.isna().all()
    np.testing.assert_allclose(table.probability_1, answers.values, atol=1e-4)
    if (answers.values > 0.5).all(): assert table.class_1.tolist() == [task.words[c] for c in answers.indices]


def test_the_stored_logits_of_experts_that_multiply_are_the_mean_of_theirs(bench):
    for method in MEANS:
        again = logits_again(bench, bench(method))[0]
        assert again.shape[0] == 3 and np.abs(again[0] - again[1]).max() > 1e-3, "experts differ"
        assert stored(bench(method))["test_logits"].shape == (1, *again.shape[1:])
        np.testing.assert_allclose(stored(bench(method))["test_logits"][0], again.mean(0), atol=1e-4)
        assert len(bench(method).result()["experts"]) == 3, "each is judged alone, too"


def test_sade_can_weigh_its_experts_at_test_time(bench):
    run = bench.fit("sade", combine="test-time", lr=0.05)
    again, weights, _ = logits_again(bench, run)
    assert weights.sum().item() == pytest.approx(1, abs=1e-5) and weights.min() >= 0.05 - 1e-6
    np.testing.assert_allclose(run.result()["expert_weights"], weights, atol=1e-5)
    np.testing.assert_allclose(stored(run)["test_logits"][0], np.einsum("e,enc->nc", weights, again), atol=1e-4)


@pytest.mark.parametrize("method, fields", [("sade", dict(combine="test-time", lr=0.05)), ("tip-adapter-f", {}), ("crt", {}), ("posthoc-la", {}), ("balpoe", {})])
def test_metrics_of_validation_are_those_of_the_stored_answers_whatever_was_settled_after_training(bench, method, fields):
    run = bench.fit(method, **fields)
    kept, val = stored(run), run.result()["val"]
    found = score(kept["val_logits"], kept["val_targets"], np.array(run.result()["data"]["shot_groups"]))[0]
    assert {k: pytest.approx(v) for k, v in found.items()} == val


# ---- stopped and taken up

@pytest.mark.parametrize("method", ["lift", "coop", "tip-adapter-f", "clip-lora", "ride", "cmo"])
def test_a_stopped_run_goes_on_to_the_same_numbers(bench, method, tmp_path):
    def stop(row):
        if row["step"] == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): bench.fit(method, stop, out_dir=str(tmp_path), checkpoint_every=2)
    [begun] = list_runs(tmp_path)
    assert begun.load_checkpoint()["step"] == 2 and not begun.done and begun.name == bench(method).name
    seen = []
    run = bench.fit(method, seen.append, out_dir=str(tmp_path), checkpoint_every=2)
    assert [r["step"] for r in seen] == [3] and run.done and not run.checkpoint_path.exists()
    assert np.array_equal(stored(run)["test_logits"], stored(bench(method))["test_logits"])
    assert read_rows(run.history_path) == read_rows(bench(method).history_path)


# ---- second stages

def counted(monkeypatch):
    steps, step = [], Learner.step
    monkeypatch.setattr(Learner, "step", lambda self, t, *batch: steps.append(t) or step(self, t, *batch))
    return steps


def test_posthoc_adjustment_is_ce_less_the_log_prior_and_shares_its_run(bench, tmp_path, monkeypatch):
    steps = counted(monkeypatch)
    late = {tau: bench.fit("posthoc-la", out_dir=str(tmp_path), tau=tau) for tau in (1.0, 1.5)}
    ce = bench.fit("ce", out_dir=str(tmp_path))
    assert steps == [0, 1, 2] and len(list_runs(tmp_path)) == 3, "one first stage for all, which is the run of ce"
    n = np.array(ce.result()["data"]["cls_num_list"])
    for tau, run in late.items():
        np.testing.assert_allclose(stored(run)["test_logits"], stored(ce)["test_logits"] - tau * np.log(n / n.sum()), atol=1e-4)
        assert run.result()["timings"]["train_s"] > ce.result()["timings"]["train_s"], "its time is that of both stages"


def test_crt_and_tau_norm_share_a_first_stage_and_change_the_classifier_alone(bench, tmp_path, monkeypatch):
    steps = counted(monkeypatch)
    crt, tau = (bench.fit(m, out_dir=str(tmp_path)) for m in ("crt", "tau-norm"))
    assert steps == [0, 1, 2] and len(list_runs(tmp_path)) == 3
    [first] = [r for r in list_runs(tmp_path) if r.path not in (crt.path, tau.path)]
    one, two, three = (load_model(r)[0] for r in (first, crt, tau))
    for a, b, c in zip(*(m.adapters.parameters() for m in (one, two, three))): assert torch.equal(a, b) and torch.equal(a, c)
    chosen = tau.result()["chosen"]
    norms = one.head.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(three.head.weight, one.head.weight / norms ** chosen["stage2_tau"])
    assert chosen["chosen_on"] == "val" and not three.head.bias.any() and (two.head.weight - one.head.weight).abs().max() > 1e-3
    other = bench.fit("crt", out_dir=str(tmp_path), stage2_lr=0.4, stage2_epochs=1)
    assert steps == [0, 1, 2] and not np.allclose(stored(other)["test_logits"], stored(crt)["test_logits"], atol=1e-3)


AT_ONCE = """
import json, sys, time
from pathlib import Path
from dmrs_nb.config import make_config
from dmrs_nb.training import Learner, fit, prepare
fields, mine = json.loads(sys.argv[1]), Path(sys.argv[2])
config = make_config(**fields)
task, step = prepare(config, progress=False), Learner.step
def slow(self, t, *batch):
    with mine.open("a") as f: f.write(f"{t}\\n")
    time.sleep(0.3)
    return step(self, t, *batch)
Learner.step = slow
mine.write_text("")
while len(list(mine.parent.glob("*.steps"))) < 2: time.sleep(0.01)
fit(config, progress=False, task=task)
"""


def test_two_processes_that_need_one_first_stage_train_it_once(bench, tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    given = lambda m: json.dumps(TINY | bench.places | dict(method=m, steps=3, out_dir=str(tmp_path / "runs")))
    start = lambda m: subprocess.Popen([sys.executable, "-c", AT_ONCE, given(m), str(tmp_path / f"{m}.steps")], env=env, stderr=subprocess.PIPE, text=True)
    both = [start(m) for m in ("crt", "tau-norm")]
    said = [p.communicate(timeout=400)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert sorted("".join(p.read_text() for p in tmp_path.glob("*.steps")).split()) == ["0", "1", "2"]
    runs = list_runs(tmp_path / "runs")
    assert len(runs) == 3 and all(r.done for r in runs)


@pytest.mark.parametrize("method", ["tip-adapter", "tip-adapter-f"])
def test_what_a_recipe_chooses_by_itself_is_chosen_on_validation(bench, method):
    run = bench(method)
    model, clip, _ = load_model(run)
    task, chosen = bench.task(bench.config(method)), dict(alpha=model.alpha.item(), beta=model.beta.item())
    features = encode_images(clip, [clip.preprocess.normalize(task.cache.tensor(task.split.val))])
    found = tune(model, features, torch.as_tensor(task.items.targets[task.split.val]))
    told = run.result()["chosen"]
    assert {k: found[k] for k in chosen} == pytest.approx(chosen) == {k: told[k] for k in chosen} and told["chosen_on"] == "val"


# ---- where one recipe is another

def test_one_expert_at_lambda_one_is_logit_adjustment(bench, tmp_path):
    one = bench.losses("logit-adjusted", tmp_path / "la")
    assert bench.losses("logit-adjusted", tmp_path / "mme", loss="mme", lambdas=(1.0,)) == one
    assert bench.losses("logit-adjusted", tmp_path / "softmax", loss="balanced-softmax") == one
    assert bench.losses("logit-adjusted", tmp_path / "zero", loss="mme", lambdas=(0.0,)) != one


@pytest.mark.parametrize("method, fields", [("focal", dict(gamma=0)), ("class-balanced", dict(beta=0)), ("ldam-drw", dict(max_margin=0, defer=1, logit_scale=None)),
                                            ("logit-adjusted", dict(tau=0))])
def test_a_loss_that_does_nothing_trains_as_ce(bench, method, fields, tmp_path):
    ce = [r["loss"] for r in read_rows(bench("ce").history_path)]
    np.testing.assert_allclose(bench.losses(method, tmp_path, **fields), ce, atol=1e-5)
    own = [r["loss"] for r in read_rows(bench(method).history_path)]
    assert np.abs(np.subtract(own, ce)).max() > 1e-3, "and with its own number it does not"


# ---- what training shows the model

def test_cmo_backgrounds_come_as_images_come_and_foregrounds_as_classes(bench):
    config = bench.config("cmo", steps=66)
    task = bench.task(config)
    rows = make_batches(config, task, build_model(config, task.clip, task.text, task.words)).stream.reshape(66, 2, 8)
    times, n = np.bincount(rows[:, 0].ravel())[task.split.train], np.array(task.split.cls_num_list)
    assert times.max() - times.min() <= 1, "backgrounds: each image as often as any other"
    back, front = (np.bincount(task.items.targets[rows[:, half].ravel()], minlength=len(n)) / rows[:, half].size for half in (0, 1))
    np.testing.assert_allclose(back, n / n.sum(), atol=0.02)
    np.testing.assert_allclose(front, 1 / len(n), atol=0.08)


def test_every_step_mixes_by_a_draw_of_its_own_that_its_seed_repeats(bench, tmp_path, monkeypatch):
    drawn, draw = [], MixUp.draw
    monkeypatch.setattr(MixUp, "draw", lambda self, batch: drawn.append(draw(self, batch)) or drawn[-1])
    for seed in (0, 0, 1): bench.fit("mixup", out_dir=str(tmp_path / str(len(drawn))), seed=seed)
    a, b, c = (tuple(lam for lam, _ in drawn[i:i + 3]) for i in (0, 3, 6))
    assert len(drawn) == 9 and len(set(a)) == 3 and a == b and not set(a) & set(c)


# ---- the published code, fault by fault

def test_each_switch_changes_its_own_fields_and_official_is_all_of_them(bench):
    usual = make_config("dmrs", epochs=40, batch_size=16).content()
    for switch in OFFICIAL.values():
        content = make_config("dmrs", epochs=40, batch_size=16, **switch).content()
        changed = {k for k in content.keys() | usual.keys() if content.get(k) != usual.get(k)}
        assert changed and changed <= set(switch), switch
    together = make_config("dmrs", epochs=40, batch_size=16, **{k: v for s in OFFICIAL.values() for k, v in s.items()}).content()
    assert make_config("dmrs-official").content() == together | dict(method="dmrs-official")
    assert len([k for s in OFFICIAL.values() for k in s]) == len({k for s in OFFICIAL.values() for k in s}), "no field belongs to two switches"


def switched(bench, name, **fields):
    config = bench.config("dmrs", **OFFICIAL.get(name, {}) | fields)
    return config, bench.task(config)


def test_switch_optimiser_is_plain_sgd_whose_rate_hardly_moves(bench):
    config, task = switched(bench, "optimiser")
    [group] = make_optimizer([torch.nn.Parameter(torch.zeros(1))], config).param_groups
    assert (group["momentum"], group["weight_decay"], group["lr"]) == (0, 0, 0.1) and "betas" not in group
    per_epoch, steps = 100, 40 * 100   # what a one-cycle of PyTorch does when it is stepped once an epoch
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    cycle, rates = torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=0.1, total_steps=steps, anneal_strategy="linear"), []
    for _ in range(40): rates.append(sgd.param_groups[0]["lr"]); sgd.step(); cycle.step()
    ours = [lr_at(e * per_epoch + i, steps, config, per_epoch) for e in range(40) for i in (0, per_epoch - 1)]
    np.testing.assert_allclose(ours[::2], rates, rtol=1e-6)
    assert ours[::2] == ours[1::2] and 0.004 <= min(ours) < max(ours)
    large = lr_at(40 * 1000 - 1, 40 * 1000, config, 1000)
    assert 0.004 < large < 0.005, "at the published size it never reaches the nominal 0.1"


def test_switch_optimiser_stores_the_rates_that_were_used(bench, monkeypatch, tmp_path):
    used, step = [], Learner.step
    def watched(self, t, *batch):
        loss = step(self, t, *batch)
        used.append(self.optimizer.param_groups[0]["lr"])
        return loss
    monkeypatch.setattr(Learner, "step", watched)
    run = bench.fit("dmrs", out_dir=str(tmp_path), steps=12, **OFFICIAL["optimiser"])
    assert len(set(used)) == 3, "the training images are 36, five batches an epoch"
    np.testing.assert_allclose([r["lr"] for r in read_rows(run.history_path)], used)


def test_switches_mixing_and_partner(bench):
    usual, all_mixed, itself = (mixing_of(*switched(bench, name)) for name in ("none", "mixing", "partner"))
    assert (usual.mix_prob, all_mixed.mix_prob, itself.mix_prob) == (0.1, 1.0, 0.1) and not all_mixed.per_image
    assert (usual.diagonal, all_mixed.diagonal, itself.diagonal) == (-torch.inf, -torch.inf, 0.0)
    images, y = torch.rand(8, 3, 14, 14), torch.arange(8) % 4
    for mixing, often in ((usual, 0.1), (all_mixed, 1.0)):
        mixed = [not torch.equal(mixing(images, y)[0], images) for _ in range(100)]
        assert abs(np.mean(mixed) - often) < 0.1
    for mixing in (usual, itself): mixing.similarity = -torch.ones(4, 4)   # all others sound less alike than zero
    partner = lambda m: y[PARTNERS["similar"](m, y)]
    assert (partner(usual) != y).all() and torch.equal(partner(itself), y)


def test_switches_augment_words_and_split(bench):
    config, task = switched(bench, "augment")
    model = build_model(config, task.clip, task.text, task.words)
    assert isinstance(make_batches(config, task, model).transform, AutoAugment)
    config, task = switched(bench, "words")
    usual = bench.task(bench.config("dmrs"))
    assert usual.words[2] == "mobile home park" and task.words == list(SIZES)
    torch.testing.assert_close(task.text, F.normalize(task.clip.model.encode_text(task.clip.tokenizer(list(SIZES))), dim=-1), rtol=0, atol=1e-5)
    assert not torch.allclose(task.text, usual.text, atol=1e-2)
    config, task = switched(bench, "split")
    parts = published_split(60, 0.2, 0)
    assert len(task.split.val) == 0 and task.split.test.tolist() == parts["test"].tolist() and task.split.train.tolist() == sorted(parts["train"])
    assert np.bincount(usual.items.targets[usual.split.test]).tolist() == [6, 3, 2, 1], "ours is drawn class by class"


def test_switch_test_draws_judges_class_balanced_draws_and_stores_every_image(bench, tmp_path):
    run = bench.fit("dmrs", out_dir=str(tmp_path), **OFFICIAL["test draws"])
    usual, kept = bench("dmrs"), stored(run)
    assert np.array_equal(kept["test_logits"], stored(usual)["test_logits"]) and kept["test_paths"].tolist() == stored(usual)["test_paths"].tolist()
    assert run.result()["metrics"] != usual.result()["metrics"] and run.result()["val"] == usual.result()["val"]
    answers = torch.as_tensor(kept["test_logits"]).softmax(-1).mean(0).argmax(-1).numpy()
    right = {c: (answers == kept["test_targets"])[kept["test_targets"] == c].mean() for c in range(4)}
    recall = run.result()["metrics"]["per_class_recall"]
    for c, r in enumerate(recall): assert r is None or np.isnan(r) or right[c] not in (0, 1) or r == right[c], "the draws are of the test images"


def test_switch_selection_keeps_the_best_look_at_test(bench, tmp_path):
    run = bench.fit("dmrs", out_dir=str(tmp_path), steps=8, eval_every=1, lr=0.2, warmup=0.0, **OFFICIAL["selection"])
    looks = [r["test_acc1"] for r in read_rows(run.history_path)]
    assert len(looks) == 8 and run.result()["metrics"]["acc1"] == pytest.approx(max(looks)) and min(looks) < max(looks)
    assert "test_acc1" not in read_rows(bench("dmrs").history_path)[0]


def test_switches_groups_and_adapters(bench, tmp_path):
    assert shot_groups([80, 79, 21, 20], *OFFICIAL["groups"]["thresholds"]).tolist() == ["many", "medium", "medium", "few"]
    run = bench.fit("dmrs", out_dir=str(tmp_path), **OFFICIAL["groups"])
    assert run.result()["data"]["thresholds"] == [79, 21] and run.result()["data"]["shot_groups"] == ["few"] * 4
    assert run.result()["metrics"]["acc1"] == bench("dmrs").result()["metrics"]["acc1"] and run.result()["metrics"]["many"] is None
    config, task = switched(bench, "adapters")
    dense, usual = (build_model(c, task.clip, task.text) for c in (config, bench.config("dmrs")))
    width = task.clip.model.visual.ln_post.normalized_shape[0]
    assert isinstance(dense, MultiExpertCLIP) and sum(dense.trainable_parameters().values()) == 3 * (width * width + width)
    assert sum(usual.trainable_parameters().values()) == 3 * 2 * width * config.lora_r


# ---- exports

@pytest.mark.parametrize("method, format", [("lift", "torch-export"), ("tip-adapter-f", "onnx"), ("coop", "onnx"), ("clip-lora", "onnx"), ("crt", "onnx"),
                                            ("ride", "torch-export")])
def test_an_export_answers_as_its_run(bench, method, format, tmp_path):
    image = next((bench.root / "runway").iterdir())
    folder = export(bench(method), tmp_path / "out", formats=(format,), check=[image])
    assert json.loads((folder / "classes.json").read_text())["largest_difference"][format] < 1e-3


@pytest.mark.parametrize("method, what", [("lift", "blocks beside its MLPs that"), ("tip-adapter", "a cache of training images that"),
                                          ("tip-adapter-f", "a cache of training images that")])
def test_what_no_open_clip_model_holds_is_not_written_as_one(bench, method, what, tmp_path):
    with pytest.raises(ValueError, match=f"format safetensors: run {bench(method).name} has {what} no open_clip model holds; choose onnx or torch-export"):
        export(bench(method), tmp_path / "out", formats="safetensors")
    assert not (tmp_path / "out").exists()
