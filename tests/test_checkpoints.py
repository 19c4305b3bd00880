"""dmrs_nb.checkpoints: files in each layout that people have on their disks, through load_clip; refusals; what was decided from what."""
import dataclasses
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dmrs_nb.compat
import open_clip
from dmrs_nb import checkpoints as K
from dmrs_nb import clip as C
from dmrs_nb.data import OPENAI_MEAN, OPENAI_STD, Preprocess

GOLDEN = np.load(Path(__file__).parent / "golden" / "golden.npz")
STATE = {k.removeprefix("model/state/"): torch.from_numpy(GOLDEN[k]) for k in GOLDEN.files if k.startswith("model/state/")}
HALF = (.5, .5, .5)


@pytest.fixture(scope="module", autouse=True)
def golden_configs(tmp_path_factory):
    "The small model of the golden numbers under two names, as open_clip has its QuickGELU models."
    for name, quick_gelu in (("small-28", False), ("small-28-quickgelu", True)):
        path = tmp_path_factory.mktemp("configs") / f"{name}.json"
        path.write_text(json.dumps(dict(
            embed_dim=24, quick_gelu=quick_gelu, vision_cfg=dict(image_size=28, layers=2, width=64, head_width=64, patch_size=7),
            text_cfg=dict(context_length=16, vocab_size=64, width=32, heads=2, layers=1))))
        open_clip.add_model_config(path)


@pytest.fixture
def published(monkeypatch):
    "A published checkpoint of the small model, with statistics of its own."
    c = K.Checkpoint("small", "SmallCLIP", "small-28-quickgelu", "https://example.org", "MIT", "nobody", quick_gelu=True, mean=HALF, std=(.2, .3, .4),
                     interpolation="bilinear", image_size=28, files=("SmallCLIP*",))
    monkeypatch.setitem(K.CHECKPOINTS, "small", c)
    return c


def full_size(backbone):
    "A state dict with the real names and shapes of a published model, and one number for each tensor: a file of a few kB."
    with torch.device("meta"): shapes = open_clip.CLIP(**open_clip.get_model_config(backbone)).state_dict()
    return {k: torch.zeros(()).expand(v.shape) for k, v in shapes.items()}


def in_transformers_names(state):
    "The inverse of from_transformers, written the other way round."
    out = {}
    for k, v in state.items():
        if k in ("visual.proj", "text_projection"): out[{"visual.proj": "visual_projection"}.get(k, k) + ".weight"] = v.T
        elif ".attn.in_proj_" in k:
            tower, rest = ("vision_model", k.removeprefix("visual.")) if k.startswith("visual.") else ("text_model", k)
            _, _, i, _, kind = rest.split(".")
            start, kind = f"{tower}.encoder.layers.{i}.self_attn", kind.removeprefix("in_proj_")
            for part, piece in zip("qkv", v.chunk(3)): out[f"{start}.{part}_proj.{kind}"] = piece
        else:
            tower = "vision_model" if k.startswith("visual.") else "text_model"
            plain = k.removeprefix("visual.")
            name = {"class_embedding": "embeddings.class_embedding", "conv1.weight": "embeddings.patch_embedding.weight",
                    "positional_embedding": "embeddings.position_embedding.weight", "token_embedding.weight": "embeddings.token_embedding.weight",
                    "ln_pre.weight": "pre_layrnorm.weight", "ln_pre.bias": "pre_layrnorm.bias", "ln_post.weight": "post_layernorm.weight",
                    "ln_post.bias": "post_layernorm.bias", "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias"}.get(plain)
            if name is None and plain != "logit_scale":
                name = plain.replace("transformer.resblocks", "encoder.layers").replace(".attn.", ".self_attn.").replace(".ln_1.", ".layer_norm1.")
                name = name.replace(".ln_2.", ".layer_norm2.").replace(".mlp.c_fc.", ".mlp.fc1.").replace(".mlp.c_proj.", ".mlp.fc2.")
            out["logit_scale" if plain == "logit_scale" else f"{tower}.{name}"] = v
    return out | {"text_model.embeddings.position_ids": torch.arange(16)[None], "vision_model.embeddings.position_ids": torch.arange(17)[None]}


