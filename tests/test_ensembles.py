"""Losses of several experts and their combination, against loops that share no code."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dmrs_nb.ensembles import (LOSSES, RIDELoss, SADELoss, combine_logits, diversity_temperature, expert_diversity, make_loss, reversed_counts)
from dmrs_nb.ensembles import test_time_weights as weights_of_views  # under a name that pytest does not collect
from dmrs_nb.losses import BalancedSoftmaxLoss, CrossEntropyLoss, LogitAdjustedLoss, MMELoss, effective_prior, ensemble
from dmrs_nb.rebalancing import ClassBalancedLoss, FocalLoss, LDAMLoss, WeightedCrossEntropyLoss
from loss_problems import COUNTS, close, problem


# -- SADE ------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("counts", [COUNTS, [5, 100, 1, 60, 20]])
def test_sade_by_a_loop(counts):
    z, y, _ = problem(1)
    pi = np.array(counts) / sum(counts)
    turned = np.empty(5)
    for rank, c in enumerate(sorted(range(5), key=lambda c: counts[c])): turned[c] = sorted(pi)[::-1][rank]
    total = 0.
    for e, shift in enumerate((0 * pi, np.log(pi), np.log(pi) - 1.5 * np.log(turned))):
        for row, c in zip(z[e].numpy() + shift, y): total += (np.log(np.exp(row).sum()) - row[c]) / len(y) / 3
    close(SADELoss(counts, tau=1.5)(z, y), total)


def test_sade_experts_are_known_losses():
    z, y, soft = problem(2)
    parts = lambda targets: [CrossEntropyLoss()(z[0], targets), BalancedSoftmaxLoss(COUNTS)(z[1], targets)]
    for targets in (y, soft):
        third = F.cross_entropy(z[2] + SADELoss(COUNTS).adjustments[2], targets)
        close(SADELoss(COUNTS)(z, targets), sum(parts(targets), third) / 3)
    close(SADELoss(COUNTS, tau=0)(z, y), MMELoss(COUNTS, lambdas=[0, 1, 1])(z, y))
    close(SADELoss([4] * 5)(z, y), CrossEntropyLoss()(z, y))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.randoms())
def test_reversed_counts_do_not_know_the_order_of_classes(counts, random):
    turned, order = reversed_counts(counts), list(range(len(counts)))
    random.shuffle(order)
    assert reversed_counts([counts[c] for c in order]).equal(turned[order])
    close(turned.sum(), float(sum(counts)))
    for a, n in zip(turned, counts):
        for b, m in zip(turned, counts): assert (a == b) if n == m else (a > b) == (n < m) or a == b
    if len(set(counts)) == len(counts): assert reversed_counts(turned.long().tolist()).tolist() == counts


# -- RIDE ------------------------------------------------------------------------------------------------------------------------------

def softmax(v): return np.exp(v - v.max()) / np.exp(v - v.max()).sum()


def ride_by_hand(z, y, late, s, max_m, delta, gamma, beta, temperature):
    "Expert by expert, image by image, as the paper's loss is written, divided by the number of experts."
    n, total = np.array(COUNTS, float), 0.
    m, w, T = max_m * (n / n.min())**-0.25, np.ones(5), np.full(5, temperature)
    if late:
        w, size = 1 / (1 - beta**n), gamma * n / n.mean() + 1 - gamma
        T = temperature * size / size.max()
    for z_e in z:
        for b, c in enumerate(y):
            shifted = z_e[b].copy()
            shifted[c] -= s * m[c]
            total -= w[c] / w[y].sum() * np.log(softmax(shifted)[c])
            p, q = softmax(z.mean(0)[b] / T), softmax(z_e[b] / T)
            total += delta * T.mean()**2 * (p * np.log(p / q)).sum() / len(y)
    return total / len(z)


@pytest.mark.parametrize("progress", [0., 0.5, 1.])
@pytest.mark.parametrize("experts", [1, 2, 3, 5])
def test_ride_by_a_loop(experts, progress):
    z, y, _ = problem(3, experts)
    loss = RIDELoss(COUNTS, s=7., max_m=0.3, diversity=-0.45, reweight=0.2, beta=0.99, defer=0.5, temperature=1.7)
    loss.progress = progress
    close(loss(z, y), ride_by_hand(z.numpy(), y.numpy(), progress >= 0.5, 7., 0.3, -0.45, 0.2, 0.99, 1.7))
    close(loss(z, F.one_hot(y, 5).double()), loss(z, y))


def test_ride_identities():
    z, y, soft = problem(4)
    for targets in (y, soft):
        close(RIDELoss(COUNTS, diversity=0, max_m=0)(z, targets), CrossEntropyLoss()(z, targets))
        close(RIDELoss(COUNTS, diversity=0)(z, targets), LDAMLoss(COUNTS)(z, targets))
        close(RIDELoss(COUNTS)(z[:1], targets), LDAMLoss(COUNTS)(z[:1], targets))
        close(RIDELoss(COUNTS)(z[0], targets), LDAMLoss(COUNTS)(z[0], targets))
    assert RIDELoss(COUNTS)(z, y) < RIDELoss(COUNTS, diversity=0)(z, y)


@pytest.mark.parametrize("temperature", [1., 1.7, [1., 0.9, 0.8, 0.7, 0.5]])
def test_diversity_and_its_gradient_with_the_mean_held(temperature):
    z, _, _ = problem(5)
    T = torch.as_tensor(temperature, dtype=torch.float64)
    mean = (z.mean(0) / T).softmax(-1)
    held = lambda z: T.mean()**2 * (mean * (mean.log() - (z / T).log_softmax(-1))).sum(-1).mean()
    close(expert_diversity(z, temperature), held(z), 1e-9)
    a = z.clone().requires_grad_()
    expert_diversity(a, temperature).backward()
    bumps = torch.eye(z.numel(), dtype=torch.float64).view(-1, *z.shape) * 1e-6
    slopes = torch.stack([(held(z + bump) - held(z - bump)) / 2e-6 for bump in bumps]).view(z.shape)
    close(a.grad, slopes, 1e-7, 1e-5)


def test_alike_experts_have_no_reason_to_part():
    z = problem(6)[0][:1].repeat(3, 1, 1).requires_grad_()
    value = expert_diversity(z)
    value.backward()
    assert value.abs() < 1e-12 and z.grad.abs().max() < 1e-12


def test_rare_classes_have_the_cooler_temperature():
    T = diversity_temperature(COUNTS, 0.05, 2.)
    assert T[0] == 2 and (T.diff() < 0).all() and T.min() > 0
    assert diversity_temperature(COUNTS, 0.).eq(1).all() and diversity_temperature([3, 3], 1.).eq(1).all()


# -- combinations ----------------------------------------------------------------------------------------------------------------------

def test_combinations_by_a_loop():
    z, _, _ = problem(7)
    for weights in (None, [1, 1, 1], [0.2, 0.5, 0.3], [4, 0, 1]):
        w = np.ones(3) / 3 if weights is None else np.array(weights) / sum(weights)
        mean = np.array([sum(w[e] * softmax(z[e, b].numpy()) for e in range(3)) for b in range(7)])
        product = np.array([np.prod([softmax(z[e, b].numpy())**w[e] for e in range(3)], axis=0) for b in range(7)])
        close(combine_logits(z, "mean", weights), mean, 1e-9); close(combine_logits(z, "product", weights), product / product.sum(1, keepdims=True), 1e-9)


@pytest.mark.parametrize("how", ["mean", "product"])
def test_combination_is_a_distribution_and_one_expert_is_itself(how):
    z, _, _ = problem(8, scale=5000.)
    p = combine_logits(z.half(), how, [1, 2, 3])
    assert p.dtype == torch.float32 and p.isfinite().all() and (p >= 0).all()
    close(p.sum(1), torch.ones(7))
    close(combine_logits(z[0], how), z[0].softmax(-1)); close(combine_logits(z[:1], how), z[0].softmax(-1)); close(combine_logits(z), ensemble(z))
    close(combine_logits(z, how, [0, 0, 5]), z[2].softmax(-1))


def test_balpoe_is_mme_whose_product_is_balanced():
    z, y, soft = problem(9)
    for targets in (y, soft):
        close(MMELoss(COUNTS, lambdas=[0, 1, 2])(z, targets), np.mean([LogitAdjustedLoss(COUNTS, tau)(e, targets) for e, tau in zip(z, (0, 1, 2))]))
        close(MMELoss(COUNTS, lambdas=[1])(z[0], targets), LogitAdjustedLoss(COUNTS)(z[0], targets))
    silent = torch.stack([effective_prior(COUNTS, COUNTS, lam).log() for lam in (0, 1, 2)])[:, None]
    close(combine_logits(silent, "product"), torch.full((1, 5), 0.2))
    assert combine_logits(silent, "mean").max() > 0.25


# -- weights at test time --------------------------------------------------------------------------------------------------------------

def steady(seed=10):
    a, b = problem(seed, batch=40)[0], problem(seed + 1, batch=40)[0]
    b[1] = a[1]
    return a, b


def agreement(a, b, w): return F.cosine_similarity(combine_logits(a, "product", w), combine_logits(b, "product", w)).mean()


def test_steady_expert_gets_the_weight():
    a, b = steady()
    w = weights_of_views(a, b)
    assert w.dtype == torch.float32 and w.argmax() == 1 and w.min() >= 0.05 and abs(w.sum() - 1) < 1e-6
    assert agreement(a, b, w) > agreement(a, b, None) + 0.1
    assert weights_of_views(a, b, steps=300, lr=1., floor=0.).max() > w.max()
    assert weights_of_views(a, b).equal(w)  # nothing is drawn


def test_first_step_follows_the_gradient():
    a, b = steady(20)
    w = torch.full((3,), 1 / 3, dtype=torch.float64)
    slope = torch.stack([(agreement(a, b, (w + d).softmax(0)) - agreement(a, b, (w - d).softmax(0))) / 2e-5 for d in torch.eye(3).double() * 1e-5])
    close(weights_of_views(a, b, steps=1, lr=0.1, floor=0.), (w + 0.19 * slope).softmax(0), 1e-5)  # Nesterov's first step is 1.9 times the rate


def test_test_time_weights_leave_no_trace():
    a, b = steady(30)
    expected = weights_of_views(a, b)
    with torch.no_grad(): assert weights_of_views(a, b).equal(expected)
    with torch.inference_mode(): assert weights_of_views(a * 1, b * 1).equal(expected)
    a.requires_grad_()
    assert not weights_of_views(a, b).requires_grad and a.grad is None
    close(weights_of_views(a, a), torch.full((3,), 1 / 3), 1e-5)  # the views agree whatever the weights
    close(weights_of_views(a, b, steps=0), torch.full((3,), 1 / 3))


# -- by name ---------------------------------------------------------------------------------------------------------------------------

def test_names_give_the_classes():
    z, y, _ = problem(11)
    expected = {"ce": CrossEntropyLoss(), "logit-adjusted": LogitAdjustedLoss(COUNTS), "balanced-softmax": BalancedSoftmaxLoss(COUNTS), "mme": MMELoss(COUNTS),
                "weighted-ce": WeightedCrossEntropyLoss(COUNTS), "focal": FocalLoss(), "class-balanced": ClassBalancedLoss(COUNTS), "ldam-drw": LDAMLoss(COUNTS),
                "ride": RIDELoss(COUNTS), "sade": SADELoss(COUNTS)}
    assert set(LOSSES) == set(expected)
    for name, loss in expected.items():
        made = make_loss(name, COUNTS, num_experts=3)
        assert type(made) is type(loss) is LOSSES[name] and made(z, y).equal(loss(z, y))
    assert make_loss("logit-adjusted", COUNTS, tau=2.).tau == 2 and make_loss("focal", COUNTS, gamma=0.).gamma == 0
    assert make_loss("mme", COUNTS, 2, [0, 1]).lambdas.tolist() == [0, 1] and make_loss("mme", COUNTS).lambdas.tolist() == [-1]


@pytest.mark.parametrize("name", LOSSES)
def test_any_name_is_finite_and_has_its_gradient(name):
    z, y, soft = problem(12)
    for counts in (COUNTS, [1, 10**6, 1, 1, 3]):
        loss = make_loss(name, counts, num_experts=3)
        for loss.progress in (0., 1.):
            for targets in (y, soft):
                far = (z * 1e4 / z.abs().max()).float().requires_grad_()
                value = loss(far, targets)
                value.backward()
                assert value.dtype == torch.float32 and value.isfinite() and far.grad.isfinite().all()
                if name != "ride" or loss.progress == 0: assert far.grad.sum(-1).abs().max() < 1e-4  # but where classes differ in temperature
                assert loss(z.half(), targets).dtype == torch.float32
                if name != "ride": assert torch.autograd.gradcheck(lambda z: loss(z, targets), z.clone().requires_grad_())  # its mean is held: tested above


@pytest.mark.parametrize("name", LOSSES)
def test_one_class_costs_nothing(name):
    value = make_loss(name, [1], num_experts=3)(torch.tensor([[[1e4]], [[-1e4]], [[0.]]]), torch.tensor([0]))
    assert value == 0


@pytest.mark.parametrize("name", LOSSES)
def test_state_travels(name):
    z, y, _ = problem(13)
    first, second = make_loss(name, COUNTS, num_experts=3), make_loss(name, [1] * 5, num_experts=3)
    second.load_state_dict(first.state_dict())
    for loss in (first, second): loss.progress = 1.
    assert second(z, y).equal(first(z, y)) and not list(first.parameters())


# -- what cannot be meant --------------------------------------------------------------------------------------------------------------

Z = torch.zeros(3, 4, 5)


@pytest.mark.parametrize("make, sentence", [
    (lambda: make_loss("balanced_softmax", [1, 2]), "Did you mean 'balanced-softmax'"), (lambda: make_loss("ce", [1, 2], lambdas=[0]), "only the loss 'mme'"),
    (lambda: make_loss("sade", [1, 2], 3, lambdas=[0]), r"only the loss 'mme' takes them, found \[0\] with loss 'sade'"),
    (lambda: make_loss("mme", [1, 2], 2, [0, 1, 2]), "one for each of 2 experts, found 3"), (lambda: make_loss("mme", [1, 2], 0), "at least 1, found 0"),
    (lambda: make_loss("sade", [1, 2], 2), "num_experts: the loss 'sade' has exactly 3, found 2"), (lambda: make_loss("sade", [1, 2]), "exactly 3, found 1"),
    (lambda: make_loss("ride", [1, 0]), "class 1 has 0 training images"), (lambda: make_loss("sade", [1, 0], 3), "class 1 has 0 training images"),
    (lambda: make_loss("ride", [1, 2], reweight=1.5), r"reweight: found 1.5, expected a number in \[0, 1\]"), (lambda: RIDELoss([1, 2], temperature=0), "temperature: found 0"),
    (lambda: RIDELoss([1, 2], temperature=math.nan), "temperature: found nan"), (lambda: RIDELoss([1, 2], s=-1), "s: found -1"),
    (lambda: SADELoss(COUNTS)(Z[:2], torch.zeros(4).long()), r"found shape \(2, 4, 5\), expected \(3, B, C\)"),
    (lambda: SADELoss(COUNTS)(Z[0], torch.zeros(4).long()), "exactly three experts"), (lambda: SADELoss([1, 2])(Z, torch.zeros(4).long()), "5 classes, but cls_num_list has 2"),
    (lambda: RIDELoss([1, 2])(Z, torch.zeros(4).long()), "5 classes, but cls_num_list has 2"), (lambda: RIDELoss(COUNTS)(Z, torch.zeros(3).long()), "class indices or"),
    (lambda: combine_logits(Z, "sum"), "how: found 'sum', expected one of mean, product"), (lambda: combine_logits(Z, weights=[1, 2]), "expected 3 numbers of at least 0"),
    (lambda: combine_logits(Z, weights=[0, 0, 0]), "not all of them 0"), (lambda: combine_logits(Z, weights=[1, math.nan, 1]), "weights: found"),
    (lambda: weights_of_views(Z, Z[:, :2]), "expected two views of one shape"), (lambda: weights_of_views(Z[0], Z[0]), "expected two views of one shape"),
    (lambda: weights_of_views(Z, Z, floor=0.4), r"floor: found 0.4, expected a number from 0 to below 1 / 3 experts")])
def test_settings_that_cannot_be_meant(make, sentence):
    with pytest.raises(ValueError, match=sentence): make()
