"""Metrics: parity with two libraries on many shapes, invariances, faults, and the promise of the intervals."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn import metrics as sk

import dmrs_nb.compat  # noqa: F401  before torchmetrics, which imports torchvision
from dmrs_nb.metrics import (bootstrap_interval, compute_metrics, confusion_matrix, confusion_metrics, expected_calibration_error,
                             mean_per_class_recall, metric_intervals, paired_bootstrap)
from torchmetrics.functional import classification as tm

SHARES = ["acc1", "mean_per_class_recall", "many", "medium", "few", "worst_class", "macro_f1", "kappa", "ece"]


def answers(seed, n=200, c=6, skew=1.0):
    rng = np.random.default_rng(seed)
    shares = np.arange(1, c + 1) ** -skew
    targets = np.concatenate([np.arange(c), rng.choice(c, n - c, p=shares / shares.sum())])
    logits = rng.normal(size=(n, c)) + 1.5 * np.eye(c)[targets]
    return torch.softmax(torch.tensor(logits), -1), torch.tensor(targets)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(10, 120))
def test_parity_with_two_libraries(seed, c, n):
    probs, targets = answers(seed, n, c)
    ours, preds = compute_metrics(probs, targets), probs.argmax(1)
    theirs = {"acc1": [sk.accuracy_score(targets, preds), tm.multiclass_accuracy(probs, targets, c, average="micro")],
              "mean_per_class_recall": [sk.balanced_accuracy_score(targets, preds), tm.multiclass_recall(probs, targets, c)],
              "macro_f1": [sk.f1_score(targets, preds, average="macro"), tm.multiclass_f1_score(probs, targets, c)],
              "kappa": [sk.cohen_kappa_score(targets, preds), tm.multiclass_cohen_kappa(probs, targets, c)],
              "ece": [tm.multiclass_calibration_error(probs.float(), targets, c, n_bins=15)]}
    for name, values in theirs.items():
        for value in values: assert ours[name] == pytest.approx(float(value), abs=2e-6), name
    np.testing.assert_array_equal(confusion_matrix(preds, targets, c), sk.confusion_matrix(targets, preds, labels=range(c)))
    np.testing.assert_allclose(ours["per_class_recall"], sk.recall_score(targets, preds, average=None, labels=range(c)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_renaming_classes_and_reordering_images_change_nothing(seed):
    probs, targets = answers(seed)
    rng = np.random.default_rng(seed)
    rename, order, groups = rng.permutation(6), rng.permutation(len(targets)), np.array(["many", "many", "medium", "medium", "few", "few"])
    back = np.argsort(rename)  # class c becomes rename[c]
    a = compute_metrics(probs, targets, groups)
    b = compute_metrics(probs.numpy()[order][:, back], rename[targets.numpy()[order]], groups[back])
    for name in SHARES: assert a[name] == pytest.approx(b[name], abs=1e-12), name


def test_shares_stay_between_0_and_1_and_perfection_is_1():
    probs, targets = answers(0)
    for p in (probs, probs.flip(1), torch.eye(6)[targets]):
        m = compute_metrics(p, targets, ["many"] * 2 + ["medium"] * 2 + ["few"] * 2)
        assert all(0 <= m[k] <= 1 for k in SHARES if k != "kappa") and -1 <= m["kappa"] <= 1
    assert all(m[k] == 1 for k in SHARES if k != "ece") and m["ece"] == 0


def test_repeating_the_common_images_moves_only_what_weighs_images():
    probs, targets = answers(3)
    again = torch.cat([torch.arange(len(targets)), *[torch.where(targets == 0)[0]] * 3])
    a, b = compute_metrics(probs, targets), compute_metrics(probs[again], targets[again])
    assert a["per_class_recall"] == b["per_class_recall"] and a["mean_per_class_recall"] == b["mean_per_class_recall"]
    assert a["acc1"] != b["acc1"] and a["kappa"] != b["kappa"] and a["macro_f1"] != b["macro_f1"]


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "float64", "list", "grad"])
def test_takes_what_models_give(kind):
    probs, targets = answers(1)
    other = {"list": probs.tolist(), "grad": probs.clone().requires_grad_()}
    a, b = (compute_metrics(p, targets)["mean_per_class_recall"] for p in (probs, other[kind] if kind in other else probs.to(getattr(torch, kind))))
    assert a == pytest.approx(b, abs=0.02)


def test_what_is_not_defined_is_none_and_json():
    import json
    probs = np.array([[0.6, 0.4, 0.0], [0.7, 0.3, 0.0]])
    m = compute_metrics(probs, [0, 0], ["many", "few", "few"])
    assert m["few"] is None and m["medium"] is None and m["kappa"] is None and m["per_class_recall"] == [1.0, None, None]
    assert m["worst_class"] == 1.0 and m["macro_f1"] == 1.0  # classes that are neither there nor answered stay out
    assert json.loads(json.dumps(m, allow_nan=False)) == m


@pytest.mark.parametrize("change, message", [
    (lambda p, t: (p.log(), t), "apply softmax to logits first"),
    (lambda p, t: (p * float("nan"), t), "NaN or infinity in 200 of 200 rows, the first is row 0"),
    (lambda p, t: (p[:5], t), r"probs has shape \(5, 6\) and targets \(200,\)"),
    (lambda p, t: (p[:0], t[:0]), "at least one test image"),
    (lambda p, t: (p, t + 1), "targets holds classes 1 to 6, expected 0 to 5"),
    (lambda p, t: (p, t.float()), "whole class numbers"),
    (lambda p, t: (p[:, 0], t), r"expected \(N, C\)"),
])
def test_faults_are_sentences(change, message):
    with pytest.raises(ValueError, match=message): compute_metrics(*change(*answers(0)))


def test_faulty_groups_are_sentences():
    with pytest.raises(ValueError, match="groups has 2 entries, expected one for each of 6"): compute_metrics(*answers(0), ["many", "few"])
    with pytest.raises(ValueError, match="'tail'"): compute_metrics(*answers(0), ["tail"] * 6)


def test_confidence_on_the_edge_of_a_bin_belongs_below():
    probs, targets = np.array([[0.5, 0.5], [0.51, 0.49]]), np.array([0, 1])  # 0.5 in (0, 0.5], 0.51 in (0.5, 1]
    assert expected_calibration_error(probs, targets, bins=2) == pytest.approx((0.5 + 0.51) / 2)


# ---- intervals ----

def recall(probs, targets): return mean_per_class_recall(confusion_matrix(probs.argmax(1), targets, probs.shape[1]))


def test_interval_is_a_function_of_its_seed_and_leaves_the_global_state_alone():
    probs, targets = answers(0)
    state = np.random.get_state()[1].copy()
    first = bootstrap_interval(recall, probs, targets, n=100, seed=3)
    assert first == bootstrap_interval(recall, probs, targets, n=100, seed=3) != bootstrap_interval(recall, probs, targets, n=100, seed=4)
    assert (np.random.get_state()[1] == state).all()


def test_accuracy_interval_agrees_with_theory():
    right = np.random.default_rng(0).random(2000) < 0.8
    low, high = bootstrap_interval(np.mean, right, n=2000)
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 2000)
    assert (low, high) == pytest.approx((right.mean() - half, right.mean() + half), abs=0.0025)
    narrow, wide = (np.subtract(*bootstrap_interval(np.mean, right, level=level)[::-1]) for level in (0.5, 0.99))
    assert narrow < high - low < wide


def test_strata_keep_the_number_of_images_per_class():
    labels = np.repeat(np.arange(5), [50, 20, 7, 2, 1])
    counts = []
    labels = np.random.default_rng(0).permutation(labels)
    bootstrap_interval(lambda t: counts.append(np.bincount(t, minlength=5).tolist()) or 0.0, labels, n=20, strata=labels)
    assert all(c == [50, 20, 7, 2, 1] for c in counts)


def test_paired_is_antisymmetric_and_narrower():
    probs, targets = answers(5, 400)
    noise = torch.softmax(probs.log() + 0.3 * torch.randn(probs.shape, generator=torch.Generator().manual_seed(0)), -1)
    low, high = paired_bootstrap(recall, probs, noise, targets, n=300, strata=targets)
    assert paired_bootstrap(recall, noise, probs, targets, n=300, strata=targets) == pytest.approx((-high, -low), abs=1e-12)
    alone = [np.subtract(*bootstrap_interval(recall, p, targets, n=300, strata=targets)[::-1]) for p in (probs, noise)]
    assert high - low < np.hypot(*alone)


def test_metric_intervals_hold_the_metrics_and_know_empty_groups():
    probs, targets = answers(2, 300)
    groups = ["many"] * 3 + ["few"] * 3
    point, around = compute_metrics(probs, targets, groups), metric_intervals(probs, targets, groups, n=200)
    assert set(around) == set(SHARES) - {"worst_class"} and around["medium"] is None
    for name, interval in around.items():
        if interval and name != "ece": assert interval[0] <= point[name] <= interval[1], name


@pytest.mark.parametrize("call, message", [
    (lambda: bootstrap_interval(np.mean, [1, 0], [1]), r"\[2, 1\] rows"),
    (lambda: bootstrap_interval(np.mean, []), r"\[0\] rows"),
    (lambda: bootstrap_interval(np.mean, [1, 0], level=95), "level is 95, expected a share"),
    (lambda: bootstrap_interval(lambda x: float("nan"), [1, 0], n=5), "undefined"),
])
def test_interval_faults_are_sentences(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_a_statistic_undefined_in_some_redraws_still_has_an_interval():
    targets = np.array([0] * 30 + [1])  # the single image of class 1 is missing from a third of the redraws
    def few(preds, targets): return confusion_metrics(confusion_matrix(preds, targets, 2), ["many", "few"])["few"] or np.nan
    low, high = bootstrap_interval(few, targets, targets, n=100)
    assert (low, high) == (1.0, 1.0)
