"Golden numbers, a naive loop over PEFT models, and the faults of adapter folders."
import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import dmrs_nb.compat  # noqa: F401
import open_clip
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import Attention

from dmrs_nb.experts import DenseExperts, MultiExpertCLIP, expert_attention, expert_state
from dmrs_nb.lora import TARGETS, split_in_proj
from dmrs_nb.losses import MMELoss

GOLDEN = np.load(Path(__file__).parent / "golden" / "golden.npz")


def golden(key): return torch.from_numpy(np.asarray(GOLDEN[key]))


def open_clip_model(seed=0, layers=3, width=32, block_type="custom", **vision):
    torch.manual_seed(seed)
    model = open_clip.CLIP(16, dict(image_size=28, layers=layers, width=width, head_width=16, patch_size=7, block_type=block_type, **vision),
                           dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1), quick_gelu=True)
    return model.eval().requires_grad_(False)


def experts(model=None, num_classes=5, **kw):
    model = model if model is not None else open_clip_model()
    text = F.normalize(torch.randn(num_classes, 16, generator=torch.Generator().manual_seed(9)), dim=-1)
    return MultiExpertCLIP(SimpleNamespace(model=model), text, **{"lora_dropout": 0., "r": 4, "lora_alpha": 8, **kw})


def scramble(model, seed=1):
    "Give every trainable parameter a value of its own, B included."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.adapters.parameters(): p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


def images(n=4, seed=3): return torch.randn(n, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("E", [3, 5])
def test_golden_attention(E):
    attn = Attention(32, 4)
    attn.load_state_dict({"in_proj_weight": golden(f"attention/{E}/in_proj_weight"), "in_proj_bias": golden(f"attention/{E}/in_proj_bias")},
                         strict=False)
    dense = DenseExperts(attn.out_proj.weight, attn.out_proj.bias, E)
    dense.load_state_dict({"weight": golden(f"attention/{E}/out_proj_weight"), "bias": golden(f"attention/{E}/out_proj_bias")})
    x = golden(f"attention/{E}/x").transpose(0, 1).unflatten(0, (E, 2))
    y = expert_attention(SimpleNamespace(attn=attn), x, {"out_proj": dense})
    torch.testing.assert_close(y.flatten(0, 1).transpose(0, 1), golden(f"attention/{E}/out"), rtol=1e-5, atol=1e-6)


def golden_clip():
    state = {k.removeprefix("model/state/"): golden(k) for k in GOLDEN.files if k.startswith("model/state/")}
    model = open_clip.CLIP(24, dict(image_size=28, layers=2, width=64, head_width=64, patch_size=7, block_type="custom"),
                           dict(context_length=16, vocab_size=64, width=32, heads=2, layers=1), quick_gelu=True)
    model.load_state_dict(state)
    model.eval().requires_grad_(False)
    return model, model.encode_text(golden("model/text"), normalize=True)


def test_golden_model_and_step():
    clip, text = golden_clip()
    model = MultiExpertCLIP(SimpleNamespace(model=clip), text, num_experts=3, adapter="dense").train()
    loss_fn, x, y = MMELoss(GOLDEN["mme/3/cls_num_list"], num_experts=3), golden("model/x"), golden("model/targets")
    logits = model(x)
    loss = loss_fn(logits, y)
    loss.backward()
    torch.testing.assert_close(logits, golden("model/logits"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, golden("model/loss"))
    for i in range(2):
        for part in ("weight", "bias"):
            grad = getattr(model.adapters[str(i)]["out_proj"], part).grad
            torch.testing.assert_close(grad, golden(f"model/grad/block{i}/out_proj.{part}"), rtol=1e-4, atol=1e-6)
    torch.optim.SGD(model.adapters.parameters(), lr=0.1).step()
    torch.testing.assert_close(model(x), golden("model/logits_after_step"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss_fn(model(x), y), golden("model/loss_after_step"))
    assert GOLDEN["model/lora_grad_is_none"].all() and all(p.grad is None for p in clip.parameters())


def logits_of(model, features): return model.logit_scale.exp() * F.normalize(features, dim=-1) @ model.text_features.T


def peft_towers(model):
    "The naive version: one PEFT model per expert, with that expert's numbers."
    towers = []
    for e in range(model.num_experts):
        base = copy.deepcopy(model.visual)
        for block in base.transformer.resblocks: block.attn = split_in_proj(block.attn)
        names = [f"transformer.resblocks.{i}.{TARGETS[n]}" for i, adapters in model.adapters.items() for n in adapters]
        tower = peft.get_peft_model(base, peft.LoraConfig(r=model.r, lora_alpha=model.lora_alpha, target_modules=names)).eval()
        assert not peft.set_peft_model_state_dict(tower, expert_state(model, e)).unexpected_keys
        towers.append(tower)
    return towers


@pytest.mark.parametrize("kw", [dict(), dict(num_experts=1), dict(num_experts=4, expert_blocks=1), dict(expert_blocks=2),
                                dict(target_modules=("q", "v")), dict(target_modules=("k", "c_fc"), expert_blocks=2),
                                dict(target_modules=("c_proj",)), dict(target_modules=tuple(TARGETS), num_experts=2)], ids=str)
@pytest.mark.parametrize("pool_type", ["tok", "avg"])
def test_agrees_with_a_loop_over_peft_models(kw, pool_type):
    model = scramble(experts(open_clip_model(pool_type=pool_type), **kw)).train()
    towers, x, y = peft_towers(model), images(), torch.tensor([0, 1, 2, 3])
    naive, batched = torch.stack([logits_of(model, t(x)) for t in towers]), model(x)
    torch.testing.assert_close(batched, naive, rtol=1e-5, atol=2e-5)
    for logits in (naive, batched): F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits))).backward()
    for e, tower in enumerate(towers):
        theirs = {n.replace(".default", ""): p.grad for n, p in tower.named_parameters() if p.requires_grad}
        for i, adapters in model.adapters.items():
            for name, adapter in adapters.items():
                for part, p in adapter.named_parameters():
                    grad = theirs.pop(f"base_model.model.transformer.resblocks.{i}.{TARGETS[name]}.{part}.weight")
                    torch.testing.assert_close(p.grad[e], grad, rtol=1e-3, atol=1e-6)
        assert not theirs


