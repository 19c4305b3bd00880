"""dmrs_nb.clip: golden parity through every file format, faults, caches under processes."""
import dataclasses
import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dmrs_nb.compat
import open_clip
from dmrs_nb import clip as C
from dmrs_nb.checkpoints import read_state_dict
from dmrs_nb.data import OPENAI_MEAN, OPENAI_STD, Preprocess

GOLDEN = np.load(Path(__file__).parent / "golden" / "golden.npz")
WORDS = ["river", "forest", "parking lot", "beach"]


def golden(key): return torch.from_numpy(GOLDEN[key])


@pytest.fixture(scope="module")
def golden_state(): return {k.removeprefix("model/state/"): golden(k) for k in GOLDEN.files if k.startswith("model/state/")}


@pytest.fixture(scope="module", autouse=True)
def golden_configs(tmp_path_factory):
    "The tiny model of the golden numbers under two names, as open_clip has its QuickGELU models."
    for name, quick_gelu in (("golden-28", False), ("golden-28-quickgelu", True)):
        path = tmp_path_factory.mktemp("configs") / f"{name}.json"
        path.write_text(json.dumps(dict(
            embed_dim=24, quick_gelu=quick_gelu, vision_cfg=dict(image_size=28, layers=2, width=64, head_width=64, patch_size=7),
            text_cfg=dict(context_length=16, vocab_size=64, width=32, heads=2, layers=1))))
        open_clip.add_model_config(path)


@pytest.fixture(scope="module")
def tiny(): return C.load_clip()


def torchscript(state, path):
    "An archive as OpenAI made them: the traced model, and a number among its weights."
    model = open_clip.CLIP(24, dict(image_size=28, layers=2, width=64, head_width=64, patch_size=7),
                           dict(context_length=16, vocab_size=64, width=32, heads=2, layers=1), quick_gelu=True)
    model.load_state_dict(state)
    model.eval().requires_grad_(False)
    model.register_buffer("input_resolution", torch.tensor(28))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(model, {"encode_image": torch.zeros(1, 3, 28, 28), "encode_text": torch.zeros(1, 16, dtype=torch.long)})
        torch.jit.save(traced, str(path))


def write(kind, state, folder):
    path = folder / {"safetensors": "w.safetensors"}.get(kind, "w.pt")
    if kind == "safetensors": save_file(state, path)
    if kind == "state dict": torch.save(state, path)
    if kind == "training checkpoint": torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    if kind == "half precision": torch.save({k: v.half() for k, v in state.items()}, path)
    if kind == "torchscript": torchscript(state, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "state dict", "training checkpoint", "torchscript", "half precision"])
def test_golden_logits_through_every_file_format(kind, golden_state, tmp_path):
    clip = C.load_clip("golden-28-quickgelu", write(kind, golden_state, tmp_path))
    text = clip.model.encode_text(golden("model/text"), normalize=True)
    logits = C.zero_shot_logits(C.encode_images(clip, [golden("model/x")]), text, clip.logit_scale)
    tolerance = 2e-2 if kind == "half precision" else 1e-5
    for expert in golden("model/logits"):  # before training every published expert is the plain CLIP
        torch.testing.assert_close(logits, expert, atol=tolerance, rtol=tolerance)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in clip.model.parameters())
    assert clip.preprocess == Preprocess(28, OPENAI_MEAN, OPENAI_STD)


def test_an_openai_archive_refuses_a_gelu_model_and_obeys_the_caller(golden_state, tmp_path):
    path = write("torchscript", golden_state, tmp_path)
    assert read_state_dict(path)[1] == {"container": "TorchScript archive", "openai": True, "names": "open_clip"}
    with pytest.raises(ValueError, match="trained with QuickGELU.*Use backbone='golden-28-quickgelu'"): C.load_clip("golden-28", path)
    forced, right = C.load_clip("golden-28", path, quick_gelu=True), C.load_clip("golden-28-quickgelu", path)
    torch.testing.assert_close(forced.model.encode_image(golden("model/x")), right.model.encode_image(golden("model/x")))
    other = C.load_clip("golden-28", path, quick_gelu=False)
    assert other.fingerprint != right.fingerprint


