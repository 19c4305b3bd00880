"""Contrasts: parity with naive loops, p values and Holm by hand, what a results folder lacks, and how often the rules are wrong."""
import itertools
import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dmrs_nb.contrasts import (cells, contrasts, format_table, hierarchical_bootstrap, holm, interval, load_answers, method_table, paired_test,
                               plot_contrasts)
from dmrs_nb.metrics import seeds_bootstrap


def tables(seed=0, S=3, classes=5, each=8):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.arange(classes), each))
    return *(rng.random((S, len(y))) < q for q in (.7, .5)), y


def naive(a, b, n, seed, strata):
    d, rows, images = np.subtract(a, b, dtype=float), np.random.default_rng([seed, 1]).integers(0, len(a), (n, len(a))), np.random.default_rng(seed)
    places = [np.flatnonzero(strata == s) for s in np.unique(strata)]
    columns = np.concatenate([p[images.integers(0, len(p), (n, len(p)))] for p in places], axis=1)
    return np.array([np.mean([[d[s, i] for i in c] for s in r]) for r, c in zip(rows, columns)])


# ---- redrawing

@pytest.mark.parametrize("S, classes, each", [(1, 3, 4), (3, 5, 8), (5, 1, 20), (2, 7, 1)])
def test_equals_a_naive_loop(S, classes, each):
    a, b, y = tables(1, S, classes, each)
    np.testing.assert_allclose(hierarchical_bootstrap(a, b, n=60, seed=4, strata=y), naive(a, b, 60, 4, y), atol=1e-12)
    np.testing.assert_allclose(hierarchical_bootstrap(a, b, n=60, seed=4), naive(a, b, 60, 4, np.zeros(len(y))), atol=1e-12)


@pytest.mark.parametrize("stratified", [True, False])
def test_ends_are_those_of_seeds_bootstrap(stratified):
    a, b, y = tables(2)
    strata = y if stratified else None
    found = paired_test(a, b, n=500, seed=3, strata=strata)
    np.testing.assert_allclose((found["low"], found["high"]), seeds_bootstrap(a, b, n=500, seed=3, strata=strata), atol=1e-12)


def test_variance_is_that_of_every_possible_resample():
    d = np.array([[1., 0, -1], [1, 1, 0]])
    every = [d[np.ix_(r, c)].mean() for r in itertools.product(range(2), repeat=2) for c in itertools.product(range(3), repeat=3)]
    redrawn = hierarchical_bootstrap(d, n=100_000)
    assert redrawn.mean() == pytest.approx(np.mean(every), abs=5e-3) and redrawn.var() == pytest.approx(np.var(every), rel=.02)
    assert set(np.round(redrawn, 9)) == set(np.round(every, 9))


def test_images_are_redrawn_within_their_class():
    y = np.repeat([0, 1], 20)
    a = np.tile(y == 1, (3, 1))                                       # all of class 1 right, none of class 0
    assert np.ptp(hierarchical_bootstrap(a, strata=y)) == 0 and np.ptp(hierarchical_bootstrap(a)) > .1


def test_columns_are_the_images_alone_and_order_of_images_is_nothing():
    a, b, y = tables(3)
    keep = y > 2
    np.testing.assert_allclose(hierarchical_bootstrap(a, b, strata=y, columns=keep), hierarchical_bootstrap(a[:, keep], b[:, keep], strata=y[keep]))
    order = np.argsort(y, kind="stable")
    np.testing.assert_allclose(hierarchical_bootstrap(a, b, strata=y), hierarchical_bootstrap(a[:, order], b[:, order], strata=y[order]))


@pytest.mark.parametrize("change, says", [
    (dict(b=np.ones((2, 40))), r"\(3, 40\) and b \(2, 40\)"), (dict(a=np.ones(40)), "a: found shape"), (dict(a=np.ones((0, 40))), "at least one of each"),
    (dict(strata=np.zeros(39)), "strata: found 39 entries"), (dict(columns=np.zeros(40, bool)), "columns: found 0 of 40"),
    (dict(columns=np.ones(3, bool)), "expected one or more of 40"), (dict(a=np.full((3, 40), np.nan)), "120 scores that are NaN"), (dict(level=1), "level: found 1")])
def test_tables_that_do_not_fit_get_a_sentence(change, says):
    a, b, y = tables()
    with pytest.raises(ValueError, match=says): paired_test(**dict(a=a, b=b, strata=y) | change)


# ---- p values

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 300))
def test_p_is_a_p_value(seed, S, n):
    a, b, y = tables(seed, S)
    found, back = paired_test(a, b, n=n, strata=y), paired_test(b, a, n=n, strata=y)
    assert min(1, 2 / (n + 1)) - 1e-12 <= found["p"] <= 1 and found["p"] == back["p"]
    assert found["difference"] == pytest.approx(a.mean() - b.mean()) and found["low"] == pytest.approx(-back["high"])


