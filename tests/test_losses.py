"""Losses against the published numbers, and under inputs that no notebook would show."""
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dmrs_nb.losses import (BalancedSoftmaxLoss, CrossEntropyLoss, LogitAdjustedLoss, MMELoss, default_lambdas, effective_prior, ensemble,
                            expert_cross_entropy, log_prior)

GOLDEN = np.load(Path(__file__).parent / "golden" / "golden.npz")
EXPERTS = (1, 2, 3, 5)


def golden(experts, name): return torch.from_numpy(np.asarray(GOLDEN[f"mme/{experts}/{name}"]))


def close(a, b, atol=1e-5): torch.testing.assert_close(a, b, atol=atol, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize("experts", EXPERTS)
def test_published_lambdas_and_prior(experts):
    close(torch.tensor(default_lambdas(experts)), golden(experts, "lambdas"), 1e-12)
    close(log_prior(golden(experts, "cls_num_list")), golden(experts, "log_prior"), 1e-6)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_published_loss_and_gradient(experts, kind):
    loss = MMELoss(golden(experts, "cls_num_list").tolist(), num_experts=experts)
    logits = golden(experts, "logits").requires_grad_()
    value = loss(logits, golden(experts, kind))
    value.backward()
    close(value.detach(), golden(experts, f"loss_{kind}"))
    close(logits.grad, golden(experts, f"grad_{kind}"), 1e-6)


@pytest.mark.parametrize("experts", EXPERTS)
def test_published_test_loss_and_inference(experts):
    """At test time the published code one-hots the targets; the prior stays in the loss and never enters the answer."""
    loss, targets = MMELoss(golden(experts, "cls_num_list"), num_experts=experts), golden(experts, "hard")
    close(loss(golden(experts, "logits"), F.one_hot(targets, 7).float()), golden(experts, "loss_test"))
    close(loss(golden(experts, "logits"), targets), golden(experts, "loss_test"))
    close(ensemble(golden(experts, "logits")), golden(experts, "inference"), 1e-6)


# -- any logits, any counts ------------------------------------------------------------------------------------------------------------

@st.composite
def problems(draw):
    "Logits up to ±1e4, counts from one image to a million, hard and soft targets."
    experts, batch, classes = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 8))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = (torch.rand(experts, batch, classes, generator=g, dtype=torch.float64) * 2 - 1) * 10 ** draw(st.floats(-2, 4))
    counts = draw(st.lists(st.one_of(st.just(1), st.integers(1, 10**6)), min_size=classes, max_size=classes))
    lambdas = draw(st.lists(st.floats(-3, 3), min_size=experts, max_size=experts))
    soft = torch.rand(batch, classes, generator=g, dtype=torch.float64)
    return logits, counts, lambdas, torch.randint(classes, (batch,), generator=g), soft / soft.sum(1, keepdim=True)


def reference(logits, counts, lambdas, soft):
    "The formula in float64, with the largest logit taken out by hand."
    prior = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    total = 0.
    for z, lam in zip(logits, lambdas):
        z = z + lam * prior.log()
        top = z.max(1, keepdim=True).values
        total += -(soft * (z - top - (z - top).exp().sum(1, keepdim=True).log())).sum(1).mean() / len(logits)
    return total


