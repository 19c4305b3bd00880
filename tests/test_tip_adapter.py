"dmrs_nb.tip_adapter: loops in NumPy, the authors' search as a loop, gradients by hand, files, and what is refused."
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmrs_nb.tip_adapter import TipAdapter, cache_keys, cache_logits, open_cache, search_grid, tune

C, D, N, B = 3, 8, 12, 5


def close(a, b, eps=1e-5): torch.testing.assert_close(a, b, rtol=0, atol=eps)
def unit(*shape, seed=0): return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


class Encoder(nn.Module):
    "An image encoder whose features have different lengths."
    def __init__(self): super().__init__(); self.weight = torch.randn(3, D, generator=torch.Generator().manual_seed(8))
    def encode_image(self, images, normalize=False):
        x = images.mean((2, 3)) @ self.weight
        return F.normalize(x, dim=-1) if normalize else x


CLIP = SimpleNamespace(model=Encoder(), logit_scale=20., embed_dim=D, device=torch.device("cpu"))
TEXT, KEYS, FEATURES, TARGETS = unit(C, D, seed=1), unit(N, D, seed=2), unit(B, D, seed=3), torch.tensor([0] * 7 + [1] * 3 + [2] * 2)


def tip(**kw): return TipAdapter(CLIP, **(dict(text_features=TEXT, keys=KEYS, targets=TARGETS, num_classes=C) | kw))


def loops(f, text, keys, y, scale, alpha, beta):
    z = np.zeros((len(f), len(text)))
    for b in range(len(f)):
        for c in range(len(text)): z[b, c] = scale * sum(f[b] * text[c])
        for n in range(len(keys)): z[b, y[n]] += alpha * math.exp(-beta * (1 - sum(f[b] * keys[n])))
    return z


@pytest.mark.parametrize("alpha, beta", [(1., 5.5), (0.3, 1.), (7., 40.)])
def test_parity_with_three_loops(alpha, beta):
    slow = loops(*(t.double().numpy() for t in (FEATURES, TEXT, KEYS)), TARGETS.tolist(), 20., alpha, beta)
    close(tip(alpha=alpha, beta=beta).classify(FEATURES).double(), torch.tensor(slow), 1e-4)


def test_no_cache_is_zero_shot():
    close(tip(alpha=0.).classify(FEATURES), 20. * FEATURES @ TEXT.T)
    close(tip(alpha=0., trainable=True).classify(FEATURES), 20. * FEATURES @ TEXT.T)


def test_a_sharp_vote_is_the_nearest_neighbour():
    model = tip(alpha=1e4, beta=1e6)
    assert torch.equal(model.classify(KEYS).argmax(-1), TARGETS)
    close(model.parts(KEYS)[1], F.one_hot(TARGETS, C).float(), 0.35)      # float32: 1 - cosine of a copy is not always 0
    double = cache_logits(KEYS.double(), KEYS.double(), F.one_hot(TARGETS, C).double(), 1e9)
    assert torch.equal(double.argmax(-1), TARGETS)


def test_a_flat_vote_counts_images():
    close(cache_logits(FEATURES, KEYS, F.one_hot(TARGETS, C).float(), 1e-6), torch.tensor([[7., 3., 2.]]).expand(B, -1), 1e-3)


def test_order_of_the_cache_does_not_matter():
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    close(tip(keys=KEYS[order], targets=TARGETS[order]).classify(FEATURES), tip().classify(FEATURES))


def test_scale_and_alpha_go_together():
    ours, hundred = tip(alpha=0.7), tip(alpha=0.7 * 100 / 20.)
    hundred.logit_scale = 100.
    close(5 * ours.classify(FEATURES), hundred.classify(FEATURES), 1e-4)


# gradients and training

def test_gradient_reaches_keys_alone_and_is_the_one_by_hand():
    model = tip(alpha=2., beta=3., trainable=True)
    assert model.trainable_parameters() == {"keys": N * D} and tip().trainable_parameters() == {}
    model.classify(FEATURES)[1, 2].backward()
    weight = 2. * 3. * (-3. * (1 - FEATURES[1] @ KEYS.T)).exp() * (TARGETS == 2)
    close(model.keys.grad, weight[:, None] * FEATURES[1])
    double = [t.double() for t in (FEATURES, KEYS)]
    assert torch.autograd.gradcheck(lambda k: cache_logits(double[0], k, F.one_hot(TARGETS, C).double(), 5.5), double[1].requires_grad_())


def test_a_step_changes_keys_and_nothing_else():
    model = tip(trainable=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    loss = F.cross_entropy(model.classify(KEYS.clone()), TARGETS)
    loss.backward(); optimizer.step()
    assert F.cross_entropy(model.classify(KEYS.clone()), TARGETS) < loss
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])] == ["keys"]
    assert set(before) == {"text_features", "values", "keys", "alpha", "beta"}


def test_the_callers_tensors_stay_as_they_are():
    keys, text = KEYS.clone(), TEXT.clone()
    model = tip(keys=keys, text_features=text, trainable=True)
    with torch.no_grad(): model.keys.zero_(); model.text_features.zero_()
    assert torch.equal(keys, KEYS) and torch.equal(text, TEXT)


def test_lower_precision_around_it_changes_nothing():
    with torch.autocast("cpu", torch.bfloat16): low = tip().classify(FEATURES)
    assert low.dtype == torch.float32 and torch.equal(low, tip().classify(FEATURES))


