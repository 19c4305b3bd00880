"""Weights, focal loss and margins against loops that share no code, and under inputs that no notebook would show."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dmrs_nb.losses import CrossEntropyLoss, MMELoss
from dmrs_nb.rebalancing import (ClassBalancedLoss, FocalLoss, LDAMLoss, WeightedCrossEntropyLoss, class_weights, label_shares, ldam_margins,
                                 weighted_cross_entropy)
from loss_problems import COUNTS, close, problem

LOSSES = [WeightedCrossEntropyLoss, FocalLoss, ClassBalancedLoss, LDAMLoss]


# -- against loops ---------------------------------------------------------------------------------------------------------------------

def log_softmax(row):
    top = max(row)
    return [v - top - math.log(sum(math.exp(u - top) for u in row)) for v in row]


def weights_by_hand(counts, how, beta):
    raw = [1 / n if how == "inverse" else 1 / sum(beta**k for k in range(n)) for n in counts]
    return [w * len(raw) / sum(raw) for w in raw]


def loss_by_hand(z, t, weights=None, gamma=0., drops=None):
    "One expert, image by image, class by class; `drops` is what a whole label takes from each logit."
    total = divisor = 0.
    for row, shares in zip(z.tolist(), t.tolist()):
        if drops is not None: row = [v - d * share for v, d, share in zip(row, drops, shares)]
        for c, (log_p, share) in enumerate(zip(log_softmax(row), shares)):
            weight = share * (1 if weights is None else weights[c])
            total -= weight * (1 - math.exp(log_p))**gamma * log_p
            divisor += weight
    return total / divisor


@pytest.mark.parametrize("how, beta", [("inverse", 0.5), ("effective", 0.), ("effective", 0.5), ("effective", 0.999), ("effective", 0.9999)])
def test_weights_from_their_definition(how, beta):
    w = class_weights(COUNTS, how, beta)
    close(w, weights_by_hand(COUNTS, how, beta), 1e-6)
    assert w.dtype == torch.float32 and abs(w.mean().item() - 1) < 1e-6


def test_weights_keep_their_digits_when_beta_is_near_one():
    """1 - β^n would lose them: at β = 1 - 1e-12 the plain form is off by more than one in ten thousand."""
    close(class_weights([1, 10, 1000], "effective", 1 - 1e-12), class_weights([1, 10, 1000]), 1e-6, 1e-6)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("progress", [0., 0.8])
def test_every_loss_is_the_mean_of_its_experts_by_hand(kind, progress):
    z, y, soft = problem()
    targets, t = (y, F.one_hot(y, 5).double()) if kind == "hard" else (soft, soft)
    margins = [0.5 * n**-0.25 for n in COUNTS]  # the rarest class has one image
    cases = {WeightedCrossEntropyLoss(COUNTS): dict(weights=weights_by_hand(COUNTS, "inverse", 0)),
             ClassBalancedLoss(COUNTS, 0.9): dict(weights=weights_by_hand(COUNTS, "effective", 0.9)), FocalLoss(gamma=0.5): dict(gamma=0.5), FocalLoss(): dict(gamma=2.),
             LDAMLoss(COUNTS, max_m=0.5, s=10.): dict(drops=[10 * m for m in margins], weights=weights_by_hand(COUNTS, "effective", 0.9999) if progress else None)}
    for loss, kw in cases.items():
        loss.progress = progress
        close(loss(z, targets), np.mean([loss_by_hand(e, t, **kw) for e in z]), 1e-5)


def test_hard_labels_are_those_of_torch():
    z, y, _ = problem(1)
    for loss, w in ((WeightedCrossEntropyLoss(COUNTS), class_weights(COUNTS)), (ClassBalancedLoss(COUNTS), class_weights(COUNTS, "effective"))):
        a, b = z[0].float().requires_grad_(), z[0].float().requires_grad_()
        loss(a, y).backward(); F.cross_entropy(b, y, weight=w).backward()
        close(loss(a, y), F.cross_entropy(b, y, weight=w)); close(a.grad, b.grad, 1e-6)


def test_soft_labels_are_those_of_torch_up_to_the_divisor():
    z, _, soft = problem(2)
    w = class_weights(COUNTS)
    close(WeightedCrossEntropyLoss(COUNTS)(z[0], soft) * (soft * w).sum() / len(soft), F.cross_entropy(z[0], soft, weight=w.double()), 1e-5)


def test_ldam_as_published():
    """The margin leaves the cosine of the true class, then everything is scaled; weights are normalised to the number of classes."""
    z, y, _ = problem(3, experts=1)
    cos, m = z[0] / 30, np.array(COUNTS)**-0.25
    m *= 0.5 / m.max()
    w = (1 - 0.9999) / (1 - np.power(0.9999, COUNTS))
    moved = cos - F.one_hot(y, 5) * torch.from_numpy(m)
    loss = LDAMLoss(COUNTS)
    for progress, weight in ((0., None), (0.7999, None), (0.8, torch.from_numpy(w / w.sum() * 5)), (1., torch.from_numpy(w / w.sum() * 5))):
        loss.progress = progress
        close(loss(z, y), F.cross_entropy(30 * moved, y, weight=weight), 1e-4)


def test_focal_as_published():
    z, y, _ = problem(4, experts=1)
    ce = F.cross_entropy(z[0], y, reduction="none")
    close(FocalLoss(gamma=2)(z, y), ((1 - (-ce).exp())**2 * ce).mean())


# -- identities ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [1, 2])
def test_identities(kind):
    data = problem(5, experts=2)
    z, targets = data[0], data[kind]
    ce = CrossEntropyLoss()(z, targets)
    for loss in (FocalLoss(gamma=0), ClassBalancedLoss(COUNTS, beta=0), WeightedCrossEntropyLoss([9] * 5), LDAMLoss(COUNTS, max_m=0),
                 LDAMLoss(COUNTS, max_m=0, beta=0, defer=0), MMELoss(COUNTS, lambdas=[0, 0])):
        close(loss(z, targets), ce)
    close(LDAMLoss(COUNTS, max_m=0, beta=0.99, defer=0)(z, targets), ClassBalancedLoss(COUNTS, 0.99)(z, targets))


def test_one_class_in_a_batch_cancels_the_weights():
    z, _, _ = problem(6)
    y = torch.full((7,), 4)
    close(WeightedCrossEntropyLoss(COUNTS)(z, y), CrossEntropyLoss()(z, y))


def test_margins_fall_with_the_fourth_root():
    close(ldam_margins([16, 1], 0.4), [0.2, 0.4])
    assert ldam_margins([5, 5, 5], 0.3).tolist() == pytest.approx([0.3] * 3) and not ldam_margins(COUNTS, 0).any()


def test_deferral_never_and_always():
    z, y, _ = problem(7)
    always, never = LDAMLoss(COUNTS, defer=0), LDAMLoss(COUNTS, defer=2)
    never.progress = 1.
    close(never(z, y), LDAMLoss(COUNTS)(z, y))
    assert not torch.isclose(always(z, y), never(z, y))


# -- gradients and the far ends --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("progress", [0., 0.9])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss, progress):
    z, y, soft = problem(8)
    loss = loss(COUNTS).double()
    loss.progress = progress
    for targets in (y, soft): assert torch.autograd.gradcheck(lambda z: loss(z, targets), z.requires_grad_())


@st.composite
def problems(draw):
    "Logits up to ±1e4, counts from one image to a million, hard and soft targets."
    experts, batch, classes = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = (torch.rand(experts, batch, classes, generator=g, dtype=torch.float64) * 2 - 1) * 10 ** draw(st.floats(-2, 4))
    counts = draw(st.lists(st.one_of(st.just(1), st.integers(1, 10**6)), min_size=classes, max_size=classes))
    soft = torch.rand(batch, classes, generator=g, dtype=torch.float64)
    return z, counts, torch.randint(classes, (batch,), generator=g), soft / soft.sum(1, keepdim=True)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.5, 1., 2., 5.]))
def test_any_problem_is_finite(problem, gamma):
    z, counts, hard, soft = problem
    for loss in (WeightedCrossEntropyLoss(counts), ClassBalancedLoss(counts), FocalLoss(gamma=gamma), LDAMLoss(counts)):
        for loss.progress in (0., 1.):
            a = z.float().requires_grad_()
            for targets in (hard, soft):
                a.grad = None
                value = loss(a, targets)
                value.backward()
                assert value.dtype == torch.float32 and value.isfinite() and value > -1e-3 and a.grad.isfinite().all()
                assert a.grad.sum(-1).abs().max() < 1e-4  # logits are moved against each other
            close(loss(z, F.one_hot(hard, len(counts)).double()), loss(z, hard), 1e-3, 1e-4)


@pytest.mark.parametrize("gamma", [0., 0.3, 1., 2.])
def test_focal_gradient_of_a_sure_answer_is_zero(gamma):
    z = torch.tensor([[1e4, 0.]], requires_grad=True)
    FocalLoss(gamma=gamma)(z, torch.tensor([0])).backward()
    assert z.grad.tolist() == [[0., 0.]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_logits_are_summed_in_float32(loss, dtype):
    z, y, soft = problem(9)
    for targets in (y, soft.to(dtype)):
        value = loss(COUNTS)(z.to(dtype), targets)
        assert value.dtype == torch.float32
        close(value, loss(COUNTS)(z.to(dtype).float(), targets.float() if targets.dim() == 2 else targets), 1e-3, 1e-3)


@pytest.mark.parametrize("loss", [WeightedCrossEntropyLoss, ClassBalancedLoss, LDAMLoss])
def test_what_belongs_to_the_counts_travels_with_the_module(loss):
    z, y, _ = problem(10)
    first, second = loss(COUNTS), loss([1] * 5)
    second.load_state_dict(first.state_dict())
    for m in (first, second): m.progress = 1.
    assert second(z, y).equal(first(z, y)) and not list(first.parameters())
    assert all(b.device.type == "meta" for b in loss(COUNTS).to("meta").buffers())


@pytest.mark.parametrize("loss", LOSSES)
def test_two_axes_are_one_expert_and_one_class_costs_nothing(loss):
    z, y, _ = problem(11)
    assert loss(COUNTS)(z[0], y).equal(loss(COUNTS)(z[:1], y))
    assert loss([3])(torch.tensor([[[1e4]], [[-1e4]]]), torch.tensor([0])) == 0


def test_weighted_cross_entropy_leaves_its_inputs():
    z, y, _ = problem(12, experts=2)
    shares = label_shares(z, y)
    assert shares[0].shape == shares[1].shape == (14, 5) and shares[1].sum(1).eq(1).all()
    before = z.clone()
    weighted_cross_entropy(*shares, class_weights(COUNTS)); LDAMLoss(COUNTS)(z, y)
    assert z.equal(before)


# -- what cannot be meant --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, sentence", [
    (lambda: class_weights([4, 0]), "class 1 has 0 training images"), (lambda: class_weights([4], "inverted"), "how: found 'inverted'.*Did you mean 'inverse'"),
    (lambda: class_weights([4], "effective", 1), r"beta: found 1, expected a number in \[0, 1\)"), (lambda: ClassBalancedLoss([4], beta=-0.1), "beta: found -0.1"),
    (lambda: class_weights([4], "effective", math.nan), "beta: found nan"),
    (lambda: FocalLoss(gamma=-1), "gamma: found -1, expected a number of at least 0"), (lambda: FocalLoss(gamma=math.nan), "gamma: found nan"),
    (lambda: ldam_margins([4, 2], -1), "max_m: found -1"), (lambda: LDAMLoss([4, 2], max_m=math.inf), "max_m: found inf"),
    (lambda: LDAMLoss([4, 2], s=0), "s: found 0, expected a number above 0"), (lambda: LDAMLoss([4, 2], defer=-0.5), "defer: found -0.5"),
    (lambda: WeightedCrossEntropyLoss([]), "one number per class")])
def test_settings_that_cannot_be_meant(make, sentence):
    with pytest.raises(ValueError, match=sentence): make()


@pytest.mark.parametrize("loss", [WeightedCrossEntropyLoss, ClassBalancedLoss, LDAMLoss])
def test_shapes_that_do_not_fit(loss):
    with pytest.raises(ValueError, match="5 classes, but cls_num_list has 3"): loss([5, 3, 1])(torch.zeros(4, 5), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected \(4,\) class indices or \(4, 3\) soft labels"): loss([5, 3, 1])(torch.zeros(4, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="E, B, C"): loss([5, 3, 1])(torch.zeros(1, 1, 4, 3), torch.zeros(4, dtype=torch.long))