LAYOUTS = {
    "wrapped": lambda s: {f"model.{k}": v for k, v in s.items()},
    "twice wrapped, in a checkpoint": lambda s: {"epoch": 20, "state_dict": {f"module.clip.{k}": v for k, v in s.items()}, "optimizer": {"lr": 1.}},
    "compiled": lambda s: {"model": {f"_orig_mod.{k}": v for k, v in s.items()}},
    "transformers": in_transformers_names,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden_features_through_every_layout(layout, tmp_path):
    torch.save(LAYOUTS[layout](STATE), tmp_path / "w.pt")
    clip = C.load_clip("small-28-quickgelu", tmp_path / "w.pt")
    text = clip.model.encode_text(torch.from_numpy(GOLDEN["model/text"]), normalize=True)
    logits = C.zero_shot_logits(C.encode_images(clip, [torch.from_numpy(GOLDEN["model/x"])]), text, clip.logit_scale)
    for expert in torch.from_numpy(GOLDEN["model/logits"]): torch.testing.assert_close(logits, expert, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path, backbone, name", [
    ("RemoteCLIP-ViT-B-32.pt", "ViT-B-32-quickgelu", "remoteclip-b32"),
    ("RS5M_ViT-B-32_RET-2.pt", "ViT-B-32-quickgelu", "georsclip-b32"),
    ("SkyCLIP_ViT_B32_top50pct/epoch_20.pt", "ViT-B-32", "skyclip-b32"),
    ("models--laion--CLIP-ViT-B-32-laion2B-s34B-b79K/snapshots/0/open_clip_pytorch_model.bin", "ViT-B-32", "laion2b-b32"),
    ("models--openai--clip-vit-base-patch32/snapshots/0/pytorch_model.bin", "ViT-B-32-quickgelu", "openai-b32")])
def test_published_files_by_their_real_names_and_shapes(path, backbone, name, tmp_path):
    state, path = full_size("ViT-B-32"), tmp_path / path
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 20, "state_dict": {f"module.{k}": v for k, v in state.items()}} if "SkyCLIP" in str(path) else state, path)
    assert path.stat().st_size < 200_000
    read, facts = K.read_state_dict(path)
    seen = K.recognise(read, path, facts)
    assert (seen.checkpoint.name, seen.backbones) == (name, [backbone])
    other = backbone.removesuffix("-quickgelu") if "quickgelu" in backbone else backbone + "-quickgelu"
    with pytest.raises(ValueError, match=f"quietly worse. Use backbone='{backbone}'"): C.load_clip(other, path)
    paste = rf"does not fit backbone='tiny-aid-96'.*It is {seen.checkpoint.title}. Use backbone='{backbone}' pretrained='.*{path.name}'\."
    with pytest.raises(ValueError, match=paste): C.load_clip(pretrained=path)  # the backbone was left at its default


def test_a_name_is_not_believed_against_the_shapes(tmp_path):
    torch.save(STATE, tmp_path / "RemoteCLIP-ViT-B-32.pt")
    clip = C.load_clip("small-28", tmp_path / "RemoteCLIP-ViT-B-32.pt")
    assert clip.checkpoint is None and clip.facts["quick_gelu"].startswith("no, because the backbone says so")


def test_marks_tell_openai_whatever_the_file_is_called(tmp_path):
    state = full_size("ViT-B-16") | {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}
    torch.save(state, tmp_path / "weights.pt")
    read, facts = K.read_state_dict(tmp_path / "weights.pt")
    assert facts["openai"] and "vocab_size" not in read
    assert K.recognise(read, tmp_path / "weights.pt", facts).checkpoint.name == "openai-b16"
    with pytest.raises(ValueError, match=r"QuickGELU \(the shapes and marks.*Use backbone='ViT-B-16-quickgelu'"):
        C.load_clip("ViT-B-16", tmp_path / "weights.pt")