def test_images_go_through_the_encoder():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    model = tip()
    close(model(images), model.classify(CLIP.model.encode_image(images, normalize=True)))
    assert model(images).shape == (2, C)


# keys

def test_keys_are_the_direction_of_the_mean_of_unnormalised_views():
    rounds = torch.rand(3, N, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    by_hand = torch.stack([CLIP.model.encode_image(r) for r in rounds]).mean(0)
    close(cache_keys(CLIP, (r.split(5) for r in rounds)), by_hand / by_hand.norm(dim=-1, keepdim=True))
    close(cache_keys(CLIP, [[rounds[0]]]), CLIP.model.encode_image(rounds[0], normalize=True))


def test_rounds_have_to_agree():
    images = torch.rand(4, 3, 2, 2)
    with pytest.raises(ValueError, match="found 4 images in the first and 3 in round 2"): cache_keys(CLIP, [[images], [images[:3]]])
    with pytest.raises(ValueError, match="at least one round"): cache_keys(CLIP, [])


# the search

def test_grid_is_the_authors():
    authors = [i * (7 - 0.1) / 200 + 0.1 for i in range(200)]
    close(search_grid(7, 200), torch.tensor(authors))
    with pytest.raises(ValueError, match="found 0.1 and 5"): search_grid(0.1, 5)


@pytest.mark.parametrize("seed", range(4))
def test_tune_ends_where_the_loop_ends(seed):
    features, targets = unit(40, D, seed=10 + seed), torch.randint(0, C, (40,), generator=torch.Generator().manual_seed(seed))
    model, best = tip(), (0., 0., 0.)
    found = tune(model, features, targets, search_scale=(12, 10), search_step=(15, 6))
    for beta in [i * 11.9 / 15 + 0.1 for i in range(15)]:
        for alpha in [i * 9.9 / 6 + 0.1 for i in range(6)]:
            share = (tip(alpha=alpha, beta=beta).classify(features).argmax(-1) == targets).float().mean().item()
            if share > best[0]: best = (share, alpha, beta)                # the first of equals stays
    np.testing.assert_allclose(best, (found["accuracy"], found["alpha"], found["beta"]), rtol=1e-5)
    np.testing.assert_allclose((model.alpha.item(), model.beta.item()), best[1:], rtol=1e-5)
    assert found["grid"].shape == (15, 6) and found["start"] == (tip().classify(features).argmax(-1) == targets).float().mean().item()


def test_tune_changes_alpha_and_beta_alone():
    model = tip(trainable=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tune(model, FEATURES, torch.zeros(B, dtype=torch.long), search_step=(4, 3))
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])} <= {"alpha", "beta"} and model.keys.grad is None


def test_tune_wants_images():
    with pytest.raises(ValueError, match="found 0 and 0, expected validation images"): tune(tip(), FEATURES[:0], TARGETS[:0])
    with pytest.raises(ValueError, match="found 5 and 4"): tune(tip(), FEATURES, TARGETS[:4])


# files

def test_saved_and_opened(tmp_path):
    model = tip(alpha=3., beta=2., trainable=True)
    with torch.no_grad(): model.keys.mul_(1.5)                             # trained keys need not be of unit length
    model.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]
    for again in (tip(trainable=True).load(tmp_path), open_cache(CLIP, tmp_path)): close(again.classify(FEATURES), model.classify(FEATURES), 0)
    assert not open_cache(CLIP, tmp_path).keys.requires_grad and open_cache(CLIP, tmp_path, trainable=True).keys.requires_grad


def test_files_that_do_not_fit(tmp_path):
    tip().save(tmp_path)
    fewer = tip(keys=KEYS[:4], targets=TARGETS[:4])
    with pytest.raises(ValueError, match=r"keys is \(12, 8\) there and \(4, 8\) here.*or open_cache"): fewer.load(tmp_path)
    close(fewer.keys, KEYS[:4], 0)
    other = SimpleNamespace(**{**vars(CLIP), "embed_dim": 4})
    with pytest.raises(ValueError, match=r"found shape \(3, 8\), expected \(3, 4\)"): open_cache(other, tmp_path)
    (tmp_path / "cache.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read as a cache"): open_cache(CLIP, tmp_path)
    with pytest.raises(ValueError, match="cannot be read as a cache"): tip().load(tmp_path / "elsewhere")


def test_a_file_of_something_else(tmp_path):
    from safetensors.torch import save_file
    save_file({"head": torch.zeros(2)}, tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match="has no text_features"): open_cache(CLIP, tmp_path)


@pytest.mark.parametrize("wrong, message", [
    (dict(keys=2 * KEYS), "not of unit length"), (dict(keys=KEYS[:0], targets=TARGETS[:0]), "expected \\(training images, 8\\)"),
    (dict(keys=KEYS[:, :4]), "expected \\(training images, 8\\)"), (dict(targets=TARGETS[:-1]), "one class a key"),
    (dict(targets=TARGETS + 1), "from 1 to 3, expected whole numbers 0…2"), (dict(targets=TARGETS - 1), "expected whole numbers"),
    (dict(targets=TARGETS.float()), "expected whole numbers"), (dict(text_features=TEXT[:2]), "expected \\(3, 8\\)"),
    (dict(alpha=-1.), "expected alpha ≥ 0"), (dict(beta=0.), "and beta > 0"),
])
def test_what_it_refuses(wrong, message):
    with pytest.raises(ValueError, match=message): tip(**wrong)