def test_p_by_hand():
    assert paired_test(np.ones((2, 9)), np.zeros((2, 9)), n=199)["p"] == 2 / 200    # never on the other side
    a, b, y = tables(5)
    assert paired_test(a, a) == dict(difference=0, low=0, high=0, p=1)
    redrawn = naive(b, a, 300, 0, y)
    assert paired_test(b, a, n=300, strata=y)["p"] == pytest.approx(min(1, 2 * (1 + min((redrawn < 1e-9).sum(), (redrawn > -1e-9).sum())) / 301))


def test_sums_of_floats_do_not_hide_a_zero():
    d = np.array([[1., -1, 1, -1, 0, 0, 0] * 3])                                      # many resamples are exactly 0
    redrawn = hierarchical_bootstrap(d, n=400)
    assert paired_test(d, 0 * d, n=400)["p"] == min(1, 2 * (1 + min((np.round(redrawn, 9) <= 0).sum(), (np.round(redrawn, 9) >= 0).sum())) / 401)


def test_interval_is_that_of_a_single_method():
    a, _, y = tables(6)
    found = interval(a, strata=y)
    assert found["mean"] == a.mean() and found["low"] < a.mean() < found["high"]
    np.testing.assert_allclose((found["low"], found["high"]), seeds_bootstrap(a, 0 * a, strata=y))


# ---- Holm

