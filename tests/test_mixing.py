"""Mixing against the published numbers, and under inputs that no notebook would show."""
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmrs_nb.compat
from dmrs_nb.mixing import (MIXINGS, CutMix, MixSSS, MixUp, box_mask, kept_share, make_mixing, mix_patches, mix_targets, partners,
                            patch_mask, pixel_mask)

GOLDEN = np.load(Path(__file__).parent / "golden" / "golden.npz")
CASES = ("similar", "one_class", "flip")


def golden(case, name): return torch.from_numpy(np.asarray(GOLDEN[f"mix/{case}/{name}"]))


@pytest.mark.parametrize("diagonal", [0., -float("inf")])
@pytest.mark.parametrize("case", ["similar", "one_class"])
def test_published_partners(case, diagonal):
    assert partners(golden(case, "similarity"), golden(case, "targets"), diagonal).equal(golden(case, "partner"))


@pytest.mark.parametrize("case", CASES)
def test_published_mixture(case):
    targets, partner, mask = golden(case, "targets"), golden(case, "partner"), golden(case, "mask")
    lam = kept_share(mask, 28, 28)
    torch.testing.assert_close(lam, golden(case, "lam"), atol=1e-7, rtol=0)
    assert mix_patches(golden(case, "x"), partner, mask).equal(golden(case, "mixed"))
    torch.testing.assert_close(mix_targets(targets, partner, lam, 10, 0.05), golden(case, "mixed_targets"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_published_mixture_through_the_class(case, monkeypatch):
    """The whole call, with the one thing that cannot be reproduced, the draw of the cells, put in."""
    mixing = MixSSS(golden(case, "similarity"), alpha=float(golden(case, "alpha")), partner="flip" if case == "flip" else "similar")
    monkeypatch.setattr(mixing, "draw_mask", lambda batch: golden(case, "mask").bool())
    mixed, targets = mixing(golden(case, "x"), golden(case, "targets"))
    assert mixed.equal(golden(case, "mixed"))
    torch.testing.assert_close(targets, golden(case, "mixed_targets"), atol=1e-6, rtol=0)
