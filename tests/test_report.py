"""The report on made-up run folders: what is missing, damaged, degenerate or badly spread over seeds."""
import json
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file
from scipy.stats import binomtest

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from dmrs_nb import report  # noqa: E402
from dmrs_nb.calibration import calibrated, fit_temperature  # noqa: E402
from dmrs_nb.clip import encode_images  # noqa: E402
from dmrs_nb.config import make_config  # noqa: E402
from dmrs_nb.data import eval_batches, eval_transform  # noqa: E402
from dmrs_nb.longtail import SHOT_COLORS  # noqa: E402
from dmrs_nb.losses import ensemble  # noqa: E402
from dmrs_nb.metrics import compute_metrics  # noqa: E402
from dmrs_nb.training import fit, prepare  # noqa: E402

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


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    "A small benchmark with an ablation: four configurations of dmrs, ce at three seeds, zero-shot at one."
    out = tmp_path_factory.mktemp("runs")
    mme = dict(method="dmrs", E=3, loss="mme", mixing="mixsss", lambdas=[-.5, 0, 1.5])
    for s in range(3):
        make_run(out, f"dmrs-s{s}", seed=s, **mme)
        make_run(out, f"dmrs-nomix-s{s}", seed=s, **mme | dict(mixing="none"))
        make_run(out, f"dmrs-random-s{s}", seed=s, **mme | dict(mix_partner="random"))
        make_run(out, f"dmrs-one-s{s}", seed=s, **mme | dict(E=1, lambdas=[0.0]))
        make_run(out, f"ce-s{s}", seed=s, strength=1)
    make_run(out, "zs-s0", method="zero-shot", strength=.5, steps=0)
    return out


# ---- reading one run: every fault is a sentence that names the file

def test_load_run_reads_what_was_written(out):
    run = report.load_run(out / "dmrs-s0")
    assert run.predictions["test_logits"].shape == (3, 50, 5) and len(run.history) == 4
    assert [run.data["words"][c] for c in run.order] == WORDS
    np.testing.assert_allclose(report.run_probs(run), torch.as_tensor(run.predictions["test_logits"]).softmax(-1).mean(0), atol=1e-6)


