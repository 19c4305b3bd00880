"Heads and second-stage classifiers against plain loops, torch's own layers, and written-down gradients."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from dmrs_nb.classifiers import (HEADS, TAUS, CosineHead, LinearHead, choose_tau, first_weights, make_head, mean_recall, posthoc_bias,
                                 retrain_classifier, tau_normalise, tau_recalls)
from dmrs_nb.sampling import make_sampler

C, D = 5, 8


def seeded(seed=0): return torch.Generator().manual_seed(seed)
def unit(*shape, seed=0): return F.normalize(torch.randn(*shape, generator=seeded(seed)), dim=-1)


@pytest.fixture
def tail():
    "Features that lie around one direction a class, 20 images down to 2."
    targets = torch.arange(C).repeat_interleave(torch.tensor([20, 12, 7, 4, 2]))
    return F.normalize(unit(C, D)[targets] + 0.3 * torch.randn(len(targets), D, generator=seeded(1)), dim=-1), targets


@pytest.mark.parametrize("shape", [(4, D), (3, 4, D)])
def test_linear_head_is_nn_linear_on_scaled_features(shape):
    head, layer, x = LinearHead(unit(C, D), 12.5), nn.Linear(D, C), unit(*shape, seed=2)
    with torch.no_grad(): head.bias.normal_(generator=seeded(3)); layer.weight.copy_(head.weight); layer.bias.copy_(12.5 * head.bias)
    torch.testing.assert_close(head(x), layer(12.5 * x))
    assert head(x).shape == (*shape[:-1], C)


