"""A second real data set, AID: 30 classes, naturally imbalanced, names in CamelCase.

The images may not be redistributed, so these tests read a copy that lies beside the repository, and skip where there is none.
"""
from pathlib import Path

import numpy as np
import pytest

from dmrs_nb.clip import encode_images, encode_text, load_clip, zero_shot_logits
from dmrs_nb.data import DATASETS, class_words, decode, eval_batches, eval_transform, load_items
from dmrs_nb.longtail import longtail_split, shot_groups, shot_thresholds

AID = Path(__file__).resolve().parents[2] / "shared" / "data" / "aid"
pytestmark = pytest.mark.skipif(not AID.is_dir(), reason="AID is research-only and not shipped: expected a copy in ../shared/data/aid")


@pytest.fixture(scope="module")
def items(): return load_items("aid", AID)


def test_folder_names_become_words(items):
    words = dict(zip(items.classnames, class_words(items.classnames, DATASETS["aid"].words)))
    assert len(set(words.values())) == 30
    assert words["BaseballField"] == "baseball field" and words["SparseResidential"] == "sparse residential" and words["StorageTanks"] == "storage tanks"
    assert not [w for w in words.values() if w != w.lower()]


def test_a_naturally_imbalanced_set_keeps_its_tail_or_asks_for_an_order(items):
    as_it_is = longtail_split(items.targets, items.classnames)
    available = np.bincount(items.targets)
    assert np.abs(np.array(as_it_is.cls_num_list) - 0.7 * available).max() <= 1.5
    with pytest.raises(ValueError, match="training images, but .* are asked for"): longtail_split(items.targets, items.classnames, "exp", 0.5)
    tail = longtail_split(items.targets, items.classnames, "exp", 0.05, order="size")
    assert max(tail.cls_num_list) / min(tail.cls_num_list) == pytest.approx(20, rel=0.1)
    assert list(np.argsort(-available, kind="stable")) == list(np.argsort(-np.array(tail.cls_num_list), kind="stable"))


def test_zero_shot_knows_the_images_it_was_pretrained_on(items, tmp_path):
    clip = load_clip()
    cache = decode(items, clip.preprocess, cache_dir=tmp_path, progress=False)
    assert len(cache) == len(items) and not cache.bad
    some = np.arange(0, len(items), 50)
    text = encode_text(clip, class_words(items.classnames, DATASETS["aid"].words), cache_dir=tmp_path)
    features = encode_images(clip, eval_batches(cache, some, 100, eval_transform(clip.preprocess)))
    accuracy = (zero_shot_logits(features, text, clip.logit_scale).argmax(1).numpy() == items.targets[some]).mean()
    assert accuracy > 0.6, f"the model card records 72 % on held-out AID images, found {accuracy:.1%}"


def test_it_reports_groups_that_all_exist(items):
    counts = longtail_split(items.targets, items.classnames).cls_num_list
    many, few, reason = shot_thresholds(counts, DATASETS["aid"].thresholds)
    assert {"many", "medium", "few"} == set(shot_groups(counts, many, few)), reason