def test_a_published_checkpoint_decides_and_given_values_win(published, tmp_path):
    torch.save(STATE, path := tmp_path / "SmallCLIP-v2.pt")
    clip = C.load_clip("small-28-quickgelu", path)
    assert clip.checkpoint == "small" and clip.preprocess == Preprocess(28, HALF, (.2, .3, .4), "bilinear")
    assert clip.facts["mean"] == "0.5, 0.5, 0.5, because the shapes and the name of the file are those of SmallCLIP"
    mine = C.load_clip("small-28", path, quick_gelu=False, mean=[.1, .2, .3], interpolation="bicubic")
    assert mine.preprocess == Preprocess(28, (.1, .2, .3), (.2, .3, .4), "bicubic")
    assert {k for k, v in mine.facts.items() if v.endswith("because it was given")} == {"quick_gelu", "mean", "interpolation"}
    assert not torch.equal(*(c.model.encode_image(torch.ones(1, 3, 28, 28)) for c in (clip, mine)))
    whole = C.load_clip("small-28-quickgelu", path, preprocess=Preprocess(20, HALF))
    assert whole.preprocess == Preprocess(20, HALF) and whole.facts["image_size"] == "20, because it was given"


def test_an_unknown_file_takes_the_word_of_the_backbone(tmp_path):
    torch.save(STATE, path := tmp_path / "mine.pt")
    for backbone, said in (("small-28", "no"), ("small-28-quickgelu", "yes")):
        clip = C.load_clip(backbone, path)
        assert clip.facts["quick_gelu"] == f"{said}, because the backbone says so, and nothing is known of the weights"
        assert (clip.preprocess.mean, clip.preprocess.std) == (OPENAI_MEAN, OPENAI_STD) and "OpenAI's" in clip.facts["mean"]


@pytest.mark.parametrize("given, sentence", [
    (dict(mean=(.5, .5)), "mean=.*one number for each of red, green and blue"), (dict(std=(.2, .2, 0)), "std=.*one positive number for each"),
    (dict(interpolation="lanczos"), "interpolation.*lanczos")])
def test_wrong_statistics_get_a_sentence(given, sentence):
    with pytest.raises(ValueError, match=sentence): C.load_clip("small-28", "random", **given)


