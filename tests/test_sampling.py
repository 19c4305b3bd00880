"Samplers against their derived shares, against the recorded draws of the published sampler, across processes and against bad input."
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader

from dmrs_nb.longtail import img_num_per_cls
from dmrs_nb.sampling import SAMPLERS, ClassAwareSampler, expected_draws, index_stream, make_sampler, sampling_prior

GOLDEN = np.load(Path(__file__).parent / "golden" / "golden.npz")
TAIL = np.array(img_num_per_cls(69, 21, "exp", .05))
TARGETS = np.repeat(np.arange(21), TAIL)
small_tails = st.lists(st.integers(1, 12), min_size=2, max_size=6)


def test_the_published_sampler_and_ours_draw_from_one_distribution():
    "Counts of 20,000 draws of the published sampler, buckets of 20, 10, 5, 2 and 1: both fit the derived shares, and each other."
    n, published = [20, 10, 5, 2, 1], GOLDEN["sampler/balanced_counts_of_20000"]
    targets = np.repeat(np.arange(5), n)
    ours = np.bincount(targets[list(ClassAwareSampler(targets, 20000, torch.Generator().manual_seed(0)))])
    expected = expected_draws("class", n, 20000)
    assert published.sum() == 20000 and stats.chisquare(published, expected).pvalue > .01
    assert stats.chisquare(ours, expected).pvalue > .01
    assert stats.chi2_contingency([published, ours]).pvalue > .01
    assert stats.chisquare(published, expected_draws("sqrt", n, 20000)).pvalue < 1e-9


@pytest.mark.parametrize("name", ["class", "sqrt", "progressive"])
def test_p_values_over_many_seeds_are_uniform(name):
    "One seed can be lucky; forty p-values of a true hypothesis are uniform. Progressive draws vary a little less than a multinomial."
    expected = expected_draws(name, TAIL, 2000, .5)
    ps = [stats.chisquare(np.bincount(TARGETS[index_stream(name, TARGETS, 2000, seed)], minlength=21), expected).pvalue for seed in range(40)]
    assert stats.kstest(ps, "uniform").pvalue > .001


@given(small_tails, st.sampled_from([*SAMPLERS]), st.integers(1, 80), st.integers(0, 9))
@settings(deadline=None)
def test_every_deck_is_dealt_to_its_end(n, name, draws, seed):
    targets = np.repeat(np.arange(len(n)), n)
    drawn = index_stream(name, targets, draws, seed)
    assert drawn.dtype == np.int64 and len(drawn) == draws and 0 <= drawn.min() <= drawn.max() < len(targets)
    decks = [np.arange(len(targets))] if name == "instance" else [np.where(targets == c)[0] for c in range(len(n))]
    for deck in decks:
        views = np.bincount(drawn, minlength=len(targets))[deck]
        assert views.max() - views.min() <= 1


@given(small_tails, st.sampled_from([*SAMPLERS]), st.integers(1, 500), st.floats(0, 1))
@settings(deadline=None)
def test_shares_are_shares(n, name, draws, progress):
    assert np.isclose(sampling_prior(name, n, progress).sum(), 1) and (sampling_prior(name, n, progress) > 0).all()
    assert np.isclose(expected_draws(name, n, draws, progress).sum(), draws)


def test_the_mean_over_a_progressive_run_is_half_way():
    walk = np.mean([sampling_prior("progressive", TAIL, (i + .5) / 100) for i in range(100)], axis=0)
    np.testing.assert_allclose(walk, sampling_prior("progressive", TAIL), atol=1e-12)


def test_short_passes_do_not_forget_their_decks():
    sampler = make_sampler("instance", TARGETS, 100)
    passes = np.concatenate([list(sampler) for _ in range(14)])
    assert np.ptp(np.bincount(passes, minlength=len(TARGETS))) <= 1


