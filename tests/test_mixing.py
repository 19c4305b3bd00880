"""Mixing against the published numbers, and under inputs that no notebook would show."""
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmrs_nb.compat
from dmrs_nb.mixing import (CMO, MIXINGS, CutMix, MixSSS, MixUp, Remix, box_mask, draw_ratio, kept_share, make_mixing, mix_patches, mix_targets,
                            partners, patch_mask, pixel_mask, remix_share)
from dmrs_nb.sampling import SAMPLERS, sampling_prior

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


# -- any batch -------------------------------------------------------------------------------------------------------------------------

def painted(targets, height, width):
    "Each image filled with the number of its class: a label can be read off the pixels."
    return targets.view(-1, 1, 1, 1).expand(-1, 1, height, width)


def read_off(images, num_classes): return torch.nn.functional.one_hot(images.flatten(1), num_classes).float().mean(1)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 9), classes=st.integers(1, 6), height=st.integers(1, 40), width=st.integers(1, 40),
       cells=st.integers(1, 12), partner=st.sampled_from(["similar", "random", "flip"]), per_image=st.booleans(),
       mix_prob=st.sampled_from([0., 0.5, 1.]))
def test_label_is_the_share_of_pixels(seed, batch, classes, height, width, cells, partner, per_image, mix_prob):
    g = torch.Generator().manual_seed(seed)
    targets, S = torch.randint(classes, (batch,), generator=g), torch.randn(classes, classes, generator=g)
    mixing = MixSSS(S, cells, label_smoothing=0., partner=partner, mix_prob=mix_prob, generator=g, per_image=per_image)
    mixed, labels = mixing(painted(targets, height, width), targets)
    torch.testing.assert_close(read_off(mixed, classes), labels, atol=1e-5, rtol=0)
    torch.testing.assert_close(labels.sum(1), torch.ones(batch))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 12), classes=st.integers(1, 6), own=st.sampled_from([0., -float("inf")]))
def test_partners_are_the_nearest(seed, batch, classes, own):
    g = torch.Generator().manual_seed(seed)
    targets, S = torch.randint(classes, (batch,), generator=g), torch.randn(classes, classes, generator=g)
    before = S.clone()
    for i, p in enumerate(partners(S, targets, own).tolist()):
        seen = [own if a == targets[i] else S[targets[i], a].item() for a in targets]
        assert p == seen.index(max(seen))
        if own < 0 and len(targets.unique()) > 1: assert targets[p] != targets[i]
    assert S.equal(before)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 5), cells=st.integers(1, 14), ratio=st.floats(0, 1))
def test_kept_cells_are_rounded_up(seed, batch, cells, ratio):
    mask = patch_mask(batch, cells, ratio, torch.Generator().manual_seed(seed))
    assert mask.shape == (batch, cells, cells) and mask.dtype == torch.bool
    assert set(mask.sum((1, 2)).tolist()) == {int(np.ceil(cells**2 * ratio))}


@settings(max_examples=100, deadline=None)
@given(height=st.integers(1, 30), width=st.integers(1, 30), lam=st.floats(0, 1), row=st.floats(0, 0.999), column=st.floats(0, 0.999))
def test_box_is_never_larger_than_asked(height, width, lam, row, column):
    mask = box_mask(height, width, lam, row, column)
    assert mask.shape == (height, width) and (~mask).float().mean() <= 1 - lam + 1e-6


@pytest.mark.parametrize("size", [(28, 28), (96, 96), (224, 224), (64, 100), (3, 5)])
def test_cells_cover_every_pixel_once(size):
    one_cell_each = torch.eye(49, dtype=torch.bool).view(49, 7, 7)
    assert pixel_mask(one_cell_each, *size).sum(0).eq(1).all()