def test_configs_beside_a_file_are_read(tmp_path):
    torch.save(in_transformers_names(STATE), tmp_path / "pytorch_model.bin")
    say = lambda name, value: (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    say("config.json", {"vision_config": {"hidden_act": "gelu"}})
    say("preprocessor_config.json", {"image_mean": list(HALF), "image_std": list(HALF), "resample": 2})
    with pytest.raises(ValueError, match=r"GELU \(config.json beside the file says so\).*Use backbone='small-28'"):
        C.load_clip("small-28-quickgelu", tmp_path / "pytorch_model.bin")
    assert C.load_clip("small-28", tmp_path / "pytorch_model.bin").preprocess == Preprocess(28, HALF, HALF, "bilinear")
    say("open_clip_config.json", {"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {"mean": [.1, .1, .1], "std": [.9, .9, .9], "size": 28}})
    clip = C.load_clip("small-28-quickgelu", tmp_path / "pytorch_model.bin")  # open_clip's own config goes first
    assert clip.preprocess == Preprocess(28, (.1, .1, .1), (.9, .9, .9)) and "open_clip_config.json" in clip.facts["std"]
    for name in ("open_clip_config.json", "config.json", "preprocessor_config.json"): say(name, "[not an object")
    assert K.beside(tmp_path / "pytorch_model.bin") == {}


def test_a_tag_brings_its_facts(published, tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "w.pt")
    entry = dict(quick_gelu=True, mean=HALF, std=HALF, interpolation="bilinear", resize_mode="squash")
    for name in ("small-28", "small-28-quickgelu"): monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"tag": entry})
    monkeypatch.setattr(C, "download_pretrained", lambda entry: tmp_path / "w.pt")
    monkeypatch.setitem(K.CHECKPOINTS, "small", dataclasses.replace(published, tag="tag"))
    clip = C.load_clip("small-28-quickgelu", "tag")
    assert clip.checkpoint == "small" and clip.preprocess == Preprocess(28, HALF, HALF, "bilinear", "squash")
    assert clip.facts["quick_gelu"] == "yes, because open_clip's table of tags says so for 'tag'"
    with pytest.raises(ValueError, match="Use backbone='small-28-quickgelu'"): C.load_clip("small-28", "tag")


def test_a_folder_is_answered_with_what_lies_in_it(tmp_path):
    with pytest.raises(ValueError, match="is a folder. No weight file lies in it"): C.load_clip("small-28", tmp_path)
    torch.save(STATE, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="Give one of its files: w.pt"): C.load_clip("small-28", str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="Use backbone='local-dir:.*' and no pretrained"): C.load_clip("small-28", tmp_path)


class Evil:
    def __reduce__(self): return (os.system, (f"touch {os.environ['DMRS_TEST_EVIL']}",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickled_object_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("DMRS_TEST_EVIL", str(tmp_path / "owned"))
    torch.save({"state_dict": Evil()}, tmp_path / "new.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("new.pt", "old.pt"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as weights"): K.read_state_dict(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_a_training_checkpoint_that_pickles_more_than_tensors_says_how_to_write_them_alone(tmp_path):
    torch.save({"state_dict": STATE, "best": np.float64(.5)}, tmp_path / "epoch_1.pt")
    with pytest.raises(ValueError, match=r"it holds numpy.*torch.save\(torch.load\(FILE, weights_only=False\)\['state_dict'\]"):
        K.read_state_dict(tmp_path / "epoch_1.pt")
    torch.save({"state_dict": STATE, "optimizer": {"param_groups": [{"lr": .1}]}, "scaler": {"scale": 65536.}}, tmp_path / "epoch_2.pt")
    assert K.read_state_dict(tmp_path / "epoch_2.pt")[0].keys() == STATE.keys()  # what open_clip's training writes is read


def test_broken_files_get_a_sentence(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:len(whole) // 2])
    torch.save(STATE, tmp_path / "w.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:-2000])
    (tmp_path / "page.pt").write_text("<html>404</html>")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("cut.safetensors", "cut.pt", "page.pt", "empty.pt"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as weights"): C.load_clip("small-28", tmp_path / name)
    torch.save({"epoch": 1, "weights": [1, 2]}, tmp_path / "list.pt")
    with pytest.raises(ValueError, match="found epoch, weights; save the state dict alone"): C.load_clip("small-28", tmp_path / "list.pt")
    torch.save({f"{who}.{k}": v for who in ("student", "teacher") for k, v in STATE.items()}, tmp_path / "pair.pt")
    with pytest.raises(ValueError, match=r"holds 2 CLIPs \(student., teacher.\)"): C.load_clip("small-28", tmp_path / "pair.pt")
    for missing in (tmp_path / "no.pt", "no.pt", "folder/no"):
        with pytest.raises(ValueError, match="there is no such file"): C.load_clip("small-28", missing)


def test_weights_fit_completely_or_not_at_all(tmp_path):
    model = C._create("small-28", C._model_config("small-28"), load_weights=False)
    before = C.fingerprint(model, {})
    larger = {**STATE, "visual.positional_embedding": torch.zeros(50, 64)}  # open_clip would stretch it
    with pytest.raises(ValueError, match=r"visual.positional_embedding is \(50, 64\) where \(17, 64\)"): K.load_state(model, larger, "w", "small-28")
    extra = {**STATE, "visual.head.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="1 tensors are unknown, such as visual.head.weight"): K.load_state(model, extra, "w", "small-28")
    part = {k: v for k, v in STATE.items() if "ln_post" not in k}
    with pytest.raises(ValueError, match="2 tensors are missing.*The sizes are right: it is a part"): K.load_state(model, part, "w", "small-28")
    assert C.fingerprint(model, {}) == before
    torch.save(larger, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="vision image_size 49 where 28 is expected.*Name the backbone"): C.load_clip("small-28", tmp_path / "w.pt")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "head.pt")
    with pytest.raises(ValueError, match="tensors are missing.*1 tensors are unknown, such as fc.weight"): C.load_clip("small-28", tmp_path / "head.pt")


def test_reading_needs_no_open_clip():
    import subprocess, sys
    code = ("import sys; from dmrs_nb.checkpoints import read_state_dict, architecture, beside; from pathlib import Path; import dmrs_nb;"
            "s, _ = read_state_dict(Path(dmrs_nb.__file__).parent/'assets'/'tiny-aid-96.safetensors');"
            "assert architecture(s)['vision_cfg']['image_size'] == 96 and not {'open_clip', 'transformers', 'pandas'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- writing

def test_what_is_written_has_the_mode_of_any_other_file_and_reads_back(tmp_path):
    table = torch.arange(6.).reshape(2, 3)
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try: K.write_tensors(path := tmp_path / f"{umask:o}" / "w.safetensors", {"a": table, "b": table.T, "c": table[:, 1], "d": torch.nn.Parameter(table).half()}, {"format": "pt"})
        finally: os.umask(before)
        assert path.stat().st_mode & 0o777 == mode and os.listdir(path.parent) == [path.name]
    read = load_file(path)
    assert torch.equal(read["b"], table.T) and torch.equal(read["c"], table[:, 1]) and read["d"].dtype == torch.float16
    with safe_open(path, "pt") as f: assert f.metadata() == {"format": "pt"}


@pytest.mark.parametrize("size, says", [(0, "File too large"), (300, "File too large")])
def test_tensors_on_a_full_disk_are_a_sentence_and_leave_what_was_there(tmp_path, size, says):
    resource = pytest.importorskip("resource")
    path, before = tmp_path / "w.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    K.write_tensors(path, {"a": torch.ones(2)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(OSError) as e: K.write_tensors(path, {"a": torch.zeros(1000)})
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(e.value) == f"could not write {path} ({says}). What was there before is unchanged; free some space and start the same command again."
    assert torch.equal(load_file(path)["a"], torch.ones(2)) and os.listdir(tmp_path) == ["w.safetensors"]


def test_a_folder_that_is_a_file_and_a_bug_of_ours(tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(OSError, match=r"could not write .*mine/w.safetensors \((Not a directory|File exists)\).*check the folder"): K.write_tensors(tmp_path / "mine" / "w.safetensors", {"a": torch.ones(1)})
    with pytest.raises(TypeError): K.write_tensors(tmp_path / "w.safetensors", {"a": torch.ones(1)}, {"a": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_text_file_and_a_long_reason_end_in_whole_words(tmp_path):
    (tmp_path / "notes.pt").write_text("eight classes, ask Ana")
    with pytest.raises(ValueError, match=r"notes.pt: cannot be read as weights \(it is not an archive of tensors\)\. Expected"): K.read_state_dict(tmp_path / "notes.pt")
    torch.save(STATE, tmp_path / "w.pt")
    whole = bytearray((tmp_path / "w.pt").read_bytes())
    whole[-400:-100] = bytes(300)   # the directory at the end of the archive
    (tmp_path / "w.pt").write_bytes(whole)
    with pytest.raises(ValueError) as e: K.read_state_dict(tmp_path / "w.pt")
    why = str(e.value).split("as weights (")[1].split("). Expected")[0]
    assert len(why) <= 120 and "If yo" not in why
    for error, said in ((KeyError(101), "it is not an archive of tensors"), (RuntimeError("failed reading zip archive: internal miniz error. If you see this, " + "x" * 99), "failed reading zip archive: internal miniz error"),
                        (RuntimeError("word " * 40), ("word " * 23).strip() + " …"), (EOFError(), "the file is empty")):
        assert f"cannot be read as weights ({said}). Expected" in str(K._refused(Path("w.pt"), error))