@pytest.mark.parametrize("shape", [(4, D), (3, 4, D)])
def test_cosine_head_is_a_loop_of_cosines(shape):
    text, x = unit(C, D) * torch.arange(1., C + 1)[:, None], unit(*shape, seed=2)
    rows = x.reshape(-1, D).double().numpy()
    naive = np.array([[7. * f @ w / math.sqrt(w @ w) for w in text.double().numpy()] for f in rows]).reshape(*shape[:-1], C)
    np.testing.assert_allclose(CosineHead(text, 7.)(x).detach().numpy(), naive, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_heads_begin_as_zero_shot_and_linear_part_makes_their_logits(name):
    text, x = unit(C, D), unit(6, D, seed=2)
    head = make_head(name, text, 30.)
    torch.testing.assert_close(head(x), 30 * x @ text.T)
    with torch.no_grad():
        for p in head.parameters(): p.add_(0.3 * torch.randn(p.shape, generator=seeded(4)))
    weight, bias = head.linear_part()
    assert weight.shape == (C, D) and bias.shape == (C,)
    torch.testing.assert_close(x @ weight.T + bias, head(x))
    assert not torch.equal(head.weight, text), "the text features themselves may not be trained"


def test_gradients_are_the_written_ones(tail):
    x, t = tail
    for head in (LinearHead(unit(C, D), 4.), CosineHead(2 * unit(C, D), 4.)):
        F.cross_entropy(head(x), t).backward()
        p = head(x).softmax(-1).detach()
        pull = sum(torch.outer(p[i] - F.one_hot(t[i], C), x[i]) for i in range(len(t))) / len(t)
        if isinstance(head, CosineHead):
            w = head.weight.detach()
            pull = (pull - (pull * w).sum(1, keepdim=True) * w / (w * w).sum(1, keepdim=True)) / w.norm(dim=1, keepdim=True)
            torch.testing.assert_close((head.weight.grad * w).sum(1), torch.zeros(C), atol=1e-6, rtol=0)
        torch.testing.assert_close(head.weight.grad, 4 * pull, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_float32_under_autocast(name):
    head, x = make_head(name, unit(C, D), 25.), unit(6, D, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
        (cosines := head(x.bfloat16())).sum().backward()
    assert logits.dtype == cosines.dtype == head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(logits, head(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", HEADS)
def test_file_round_trip(name, tmp_path):
    head = make_head(name, 3 * unit(C, D, seed=5), 25.)
    head.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["head.safetensors"]
    again = make_head(name, unit(C, D), 25.)
    assert again.load(tmp_path) is again
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), again.state_dict().values()))
    assert all(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("other, sentence", [
    (("linear", unit(C + 1, D), 25.), "weight is (5, 8) there and (6, 8) here"),
    (("linear", unit(C, D), 24.), "scale is 25 there and 24 here"),
    (("cosine", unit(C, D), 25.), "bias is unknown here")], ids=["classes", "scale", "kind"])
def test_a_head_that_does_not_fit_is_refused_and_left_alone(other, sentence, tmp_path):
    LinearHead(3 * unit(C, D), 25.).save(tmp_path)
    head = make_head(*other)
    before = head.weight.detach().clone()
    with pytest.raises(ValueError, match="does not fit") as e: head.load(tmp_path)
    assert sentence in str(e.value) and "head.safetensors" in str(e.value)
    assert torch.equal(head.weight, before)


def test_damaged_and_missing_files(tmp_path):
    head = CosineHead(unit(C, D))
    with pytest.raises(ValueError, match="cannot be read as a classifier"): head.load(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read as a classifier"): head.load(tmp_path)
    save_file({"weight": unit(C, D)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="scale is missing there"): head.load(tmp_path)
    head.save(tmp_path)
    assert set(load_file(tmp_path / "head.safetensors")) == {"weight", "scale"} and not list(tmp_path.glob("*.part"))


def test_unknown_heads_and_scales():
    with pytest.raises(ValueError, match="Did you mean 'cosine'"): make_head("cosin", unit(C, D), 25.)
    for scale in (0., -1., math.inf, math.nan):
        with pytest.raises(ValueError, match="expected a number above 0"): make_head("linear", unit(C, D), scale)
    with pytest.raises(ValueError, match="expected \\(classes, width\\)"): CosineHead(unit(D))


def naive_retrain(f, t, weight, bias, draws, scale, lr, momentum=.9, decay=5e-4):
    "The same training without torch: softmax, its gradient, momentum, decay, cosine."
    v = [0., 0.]
    for k, rows in enumerate(draws):
        z = scale * (f[rows] @ weight.T + bias)
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(rows)), t[rows]] -= 1
        grads = scale * p.T @ f[rows] / len(rows) + decay * weight, scale * p.mean(0) + decay * bias
        v = [momentum * old + g for old, g in zip(v, grads)]
        rate = lr * (1 + math.cos(math.pi * k / len(draws))) / 2
        weight, bias = weight - rate * v[0], bias - rate * v[1]
    return weight, bias


@pytest.mark.parametrize("sampler", ["class", "instance"])
def test_retraining_is_the_loop(tail, sampler):
    (x, t), g = tail, seeded(7)
    start = first_weights(C, D, g)
    draws = np.array(list(make_sampler(sampler, t, 25 * 16, g))).reshape(25, 16)
    weight, bias = naive_retrain(x.double().numpy(), t.numpy(), start["weight"].double().numpy(), start["bias"].double().numpy(), draws, 10.,
                                 .2 * 16 / 512)
    state = retrain_classifier(x, t, C, 25, 16, sampler=sampler, scale=10., generator=seeded(7))
    np.testing.assert_allclose(state["weight"].numpy(), weight, atol=2e-5)
    np.testing.assert_allclose(state["bias"].numpy(), bias, atol=2e-5)


def test_retraining_depends_on_its_generator_alone(tail):
    x, t = tail
    run = lambda seed: retrain_classifier(x, t, C, 5, 8, generator=None if seed is None else seeded(seed))["weight"]
    torch.manual_seed(1); a = run(None); state = torch.get_rng_state()
    torch.manual_seed(2); b = run(None)
    assert torch.equal(a, b) and torch.equal(a, run(0)) and not torch.equal(a, run(1))
    torch.manual_seed(1); run(3)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is not touched"


def test_rate_times_scale_squared_is_what_counts(tail):
    x, t = tail
    zero = dict(weight=torch.zeros(C, D), bias=torch.zeros(C))
    a = retrain_classifier(x, t, C, 20, 16, lr=.4, scale=5., weight_decay=1e-3, start=zero)
    b = retrain_classifier(x, t, C, 20, 16, lr=.1, scale=10., weight_decay=4e-3, start=zero)
    for k in a: torch.testing.assert_close(5 * a[k], 10 * b[k], rtol=1e-4, atol=1e-5)
    c = retrain_classifier(x, t, C, 1, 32, lr=.2, start=zero, momentum=0., weight_decay=0., sampler="class")
    d = retrain_classifier(x, t, C, 1, 32, lr=.4, start=zero, momentum=0., weight_decay=0., sampler="class")
    torch.testing.assert_close(2 * c["weight"], d["weight"])   # one step from zero is linear in the rate


def test_start_is_not_changed_and_no_steps_of_rate_zero_move_nothing(tail):
    x, t = tail
    start = dict(weight=unit(C, D), bias=torch.ones(C))
    state = retrain_classifier(x, t, C, 3, 8, lr=0., start=start)
    assert all(torch.equal(state[k], start[k]) for k in start) and state["weight"] is not start["weight"]
    head = LinearHead(unit(C, D), 25.)
    head.load_state_dict(retrain_classifier(x, t, C, 3, 8, start=start))
    assert torch.equal(start["bias"], torch.ones(C))


def test_balanced_draws_help_rare_classes(tail):
    x, t = tail
    test = F.normalize(unit(C, D).repeat_interleave(40, 0) + 0.3 * torch.randn(40 * C, D, generator=seeded(9)), dim=-1)
    truth = torch.arange(C).repeat_interleave(40)
    def rare(sampler):
        head = LinearHead(unit(C, D), 5.)
        head.load_state_dict(retrain_classifier(x, t, C, 60, 32, scale=5., sampler=sampler))
        return (head(test).argmax(-1) == truth)[truth == C - 1].float().mean()
    assert rare("class") > rare("instance") + .1


def test_retraining_refuses(tail):
    x, t = tail
    for args, sentence in [((x[t != 2], t[t != 2], C), "class 2 has no image"), ((x, t, C + 1), "class 5 has no image"),
                           ((x, t[1:], C), "expected one class for each of 45 rows"), ((x, t, C - 1), "expected 0 … 3"),
                           ((x[None], t, C), "expected \\(images, width\\)"), ((x[:0], t[:0], C), "expected at least one image")]:
        with pytest.raises(ValueError, match=sentence): retrain_classifier(*args, 1, 4)
    with pytest.raises(ValueError, match="Did you mean 'class'"): retrain_classifier(x, t, C, 1, 4, sampler="clas")


def test_tau_normalise():
    w = unit(C, D) * torch.tensor([8., 4., 2., 1., .5])[:, None]
    assert torch.equal(tau_normalise(w, 0), w)
    torch.testing.assert_close(tau_normalise(w, 1), F.normalize(w, dim=1))
    for tau in TAUS:
        naive = np.stack([row / math.sqrt(sum(row * row)) ** tau for row in w.double().numpy()])
        np.testing.assert_allclose(tau_normalise(w, tau).numpy(), naive, rtol=1e-5)
        torch.testing.assert_close(tau_normalise(unit(C, D), tau), unit(C, D))   # unit text features: nothing to divide
    assert tau_normalise(torch.zeros(2, 3), 1.5).tolist() == [[0.] * 3] * 2
    x = unit(7, D, seed=2)
    torch.testing.assert_close(25 * x @ tau_normalise(w, 1).T, CosineHead(w, 25.)(x))


def test_tau_is_chosen_by_the_mean_over_classes_and_of_equals_the_smallest(tail):
    x, t = tail
    w = unit(C, D) * torch.tensor([8., 4., 2., 1., .5])[:, None]
    naive = []
    for tau in TAUS:
        recalls = []
        for c in range(C):
            rows = [i for i in range(len(t)) if t[i] == c]
            recalls.append(sum(int(np.argmax(tau_normalise(w, tau).numpy() @ x[i].numpy())) == c for i in rows) / len(rows))
        naive.append(np.mean(recalls))
    np.testing.assert_allclose(tau_recalls(w, x, t).numpy(), naive, atol=1e-12)
    assert choose_tau(w, x, t) == TAUS[int(np.argmax(np.round(naive, 12)))] > 0
    assert choose_tau(w, x, t, taus=(2., .5, 0.)) in (2., .5, 0.)
    assert choose_tau(unit(C, D), x, t, taus=(2., .5, .3)) == .3
    assert TAUS == pytest.approx(np.linspace(0, 2, 21))
    with pytest.raises(ValueError, match="at least one candidate"): choose_tau(w, x, t, taus=[])
    with pytest.raises(ValueError, match="expected 0 … 3"): choose_tau(w[:4], x, t)


def test_mean_recall_leaves_out_absent_classes():
    assert mean_recall(torch.tensor([0, 0, 3, 1]), torch.tensor([0, 0, 3, 3])).item() == .75
    assert mean_recall(torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 1])).tolist() == [1., 0.]


@pytest.mark.parametrize("tau", [0., .5, 1., 2.])
def test_posthoc_bias(tau):
    counts = [90, 9, 1]
    np.testing.assert_allclose(posthoc_bias(counts, tau), [-tau * math.log(k / 100) for k in counts], rtol=1e-6)
    torch.testing.assert_close(posthoc_bias(torch.tensor(counts), tau), posthoc_bias(np.array(counts), tau))
    assert posthoc_bias(counts, tau).dtype == torch.float32
    assert posthoc_bias([4, 4], tau).diff().item() == 0


def test_posthoc_bias_takes_the_prior_out():
    likelihood, prior = torch.tensor([[.2, .7, .1]]), torch.tensor([.5, .3, .2])
    posterior = likelihood * prior / (likelihood * prior).sum()
    torch.testing.assert_close((posterior.log() + posthoc_bias([5, 3, 2])).softmax(-1), likelihood)
    for counts, sentence in [([3, 0], "class 1 has 0 training images"), ([-1, 2], "class 0 has -1"), ([], "one number per class"),
                             ([[1, 2]], "one number per class")]:
        with pytest.raises(ValueError, match=sentence): posthoc_bias(counts)