def test_holm_by_hand():
    np.testing.assert_allclose(holm([.01, .04, .03, .005]), [.03, .06, .06, .02])
    np.testing.assert_allclose(holm([.01, .01, .5]), [.03, .03, .5])
    np.testing.assert_allclose(holm([.6, .7]), [1, 1])
    assert holm([]).shape == (0,) and holm([.2]) == [.2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_is_its_definition(p):
    adjusted, m = holm(p), len(p)
    ranked = sorted(p)
    for value, found in zip(p, adjusted):      # the largest of the products up to this rank, ties at their last place
        last = max(k for k in range(m) if ranked[k] == value)
        assert found == pytest.approx(min(1, max(ranked[k] * (m - k) for k in range(last + 1))))
    assert (adjusted >= np.array(p) - 1e-15).all() and (adjusted <= np.minimum(1, np.array(p) * m) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


@pytest.mark.parametrize("p", [[.1, np.nan], [-.1], [1.1], [[.1]]])
def test_holm_refuses_what_is_no_p_value(p):
    with pytest.raises(ValueError, match="numbers from 0 to 1"): holm(p)


# ---- contrasts

def many(S=3, methods=4, seed=0):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(6), 10)
    return {f"m{k}": rng.random((S, 60)) < .4 + .1 * k for k in range(methods)}, y, np.where(y < 2, "many", np.where(y < 4, "medium", "few"))


def test_contrasts_are_paired_tests_and_holm_per_part():
    scores, y, groups = many()
    pairs = [("m3", "m0"), ("m1", "m0"), ("m2", "m1")]
    table = contrasts(scores, pairs, y, groups, part=["all", "few"], n=400)
    assert list(zip(table.a, table.b)) == pairs * 2 and list(table.part) == ["all"] * 3 + ["few"] * 3
    for r in table.to_dict("records"):
        a, b = scores[r["a"]].astype(float), scores[r["b"]].astype(float)
        keep = np.ones(60, bool) if r["part"] == "all" else groups == "few"
        t = stats.ttest_rel(a[:, keep].mean(1), b[:, keep].mean(1)).pvalue
        assert r["difference"] == pytest.approx(a[:, keep].mean() - b[:, keep].mean()) and r["p_seeds"] == pytest.approx(t)
        if r["part"] == "all": assert {k: r[k] for k in ("difference", "low", "high", "p")} == pytest.approx(paired_test(a, b, n=400, strata=y))
    for part in ("all", "few"): np.testing.assert_allclose(table.p_holm[table.part == part], holm(table.p[table.part == part]))
    assert table.attrs["family"] == 3 and (table.note == "").all()


def test_a_group_without_strata_is_the_images_alone():
    scores, y, groups = many()
    few = groups == "few"
    row = contrasts(scores, [("m3", "m0")], None, groups, part="few", n=300).iloc[0]
    alone = paired_test(scores["m3"][:, few], scores["m0"][:, few], n=300)
    assert (row.low, row.high, row.p) == pytest.approx((alone["low"], alone["high"], alone["p"]))


def test_groups_may_differ_between_long_tails():
    scores, y, groups = many()
    turned = np.where(y < 2, "few", "many")
    both = contrasts(scores, [("m3", "m0"), ("m2", "m0")], y, dict(m3=groups, m2=turned), part="few", n=50)
    assert both.difference[0] == pytest.approx(scores["m3"][:, y >= 4].mean() - scores["m0"][:, y >= 4].mean())
    assert both.difference[1] == pytest.approx(scores["m2"][:, y < 2].mean() - scores["m0"][:, y < 2].mean())


def test_notes_warn_of_few_seeds_and_of_a_family_that_is_too_large():
    scores, y, _ = many(S=2)
    pairs = list(itertools.combinations(scores, 2))
    assert "2 seeds, fewer than 3" in contrasts(scores, pairs, y).note[0]
    note = contrasts(scores, pairs, y, n=100).attrs["note"]
    assert "n = 100 is too small for 6 pairs" in note and "n ≥ 240" in note
    one = contrasts({k: v[:1] for k, v in scores.items()}, pairs[:1], y)
    assert "1 seed, fewer" in one.note[0] and np.isnan(one.p_seeds[0])
    assert contrasts(many(S=3)[0], pairs, y, n=240).note[0] == ""


@pytest.mark.parametrize("change, says", [
    (dict(pairs=[("m9", "m0")]), "pairs: found 'm9'"), (dict(pairs=[("m0", "m0")]), "against itself"), (dict(pairs=[("m0", "m1"), ("m1", "m0")]), "twice"),
    (dict(pairs=[]), "found none"), (dict(part="tail"), "part: found 'tail'"), (dict(part="few", groups=None), "groups: found None"),
    (dict(part="few", groups=np.full(60, "many")), "groups: found 0 of 60"), (dict(strata=np.zeros(3)), "strata: found 3 entries")])
def test_contrasts_say_what_is_wrong(change, says):
    scores, y, groups = many()
    with pytest.raises(ValueError, match=says): contrasts(**dict(scores=scores, pairs=[("m1", "m0")], strata=y, groups=groups) | change)


def test_plot_marks_what_is_claimed():
    scores, y, groups = many(S=4)
    scores["sure"] = np.ones((4, 60)); scores["twin"] = scores["m1"][::-1]; scores["m0"] = np.arange(60) % 10 < np.array([[0], [1], [1], [2]])
    table = contrasts(scores, [("sure", "m0"), ("twin", "m1")], y, groups, part=["all", "few"])
    figure = plot_contrasts(table)
    assert len(figure.axes) == 2 and [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["sure − m0", "twin − m1"]
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert table.p_holm[0] < .05 < table.p_holm[1] and [m.get_markerfacecolor() for m in marks] == ["#333333", "white"]
    plt.close(figure)


# ---- a results folder

@pytest.fixture
def folder(tmp_path):
    rng, rows = np.random.default_rng(0), []
    y = np.repeat(np.arange(4), 6).astype(np.uint8)
    preds = np.where(rng.random((10, 24)) < .6, y, (y + 1) % 4).astype(np.uint8)
    for k, (method, seed, imb) in enumerate([*((m, s, .1) for m in ("ce", "dmrs") for s in (2, 0, 1)), ("ce", 3, .1), *(("ce", s, .05) for s in range(3))]):
        numbers = [200, 100, 30, 20] if imb == .1 else [200, 30, 20, 10]
        rows.append(dict(run_id=f"r{k}", data="own", method=method, lr=.1, seed=seed, imb_factor=imb, cls_num_list=json.dumps(numbers),
                         acc1=(preds[k] == y).mean(), val_acc1=(preds[k, :12] == y[:12]).mean(), trainable=10 * (method == "dmrs")))
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    np.savez(tmp_path / "predictions.npz", run_id=[f"r{k}" for k in range(10)], words=list("abcd"), test_preds=preds, test_targets=y,
             val_preds=preds[:, :12], val_targets=y[:12])
    return tmp_path


def test_answers_fit_the_table(folder):
    answers = load_answers(folder, thresholds=(100, 25))
    np.testing.assert_allclose(answers.right.mean(1), answers.table.acc1)
    assert not answers.notes and answers.words == list("abcd") and answers.right.shape == answers.groups.shape == (10, 24)
    assert list(answers.groups[0, ::6]) == ["many", "medium", "medium", "few"] and list(answers.groups[9, ::6]) == ["many", "medium", "few", "few"]
    assert load_answers(folder, "val").right.shape == (10, 12)


def test_cells_share_their_seeds_in_order(folder):
    answers = load_answers(folder)
    found = cells(answers.only(imb_factor=.1))
    assert {k: v.shape for k, v in found.items()} == {"ce": (3, 24), "dmrs": (3, 24)}    # the fourth seed of ce is left out
    np.testing.assert_array_equal(found["dmrs"], answers.right[[4, 5, 3]])                 # seeds 0, 1, 2
    assert list(cells(answers, ["method", "imb_factor"])) == [("ce", .1), ("dmrs", .1), ("ce", .05)]
    assert list(cells(answers, lambda row: f"{row['method']} {row['imb_factor']}")) == ["ce 0.1", "dmrs 0.1", "ce 0.05"]
    with pytest.raises(ValueError, match="cell 'ce': found 2 runs with seed 0, expected one; they differ in imb_factor"): cells(answers)
    with pytest.raises(ValueError, match="found no seed that all have: dmrs has .0, 2.; ce has .3."): cells(answers.only(run_id=["r6", "r3", "r4"]))
    with pytest.raises(ValueError, match="Did you mean 'method'"): cells(answers, "methd")
    with pytest.raises(ValueError, match="method: no run has 'crt', there are ce, dmrs"): answers.only(method="crt")


def test_what_is_missing_gets_a_sentence(folder):
    arrays = dict(np.load(folder / "predictions.npz"))
    np.savez(folder / "predictions.npz", **{k: v for k, v in arrays.items() if not k.startswith("val")} | dict(run_id=arrays["run_id"][:8], test_preds=arrays["test_preds"][:8]))
    assert load_answers(folder).notes == ["2 of 10 runs have no answers (judged on other images, or stored without): r8, r9."]
    with pytest.raises(ValueError, match="found no val_preds, val_targets"): load_answers(folder, "val")
    with pytest.raises(ValueError, match="part: found 'train'"): load_answers(folder, "train")
    table = pd.read_csv(folder / "runs.csv"); table.loc[0, "acc1"] += .05; table.to_csv(folder / "runs.csv", index=False)
    assert "1 of 8 runs have another acc1 in runs.csv than their answers give, by up to 5.0 points" in load_answers(folder).notes[1]
    table.assign(run_id="x").to_csv(folder / "runs.csv", index=False)
    with pytest.raises(ValueError, match="none of the 10 runs"): load_answers(folder)
    table.drop(columns="seed").to_csv(folder / "runs.csv", index=False)
    with pytest.raises(ValueError, match="found no column seed"): load_answers(folder)
    (folder / "predictions.npz").unlink()
    with pytest.raises(ValueError, match="found no predictions.npz"): load_answers(folder)


def test_method_table_is_sorted_and_right(folder):
    answers = load_answers(folder, thresholds=(100, 25)).only(imb_factor=.1)
    table = method_table(answers, n=200)
    few = {m: answers.right[(answers.table.method == m).to_numpy()][:, 18:].mean() for m in ("ce", "dmrs")}
    assert table.few.to_dict() == pytest.approx(few) and table.few.is_monotonic_decreasing and table.seeds.to_dict() == dict(ce=4, dmrs=3)
    assert ((table.many_low <= table.many) & (table.many <= table.many_high)).all() and table.trainable.to_dict() == dict(ce=0, dmrs=10)
    assert method_table(answers, sort="overall", n=50).overall.is_monotonic_decreasing
    text = method_table(answers, n=200, formatted=True)
    assert text.few["ce"] == f"{100 * few['ce']:.1f} ({100 * table.few_low['ce']:.1f} … {100 * table.few_high['ce']:.1f})" and text.equals(format_table(table))
    with pytest.raises(ValueError, match="sort: found 'fwe'"): method_table(answers, sort="fwe")


def test_a_group_without_images_is_empty_in_the_table(folder):
    answers = load_answers(folder, thresholds=(1000, 25)).only(imb_factor=.1)              # nothing is many
    table = method_table(answers, n=20)
    assert table.many.isna().all() and (format_table(table).many == "–").all()


def test_one_cell_has_one_long_tail(folder):
    answers = load_answers(folder, thresholds=(100, 25))
    with pytest.raises(ValueError, match="groups differ, expected one long tail"): method_table(answers.only(run_id=["r6", "r7"]))
    assert list(method_table(answers, by=["method", "imb_factor"], n=20).index.names) == ["method", "imb_factor"]


# ---- how often it is wrong

@pytest.mark.parametrize("seeds, low, high", [(0, 0, .03), (.25, .09, .3)])
def test_few_seeds_are_careful_with_single_answers_and_rash_with_whole_seeds(seeds, low, high):
    rng, y, claimed = np.random.default_rng(0), np.repeat(np.arange(10), 20), []
    for _ in range(200):
        easy = rng.normal(size=200)
        a, b = (.3 + easy + seeds * rng.normal(size=(3, 1)) + .7 * rng.normal(size=(3, 200)) > 0 for _ in range(2))
        claimed.append(paired_test(a, b, n=199, strata=y)["p"] < .05)
    assert low <= np.mean(claimed) <= high