@settings(max_examples=150, deadline=None)
@given(problems())
def test_any_problem_matches_the_formula_and_has_a_finite_gradient(problem):
    logits, counts, lambdas, hard, soft = problem
    loss = MMELoss(counts, lambdas)
    for dtype in (torch.float64, torch.float32):
        z = logits.detach().to(dtype, copy=True).requires_grad_()
        for targets, expected in ((hard, F.one_hot(hard, len(counts)).double()), (soft, soft)):
            z.grad = None
            value = loss(z, targets)
            value.backward()
            torch.testing.assert_close(value.detach().double(), reference(logits, counts, lambdas, expected), rtol=1e-4, atol=1e-3)
            assert value.isfinite() and z.grad.isfinite().all() and value > -1e-3
            assert z.grad.sum(-1).abs().max() < 1e-5  # a pull moves logits against each other, never all of them at once


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(-1e3, 1e3), st.integers(2, 1000))
def test_constants_cancel(problem, constant, scale):
    logits, counts, lambdas, hard, _ = problem
    loss = MMELoss(counts, lambdas)(logits, hard)
    torch.testing.assert_close(MMELoss(counts, lambdas)(logits + constant, hard), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(MMELoss([n * scale for n in counts], lambdas)(logits, hard), loss, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_ensemble_is_a_distribution(problem):
    probs = ensemble(problem[0])
    assert probs.shape == problem[0].shape[1:] and (probs >= 0).all()
    torch.testing.assert_close(probs.sum(1), torch.ones(len(probs), dtype=probs.dtype))


LOSSES = [CrossEntropyLoss, LogitAdjustedLoss, BalancedSoftmaxLoss, MMELoss]


def built(loss, counts, experts): return loss(counts, num_experts=experts) if loss is MMELoss else loss(counts)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    loss = built(loss, [30, 7, 1], 2).double()
    z = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    soft = torch.tensor([[.5, .5, 0], [1, 0, 0], [0, .2, .8], [.3, .3, .4]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: loss(z, torch.tensor([0, 2, 1, 2])), z)
    assert torch.autograd.gradcheck(lambda z: loss(z, soft), z)


# -- as a module in somebody's loop ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    z = torch.full((3, 2, 100), 3e4, dtype=dtype)
    for loss in LOSSES:
        value = built(loss, [1] * 100, 3)(z, torch.tensor([0, 99]))
        assert value.dtype == torch.float32
        close(value, torch.tensor(100.).log(), 1e-4)
    assert ensemble(z).dtype == torch.float32


def test_counts_are_a_buffer_that_travels_with_the_module(tmp_path):
    loss = MMELoss(np.array([5, 3, 1]), num_experts=2)
    assert {name for name, _ in loss.named_buffers()} == {"cls_num_list", "lambdas"} and not list(loss.parameters())
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    other = MMELoss([1, 1, 1], lambdas=[0, 0])
    other.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    z, y = torch.randn(2, 4, 3), torch.tensor([0, 1, 2, 0])
    assert other(z, y).equal(loss(z, y))
    assert loss.to("meta").cls_num_list.device.type == "meta"


def test_the_caller_keeps_his_counts_and_logits():
    counts, z = torch.tensor([5, 3, 1]), torch.randn(3, 4, 3)
    before = z.clone()
    loss = MMELoss(counts)
    loss(z, torch.tensor([0, 1, 2, 0]))
    counts[0] = 0
    assert loss.cls_num_list.tolist() == [5, 3, 1] and z.equal(before)


@pytest.mark.parametrize("loss", LOSSES)
def test_two_axes_are_one_expert(loss):
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    loss = built(loss, [5, 3, 1], 1)
    assert loss(z, y).equal(loss(z[None], y))
    assert ensemble(z).equal(ensemble(z[None]))


def test_one_class_costs_nothing():
    """A sum over one class: the softmax is 1 whatever the logit."""
    for loss in LOSSES: assert built(loss, [1], 2)(torch.tensor([[[1e4]], [[-1e4]]]), torch.tensor([0])) == 0


def test_labels_may_be_whole_numbers_of_any_width():
    z, y = torch.randn(2, 4, 3), torch.tensor([0, 1, 2, 0])
    assert expert_cross_entropy(z, F.one_hot(y, 3)).equal(expert_cross_entropy(z, F.one_hot(y, 3).double()))


@pytest.mark.parametrize("tau", [0., 1., 2.5])
def test_logit_adjustment_adds_tau_log_prior_by_hand(tau):
    z, y, n = np.array([[0.5, -1., 2.], [1., 0., -0.5]]), [0, 2], np.array([70, 20, 10])
    moved = z + tau * np.log(n / 100)
    costs = [np.log(np.exp(row).sum()) - row[c] for row, c in zip(moved, y)]
    close(LogitAdjustedLoss(n, tau)(torch.from_numpy(z), torch.tensor(y)), torch.tensor(np.mean(costs)))
    if tau == 1: close(BalancedSoftmaxLoss(n)(torch.from_numpy(z), torch.tensor(y)), torch.tensor(np.mean(costs)))


@pytest.mark.parametrize("shares, lam", [([100, 10, 1], 1.), ([10, 10, 10], 0.), ([10, 10**.5, 1], 0.5)])
def test_balanced_pairs_of_sampler_and_prior(shares, lam):
    close(effective_prior(shares, [100, 10, 1], lam), torch.full((3,), 1 / 3), 1e-5)


# -- what cannot be meant --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("counts, sentence", [
    ([4, 0, 2], r"class 1 has 0 training images.*Leave the class out"), ([4, 2, -1], "class 2 has -1 training images"),
    ([4, float("nan")], "class 1 has nan"), ([float("inf"), 4], "class 0 has inf"), ([], "one number per class"),
    ([[1, 2]], "one number per class")])
@pytest.mark.parametrize("loss", [MMELoss, LogitAdjustedLoss, BalancedSoftmaxLoss])
def test_counts_that_have_no_logarithm(loss, counts, sentence):
    with pytest.raises(ValueError, match=sentence): loss(counts)


@pytest.mark.parametrize("logits, targets, sentence", [
    ((2, 4, 3), (4,), "2 experts, but the loss has 3 lambdas"), ((4, 3), (4,), "1 experts"),
    ((3, 4, 5), (4,), "5 classes, but cls_num_list has 3"),
    ((3, 4, 3), (3,), r"expected \(4,\) class indices or \(4, 3\) soft labels"),
    ((3, 4, 3), (4, 5), "found shape"), ((3, 1, 4, 3), (4,), "E, B, C")])
def test_shapes_that_do_not_fit(logits, targets, sentence):
    y = torch.zeros(targets) if len(targets) > 1 else torch.zeros(targets, dtype=torch.long)
    with pytest.raises(ValueError, match=sentence): MMELoss([5, 3, 1])(torch.zeros(logits), y)


def test_lambdas_that_do_not_fit():
    with pytest.raises(ValueError, match="one for each of 2 experts, found 3"): MMELoss([1, 2], [0, 1, 2], 2)
    with pytest.raises(ValueError, match="at least 1, found 0"): default_lambdas(0)
