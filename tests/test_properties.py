"What has to hold for any input that makes sense, against references in NumPy and scikit-learn that share no code with the package."
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from dmrs_nb.ensembles import LOSSES, combine_logits, make_loss
from dmrs_nb.longtail import IMB_TYPES, ORDERS, class_order, img_num_per_cls, longtail_split, published_split, stratified_split
from dmrs_nb.metrics import (accuracy, cohen_kappa, compute_metrics, confusion_matrix, confusion_metrics, macro_f1, mean_per_class_recall,
                             per_class_recall)
from dmrs_nb.mixing import MIXINGS, make_mixing
from dmrs_nb.sampling import SAMPLERS, index_stream, sampling_prior


def fuzz(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


SEED = st.integers(0, 2**31)


# ---- losses: any logits, any counts

def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def cross_entropy(z, t, w=1.): return -(w * t * log_softmax(z)).sum() / (w * t * np.ones_like(z)).sum()


def effective(n, beta):  # 1 / effective number of images
    return np.array([(1 - beta) / (1 - beta ** k) for k in n.tolist()])


def margins(n): return 0.5 * (n.min() / n) ** 0.25


def ldam(z, t, n, late): return cross_entropy(z - 30 * t * margins(n), t, effective(n, 0.9999) if late else 1.)


def ride(z, t, n, late, held=None):  # held: logits whose mean gets no gradient
    size = 0.05 * n / n.mean() + 0.95
    T = size / size.max() if late else np.ones(len(n))
    mean = log_softmax((z if held is None else held).mean(0) / T)
    apart = (np.exp(mean) * (mean - log_softmax(z / T))).sum(-1).mean()
    return ldam(z, t, n, late) - (0.2 * T.mean() ** 2 * apart if len(z) > 1 else 0)


def turned(n):  # the profile upside down; classes of one size share what their ranks got
    ascending = np.sort(n)
    return np.array([ascending[::-1][ascending == k].mean() for k in n])


def shares(n): return np.log(n / n.sum())


def exponents(E): return (-0.5, 0, 1.5) if E == 3 else np.linspace(-1, 2, E)


def focal(z, t):
    p = np.exp(log_softmax(z))
    return -(t * (1 - p) ** 2 * log_softmax(z)).sum() / (z.size / z.shape[-1])


REFERENCE = {   # (E, B, C) logits, (B, C) labels, (C,) counts, whether the last part of training has begun -> nats
    "ce": lambda z, t, n, late: cross_entropy(z, t),
    "logit-adjusted": lambda z, t, n, late: cross_entropy(z + shares(n), t),
    "balanced-softmax": lambda z, t, n, late: cross_entropy(z + np.log(n), t),
    "mme": lambda z, t, n, late: np.mean([cross_entropy(e + lam * shares(n), t) for e, lam in zip(z, exponents(len(z)))]),
    "weighted-ce": lambda z, t, n, late: cross_entropy(z, t, 1 / n),
    "class-balanced": lambda z, t, n, late: cross_entropy(z, t, effective(n, 0.999)),
    "focal": lambda z, t, n, late: focal(z, t),
    "ldam-drw": ldam,
    "ride": ride,
    "sade": lambda z, t, n, late: np.mean([cross_entropy(z[0], t), cross_entropy(z[1] + shares(n), t), cross_entropy(z[2] + shares(n) - 2 * shares(turned(n)), t)])}
COUNTS = st.lists(st.sampled_from([1, 1, 1, 2, 7, 60, 3000]), min_size=1, max_size=6)


def problem(seed, name, counts, experts, size, soft, dtype):
    rng, E, B, C = np.random.default_rng(seed), 3 if name == "sade" else experts, int(seed % 4) + 1, len(counts)
    z = torch.tensor(rng.uniform(-1, 1, (E, B, C)) * 10 ** rng.uniform(-2, size, (E, B, 1))).to(dtype)
    if seed % 3 == 0: z = (10 ** size * z.sign()).to(dtype)                     # everything at the ends
    t = rng.dirichlet(np.full(C, 0.3), B) if soft else np.eye(C)[rng.integers(0, C, B)]
    targets = torch.tensor(t).float() if soft else torch.tensor(t.argmax(1))
    return z, targets, (targets.double().numpy() if soft else t)


def test_every_loss_has_its_reference(): assert set(REFERENCE) == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
@fuzz(50)
@given(SEED, COUNTS, st.integers(1, 4), st.sampled_from([0, 2, 4]), st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@example(0, [1, 1], 3, 4, False, True, torch.float32)
@example(3, [3000, 1], 3, 4, False, True, torch.float16)
def test_losses_and_gradients_are_finite_and_right(name, seed, counts, experts, size, soft, late, dtype):
    z, targets, t = problem(seed, name, counts, experts, size, soft, dtype)
    loss = make_loss(name, counts, num_experts=len(z))
    if hasattr(loss, "progress"): loss.progress = float(late)
    leaf = (z[0] if len(z) == 1 and seed % 2 else z).clone().requires_grad_()   # one model may come as (B, C)
    value = loss(leaf, targets)
    value.backward()
    expected = REFERENCE[name](z.double().numpy(), t, np.array(counts, float), late)
    assert value.shape == () and value.dtype == torch.float32 and leaf.grad.isfinite().all()
    assert value.item() == pytest.approx(expected, rel=2e-4, abs=2e-4 * max(1, 10 ** size / 100))
    if name != "ride" and dtype == torch.float32:
        assert leaf.grad.sum(-1).abs().max() < 1e-4, "the same number on all logits of an image changes nothing"
        if expected > 0.1 and len(counts) > 1: assert leaf.grad.abs().max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_losses_are_the_slopes_of_the_references(name):
    "Where the reference is smooth; RIDE's bonus holds the mean of the experts still."
    z, targets, t = problem(4, name, [60, 7, 1], 3, 0.5, True, torch.float32)
    loss, n = make_loss(name, [60, 7, 1], num_experts=3), np.array([60., 7, 1])
    leaf = z.clone().requires_grad_()
    loss(leaf, targets).backward()
    base, h = z.double().numpy(), 1e-5
    held = dict(held=base) if name == "ride" else {}
    for place in np.ndindex(base.shape):
        up, down = base.copy(), base.copy()
        up[place] += h; down[place] -= h
        slope = (REFERENCE[name](up, t, n, False, **held) - REFERENCE[name](down, t, n, False, **held)) / (2 * h)
        assert leaf.grad[place].item() == pytest.approx(slope, abs=2e-5), place


# ---- several experts, one answer

@fuzz(60)
@given(SEED, st.integers(1, 5), st.integers(1, 4), st.integers(1, 7), st.sampled_from([-1, 1, 4]), st.sampled_from(["mean", "product"]), st.booleans())
def test_combined_rows_sum_to_1(seed, E, B, C, size, how, weighted):
    rng = np.random.default_rng(seed)
    z = torch.tensor(rng.uniform(-1, 1, (E, B, C)) * 10. ** size)
    weights = (rng.random(E) + 0.01).tolist() if weighted else None
    w = np.array(weights if weighted else [1.] * E)[:, None, None] / np.sum(weights if weighted else E)
    probs = combine_logits(z.float(), how, weights)
    z = z.float().double().numpy()
    expected = (w * np.exp(log_softmax(z))).sum(0) if how == "mean" else np.exp(log_softmax((w * z).sum(0)))
    assert probs.shape == (B, C) and (probs >= 0).all()
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(probs, expected, atol=2e-3 if size == 4 else 1e-5)


# ---- mixing: any image, any grid

def build(name, C, seed, cells, smoothing, counts):
    kw = dict(mixsss=dict(cells=cells, per_image=bool(seed % 2), diagonal=-float("inf"))).get(name, {})
    S = torch.rand(C, C, generator=torch.Generator().manual_seed(seed))
    return make_mixing(name, C, S, torch.Generator().manual_seed(seed), cls_num_list=counts, label_smoothing=smoothing, **kw)


@pytest.mark.parametrize("name", MIXINGS)
@fuzz(50)
@given(SEED, st.integers(1, 6), st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 33), st.integers(1, 33), st.integers(1, 12), st.sampled_from([0., 0.1]))
@example(1, 4, [9, 1, 1], 1, 1, 12, 0.1)
@example(2, 3, [9, 1, 1], 7, 31, 5, 0.)
def test_mixing_keeps_range_and_pays_by_pixels(name, seed, batch, counts, height, width, cells, smoothing):
    C, draws = len(counts), MIXINGS[name].draws
    targets = torch.randint(C, (batch * draws,), generator=torch.Generator().manual_seed(seed))
    colours = torch.eye(C)[targets][:, :, None, None].expand(-1, -1, height, width)    # an image of class c is 1 in channel c, 0 elsewhere
    mixed, labels = build(name, C, seed, cells, smoothing, counts)(colours, targets)
    assert mixed.shape == (batch, C, height, width) and 0 <= mixed.min() and mixed.max() <= 1 + 1e-6
    torch.testing.assert_close(mixed.sum(1), torch.ones(batch, height, width))          # each pixel is paid once
    if labels.dim() == 1: labels = torch.eye(C)[labels]
    torch.testing.assert_close(labels.sum(1), torch.ones(batch))
    pixels = mixed.double().mean((2, 3)).float()
    if name == "remix":                                                                 # as the pixels, or all for the class that is three times rarer and larger in the picture
        for row, share in zip(pixels.tolist(), labels.tolist()):
            a, b = np.argsort(row)[::-1][:2] if C > 1 else (0, 0)
            whole = row[b] > 0 and row[a] > 0.5 and counts[b] >= 3 * counts[a]
            paid = np.eye(C)[a] if whole else np.array(row)
            if abs(row[a] - 0.5) > 1e-6: np.testing.assert_allclose(share, (1 - smoothing) * paid + smoothing / C, atol=1e-5)
    else: torch.testing.assert_close(labels, (1 - smoothing) * pixels + smoothing / C, atol=1e-5, rtol=0)

    noise = torch.rand(batch * draws, 2, height, width, generator=torch.Generator().manual_seed(seed)) * 4 - 2
    mixed = build(name, C, seed, cells, smoothing, counts)(noise, targets)[0]
    assert (mixed >= noise.amin(0) - 1e-6).all() and (mixed <= noise.amax(0) + 1e-6).all()
    if name in ("mixsss", "cutmix", "cmo"): assert (mixed[:, None] == noise[None]).any(1).all(), "every value is somebody's"
    if name == "none": assert mixed.equal(noise)


@pytest.mark.parametrize("name, given_away, tolerance", [
    ("none", 0., 0.), ("mixup", 0.5, 0.04), ("remix", 0.5, 0.04), ("mixsss", 0.5, 0.04), ("cutmix", 0.5 - 0.2 + 1 / 48, 0.04), ("cmo", (0.5 - 0.2 + 1 / 48) / 2, 0.04)])
def test_each_mixing_gives_away_as_much_as_its_formula_says(name, given_away, tolerance):
    "Two classes in two colours; how much of an image is the other's, over 600 steps. A box of area u anywhere, cut at the border, keeps (√u − u / 4)² on average."
    draws, mixing = MIXINGS[name].draws, build(name, 2, 0, 8, 0., [5, 5])
    targets = torch.tensor([0, 1] if draws == 1 else [0, 0, 1, 1])
    colours = targets[:, None, None, None].expand(-1, 1, 64, 64).float()
    other = np.mean([mixing(colours, targets)[0][0].mean().item() for _ in range(600)])
    assert abs(other - given_away) <= tolerance


# ---- samplers: every class, and nothing outside

@pytest.mark.parametrize("name", SAMPLERS)
@fuzz(25)
@given(SEED, st.lists(st.integers(1, 25), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_samplers_draw_every_class_as_often_as_promised(name, seed, counts, order):
    targets = [c for c, k in enumerate(counts) for _ in range(k)]
    order.shuffle(targets)
    size = np.array(counts) / len(targets)
    shares = {"instance": size, "class": np.full(len(size), 1 / len(size)), "sqrt": size ** 0.5 / (size ** 0.5).sum(), "progressive": (size + 1 / len(size)) / 2}[name]
    n = max(600, int(np.ceil(30 / shares.min())))                               # to miss a class then has a chance of about e^-30
    drawn = index_stream(name, targets, n, seed)
    assert len(drawn) == n and 0 <= drawn.min() and drawn.max() < len(targets)
    found = np.bincount(np.array(targets)[drawn], minlength=len(counts))
    assert found.min() > 0 and (abs(found - n * shares) <= 6 * np.sqrt(n * shares) + 1).all()
    np.testing.assert_allclose(sampling_prior(name, counts, 0.5), shares)
    if name == "instance" and n >= len(targets): assert len(set(drawn[:len(targets)].tolist())) == len(targets)


# ---- metrics against scikit-learn, with classes that are empty or never answered

@st.composite
def confusions(draw):
    C = draw(st.integers(1, 7))
    m = np.array(draw(st.lists(st.lists(st.sampled_from([0, 0, 1, 2, 9]), min_size=C, max_size=C), min_size=C, max_size=C)))
    for c in draw(st.sets(st.integers(0, C - 1), max_size=2)): m[c] = 0          # no test images
    for c in draw(st.sets(st.integers(0, C - 1), max_size=2)): m[:, c] = 0       # never answered
    return m


def same(ours, theirs): assert (ours is None or np.isnan(ours)) if np.isnan(theirs) else ours == pytest.approx(theirs, abs=1e-12), (ours, theirs)


@fuzz(100)
@given(confusions(), SEED)
@example(np.array([[3]]), 0)
@example(np.array([[0, 4], [0, 0]]), 0)
@example(np.array([[0, 0], [5, 0]]), 1)
def test_metrics_are_scikit_learns(confusion, seed):
    C, rng = len(confusion), np.random.default_rng(seed)
    if confusion.sum() == 0: return same(confusion_metrics(confusion)["acc1"], np.nan)
    targets, preds = (i.repeat(confusion.flatten()) for i in np.indices((C, C)).reshape(2, -1))
    order = rng.permutation(len(targets))
    targets, preds = targets[order], preds[order]
    groups = rng.choice(["many", "medium", "few"], C)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                         # their remarks on classes without images, the very case here
        np.testing.assert_array_equal(confusion_matrix(preds, targets, C), sk.confusion_matrix(targets, preds, labels=range(C)))
        recall = sk.recall_score(targets, preds, labels=range(C), average=None, zero_division=np.nan)
        theirs = {"acc1": sk.accuracy_score(targets, preds), "mean_per_class_recall": sk.balanced_accuracy_score(targets, preds),
                  "macro_f1": sk.f1_score(targets, preds, average="macro"), "kappa": sk.cohen_kappa_score(targets, preds, labels=range(C)),
                  "worst_class": min(recall[~np.isnan(recall)])}
        for g in ("many", "medium", "few"):
            there = [c for c in range(C) if groups[c] == g and (targets == c).any()]
            theirs[g] = sk.recall_score(targets, preds, labels=there, average="macro") if there else np.nan
    probs = 0.4 * rng.dirichlet(np.ones(C), len(preds)) + 0.6 * np.eye(C)[preds]  # the answer stays where it is
    for ours in (confusion_metrics(confusion, groups), compute_metrics(probs, targets, groups)):
        for name, value in theirs.items(): same(ours[name], value)
        for a, b in zip(ours["per_class_recall"], recall, strict=True): same(a, b)
    for function, name in ((accuracy, "acc1"), (mean_per_class_recall, "mean_per_class_recall"), (macro_f1, "macro_f1"), (cohen_kappa, "kappa")):
        same(function(confusion), theirs[name])
    np.testing.assert_allclose(per_class_recall(confusion), recall)


# ---- splits and profiles

CLASS_SIZES = st.lists(st.integers(1, 30), min_size=2, max_size=6)


@fuzz(80)
@given(CLASS_SIZES, st.floats(0, 0.49), st.floats(0, 0.49), SEED)
def test_a_split_is_a_partition_with_every_class_in_training(sizes, val, test, seed):
    targets = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    parts = stratified_split(targets, val, test, seed % 1000)
    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(targets)))
    for c, n in enumerate(sizes):
        got = {name: int((targets[part] == c).sum()) for name, part in parts.items()}
        assert got["train"] >= 1 and (val > 0 or got["val"] == 0) and (test > 0 or got["test"] == 0)
        if n >= 3: assert got["val"] >= (val > 0) and got["test"] >= (test > 0)
        if n >= 3: assert abs(got["val"] - n * val) <= 1 and abs(got["test"] - n * test) <= 1, "the shares that were asked for"
    published = published_split(len(targets) + 20, 0.2, seed % 1000)
    np.testing.assert_array_equal(np.sort(np.concatenate(list(published.values()))), np.arange(len(targets) + 20))


@fuzz(100)
@given(st.integers(1, 3000), st.integers(2, 60), st.sampled_from(IMB_TYPES), st.floats(0.001, 1))
def test_profiles_never_grow(img_max, C, imb_type, imb_factor):
    n = np.array(img_num_per_cls(img_max, C, imb_type, imb_factor))
    assert len(n) == C and n[0] == img_max and (np.diff(n) <= 0).all() and n[-1] >= (0 if imb_type != "none" else img_max)
    if imb_type != "none": assert abs(n[-1] - img_max * imb_factor) < 1 + 1e-9
    if imb_type == "exp": assert (abs(n - img_max * imb_factor ** np.linspace(0, 1, C)) < 1 + 1e-9).all()


@fuzz(60)
@given(st.integers(2, 6), st.integers(12, 30), st.sampled_from(["exp", "step"]), st.floats(0.2, 1), st.sampled_from(ORDERS), st.integers(0, 99))
def test_thinning_follows_the_profile_and_leaves_validation_and_test_alone(C, size, imb_type, imb_factor, order, seed):
    targets, names = np.tile(np.arange(C), size), [f"class {c}" for c in range(C)]
    whole = longtail_split(targets, names, split_seed=seed, seed=seed)
    thin = longtail_split(targets, names, imb_type, imb_factor, order=order, split_seed=seed, seed=seed)
    assert set(thin.train) <= set(whole.train)
    np.testing.assert_array_equal(thin.val, whole.val); np.testing.assert_array_equal(thin.test, whole.test)
    assert not set(thin.train) & (set(thin.val) | set(thin.test)) and not set(thin.val) & set(thin.test)
    np.testing.assert_array_equal(thin.cls_num_list, np.bincount(targets[thin.train], minlength=C))
    profile = np.array(thin.cls_num_list)[class_order(whole.cls_num_list, order, seed)]
    assert profile.tolist() == img_num_per_cls(len(whole.train) // C, C, imb_type, imb_factor)
