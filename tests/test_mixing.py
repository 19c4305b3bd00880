"""Mixing against the published numbers, and under inputs that no notebook would show."""
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmrs_nb.compat
from dmrs_nb.mixing import (CMO, MIXINGS, CutMix, MixSSS, MixUp, Remix, box_mask, kept_share, make_mixing, mix_patches, mix_targets,
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


def any_mixing(name, num_classes, generator=None, S=None):
    "By name, with what each of them needs, and always mixing."
    kw = dict(mix_prob=1.) if name == "cmo" else {}
    return make_mixing(name, num_classes, torch.rand(num_classes, num_classes) if S is None else S, generator, cls_num_list=2 ** np.arange(num_classes), **kw)


# -- Remix and CMO ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("own, partner, lam, share", [
    (90, 10, 0.4, 0.), (90, 10, 0.6, 0.6), (10, 90, 0.6, 1.), (10, 90, 0.4, 0.4),     # a rare class needs more than half of the pixels
    (30, 10, 0.4, 0.), (29, 10, 0.4, 0.4), (10, 30, 0.6, 1.), (10, 29, 0.6, 0.6),      # three times is enough, less is not
    (90, 10, 0.5, 0.5), (10, 90, 0.5, 0.5), (5, 5, 0.2, 0.2)])
def test_whose_label_remix_gives(own, partner, lam, share):
    assert remix_share(lam, torch.tensor([own]), torch.tensor([partner])).tolist() == pytest.approx([share])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 9), counts=st.lists(st.integers(1, 200), min_size=1, max_size=6),
       kappa=st.floats(1, 9), tau=st.floats(0, 1), smoothing=st.sampled_from([0., 0.1]))
def test_remix_is_a_loop_in_numpy(seed, batch, counts, kappa, tau, smoothing):
    C, rng = len(counts), np.random.default_rng(seed)
    y, x = rng.integers(0, C, batch), rng.random((batch, 5))
    build = lambda: Remix(C, counts, kappa, tau, label_smoothing=smoothing, generator=torch.Generator().manual_seed(seed))
    lam = build().draw(batch)[0]
    mixed, labels = build()(torch.tensor(x), torch.tensor(y))
    for i in range(batch):
        j = (i - 1) % batch
        large, small = max(counts[y[i]], counts[y[j]]), min(counts[y[i]], counts[y[j]])
        share_of_large = lam if counts[y[i]] == large else 1 - lam
        expected, mine = np.full(C, smoothing / C), 1 - smoothing
        if y[i] != y[j] and large >= kappa * small and share_of_large < tau and large > small: expected[y[i] if counts[y[i]] == small else y[j]] += mine
        elif y[i] != y[j] and kappa == 1 and large == small: continue       # equal classes, no majority: not the rule's business
        else: expected[y[i]] += mine * lam; expected[y[j]] += mine * (1 - lam)
        np.testing.assert_allclose(labels[i], expected, atol=1e-6)
        np.testing.assert_allclose(mixed[i], lam * x[i] + (1 - lam) * x[j])


def test_remix_without_a_majority_is_torchvisions_mixup(monkeypatch):
    from torchvision.transforms import v2
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs, labels = v2.MixUp(num_classes=6)(x, y)
    for remix in (Remix(6, [7] * 6), Remix(6, [90, 50, 20, 9, 3, 1], tau=0.), Remix(6, [90, 50, 20, 9, 3, 1], kappa=float("inf"))):
        monkeypatch.setattr(remix, "draw", lambda batch: (labels[0, 0].item(), torch.arange(batch).roll(1)))
        torch.testing.assert_close(remix(x, y), (theirs, labels))
    leans = Remix(6, [90, 50, 20, 9, 3, 1])
    monkeypatch.setattr(leans, "draw", lambda batch: (labels[0, 0].item(), torch.arange(batch).roll(1)))
    assert not leans(x, y)[1].equal(labels), "the counts matter"


def test_remix_hands_the_rare_class_five_eighths():
    remix, y = Remix(2, [100, 1], generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    rare = np.array([remix(torch.zeros(2, 1), y)[1][:, 1].tolist() for _ in range(3000)])
    assert (abs(rare.mean(0) - 5 / 8) < 5 * rare.std(0) / 3000 ** 0.5).all(), "whoever is the partner"


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 6), classes=st.integers(1, 6), height=st.integers(1, 30), width=st.integers(1, 30),
       mix_prob=st.sampled_from([0., 0.5, 1.]))
def test_cmo_labels_are_the_share_of_pixels_and_backgrounds_are_the_first_half(seed, batch, classes, height, width, mix_prob):
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (2 * batch,), generator=g)
    back, fore = targets[:batch], targets[batch:] + classes                   # foregrounds in colours of their own
    mixed, labels = CMO(classes, mix_prob=mix_prob, generator=g)(painted(torch.cat([back, fore]), height, width), targets)
    assert mixed.shape == (batch, 1, height, width) and labels.shape == (batch, classes)
    colours = read_off(mixed, 2 * classes)
    torch.testing.assert_close(colours[:, :classes] + colours[:, classes:], labels, atol=1e-6, rtol=0)
    assert (colours.gather(1, back[:, None]) + colours.gather(1, fore[:, None]) > 1 - 1e-6).all(), "an image and its own foreground, nobody else"
    if mix_prob == 0: assert mixed.equal(painted(back, height, width))


