"""Losses against the published numbers, and under inputs that no notebook would show."""
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dmrs_nb.losses import (LOSSES, BalancedSoftmaxLoss, CrossEntropyLoss, LogitAdjustedLoss, MMELoss, default_lambdas, effective_prior,
                            ensemble, log_prior, make_loss)

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