def test_progressive_jumps_to_an_epoch_and_stays_at_its_end():
    sampler = make_sampler("progressive", TARGETS, 3000, num_epochs=10)
    sampler.epoch = 9
    end = np.bincount(TARGETS[list(sampler)], minlength=21)
    assert stats.chisquare(end, expected_draws("progressive", TAIL, 3000, .95)).pvalue > .001
    assert sampler.epoch == 10 and (sampler.progress() == 1).all()


def test_a_progressive_run_in_one_pass_or_in_ten_has_one_schedule():
    ten = make_sampler("progressive", TARGETS, 1000, num_epochs=10)
    for half in (slice(0, 5), slice(5, 10)):
        drawn = TARGETS[np.concatenate([list(ten) for _ in range(5)])]
        t = .25 if half.start == 0 else .75
        assert stats.chisquare(np.bincount(drawn, minlength=21), expected_draws("progressive", TAIL, 5000, t)).pvalue > .001


def test_a_stream_is_the_same_in_another_process_with_other_threads():
    code = """if True:
        import numpy as np, torch
        torch.manual_seed(99), torch.set_num_threads(2)
        from dmrs_nb.sampling import SAMPLERS, index_stream
        from dmrs_nb.longtail import img_num_per_cls
        targets = np.repeat(np.arange(21), img_num_per_cls(69, 21, "exp", .05))
        for name in SAMPLERS: print(*index_stream(name, targets, 300, seed=4))"""
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name, line in zip(SAMPLERS, there.splitlines(), strict=True):
        assert list(map(int, line.split())) == index_stream(name, TARGETS, 300, seed=4).tolist()


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_global_random_state_is_left_alone(name):
    np.random.seed(1), torch.manual_seed(1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    list(make_sampler(name, TARGETS))
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_targets_may_be_a_list_an_array_or_a_tensor(name):
    streams = [index_stream(name, kind(TARGETS), 50).tolist() for kind in (list, np.asarray, torch.as_tensor)]
    assert streams[0] == streams[1] == streams[2]


def test_in_a_loader_with_workers():
    loader = DataLoader(torch.arange(len(TARGETS)), batch_size=16, sampler=make_sampler("class", TARGETS, 64), num_workers=1)
    assert torch.cat(list(loader)).tolist() == list(make_sampler("class", TARGETS, 64))


def test_labels_in_any_order_and_one_class_alone():
    shuffled = np.random.default_rng(0).permutation(TARGETS)
    counts = np.bincount(shuffled[index_stream("class", shuffled, 21000)])
    assert stats.chisquare(counts).pvalue > .001
    assert sorted(index_stream("class", [0, 0, 0], 3)) == [0, 1, 2]


def test_a_whole_run_is_drawn_in_no_time():
    import time
    targets = np.repeat(np.arange(45), img_num_per_cls(560, 45))
    index_stream("class", targets, 10)
    start = time.process_time()  # other programs do not count
    index_stream("class", targets, 500_000)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("call, words", [
    (lambda: make_sampler("clas", [0, 1]), "Did you mean 'class'"), (lambda: make_sampler("class", []), "no image"),
    (lambda: make_sampler("class", [0, 2]), "class 1 has no image"), (lambda: make_sampler("class", [0, -1]), "label -1"),
    (lambda: make_sampler("class", [0, 1], num_samples=0), "num_samples: found 0"),
    (lambda: make_sampler("progressive", [0, 1], num_epochs=0), "num_epochs: found 0"),
    (lambda: expected_draws("progressive", [1, 1], 10, 1.5), "progress: found 1.5"),
    (lambda: sampling_prior("sqrt", []), "at least 1 image"), (lambda: sampling_prior("sqrt", [3, 0]), "found [3, 0]"),
    (lambda: index_stream("instance", [0, 1], 0), "num_samples: found 0")])
def test_a_sentence_for_every_mistake(call, words):
    with pytest.raises(ValueError) as error: call()
    assert words in str(error.value)