def test_open_clips_own_folder_loads_with_its_preprocessing(tiny, tmp_path):
    config = {"model_cfg": open_clip.get_model_config(C.TINY), "preprocess_cfg": {"mean": [.5, .4, .3], "std": [.2, .2, .2], "resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tiny.model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    clip = C.load_clip(f"local-dir:{tmp_path}")
    assert clip.preprocess == Preprocess(96, (.5, .4, .3), (.2, .2, .2), "bicubic", "squash")
    assert type(clip.model.visual.transformer.resblocks[0].attn).__name__ == "Attention"
    torch.testing.assert_close(clip.model.encode_image(torch.ones(1, 3, 96, 96)), tiny.model.encode_image(torch.ones(1, 3, 96, 96)))
    with pytest.raises(ValueError, match="cannot be read"): C.load_clip(f"local-dir:{tmp_path / 'nowhere'}")


def test_loading_leaves_the_global_random_state_alone_and_random_is_seeded():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second = C.load_clip("golden-28", "random"), C.load_clip("golden-28", "random")
    assert torch.equal(before, torch.get_rng_state()) and first.fingerprint == second.fingerprint


def test_a_preprocess_that_is_given_wins():
    mine = Preprocess(28, (.1, .2, .3), (.4, .5, .6), "bilinear", "squash")
    assert C.load_clip("golden-28", "random", preprocess=mine).preprocess is mine


def test_text_cache_is_keyed_by_weights_and_prompts(tiny, tmp_path, monkeypatch):
    first = C.encode_text(tiny, WORDS, cache_dir=tmp_path)
    calls, real = [], C._encode_prompts
    monkeypatch.setattr(C, "_encode_prompts", lambda clip, prompts: calls.append(1) or real(clip, prompts))
    assert torch.equal(C.encode_text(tiny, WORDS, cache_dir=tmp_path), first) and not calls
    reverse = C.encode_text(tiny, WORDS[::-1], cache_dir=tmp_path)
    torch.testing.assert_close(reverse, first.flip(0))
    C.encode_text(tiny, WORDS, "none", cache_dir=tmp_path)
    C.encode_text(dataclasses.replace(tiny, fingerprint="other"), WORDS, cache_dir=tmp_path)
    assert len(calls) == 3 and len(list((tmp_path / "text").iterdir())) == 4
    C.encode_text(tiny, WORDS, cache_dir=False)
    assert len(calls) == 4 and len(list((tmp_path / "text").iterdir())) == 4


def test_a_damaged_text_cache_heals_and_a_closed_one_costs_nothing(tiny, tmp_path):
    first = C.encode_text(tiny, WORDS, cache_dir=tmp_path)
    [path] = (tmp_path / "text").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(C.encode_text(tiny, WORDS, cache_dir=tmp_path), first)
    assert torch.equal(load_file(path)["text_features"], first)
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="were not cached"): again = C.encode_text(tiny, WORDS, cache_dir=tmp_path / "file")
    assert torch.equal(again, first)


def test_many_writers_of_one_text_cache(tiny, tmp_path):
    with ThreadPoolExecutor(8) as pool: answers = list(pool.map(lambda _: C.encode_text(tiny, WORDS, cache_dir=tmp_path), range(16)))
    assert all(torch.equal(a, answers[0]) for a in answers)
    assert [p.suffix for p in (tmp_path / "text").iterdir()] == [".safetensors"]


def test_make_prompts_refuses():
    with pytest.raises(ValueError, match="templates is empty"): C.make_prompts(WORDS, [])
    assert C.make_prompts(["{}"], ["a {} b"]) == [["a {} b"]]  # braces in a class name are only characters


def test_probe_saves_the_head_alone_and_never_trains_the_encoder(tiny):
    text = C.encode_text(tiny, WORDS, cache_dir=False)
    probe = C.LinearProbe(tiny, text).train()
    assert sorted(probe.state_dict()) == ["head.bias", "head.weight"] and not tiny.model.training
    before = tiny.fingerprint
    x, y = torch.randn(8, 3, 96, 96, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(probe(x), y)
        optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert C.fingerprint(tiny.model, C._model_config(C.TINY)) == before
    torch.testing.assert_close(probe.classify(probe.features(x)), probe(x))
    assert torch.equal(C.LinearProbe(tiny, num_classes=5)(x), torch.zeros(8, 5))


def test_a_fresh_process_knows_the_tiny_model_and_loads_no_tooling():
    code = ("import dmrs_nb.clip, sys, open_clip; m = open_clip.create_model('tiny-aid-96', pretrained=str(dmrs_nb.clip.ASSETS/'tiny-aid-96.safetensors'));"
            "assert sum(p.numel() for p in m.parameters()) > 9e6; assert not {'nbdev', 'fastcore', 'matplotlib'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
