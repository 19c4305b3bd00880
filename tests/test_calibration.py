"Temperature and priors against exact posteriors and independent implementations; and every file that a person may write."
import json
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import norm

from dmrs_nb.calibration import calibrated, estimate_prior, fit_temperature, negative_log_likelihood, read_prior, shift_prior

CLASSES = ["baseballdiamond", "harbor", "river"]
CENTRES, HERE, THERE = np.array([-1.0, 0.0, 1.5]), np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])


def world(shares, n=4000, seed=0):
    "Points of three Gaussians, their classes, and the log-likelihood of each class."
    rng = np.random.default_rng(seed)
    y = rng.choice(3, n, p=shares)
    x = rng.normal(CENTRES[y])
    return norm.logpdf(x[:, None], CENTRES), torch.as_tensor(y)


def posterior(loglik, shares):
    p = np.exp(loglik) * shares
    return p / p.sum(1, keepdims=True)


def test_a_moved_prior_is_the_exact_posterior_of_the_other_place():
    loglik, _ = world(THERE)
    moved = shift_prior(posterior(loglik, HERE), HERE, THERE)
    np.testing.assert_allclose(moved, posterior(loglik, THERE), atol=1e-6)
    logits = 3 * (loglik + np.log(HERE)) + 7.0   # too sure by a factor of three, and a constant that means nothing
    np.testing.assert_allclose(calibrated(logits, 3.0, HERE, THERE), posterior(loglik, THERE), atol=1e-6)


def test_each_expert_is_moved_from_its_own_prior():
    loglik, _ = world(THERE, 50)
    priors = np.array([HERE, THERE, [1 / 3] * 3])
    logits = np.stack([loglik + np.log(p) for p in priors])
    np.testing.assert_allclose(calibrated(logits, effective=priors, target=THERE), posterior(loglik, THERE), atol=1e-6)
    naive = shift_prior(torch.as_tensor(logits).softmax(-1), priors, THERE).mean(0)
    np.testing.assert_allclose(calibrated(logits, effective=priors, target=THERE), naive, atol=1e-6)
    assert np.abs(calibrated(logits, effective=priors[0], target=THERE).numpy() - naive.numpy()).max() > 0.05, "one prior for all would be another answer"


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_temperature_is_found_although_validation_has_other_shares_than_training(true):
    loglik, y = world([1 / 3] * 3)
    logits = true * (loglik + np.log(HERE))
    assert fit_temperature(logits, y, effective=HERE) == pytest.approx(true, rel=0.08)
    assert fit_temperature(logits, y) > 1.15 * fit_temperature(logits, y, effective=HERE), "as trained it also pays for the prior"


def test_temperature_is_the_minimum_of_an_independent_search():
    rng = np.random.default_rng(1)
    logits, y = rng.normal(size=(2, 60, 3)) * 4, rng.integers(3, size=60)
    logits[:, np.arange(60), y] += 3
    def cost(T):
        e = np.exp(logits / T - (logits / T).max(-1, keepdims=True))
        p = np.clip((e / e.sum(-1, keepdims=True)).mean(0)[np.arange(60), y], 1e-12, 1 - 1e-12)
        return np.mean(-(61 / 62) * np.log(p) - (1 / 62) * np.log(1 - p))
    tried = np.geomspace(0.2, 10, 4000)
    assert fit_temperature(logits, y) == pytest.approx(tried[np.argmin([cost(T) for T in tried])], rel=0.01)
    assert fit_temperature(2 * logits, y) == pytest.approx(2 * fit_temperature(logits, y), rel=0.01)


def test_right_answers_never_promise_certainty():
    y = torch.arange(12) % 3
    logits = 30.0 * torch.eye(3)[y]
    p = calibrated(logits, fit_temperature(logits, y))[torch.arange(12), y]
    assert p.min() == pytest.approx(13 / 14, abs=0.01)
    assert negative_log_likelihood(calibrated(logits), y) < 1e-6, "without it they would"


def test_too_few_images_leave_the_temperature_at_one_and_say_so():
    with pytest.warns(UserWarning, match="5 validation images for 3 classes are too few"): assert fit_temperature(torch.randn(5, 3), torch.zeros(5)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_temperature(torch.randn(6, 3), torch.arange(6) % 3)


@pytest.mark.parametrize("form", [np.asarray, lambda x: torch.as_tensor(x).half(), lambda x: torch.as_tensor(x).double()])
def test_rows_are_probabilities_whatever_the_numbers_come_in(form):
    p = calibrated(form(np.random.default_rng(0).normal(size=(2, 40, 3)) * 20), 0.5, [HERE, THERE], [0, 1, 3])
    assert p.shape == (40, 3) and p.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(p.sum(1), torch.ones(40, dtype=p.dtype))
    assert (p[:, 0] == 0).all() and (p[:, 1:] > 0).any(), "a class that does not occur there is never answered"


def test_gradients_flow_through():
    logits = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: calibrated(z, 1.7, torch.arange(1, 5), [4, 3, 2, 1]), logits)