@pytest.mark.parametrize("seed", range(5))
def test_cmo_is_torchvisions_cutmix_of_a_background_and_a_foreground(seed, monkeypatch):
    "Theirs mixes a batch with itself: of a pair, the first image takes its box from the second. The box is read off and put in."
    from torchvision.transforms import v2
    x, y = torch.rand(8, 3, 20, 33, generator=torch.Generator().manual_seed(seed)), torch.tensor([0, 1, 2, 3, 4, 5, 4, 5])
    pairs = []
    for b in range(4):
        with torch.random.fork_rng():
            torch.manual_seed(seed)                                             # one box for all pairs
            pairs.append([z[0] for z in v2.CutMix(num_classes=6)(x[[b, 4 + b]], y[[b, 4 + b]])])
    theirs, labels = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
    box = (theirs == x[:4]).all(1)
    assert box.eq(box[0]).all() and not box.all()
    monkeypatch.setattr("dmrs_nb.mixing.box_mask", lambda *_: box[0])
    mixed, soft = CMO(6, mix_prob=1.)(x, y)
    assert mixed.equal(theirs)
    torch.testing.assert_close(soft, labels)


def test_cmo_mixes_half_of_the_steps_and_none_at_the_ends_of_200_epochs():
    cmo = CMO(2, generator=torch.Generator().manual_seed(0))
    share = np.mean([cmo.draw(2)[0] < 1 for _ in range(2000)])
    assert abs(share - 0.5) < 5 * 0.5 / 2000 ** 0.5
    always = CMO(2, mix_prob=1.)
    for epoch in range(200):
        always.progress = epoch / 200
        assert (always.draw(2)[0] < 1) == (3 < epoch < 200 - 3), epoch         # epochs counted from 0, as the authors' code compares them
    always.plain, always.progress = (0., 0.), 0.
    assert always.draw(2)[0] < 1


def test_the_foreground_sampler_has_the_shares_of_the_published_weights():
    counts = [70, 33, 9, 2]
    weights = np.concatenate([[1 / n ** 1.0] * n for n in counts])              # one weight an image, exponent 1
    drawn = list(torch.utils.data.WeightedRandomSampler(weights, 20000, generator=torch.Generator().manual_seed(0)))
    theirs = np.bincount(np.repeat(np.arange(4), counts)[drawn], minlength=4) / 20000
    assert CMO.foreground in SAMPLERS
    np.testing.assert_allclose(sampling_prior(CMO.foreground, counts), theirs, atol=5 * (0.25 * 0.75 / 20000) ** 0.5)


def test_gradient_of_cmo_goes_to_the_owner_of_the_pixel():
    cmo, x = CMO(3, mix_prob=1.), torch.rand(4, 2, 5, 6, dtype=torch.float64).requires_grad_()
    def mixed(x): cmo.generator.manual_seed(4); return cmo(x, torch.tensor([0, 1, 2, 2]))[0]
    mixed(x).sum().backward()
    assert (x.grad[:2] + x.grad[2:]).eq(1).all() and 0 < x.grad[2:].sum() < x.grad.sum()
    assert torch.autograd.gradcheck(mixed, x)


@pytest.mark.parametrize("name", MIXINGS)
def test_a_step_draws_as_many_images_as_the_mixing_says(name):
    draws = MIXINGS[name].draws
    assert draws == (2 if name == "cmo" else 1)
    x, y = torch.rand(6 * draws, 3, 8, 8), torch.arange(6 * draws) % 6
    mixed, targets = any_mixing(name, 6)(x, y)
    assert len(mixed) == len(targets) == 6
    if targets.dim() == 2: torch.testing.assert_close(targets.sum(1), torch.ones(6))


# -- in somebody's loop ----------------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("mixing", [MixUp(3), CutMix(3), Remix(3, [9, 3, 1]), MixSSS(torch.rand(3, 3), cells=2)])
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


@pytest.mark.parametrize("build, sentence", [
    (lambda: Remix(3), r"cls_num_list: Remix needs the training images of 3 classes"), (lambda: make_mixing("remix", 3), "cls_num_list"),
    (lambda: Remix(3, [1, 2]), r"3 classes, each above 0; found \[1.0, 2.0\]"), (lambda: Remix(3, [1, 2, 0]), "each above 0"),
    (lambda: Remix(3, [1, 2, float("nan")]), "each above 0"), (lambda: Remix(3, [1, 2, 3], kappa=0.5), "kappa: expected a ratio of at least 1, found 0.5"),
    (lambda: Remix(3, [1, 2, 3], tau=2), "tau: expected a share"), (lambda: Remix(3, [1, 2, 3], alpha=0), "alpha"),
    (lambda: CMO(3, mix_prob=1.5), "mix_prob.*found 1.5"), (lambda: CMO(3, alpha=-1), "alpha"), (lambda: CMO(3, plain=(0.5, 0.5)), "plain: .*leave some"),
    (lambda: CMO(3)(torch.rand(3, 1, 4, 4), torch.arange(3)), "found 3 images, an odd number"),
    (lambda: CMO(3)(torch.rand(4, 1, 4, 4), torch.arange(2)), "targets: expected one for each of 4 images, found 2")])
def test_what_remix_and_cmo_refuse(build, sentence):
    with pytest.raises(ValueError, match=sentence): build()


def test_names_that_are_not_known():
    with pytest.raises(ValueError, match="Did you mean 'cutmix'"): make_mixing("cut-mix", 3)