@pytest.mark.parametrize("adapter", ["lora", "dense"])
@pytest.mark.parametrize("target_modules", [("out_proj",), ("k", "c_fc"), tuple(TARGETS)], ids=str)
def test_identity_at_start_and_merged_models(adapter, target_modules):
    clip, x = open_clip_model(), images()
    model = experts(clip, adapter=adapter, target_modules=target_modules, expert_blocks=2)
    torch.testing.assert_close(model(x), logits_of(model, clip.visual(x)).expand(3, -1, -1), rtol=1e-5, atol=1e-5)
    scramble(model)
    for e in range(3): torch.testing.assert_close(logits_of(model, model.merged(e).visual(x)), model(x)[e], rtol=1e-5, atol=2e-5)


def test_the_clip_is_referred_to_and_never_changed():
    clip = open_clip_model()
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    model = scramble(experts(clip, adapter="dense", target_modules=tuple(TARGETS))).train()
    model(images()).sum().backward()
    torch.optim.SGD(model.adapters.parameters(), lr=1.).step()
    model.merged(0)
    assert model.visual is clip.visual and not clip.visual.training
    assert all(torch.equal(v, before[k]) for k, v in clip.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in clip.parameters())
    assert all(n.startswith("adapters.") for n in model.trainable_parameters())
    assert not any("token_embedding" in n for n in model.state_dict())


def test_what_lies_below_the_first_expert_keeps_nothing_for_the_way_back():
    model, seen = scramble(experts(expert_blocks=1)), []
    for block in model.visual.transformer.resblocks: block.ln_1.register_forward_hook(lambda m, i, o: seen.append((o.shape[0], o.requires_grad)))
    model(images())
    assert seen == [(1, False)] * 3                      # one group, no gradient, up to the last block's input


def test_each_expert_drops_other_inputs_and_evaluation_none():
    model = scramble(experts(lora_dropout=0.5))
    with torch.no_grad():                                # three equal experts: only dropout can tell them apart
        for p in model.adapters.parameters(): p.copy_(p[:1].expand_as(p).clone())
    torch.manual_seed(0)
    a, b, c = model.train()(images())
    assert not torch.allclose(a, b) and not torch.allclose(b, c)
    torch.manual_seed(0)
    assert torch.equal(model(images())[0], a)            # the global generator decides, so a seed per step repeats a step
    assert torch.equal(*model.eval()(images())[:2])


def test_patch_dropout_of_a_pretrained_encoder_stays_off():
    model = experts(open_clip_model(patch_dropout=0.5)).train()
    assert model.adapters.training and torch.equal(model(images()), model(images()))


def test_initialisation_needs_no_global_randomness():
    before = torch.get_rng_state()
    clip = open_clip_model()
    torch.set_rng_state(before)
    one, two, other = (experts(clip, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    A = [m.adapters["0"]["out_proj"].lora_A for m in (one, two, other)]
    assert torch.equal(A[0], A[1]) and not torch.equal(A[0], A[2]) and not torch.equal(A[0][0], A[0][1])
    assert torch.equal(experts(clip).adapters["1"]["out_proj"].lora_A, experts(clip).adapters["1"]["out_proj"].lora_A)


def test_no_grad_autocast_compile_and_copies():
    model, x = scramble(experts()), images()
    full = model(x)
    with torch.no_grad(): assert torch.equal(model(x), full) and not model(x).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x)
        half.sum().backward()
    assert half.dtype == torch.float32 and all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.adapters.parameters())
    assert (half - full).abs().max() < 0.05 * full.abs().max()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)   # one graph: no Python decision depends on data
    torch.testing.assert_close(compiled(x), full, rtol=1e-5, atol=1e-5)
    assert torch.equal(copy.deepcopy(model)(x), full)