def test_estimate_repeats_an_independent_em_and_finds_the_shares():
    loglik, y = world(THERE)
    p, shares = posterior(loglik, HERE), HERE.copy()
    for _ in range(3000):   # Saerens et al., written anew
        q = p * shares / HERE
        shares = (q / q.sum(1, keepdims=True)).mean(0)
    found = estimate_prior(p, HERE, smooth=0)
    np.testing.assert_allclose(found, shares, atol=1e-3)
    np.testing.assert_allclose(found, np.bincount(y) / len(y), atol=0.05)
    cautious = estimate_prior(p, HERE)
    assert np.abs(cautious - 1 / 3).max() < np.abs(found - 1 / 3).max() and cautious.argmax() == 2, "imagined images pull to the middle"
    np.testing.assert_allclose(estimate_prior(np.empty((0, 3)), HERE), HERE)


@pytest.mark.parametrize("name, text", [
    ("p.json", '{"harbor": 6, "river": 2, "baseballdiamond": 0}'), ("p.yaml", "harbor: 0.75\nriver: 0.25\nbaseball diamond: 0\n"),
    ("p.yml", "{harbor: 3, river: 1, baseballdiamond: 0}"), ("p.csv", "class,share\nharbor,3\nriver,1\nbaseballdiamond,0\n"),
    ("p.csv", "\ufeffharbor;3\nriver;1\nbaseball diamond;0\n"), ("p.TXT", "harbor\t3\n\nriver\t1\nbaseballdiamond\t0"),
    ("p.csv", 'class, count\n"harbor", 3\nriver, 1\nbaseballdiamond, 0')])
def test_a_prior_is_read_from_what_people_write(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    words = ["baseball diamond", "harbor", "river"]
    np.testing.assert_allclose(read_prior(tmp_path / name, CLASSES, [8, 1, 1], words), [0, 0.75, 0.25])


@pytest.mark.parametrize("name, text, says", [
    ("p.json", "[1, 2, 3]", "found list"), ("p.json", "{", "expected JSON"), ("p.yaml", "a: [", "expected YAML"), ("p.json", '{"harbor": 1}', "no share for baseballdiamond, river"),
    ("p.json", '{"harbour": 1, "river": 1, "baseballdiamond": 1}', "did you mean 'harbor'"), ("p.json", '{"harbor": -1, "river": 1, "baseballdiamond": 1}', "harbor has -1"),
    ("p.json", '{"harbor": NaN, "river": 1, "baseballdiamond": 1}', "harbor has nan"), ("p.json", '{"harbor": null, "river": 1, "baseballdiamond": 1}', "is None, expected a number"),
    ("p.csv", "harbor,0\nriver,0\nbaseballdiamond,0", "all shares are 0"), ("p.csv", "harbor,many\nriver,0\nbaseballdiamond,0", "'many', expected a number"),
    ("p.csv", "harbor,1\nharbor,2", "given twice"), ("p.csv", "harbor,1,2", "two columns"), ("p.csv", "", "no share for"), ("p.xls", "harbor,1", "found .xls"), ("p.json", b"\xff\xfe\x00", "no UTF-8")])
def test_a_prior_that_cannot_be_meant_is_refused_and_the_file_named(tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="p\\.") as e: read_prior(str(tmp_path / name), CLASSES, [8, 1, 1])
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("given", ["nowhere.json", "x" * 5000, "a\0b", "", {1: 2}, 3, [[1, 2, 3]], object(), ["a", "b", "c"], {}])
def test_what_is_no_prior_is_a_sentence(given):
    with pytest.raises(ValueError, match="prior: "): read_prior(given, CLASSES, [8, 1, 1])


@pytest.mark.parametrize("call, says", [
    (lambda z: calibrated(z, -1), "temperature: found -1"), (lambda z: calibrated(z, math.nan), "temperature: found nan"), (lambda z: calibrated(z, 1, HERE), "give both"),
    (lambda z: calibrated(z[0, 0]), "expected (E, N, C)"), (lambda z: calibrated(z, 1, np.ones((3, 3)), HERE), "each of 2 experts"),
    (lambda z: calibrated(z, 1, [0, 1, 1], HERE), "effective: expected shares above 0"), (lambda z: calibrated(z, 1, HERE, [0, 0, 0]), "target: expected no negative share")])
def test_mistakes_name_the_argument(call, says):
    with pytest.raises(ValueError) as e: call(torch.zeros(2, 5, 3))
    assert says in str(e.value)


def test_a_prior_in_a_file_means_what_the_same_numbers_mean(tmp_path):
    (tmp_path / "shares.json").write_text(json.dumps(dict(zip(CLASSES, THERE))))
    np.testing.assert_allclose(read_prior(tmp_path / "shares.json", CLASSES, [1, 1, 1]), read_prior(THERE, CLASSES, [1, 1, 1]))
    np.testing.assert_allclose(read_prior("train", CLASSES, [7, 2, 1]), HERE)