def cut(name): return lambda run: (run / name).write_bytes((run / name).read_bytes()[: (run / name).stat().st_size // 2])
def drop(*keys):
    def change(record):
        for k in keys[:-1]: record = record[k]
        del record[keys[-1]]
    return lambda run: edit(run, change)
def savez(**arrays): return lambda run: np.savez(run / "predictions.npz", **arrays)
def write(name, text): return lambda run: (run / name).write_text(text)
PICKLED = dict(test_logits=np.array([{}], object), test_targets=np.zeros(1), test_paths=np.array(["a"]))
SHORT = dict(test_logits=np.zeros((1, 7, 5)), test_targets=np.zeros(7, int), test_paths=np.array(["a"] * 7))


@pytest.mark.parametrize("harm, said", [
    (cut("metrics.json"), "metrics.json is damaged"), (cut("predictions.npz"), "predictions.npz is damaged"), (cut("config.json"), "config.json is damaged"),
    (drop("metrics", "few"), "metrics has no few"), (drop("data"), "data has no words, cls_num_list, shot_groups"),
    (drop("data", "cls_num_list"), "data has no cls_num_list"), (drop("timings"), "lacks timings"),
    (lambda r: edit(r, lambda d: d.update(schema_version=99)), "schema_version 99"),
    (lambda r: edit(r, lambda d: d["config"].update(seed=5)), "another config"),
    (savez(**PICKLED), "predictions.npz is damaged"), (savez(test_logits=np.zeros((1, 2, 5))), "has no test_targets, test_paths"),
    (savez(**SHORT | dict(test_logits=np.zeros((1, 7, 4)))), r"test_logits is \(1, 7, 4\), expected \(experts, 7 images, 5 classes\)"),
    (savez(**SHORT | dict(test_logits=np.zeros((7, 5)))), "expected .experts, 7 images"),
    (write("history.csv", ""), "history.csv is damaged"), (write("history.csv", "a,b\n1,2\n"), "no column loss, step"),
    (lambda r: (r / "metrics.json").unlink(), "the run is not finished"),
])
def test_damage_is_a_sentence(tmp_path, harm, said):
    run = make_run(tmp_path, "r")
    harm(run)
    with pytest.raises(ValueError, match=said): report.load_run(run)


def test_no_run_at_all(tmp_path):
    with pytest.raises(ValueError, match="is no folder"): report.load_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a run folder"): report.load_run(tmp_path)


def test_stored_results_have_neither_predictions_nor_history(tmp_path):
    run = report.load_run(make_run(tmp_path, "r", E=2, predictions=False, history=False))
    assert run.predictions is None and run.history is None
    for plot in (report.plot_per_class, report.plot_experts): plot(run)
    for plot in (report.plot_confusion, lambda r: report.plot_mistakes(r, "."), report.mistakes):
        with pytest.raises(ValueError, match="predictions.npz"): plot(run)
    with pytest.raises(ValueError, match="no val predictions"): report.run_probs(run, "val")


# ---- many runs

def test_results_keeps_going_and_reports(tmp_path):
    for s in range(2): make_run(tmp_path, f"r{s}", seed=s)
    cut("metrics.json")(make_run(tmp_path, "bad"))
    (make_run(tmp_path, "going") / "metrics.json").unlink()
    df = report.results(tmp_path)
    assert len(df) == 2 and df.attrs["unfinished"] == ["going"] and "bad" in df.attrs["problems"][0]
    assert {"method", "seed", "acc1", "data.name", "data.words", "parameters.trainable", "timings.total_s"} <= set(df)


def test_results_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run.*01_run.ipynb"): report.results(tmp_path)
    (make_run(tmp_path, "going") / "metrics.json").unlink()
    with pytest.raises(ValueError, match="1 started, none finished"): report.results(tmp_path)
    with pytest.raises(ValueError, match="is no folder"): report.results(tmp_path / "nowhere")


def test_rows_come_in_the_order_of_the_book_with_the_base_first(out):
    df = report.results(out)
    assert list(dict.fromkeys(df.method)) == ["zero-shot", "ce", "dmrs"]
    assert list(dict.fromkeys(report.labels(df)))[2:] == ["dmrs", "dmrs · no mixing", "dmrs · random partner", "dmrs · E = 1 · λ = 0"]
    assert list(df[df.method == "ce"].seed) == [0, 1, 2]


def test_a_column_that_a_reader_adds_is_no_config_field(out):
    df = report.results(out)
    before = report.labels(df)
    df["note"] = range(len(df))
    assert list(report.labels(df)) == list(before)


def test_labels_name_the_ablation(out):
    df = report.results(out)
    assert set(report.labels(df)) == {"zero-shot", "ce", "dmrs", "dmrs · no mixing", "dmrs · random partner", "dmrs · E = 1 · λ = 0"}
    assert report.base_fields(df)["dmrs"] == {"num_experts": 3, "lambdas": [-.5, 0, 1.5], "mixing": "mixsss", "mix_partner": "similar"}


def test_settings_are_spelled_out_wherever_they_differ(tmp_path):
    for s in range(3): make_run(tmp_path, f"a{s}", seed=s)
    make_run(tmp_path, "b", method="dmrs", imb_factor=.1)
    df = report.results(tmp_path)
    assert set(report.labels(df)) == {"ce · imbalance 0.05", "dmrs · imbalance 0.1"}
    with pytest.raises(ValueError, match="different classes"):
        report.plot_class_grid(df.assign(**{"data.cls_num_list": [COUNTS] * 3 + [COUNTS[::-1]]}))


def test_other_images_under_one_name_are_another_row(tmp_path):
    make_run(tmp_path, "a")
    make_run(tmp_path, "b", data={"fingerprint": "0123456789abcdef"})
    df = report.results(tmp_path)
    assert report.varying_fields(df) == ["data.fingerprint"] and set(report.labels(df)) == {"ce · images f0", "ce · images 01234567"}
    df["data.name"] = ["one", "two"]  # the name tells them apart: no need for the hash
    assert report.varying_fields(df) == ["data.name"]


def test_where_a_run_happened_and_how_a_number_is_written_are_no_differences(tmp_path):
    make_run(tmp_path, "a", device="cpu", steps=10, out_dir="x")
    make_run(tmp_path, "b", seed=1, device="cuda", steps=10.0, out_dir="y", new_field=None)
    assert report.varying_fields(report.results(tmp_path)) == []


@given(st.lists(st.tuples(st.sampled_from(["ce", "dmrs"]), st.integers(1, 3), st.sampled_from(["none", "mixsss"]),
                          st.sampled_from([None, 0.05, 0.050000001, 1e-4]), st.sampled_from([None, [0.0], [-.5, 1.5]])), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_one_label_is_one_configuration(rows):
    df = pd.DataFrame(rows, columns=["method", "num_experts", "mixing", "lr", "lambdas"])
    label, config = report.labels(df), pd.Series([json.dumps(r) for r in rows])
    assert (pd.factorize(label)[0] == pd.factorize(config)[0]).all()


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_summary_agrees_with_the_statistics_module(values):
    df = pd.DataFrame({"method": "ce", "seed": range(len(values)), "acc1": values})
    row = report.summary(df, metrics=("acc1",), fmt=False).iloc[0]
    np.testing.assert_allclose([row["acc1", "mean"], row["acc1", "std"]], [statistics.mean(values), statistics.stdev(values)], atol=1e-9)
    assert row["seeds", ""] == len(values)


def test_a_seed_counts_once_and_an_empty_group_not_at_all():
    df = pd.DataFrame({"method": "ce", "seed": [0, 0, 1], "acc1": [.4, .6, .7], "few": [np.nan] * 3, "kappa": [.5, .5, .5]})
    row = report.summary(df, metrics=("acc1", "few", "kappa")).iloc[0]
    assert list(row) == ["60.0 ± 14.1", "–", "0.50 ± 0.00", 2]
    assert list(report.summary(df, by=["method", "seed"], metrics=("acc1",)).seeds) == [1, 1]
    with pytest.raises(ValueError, match="no column recall"): report.summary(df, metrics=("recall",))
    with pytest.raises(ValueError, match="no column datum"): report.summary(df, by="datum", metrics=("acc1",))


# ---- figures

def test_every_figure_is_drawn_and_none_is_left_open(out, tmp_path):
    plt.close("all")
    df, run = report.results(out), report.load_run(out / "dmrs-one-s0")
    figures = [report.plot_shot_groups(df), report.plot_class_grid(df), report.plot_history(run), report.plot_confusion(run), report.plot_experts(run),
               report.plot_per_class([report.load_run(out / f"ce-s{s}") for s in range(3)]), report.plot_longtail(COUNTS, WORDS, GROUPS)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that collapses is only a warning
        for i, fig in enumerate(figures): fig.savefig(tmp_path / f"{i}.pdf")
    assert plt.get_fignums() == []


def test_axes_that_are_given_are_used(out):
    df, run = report.results(out), report.load_run(out / "dmrs-s0")
    for plot in (lambda ax: report.plot_shot_groups(df, ax=ax), lambda ax: report.plot_class_grid(df, ax=ax), lambda ax: report.plot_confusion(run, ax=ax),
                 lambda ax: report.plot_experts(run, ax=ax), lambda ax: report.plot_longtail(COUNTS, WORDS, GROUPS, ax=ax)):
        fig, ax = plt.subplots()
        assert plot(ax) is fig and ax.has_data()
        plt.close(fig)


def test_bars_carry_the_numbers_and_the_colours(out):
    run = report.load_run(out / "dmrs-s0")
    bars = report.plot_per_class(run).axes[0].patches
    np.testing.assert_allclose([b.get_height() for b in bars], 100 * np.array(run.metrics["per_class_recall"]))
    assert [matplotlib.colors.to_hex(b.get_facecolor()).upper() for b in bars] == [SHOT_COLORS[g].upper() for g in GROUPS]
    experts = report.expert_table(run)
    assert list(experts.index) == ["expert 1, λ = −0.5", "expert 2, λ = 0", "expert 3, λ = 1.5", "ensemble"]
    heights = {round(b.get_height(), 6) for b in report.plot_experts(run).axes[0].patches}
    assert heights == {round(100 * v, 6) for v in experts[list(report.GROUPS)].to_numpy().ravel()}


def test_experts_can_be_recomputed_from_predictions(tmp_path):
    path = make_run(tmp_path, "r", E=3)
    before = report.expert_table(report.load_run(path))
    edit(path, lambda d: d.update(experts=[]))
    pd.testing.assert_frame_equal(report.expert_table(report.load_run(path)), before)


def test_a_run_without_training_or_validation(tmp_path):
    path = make_run(tmp_path, "r", method="zero-shot")
    (path / "history.csv").write_text(EMPTY_HISTORY)
    assert any("without training" in t for t in texts(report.plot_history(report.load_run(path))))
    (path / "history.csv").write_text("step,loss,val_acc1\n1,2.0,\n2,1.0,\n")
    assert any("no validation images" in t for t in texts(report.plot_history(report.load_run(path))))


def test_a_group_that_is_empty(tmp_path):
    path = make_run(tmp_path, "r", E=2)
    def no_few(d):
        d["data"]["shot_groups"] = ["many", "medium", "medium", "medium", "medium"]
        for m in (d["metrics"], *d["experts"]): m["few"] = None
    edit(path, no_few)
    run, df = report.load_run(path), report.results(tmp_path)
    for fig in (report.plot_per_class(run), report.plot_experts(run), report.plot_shot_groups(df), report.plot_confusion(run)): fig.canvas.draw()
    assert report.summary(df).few.item() == "–"


def test_a_hundred_classes_and_two(tmp_path):
    for C in (2, 100):
        counts, groups = list(range(2 * C, C, -1)), ["many"] * (C // 2) + ["few"] * (C - C // 2)
        fig = report.plot_longtail(counts, [f"class {c}" for c in range(C)], groups)
        fig.canvas.draw()
        assert len(fig.axes[0].get_xticklabels()) == C
    with pytest.raises(ValueError, match="found 2, 3 and 2 entries"): report.plot_longtail([1, 2], ["a", "b", "c"], ["many", "few"])


def test_seeds_of_different_classes_are_not_averaged(out, tmp_path):
    other = report.load_run(make_run(tmp_path, "r", data={"cls_num_list": COUNTS[::-1]}))
    with pytest.raises(ValueError, match="expected the seeds of one configuration"): report.plot_per_class([report.load_run(out / "ce-s0"), other])


@pytest.mark.parametrize("kind", ["folder", "path", "items", "function"])
def test_mistakes_with_their_images(tmp_path, kind):
    run = report.load_run(make_run(tmp_path / "runs", "r", strength=.5))
    table = report.mistakes(run, 5)
    root = tmp_path / "images"
    for p in table.path[1:]:
        (root / p).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 90).save(root / p)
    images = {"folder": str(root), "path": root, "items": SimpleNamespace(root=root), "function": lambda p: np.asarray(Image.open(root / p).convert("RGB"))}[kind]
    fig = report.plot_mistakes(run, images, n=5)
    said = texts(fig)
    assert sum(bool(ax.images) for ax in fig.axes) == 4 and sum("could not be read" in t for t in said) == 1  # the file that is not there
    assert any(f"→ {table.answered[0]}, {100 * table.probability[0]:.0f} %" in t for t in said)
    probs, targets = report.run_probs(run), run.predictions["test_targets"]
    assert table.probability[0] == max(p.max() for p, t in zip(probs, targets) if p.argmax() != t)
    assert fig._suptitle.get_text() == f"The 5 surest mistakes, true class → answer (not calibrated): {(table.probability > .9).sum() or 'none'} with more than 90 %"
    assert report.plot_mistakes(run, images, n=1)._suptitle.get_text().startswith("The surest mistake, true class")


def with_validation(run, n, scale=1.0):
    "The run again, with n validation images whose answers are as good as those on test, all logits multiplied by scale."
    stored = {**np.load(run / "predictions.npz")}
    stored["test_logits"] = stored["test_logits"] * np.float32(scale)
    stored |= dict(val_logits=stored["test_logits"][:, :n], val_targets=stored["test_targets"][:n])
    np.savez(run / "predictions.npz", **stored)
    return report.load_run(run)


def test_confidences_are_those_of_predict_and_the_table_says_what_the_temperature_does(tmp_path):
    run = with_validation(make_run(tmp_path, "r", n=200, strength=1.5), 200, scale=6.0)   # far too sure
    T, n = report.run_temperature(run)
    assert n == 200 and T == fit_temperature(run.predictions["val_logits"], run.predictions["val_targets"]) and T > 2
    np.testing.assert_allclose(report.run_probs(run, temperature="val"), calibrated(run.predictions["test_logits"], T), atol=1e-6)
    np.testing.assert_allclose(report.run_probs(run), calibrated(run.predictions["test_logits"]), atol=1e-6)
    table = report.calibration_table(run)
    assert list(table.index) == ["as trained", "calibrated"] and list(table["validation images"]) == [0, 200] and table.temperature["calibrated"] == T
    assert table["ece on test"]["calibrated"] < table["ece on test"]["as trained"] - .05 and table["nats an image"]["calibrated"] < table["nats an image"]["as trained"]
    worst, wrong = report.mistakes(run, 10**6), report.run_probs(run).argmax(1) != run.predictions["test_targets"]
    assert len(worst) == wrong.sum() and worst.probability.is_monotonic_decreasing and worst.probability.max() <= report.run_probs(run, temperature="val")[wrong].max() + 1e-9
    assert "(calibrated)" in report.plot_mistakes(run, ".", n=2)._suptitle.get_text()


def test_too_few_validation_images_fit_no_temperature(tmp_path):
    run = with_validation(make_run(tmp_path, "r", n=50), 9)
    assert report.run_temperature(run) == (1.0, 0) and list(report.calibration_table(run).index) == ["as trained"]
    assert np.array_equal(report.run_probs(run, temperature="val"), report.run_probs(run))


@pytest.mark.parametrize("E, said", [(1, "One expert: it is the whole model"), (2, "Best alone: all on many"), (3, "Best alone: all on many")])
def test_experts_that_tie_are_said_in_english(tmp_path, E, said):
    run = report.load_run(make_run(tmp_path, "r", E=E, strength=50))
    assert said in " ".join(texts(report.plot_experts(run)))
    assert report.load_run(tmp_path / "r").metrics["many"] == 1


def test_two_of_three_experts_that_tie(tmp_path):
    path = make_run(tmp_path, "r", E=3, strength=50)
    def lower(record): record["experts"][1] |= {g: 0.5 for g in ("many", "medium", "few")}
    edit(path, lower)
    assert "Best alone: experts 1 and 3 on many" in " ".join(texts(report.plot_experts(report.load_run(path))))


@pytest.mark.parametrize("stored, read", [("no", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")])
def test_the_precision_has_one_name_in_old_and_new_results(tmp_path, stored, read):
    path = make_run(tmp_path, "r")
    edit(path, lambda record: record.update(place=dict(precision=stored)))
    assert report.load_run(path).record["place"]["precision"] == read


def test_one_test_image_decides_nothing(tmp_path):
    table = report.failing_classes(answer(tmp_path, "r", [20, 20, 20, 20, 0], wrong=[1, 0, 0, 4, 3]), target=.8)
    assert list(table.verdict) == ["fails"]
    path = make_run(tmp_path, "one", n=6, strength=-50)   # the first class has two images, the others one
    table = report.failing_classes(path).set_index("class")
    assert dict(zip(table.index, table.verdict)) == {w: "fails" if n == 2 else "unsure" for w, n in zip(table.index, table.n_test)} and set(table.n_test) == {1, 2}


def test_a_run_without_mistakes(tmp_path):
    run = report.load_run(make_run(tmp_path, "r", strength=50))
    assert report.mistakes(run).empty
    assert report.plot_mistakes(run, tmp_path)._suptitle.get_text() == "No mistakes"
    assert "No mistakes" in texts(report.plot_confusion(run))


def test_the_module_works_without_a_display_and_without_notebook_tools():
    code = "import sys, dmrs_nb.report; bad = {'nbdev', 'fastcore', 'IPython', 'open_clip'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- where it fails, and what could help: made-up answers whose advice can be said by hand

def answer(out, name, right, n_train=COUNTS, wrong=None, n=20, train_fraction=1.0, text=None, **config):
    "A run that recognises the first `right[c]` of `n` test images of class c, and takes the others for `wrong[c]`."
    targets = np.repeat(np.arange(len(WORDS)), n)
    answers = np.where(np.tile(np.arange(n), len(WORDS)) < np.repeat(right, n), targets, np.repeat(wrong or [1, 0, 0, 0, 0], n))
    logits = 5 * np.eye(len(WORDS), dtype=np.float32)[answers][None]
    run = make_run(out, name, n=len(targets), data={"cls_num_list": list(n_train)}, train_fraction=train_fraction, **config)
    np.savez(run / "predictions.npz", test_logits=logits, test_targets=targets, test_paths=np.array([f"{WORDS[t]}/{i:03d}.jpg" for i, t in enumerate(targets)]))
    if text is not None:
        (run / "adapter").mkdir()
        save_file({"text_features": np.asarray(text, np.float32)}, run / "adapter" / "text_features.safetensors")
    return run


@given(st.integers(0, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=50, deadline=None)
def test_wilson_is_scipys(kn):
    k, n = kn
    expected = binomtest(k, n).proportion_ci(method="wilson") if n else (0, 1)
    np.testing.assert_allclose(report.wilson(k, n), tuple(expected), atol=1e-4)


@given(st.integers(0, 15), st.integers(0, 15), st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_a_paired_gain_is_agresti_and_mins(gained, lost, same):
    change = [1] * gained + [-1] * lost + [0] * same
    N, b, c = len(change) + 2, gained + .5, lost + .5
    middle, half = (b - c) / N, 1.96 * np.sqrt(b + c - (b - c)**2 / N) / N
    np.testing.assert_allclose(report.paired_gain(change), ((gained - lost) / len(change), max(-1, middle - half), min(1, middle + half)), atol=1e-9)
    np.testing.assert_allclose(report.paired_gain(np.array(change) / 3, 1 / 3), np.array(report.paired_gain(change)) / 3, atol=1e-9)


def test_failing_classes_say_what_they_do_not_know(tmp_path):
    run = answer(tmp_path, "r", [20, 14, 2, 17, 5], wrong=[1, 0, 0, 4, 3])
    table = report.failing_classes(run, target=.8).set_index("class")
    assert list(table.index) == ["runway", "harbor", "dense residential"]  # 17 of 20 is enough; the lowest first
    assert dict(table.verdict) == {"runway": "fails", "harbor": "fails", "dense residential": "unsure"}
    assert table.taken_for["harbor"] == "golf course 15" and table.shots["harbor"] == COUNTS[4] and table.n_test["harbor"] == 20
    assert list(report.failing_classes(run, target=.5)["class"]) == ["runway", "harbor"]
    assert report.failing_classes(answer(tmp_path, "all", [20] * 5), target=1).empty
    with pytest.raises(ValueError, match="target is 80, expected a recall"): report.failing_classes(run, target=80)


def test_a_class_without_test_images_is_unsure(tmp_path):
    path = make_run(tmp_path, "r", n=4, strength=50)
    row = report.failing_classes(path).iloc[-1]
    assert (row["class"], row.n_test, row.low, row.high, row.verdict) == ("harbor", 0, 0, 1, "unsure") and np.isnan(row.recall)
    assert report.advice(path, looks=False).set_index("class").because["harbor"] == "0 do not decide: no test image of this class"


def test_pairs_count_every_mistake_once_and_know_what_is_alike(tmp_path):
    text, looks = np.eye(5), np.eye(5)
    text[1, 0] = looks[4, 3] = 1      # forest and dense residential sound alike, golf course and harbor look alike
    run = answer(tmp_path, "r", [15, 12, 18, 16, 13], wrong=[1, 0, 0, 4, 3], text=text)
    table = report.confused_pairs(run, looks=looks).set_index(["a", "b"])
    assert dict(table.alike) == {("forest", "dense residential"): "words", ("golf course", "harbor"): "looks", ("forest", "runway"): "neither"}
    assert list(table.loc["forest", "dense residential"][["a_as_b", "b_as_a", "share", "words_rank"]]) == [5, 8, 13 / 40, 1]
    assert (table.a_as_b + table.b_as_a).sum() == 100 - 74
    assert len(report.confused_pairs(run, top=1, looks=False)) == 1 and report.confused_pairs(run, looks=False).looks.isna().all()
    (run / "adapter" / "text_features.safetensors").unlink()
    assert set(report.confused_pairs(run, looks=False).alike) == {"not known"}


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    "Four doublings: harbor gains with each, runway never; forest has as many images in all."
    out = tmp_path_factory.mktemp("curve")
    return [answer(out, f"f{f}", [19, 14, 4, 18, k], [120, 60 * f, 48 * f, 16 * f, 8 * f], train_fraction=f, steps=int(300 * f))
            for f, k in ((.25, 1), (.5, 5), (1.0, 9))]


def test_gains_are_slopes_over_doublings(curve):
    gains = report.gain_per_doubling(curve).set_index("class")
    np.testing.assert_allclose(gains.gain[["harbor", "runway"]], [.2, 0], atol=1e-12)   # 1 → 5 → 9 of 20
    assert gains.low["harbor"] > 0 > gains.low["runway"] and gains.high["runway"] > 0   # 20 images that stay the same are no certainty
    assert gains.loc["forest"][["gain", "low", "high"]].isna().all()
    table = report.learning_curve(curve[::-1])
    assert list(table[table["class"] == "harbor"].recall) == [.05, .25, .45] and list(table[table["class"] == "harbor"].n_train) == [2, 4, 8]


def test_seeds_of_a_curve_are_averaged(curve, tmp_path):
    more = answer(tmp_path, "s1", [19, 14, 4, 18, 3], [120, 15, 12, 4, 2], train_fraction=.25, seed=1)
    table = report.learning_curve([*curve, more])
    assert list(table[table["class"] == "harbor"].recall) == [.1, .25, .45]


@pytest.mark.parametrize("change, said", [(dict(lr=.1), "also differ in lr"), (dict(method="dmrs"), "also differ in method"), (dict(n=19), "different test images")])
def test_a_curve_is_of_one_configuration(curve, tmp_path, change, said):
    with pytest.raises(ValueError, match=said): report.learning_curve([*curve, answer(tmp_path, "odd", [5] * 5, train_fraction=.75, **change)])
    with pytest.raises(ValueError, match="found train_fraction=1 only"): report.learning_curve(curve[-1:])
    with pytest.raises(ValueError, match="found no run"): report.learning_curve([])


def test_advice_names_what_the_numbers_support(curve, tmp_path):
    text, looks = np.eye(5), np.eye(5)
    text[2, 0] = looks[1, 0] = 1      # runway sounds like forest, dense residential looks like it
    other = answer(tmp_path, "other", [19, 14, 19, 18, 8], n_train=[120, 60, 48, 16, 8], method="logit-adjusted")
    run = answer(tmp_path, "run", [15, 8, 4, 18, 9], [120, 60, 48, 16, 8], text=text, steps=7)
    told = report.advice(run, curve, [other], looks=looks)
    assert {c: list(own) for c, own in told.groupby("class").advice} == {
        "runway": ["another method: logit-adjusted", "a loss or a prior for rare classes", "other words"], "dense residential": ["another method: logit-adjusted", "merge, or look at the labels"],
        "harbor": ["more images", "a loss or a prior for rare classes"], "forest": ["more test images", "merge, or look at the labels"]}
    why = told.groupby("class").because.agg(list)
    assert why["runway"][0].startswith("+75 points on the same images") and "16 taken for forest, 0 the other way; rank 1 of 10 pairs in words" == why["runway"][2]
    assert why["runway"][1] == "16 taken for forest, 0 the other way, which has 120 training images and this 48"
    assert "12 taken for forest, 5 the other way" in why["dense residential"][1] and why["harbor"][0].startswith("+20 points for each doubling")
    assert why["forest"][0] == "20 do not decide: about 289 would tell"
    assert list(told.recall) == sorted(told.recall)


def test_advice_without_evidence_says_so(curve, tmp_path):
    run = answer(tmp_path, "run", [19, 19, 4, 18, 18], [120, 60, 48, 16, 8], wrong=[1, 0, 3, 0, 0])   # runway is taken for a rarer class
    alone, after = (report.advice(run, c, looks=False).iloc[0] for c in (None, curve))
    assert alone.advice == after.advice == "nothing yet" and "train_fraction=0.5" in alone.because and "does not rise for sure" in after.because
    worse = answer(tmp_path, "worse", [19, 19, 3, 18, 18])
    assert list(report.advice(run, others=[worse], looks=False).advice) == ["nothing yet"]
    assert report.advice(answer(tmp_path, "good", [20] * 5), looks=False).empty
    with pytest.raises(ValueError, match="also differ in lr"): report.advice(answer(tmp_path, "lr", [4] * 5, lr=.1), curve, looks=False)
    with pytest.raises(ValueError, match="different test images"): report.advice(run, others=[answer(tmp_path, "n", [4] * 5, n=9)], looks=False)


def test_confusions_are_framed_and_a_lost_image_is_named(tmp_path):
    run = answer(tmp_path, "r", [18, 20, 20, 20, 15], wrong=[1, 0, 0, 0, 3])
    pairs = report.confused_pairs(run, looks=False)
    def load(path):
        if path.startswith("golf"): raise FileNotFoundError(path)
        return np.zeros((4, 4, 3), np.uint8)
    fig = report.plot_confusions(run, load, pairs, n=3)
    framed = [ax for ax in fig.axes if ax.get_frame_on() and ax.images]
    assert len(framed) == 3 + 2 and sum("could not" in t for t in texts(fig)) == 3   # harbor as golf course 5 times, 3 shown; forest twice
    assert {"harbor: 5 taken for golf course", "golf course: 0 taken for harbor"} <= set(texts(fig))
    assert "No class was taken" in report.plot_confusions(run, load, pairs[:0])._suptitle.get_text()


def test_a_panel_for_each_class_that_is_asked_for(curve):
    fig = report.plot_learning_curve(curve, classes=["harbor", "forest"])
    fig.canvas.draw()
    titles = [ax._left_title.get_text() for ax in fig.axes if ax.get_visible()]
    assert titles[0] == "all classes" and titles[1].startswith("harbor\n+20 a doubling") and titles[2] == "forest\nalways as many images"
    lowest = [ax._left_title.get_text().split("\n")[0] for ax in report.plot_learning_curve(curve, classes=2).axes[1:3]]
    assert lowest == ["runway", "harbor"]


def test_looks_are_means_of_the_frozen_backbone(tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "images"
    for c, name in enumerate(("beach", "forest", "river")):
        (root / name).mkdir(parents=True)
        for i in range(8): Image.fromarray(rng.integers(80 * c, 80 * c + 90, (32, 32, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    config = make_config("linear-probe", data_root=str(root), steps=2, batch_size=4, out_dir=str(tmp_path / "runs"), cache_dir=str(tmp_path / "cache"))
    run, task = fit(config, progress=False), prepare(config, progress=False)
    looks = report.class_looks(run, cache_dir=tmp_path / "cache")
    river = [i for i in task.split.train if task.items.targets[i] == 2]
    mean = encode_images(task.clip, eval_batches(task.cache, river, 8, eval_transform(task.clip.preprocess))).mean(0).numpy()
    np.testing.assert_allclose(looks[2], mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(looks, axis=1), 1, atol=1e-5)
    (root / "river" / "7.png").unlink()
    with pytest.raises(ValueError, match="other images than when"): report.class_looks(run, cache_dir=tmp_path / "cache")


# ---- the results notebook, cell by cell in one namespace: as papermill runs it, without a kernel

NOTEBOOK = Path(__file__).parents[1] / "nbs" / "benchmarks" / "02_results.ipynb"


def read_results(capsys, **parameters):
    "Run 02_results with these parameters; what it displayed, and its variables."
    injected = "# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in parameters.items())
    space = {"In": [injected]}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] != "code": continue
        exec("".join(cell["source"]), space)
        if "parameters" in cell["metadata"].get("tags", []): exec(injected, space)
    return capsys.readouterr().out, space


@pytest.mark.skipif(not NOTEBOOK.exists(), reason="needs the notebooks of a clone")
class TestResultsNotebook:
    def test_two_exams_and_stored_results_only(self, tmp_path, capsys):
        for s in range(2):
            for i, kw in enumerate((dict(imb_factor=.05), dict(imb_factor=.1, data={"cls_num_list": [120, 70, 60, 30, 18]}))):
                make_run(tmp_path / "runs", f"ce{i}{s}", seed=s, predictions=False, history=False, **kw)
                make_run(tmp_path / "runs", f"dmrs{i}{s}", method="dmrs", E=3, loss="mme", lambdas=[-.5, 0, 1.5], seed=s, predictions=False, history=False, **kw)
        cut("metrics.json")(make_run(tmp_path / "runs", "bad"))
        out, space = read_results(capsys, runs=str(tmp_path / "runs"), save=str(tmp_path / "report"))
        assert len(space["grids"]) == 2 and list(space["table"].seeds) == [2] * 4
        assert list(space["table"].index) == [f"{m} · imbalance {i}" for i in (.05, .1) for m in ("ce", "dmrs")]
        assert any("bad" in text for text in space["said"]) and "8 finished runs" in space["said"][0]
        assert {p.name for p in (tmp_path / "report").iterdir()} == {"table.csv", "runs.csv", *(f"{f}.{k}" for f in ("shot_groups", "classes_0", "classes_1")
                                                                                                for k in ("pdf", "svg"))}

    def test_one_run_without_training(self, tmp_path, capsys):
        make_run(tmp_path, "zs", method="zero-shot", steps=0, predictions=False, history=False)
        _, space = read_results(capsys, runs=str(tmp_path))
        assert list(space["table"].index) == ["zero-shot"] and "±" not in space["table"].to_string()

    @pytest.mark.parametrize("parameters, said", [(dict(runs="empty"), "holds no finished run"), (dict(runs="nowhere"), "is no folder"),
                                                  (dict(rnus="x"), "rnus: unknown parameter.*did you mean 'runs'")])
    def test_what_it_refuses(self, tmp_path, capsys, monkeypatch, parameters, said):
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=said): read_results(capsys, **parameters)

    def test_without_parameters_it_reads_what_is_stored(self, tmp_path, capsys, monkeypatch):
        make_run(tmp_path / "nbs" / "benchmarks" / "results" / "study_ucmerced", "ce", predictions=False, history=False)
        (tmp_path / "settings.ini").touch()
        for folder in (tmp_path, tmp_path / "nbs" / "benchmarks"):  # as papermill and as JupyterLab start it
            monkeypatch.chdir(folder)
            assert "stored with the book" in read_results(capsys)[1]["said"][0]
        make_run(tmp_path / "runs", "mine", method="dmrs", predictions=False, history=False)  # a run of one's own comes first
        assert list(read_results(capsys)[1]["table"].index) == ["dmrs"]