def test_the_way_to_the_image_is_open():
    x = images(1).requires_grad_()
    scramble(experts(expert_blocks=1))(x)[1, 0, 2].backward()
    assert x.grad.abs().sum() > 0                        # for saliency maps


@pytest.mark.parametrize("kw", [dict(), dict(adapter="dense"), dict(target_modules=tuple(TARGETS), expert_blocks=2)], ids=str)
def test_folders_round_trip(tmp_path, kw):
    model = scramble(experts(**kw)).eval()
    model.save_adapters(tmp_path / "a")
    model.save_adapters(tmp_path / "a")                  # writing again is fine
    other = experts(**kw).eval().load_adapters(str(tmp_path / "a"))
    assert torch.equal(other(images()), model(images()))
    assert not list(tmp_path.rglob("*.part"))
    size = sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors"))
    assert size < 4 * sum(model.trainable_parameters().values()) + 3 * 8000   # an expert's file holds that expert only


def test_peft_loads_each_folder(tmp_path):
    model = scramble(experts(target_modules=("out_proj", "c_fc"), expert_blocks=2)).eval()
    model.save_adapters(tmp_path)
    for e in range(3):
        tower = peft.PeftModel.from_pretrained(copy.deepcopy(model.visual), tmp_path / f"expert_{e}")
        torch.testing.assert_close(logits_of(model, tower(images())), model(images())[e], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(logits_of(model, tower.merge_and_unload()(images())), model(images())[e], rtol=1e-5, atol=2e-5)


def test_dense_experts_load_into_a_plain_encoder(tmp_path):
    from safetensors.torch import load_file
    model = scramble(experts(adapter="dense")).eval()
    model.save_adapters(tmp_path)
    visual = copy.deepcopy(model.visual)
    assert not visual.load_state_dict(load_file(tmp_path / "expert_1" / "dense.safetensors"), strict=False).unexpected_keys
    torch.testing.assert_close(logits_of(model, visual(images())), model(images())[1], rtol=1e-5, atol=2e-5)


def damage(kind, folder):
    weights, config = folder / "expert_1" / "adapter_model.safetensors", folder / "expert_2" / "adapter_config.json"
    if kind == "truncated": weights.write_bytes(weights.read_bytes()[:100])
    if kind == "no weights": weights.unlink()
    if kind == "bad json": config.write_text("{")
    if kind == "other alpha": config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 99}))
    if kind == "one missing": shutil.rmtree(folder / "expert_1")


@pytest.mark.parametrize("kind, words", [
    ("truncated", ["expert_1", "cannot be read"]), ("no weights", ["expert_1", "cannot be read"]), ("bad json", ["expert_2", "cannot be read"]),
    ("other alpha", ["expert_2", "lora_alpha is 99 there and 8 here"]), ("one missing", ["holds 2 experts", "this model has 3"])])
def test_a_damaged_folder_changes_nothing(tmp_path, kind, words):
    scramble(experts()).save_adapters(tmp_path)
    damage(kind, tmp_path)
    model = experts()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError) as error: model.load_adapters(tmp_path)
    assert all(word in str(error.value) for word in words), error.value
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_other_models_and_missing_folders_are_refused(tmp_path):
    experts().save_adapters(tmp_path)
    for kw, words in ((dict(expert_blocks=1), "is unknown here"), (dict(target_modules=("out_proj", "v")), "is missing there"),
                      (dict(model=open_clip_model(width=48)), "there and")):
        with pytest.raises(ValueError, match=words): experts(**kw).load_adapters(tmp_path)
    with pytest.raises(ValueError, match="holds 0 experts"): experts().load_adapters(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="already holds expert_2"): experts(num_experts=2).save_adapters(tmp_path)


@pytest.mark.parametrize("make, words", [
    (lambda: experts(open_clip_model(block_type="default")), ["nn.MultiheadAttention", "load_clip"]),
    (lambda: experts(open_clip_model().requires_grad_(True)), ["not frozen", "requires_grad_(False)"]),
    (lambda: experts(num_experts=0), ["num_experts is 0"]),
    (lambda: experts(expert_blocks=0), ["expert_blocks is 0", "3 blocks"]),
    (lambda: experts(r=0), ["r (the rank of the adapter) is 0"]),
    (lambda: experts(adapter="Lora"), ["did you mean 'lora'"]),
    (lambda: experts(target_modules="qkv"), ["'qkv' is not a projection"]),
    (lambda: MultiExpertCLIP(SimpleNamespace(model=open_clip_model()), torch.zeros(5)), ["text_features has shape (5,)", "(classes, 16)"]),
    (lambda: experts().merged(-1), ["experts 0 … 2"]),
])
def test_faults_are_sentences(make, words):
    with pytest.raises(ValueError) as error: make()
    for word in words: assert word in str(error.value)