# -- torchvision -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [(32, 32), (20, 33)])
def test_torchvision_mixup_and_cutmix(seed, size):
    """Their draws come from the global state, so the draw is read off their result and fed in here."""
    from torchvision.transforms import v2
    targets, partner = torch.arange(6), torch.arange(6).roll(1)
    x = torch.rand(6, 3, *size, generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs, labels = v2.MixUp(num_classes=6)(x, targets)
        lam = labels[0, 0].item()
        torch.testing.assert_close(x * lam + x[partner] * (1 - lam), theirs)
        torch.testing.assert_close(mix_targets(targets, partner, lam, 6), labels)
        theirs, labels = v2.CutMix(num_classes=6)(x, targets)
    box = (theirs == x).all(1)
    assert mix_patches(x, partner, box).equal(theirs)
    torch.testing.assert_close(mix_targets(targets, partner, kept_share(box, *size), 6), labels)


def test_cutmix_boxes_have_the_distribution_of_torchvision():
    """Kept share of 1,000 boxes each: same mean and spread, within five standard errors."""
    from torchvision.transforms import v2
    targets, x = torch.arange(2), painted(torch.arange(2), 16, 16).float()
    ours = CutMix(2, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference, theirs = v2.CutMix(num_classes=2), []
        for _ in range(1000): theirs.append(reference(x, targets)[1][0, 0].item())
    mine = [ours(x, targets)[1][0, 0].item() for _ in range(1000)]
    assert abs(np.mean(mine) - np.mean(theirs)) < 5 * np.std(theirs) * (2 / 1000) ** 0.5
    assert abs(np.std(mine) - np.std(theirs)) < 0.04


# -- in somebody's loop ----------------------------------------------------------------------------------------------------------------

def any_mixing(name, num_classes, generator=None, S=None):
    "By name, with what each of them needs, and always mixing."
    kw = dict(mix_prob=1.) if name == "cmo" else {}
    return make_mixing(name, num_classes, torch.rand(num_classes, num_classes) if S is None else S, generator, cls_num_list=2 ** np.arange(num_classes), **kw)


@pytest.mark.parametrize("name", MIXINGS)
def test_only_the_generator_that_was_passed_in_is_used(name):
    x, y, S = torch.rand(6, 3, 16, 16), torch.arange(6), torch.rand(6, 6)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    draws = [any_mixing(name, 6, torch.Generator().manual_seed(s), S)(x, y) for s in (1, 1, 2)]
    assert torch.get_rng_state().equal(torch_state) and (np.random.get_state()[1] == numpy_state).all()
    assert draws[0][0].equal(draws[1][0]) and draws[0][1].equal(draws[1][1])
    if name != "none": assert not draws[0][0].equal(draws[2][0])


@pytest.mark.parametrize("name", MIXINGS)
def test_reseeding_the_generator_repeats_a_step(name):
    """What a resumed run needs: a mixture that depends on the seed of its step and on nothing before it."""
    mixing = any_mixing(name, 6, torch.Generator())
    x, y = torch.rand(6, 3, 16, 16), torch.arange(6)
    def step(): mixing.generator.manual_seed(42); return mixing(x, y)
    first = step()
    for _ in range(3): mixing(x, y)
    assert step()[0].equal(first[0]) and step()[1].equal(first[1])


@pytest.mark.parametrize("name", ["mixsss", "cutmix", "cmo"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_data_type_is_kept(name, dtype):
    x = (torch.rand(4, 3, 14, 14) * 255).to(dtype)
    assert any_mixing(name, 4, torch.Generator())(x, torch.arange(4))[0].dtype == dtype


@pytest.mark.parametrize("name", MIXINGS)
def test_the_caller_keeps_his_batch(name):
    x, y, S = torch.rand(4, 3, 14, 14), torch.arange(4), np.random.default_rng(0).random((4, 4))
    kept = x.clone(), y.clone(), S.copy()
    any_mixing(name, 4, S=S)(x, y)
    assert x.equal(kept[0]) and y.equal(kept[1]) and (S == kept[2]).all()


@pytest.mark.parametrize("name", MIXINGS)
def test_a_batch_of_one_is_itself(name):
    draws = MIXINGS[name].draws
    x, y = torch.rand(1, 3, 14, 14).repeat(draws, 1, 1, 1), torch.tensor([2] * draws)
    mixed, targets = any_mixing(name, 4)(x, y)
    torch.testing.assert_close(mixed, x[:1])
    assert (targets if targets.dim() == 1 else targets.argmax(1)).tolist() == [2]


def test_what_is_cut_out_does_not_leak():
    x = torch.rand(2, 1, 4, 4)
    x[0, :, 2:] = float("nan")
    upper = torch.tensor([[[True, True], [False, False]]]).expand(2, -1, -1)
    assert mix_patches(x, torch.tensor([1, 1]), upper)[0].isfinite().all()


@pytest.mark.parametrize("mixing", [MixUp(3), CutMix(3), MixSSS(torch.rand(3, 3), cells=2)])
def test_gradient_goes_to_whoever_is_in_the_picture(mixing):
    """One unit of gradient for each pixel of the mixture, split between the image and its partner."""
    x = torch.rand(3, 2, 4, 4, dtype=torch.float64).requires_grad_()
    def mixed(x): mixing.generator.manual_seed(0); return mixing(x, torch.arange(3))[0]
    mixed(x).sum().backward()
    assert x.grad.sum().item() == pytest.approx(x.numel())
    assert torch.autograd.gradcheck(mixed, x)


def test_published_ratio_is_one_a_batch_and_per_image_is_many():
    y, S = torch.arange(8), torch.rand(8, 8)
    x = torch.zeros(8, 1, 14, 14)
    shares = lambda **kw: MixSSS(S, label_smoothing=0., diagonal=-float("inf"), **kw)(x, y)[1].gather(1, y[:, None]).unique()
    assert len(shares()) == 1 and len(shares(per_image=True)) > 3


# -- what cannot be meant --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kw, sentence", [
    (dict(similarity=None), "needs the .C, C. similarity"), (dict(similarity=torch.rand(3, 4)), r"square.*found shape \(3, 4\)"),
    (dict(similarity=torch.full((3, 3), float("nan"))), "not finite"), (dict(num_classes=5), "expected 5 classes, found 3"),
    (dict(cells=0), "cells: expected at least 1"), (dict(alpha=-1), "alpha: expected a number above 0, found -1"),
    (dict(alpha=float("nan")), "alpha"), (dict(label_smoothing=1.), "label_smoothing"), (dict(mix_prob=1.5), "mix_prob.*found 1.5"),
    (dict(partner="flipped"), "Did you mean 'flip'"),
    (dict(similarity=None, partner="random"), "num_classes: expected at least 1, found None")])
def test_settings_that_cannot_be_meant(kw, sentence):
    with pytest.raises(ValueError, match=sentence): MixSSS(**{"similarity": torch.rand(3, 3), **kw})


def test_names_that_are_not_known():
    with pytest.raises(ValueError, match="Did you mean 'cutmix'"): make_mixing("cut-mix", 3)
