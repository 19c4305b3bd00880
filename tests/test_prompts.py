"dmrs_nb.prompts: open_clip's own encode_text, PEFT on a hand-written split encoder, caches of class features, and what is refused."
import copy
import json
import math
from types import SimpleNamespace

import dmrs_nb.compat  # noqa: F401
import numpy as np
import open_clip
import peft
import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import nn

from dmrs_nb.clip import encode_text, load_clip
from dmrs_nb.experts import MultiExpertCLIP
from dmrs_nb.prompts import (PromptCLIP, TextLoRA, TwoSidedCLIP, encode_embedded, kept, prompt_tokens, text_attention, text_tower,
                             used_length)

WORDS = ["river", "forest", "parking lot", "beach"]
END = 49407


def close(a, b, eps=1e-5): torch.testing.assert_close(a, b, rtol=0, atol=eps)


def bundle(kind=open_clip.CLIP, L=24, seed=0, **text):
    "A small random CLIP with CLIP's own tokenizer."
    torch.manual_seed(seed)
    model = kind(16, dict(image_size=28, layers=2, width=32, head_width=16, patch_size=14, block_type="custom"),
                 dict(dict(context_length=L, vocab_size=END + 1, width=16, heads=2, layers=2), **text), quick_gelu=True)
    model = model.eval().requires_grad_(False)
    return SimpleNamespace(model=model, tokenizer=SimpleTokenizer(context_length=L), backbone="small", device=torch.device("cpu"),
                           logit_scale=model.logit_scale.exp().item(), embed_dim=16)


TOWERS = {
    "default": dict(), "custom text": dict(kind=open_clip.CustomTextCLIP), "custom blocks": dict(block_type="custom"),
    "eos pooling": dict(pool_type="eos", eos_id=END), "no mask, last token": dict(no_causal_mask=True, pool_type="last"),
    "projection with bias": dict(proj_bias=True), "layer scale": dict(ls_init_value=0.5),
}


@pytest.fixture(scope="module")
def clip(): return load_clip()


@pytest.fixture
def images(): return torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(3))


def scramble(module, seed=1, size=0.3):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad: p.add_(size * torch.randn(p.shape, generator=g))
    return module


def two_sided(clip, E=1, words=WORDS, dropout=0., seed=0, **kw):
    kw = dict(r=2, lora_alpha=1, lora_dropout=dropout, target_modules=("q", "k", "v"), generator=torch.Generator().manual_seed(seed), **kw)
    lora = TextLoRA(clip, words, **kw)
    with torch.no_grad(): text = lora.eval()()
    return TwoSidedCLIP(MultiExpertCLIP(clip, text, num_experts=E, **kw), lora)


# the text encoder

@pytest.mark.parametrize("tower", TOWERS)
def test_zero_updates_are_encode_text(tower):
    clip = bundle(**TOWERS[tower])
    theirs = clip.model.encode_text(clip.tokenizer([f"a photo of a {w}." for w in WORDS]), normalize=True)
    close(TextLoRA(clip, WORDS, target_modules=("q", "k", "v", "out_proj")).eval()(), theirs)


@pytest.mark.parametrize("tower", TOWERS)
def test_rows_of_words_are_words(tower):
    clip = bundle(**TOWERS[tower])
    prompt = PromptCLIP(clip, WORDS, num_tokens=4)
    with torch.no_grad(): prompt.context.copy_(text_tower(clip).token_embedding(clip.tokenizer("a photo of a"))[0, 1:5])
    close(prompt.text_features(), clip.model.encode_text(clip.tokenizer([f"a photo of a {w}." for w in WORDS]), normalize=True))


def test_embedded_clip_gives_its_templates(clip):
    for name in ("none", "clip", "aerial"): close(TextLoRA(clip, WORDS, name).eval()(), encode_text(clip, WORDS, name, cache_dir=False))


def test_attention_is_multihead_attention_with_gradient():
    block, g = bundle().model.transformer.resblocks[0], torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 16, generator=g, requires_grad=True)
    mask = torch.full((7, 7), -math.inf).triu(1)
    ours, theirs = text_attention(block, x[None], mask, {})[0], block.attn(x, x, x, need_weights=False, attn_mask=mask)[0]
    close(ours, theirs)
    weight = torch.randn(ours.shape, generator=g)
    close(*(torch.autograd.grad((out * weight).sum(), x)[0] for out in (ours, theirs)))


def test_no_token_sees_a_later_one():
    block, x = bundle().model.transformer.resblocks[0], torch.randn(1, 1, 6, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.full((6, 6), -math.inf).triu(1)
    before = text_attention(block, x, mask, {})
    x[:, :, 4:] += 10
    after = text_attention(block, x, mask, {})
    close(before[:, :, :4], after[:, :, :4])
    assert (before - after)[:, :, 4:].abs().max() > 0.01


def test_used_length_reaches_the_last_end_token():
    clip = bundle()
    tokens = clip.tokenizer(["river", "a large parking lot by the river"])
    assert used_length(clip.model, tokens) == 9 == int((tokens == END).int().argmax(-1).max()) + 1
    clip = bundle(no_causal_mask=True, pool_type="last")
    assert used_length(clip.model, tokens) == 24      # everything is read there


def test_encoder_passes_gradcheck():
    clip = bundle(L=8)
    clip.model.double()
    tokens = clip.tokenizer(["a river", "beach"])[:, :5]
    x = clip.model.token_embedding(tokens).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: encode_embedded(clip.model, x, tokens, {}), x, eps=1e-6, atol=1e-5)


# CoOp

def test_prompt_parity_with_a_loop_over_classes(images):
    clip = bundle()
    prompt = PromptCLIP(clip, WORDS, num_tokens=6, generator=torch.Generator().manual_seed(4))
    context, rows = prompt.context.detach().clone().requires_grad_(), []
    for word in WORDS:
        ids = [END - 1, *[0] * 6, *clip.tokenizer.encode(word + "."), END]
        x = clip.model.token_embedding.weight[torch.tensor(ids)].clone()
        x = torch.cat([x[:1], context, x[7:]]) + clip.model.positional_embedding[:len(ids)]
        x = clip.model.transformer(x[None], attn_mask=clip.model.attn_mask[:len(ids), :len(ids)])[0, -1]
        rows.append(F.normalize(clip.model.ln_final(x) @ clip.model.text_projection, dim=-1))
    theirs = clip.logit_scale * clip.model.encode_image(images, normalize=True) @ torch.stack(rows).T
    close(prompt(images), theirs, 1e-4)
    y = torch.arange(4)
    close(*(torch.autograd.grad(F.cross_entropy(z, y), v)[0] for z, v in ((prompt(images), prompt.context), (theirs, context))), 1e-4)


def test_prompt_trains_the_context_alone(images):
    clip = bundle()
    before, prompt = copy.deepcopy(clip.model.state_dict()), PromptCLIP(clip, WORDS, num_tokens=4)
    assert list(prompt.state_dict()) == ["context"] and prompt.trainable_parameters() == {"context": 64}
    optimizer, start = torch.optim.SGD(prompt.parameters(), lr=1e-4), prompt.context.detach().clone()
    loss = F.cross_entropy(prompt.train()(images), torch.arange(4))
    loss.backward(); optimizer.step()
    assert F.cross_entropy(prompt(images), torch.arange(4)) < loss and not torch.equal(prompt.context, start)
    for k, v in clip.model.state_dict().items(): assert torch.equal(v, before[k])
    assert all(p.grad is None for p in clip.model.parameters())


def test_prompt_starts_small_and_from_its_generator():
    clip, state = bundle(), torch.get_rng_state()
    one, same, other = (PromptCLIP(clip, WORDS, generator=torch.Generator().manual_seed(s)).context for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(PromptCLIP(clip, WORDS).context, one)
    assert 0.015 < one.std() < 0.025 and abs(one.mean()) < 0.005


def test_prompt_is_a_linear_layer_on_features(images):
    clip = bundle()
    prompt = PromptCLIP(clip, WORDS).eval()
    weight, bias = prompt.linear_part()
    close(prompt.features(images) @ weight.T + bias, prompt(images), 1e-4)
    assert weight.shape == (4, 16) and bias.shape == (4,) and not weight.requires_grad


def test_prompt_serves_other_words_after_loading(tmp_path):
    clip = bundle()
    PromptCLIP(clip, WORDS, generator=torch.Generator().manual_seed(7)).save(tmp_path)
    other = PromptCLIP(clip, ["airport"]).load(tmp_path)
    assert torch.equal(other.context, PromptCLIP(clip, WORDS, generator=torch.Generator().manual_seed(7)).context)
    assert [p.name for p in tmp_path.iterdir()] == ["prompt.safetensors"]


def test_prompt_refuses(tmp_path):
    clip = bundle()
    with pytest.raises(ValueError, match="num_tokens is 0"): PromptCLIP(clip, WORDS, num_tokens=0)
    with pytest.raises(ValueError, match=r"'parking lot' .* is 3 tokens, and num_tokens=20 leaves 2 of the 22"): PromptCLIP(clip, WORDS, num_tokens=20)
    with pytest.raises(ValueError, match="leaves 0 of the 22"): PromptCLIP(clip, WORDS, num_tokens=40)
    with pytest.raises(ValueError, match="two classes give one prompt"): PromptCLIP(clip, ["river", "river"])
    PromptCLIP(clip, WORDS, num_tokens=4).save(tmp_path)
    with pytest.raises(ValueError, match=r"context is \(4, 16\) there and \(16, 16\) here"): PromptCLIP(clip, WORDS).load(tmp_path)
    (tmp_path / "prompt.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"): PromptCLIP(clip, WORDS).load(tmp_path)
    clip.tokenizer = lambda texts: torch.zeros(len(texts), 24, dtype=torch.long)
    with pytest.raises(ValueError, match="learned prompts need CLIP's own"): PromptCLIP(clip, WORDS)


def test_longest_name_that_fits():
    clip = bundle()
    assert prompt_tokens(clip, ["parking lot"], 19).shape == (1, 24)      # start, 19, "parking", "lot", ".", end


# the low-rank text side

class Split(nn.Module):
    "nn.MultiheadAttention with four layers that are called, softmax by hand."
    def __init__(self, mha):
        super().__init__()
        self.heads, self.out_proj = mha.num_heads, nn.Linear(mha.embed_dim, mha.embed_dim)
        self.out_proj.load_state_dict(mha.out_proj.state_dict())
        for name, w, b in zip("qkv", mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3)):
            layer = nn.Linear(*w.shape)
            layer.load_state_dict(dict(weight=w, bias=b))
            self.add_module(name, layer)

    def forward(self, x, *_, need_weights=False, attn_mask=None):
        q, k, v = (f(x).view(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3) for f in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + attn_mask).softmax(-1)
        return self.out_proj((weights @ v).permute(0, 2, 1, 3).reshape(x.shape)), None


def split_text(clip):
    model = copy.deepcopy(clip.model)
    model.visual = nn.Identity()
    for block in model.transformer.resblocks: block.attn = Split(block.attn)
    return model.requires_grad_(False)


@pytest.mark.parametrize("target_modules", [("q", "k", "v"), ("v",), ("q", "k", "v", "out_proj")])
def test_peft_reads_the_folder_and_agrees_gradients_included(tmp_path, target_modules):
    clip = bundle()
    ours = scramble(TextLoRA(clip, WORDS, r=2, lora_alpha=1, target_modules=target_modules)).eval()
    ours.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(split_text(clip), tmp_path / "text", is_trainable=True).eval()
    features = theirs.base_model.model.encode_text(clip.tokenizer([f"a photo of a {w}." for w in WORDS]), normalize=True)
    close(ours(), features)
    assert (ours() - TextLoRA(clip, WORDS).eval()()).abs().max() > 0.01                   # the updates do something
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (ours() * weight).sum().backward(); (features * weight).sum().backward()
    grads = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert len(grads) == 2 * 2 * len(target_modules)
    for i, adapters in ours.adapters.items():
        for name, adapter in adapters.items():
            for part in ("lora_A", "lora_B"):
                close(getattr(adapter, part).grad[0], grads[f"base_model.model.transformer.resblocks.{i}.attn.{name}.{part}.weight"])


def test_several_templates_are_a_mean_direction():
    clip, templates = bundle(), ["a photo of a {}.", "{}.", "an aerial view of {}."]
    lora = scramble(TextLoRA(clip, WORDS, templates)).eval()
    single = torch.stack([scramble(TextLoRA(clip, WORDS, [t])).eval()() for t in templates])
    close(lora(), F.normalize(single.mean(0), dim=-1))


def test_names_that_contain_templates_sizes_and_order_of_classes():
    clip = bundle()
    lora = scramble(TextLoRA(clip, WORDS, "aerial")).eval()
    close(scramble(TextLoRA(clip, WORDS[::-1], "aerial")).eval()().flip(0), lora())


def test_every_text_adapter_learns():
    clip = bundle()
    lora, target = TextLoRA(clip, WORDS, target_modules=("q", "k", "v", "out_proj")).eval(), torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    (lora() * target).sum().backward()
    for name, p in lora.named_parameters(): assert (p.grad.abs().max() > 0) == name.endswith("lora_B"), name    # B = 0 hides A at first
    lora.zero_grad()
    (scramble(lora)() * target).sum().backward()
    for name, p in lora.named_parameters(): assert p.grad.abs().max() > 0, name
    assert set(lora.trainable_parameters()) == {n for n, _ in lora.named_parameters()}
    assert all(p.grad is None and not p.requires_grad for p in clip.model.parameters())


def test_dropout_is_for_training_and_from_the_global_generator():
    lora = scramble(TextLoRA(bundle(), WORDS, lora_dropout=0.5))
    torch.manual_seed(0); one = lora.train()()
    torch.manual_seed(0); same = lora()
    torch.manual_seed(1); other = lora()
    assert torch.equal(one, same) and not torch.equal(one, other) and torch.equal(lora.eval()(), lora())


def test_scale_of_the_authors_code():
    adapter = TextLoRA(bundle(), WORDS, r=2, lora_alpha=2 ** 0.5).adapters["0"]["q"]
    assert math.isclose(adapter.scaling, 1 / math.sqrt(2))


def test_text_lora_refuses(tmp_path):
    clip = bundle()
    with pytest.raises(ValueError, match="'c_fc' is in the MLP"): TextLoRA(clip, WORDS, target_modules=("q", "c_fc"))
    with pytest.raises(ValueError, match="did you mean 'out_proj'"): TextLoRA(clip, WORDS, target_modules=("outproj",))
    with pytest.raises(ValueError, match="r .* is 0"): TextLoRA(clip, WORDS, r=0)
    with pytest.raises(ValueError, match="lora_dropout is 1"): TextLoRA(clip, WORDS, lora_dropout=1)
    with pytest.raises(ValueError, match="reads 22: shorten it"): TextLoRA(clip, ["river " * 30])
    TextLoRA(clip, WORDS).save(tmp_path)
    with pytest.raises(ValueError, match="r is 2 there and 4 here"): TextLoRA(clip, WORDS, r=4).load(tmp_path)
    with pytest.raises(ValueError, match="is missing there"): TextLoRA(clip, WORDS, target_modules=("q", "k", "v", "out_proj")).load(tmp_path)
    with pytest.raises(ValueError, match=r"there and \(2, 32\) here"): TextLoRA(bundle(width=32), WORDS).load(tmp_path)
    (tmp_path / "text" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="cannot be read"): TextLoRA(clip, WORDS).load(tmp_path)


def test_a_folder_that_does_not_fit_changes_nothing(tmp_path):
    clip = bundle()
    scramble(TextLoRA(clip, WORDS)).save(tmp_path)
    path = tmp_path / "text" / "adapter_config.json"
    path.write_text(json.dumps(dict(json.loads(path.read_text()), lora_alpha=7)))
    lora = TextLoRA(clip, WORDS)
    before = copy.deepcopy(lora.state_dict())
    with pytest.raises(ValueError, match="lora_alpha is 7 there and 1"): lora.load(tmp_path)
    for k, v in lora.state_dict().items(): assert torch.equal(v, before[k])


@pytest.mark.parametrize("model, message", [
    (SimpleNamespace(text=nn.Linear(2, 2)), "built-in text encoder"),
    (None, "not frozen"), ("coca", "class token"), ("cosine", "more than plain scaled dot-product attention"),
])
def test_text_towers_that_cannot_work(model, message):
    clip = bundle(open_clip.CustomTextCLIP, **({"embed_cls": True} if model == "coca" else {}), **({"scaled_cosine_attn": True} if model == "cosine" else {}))
    if model is None: clip.model.requires_grad_(True)
    elif not isinstance(model, str): clip.model = model
    for build in (lambda: TextLoRA(clip, WORDS), lambda: PromptCLIP(clip, WORDS)):
        with pytest.raises(ValueError, match=message): build()


# both sides

@pytest.mark.parametrize("E", [1, 3])
def test_two_sided_starts_zero_shot_and_trains_everything(images, E):
    clip = bundle()
    both = two_sided(clip, E)
    zero_shot = clip.logit_scale * clip.model.encode_image(images, normalize=True) @ both.text_features.T
    for mode in (True, False): close(both.train(mode)(images), zero_shot.expand(E, -1, -1), 1e-4)
    F.cross_entropy(scramble(both).train()(images).flatten(0, 1), torch.arange(4).repeat(E)).backward()
    for name, p in both.named_parameters():
        if p.requires_grad: assert p.grad is not None and p.grad.abs().max() > 0, name
    sides = {name.split(".")[0] for name in both.trainable_parameters()}
    assert sides == {"image_model", "text_lora"} and both(images).shape == (E, 4, 4)


def test_text_is_encoded_once_in_evaluation_and_again_after_any_change(images):
    both, calls = two_sided(bundle()), []
    both.text_lora.register_forward_hook(lambda *_: calls.append(1))
    both.train()(images); both(images)
    assert len(calls) == 2                                                # fresh at every training step
    with torch.inference_mode(): first = both.eval()(images); both(images)
    assert len(calls) == 3                                                # once in evaluation
    optimizer = torch.optim.SGD(both.text_lora.parameters(), lr=1.)
    F.cross_entropy(both.train()(images)[0], torch.arange(4)).backward(); optimizer.step(); calls.clear()
    second = both.eval()(images)
    assert len(calls) == 1 and (first - second).abs().max() > 1e-4
    both.load_state_dict(two_sided(bundle()).state_dict())
    close(both(images), first); assert len(calls) == 2
    with torch.no_grad():
        for p in both.text_lora.parameters(): p.data.add_(0.5)            # behind the counter's back
    assert (both.train().eval()(images) - first).abs().max() > 1e-4


def test_kept_features_can_meet_autograd_later(images):
    both = two_sided(bundle())
    with torch.inference_mode(): both.eval()(images)
    both(images).sum().backward()                                         # an inference tensor could not be saved for this
    assert all(p.grad is None for p in both.text_lora.parameters())       # in evaluation the class features are constants


def test_image_model_answers_with_the_trained_words(images):
    both = scramble(two_sided(bundle(), 2)).eval()
    with torch.no_grad():
        logits = both(images)
        close(both.image_model(images), logits)
        weight, bias = both.linear_part()
        close(both.image_features(images) @ weight.T + bias, logits, 1e-4)
        plain = both.image_model.merged(1)
        close(both.image_model.logit_scale.exp() * plain.encode_image(images, normalize=True) @ both.text_features.T, logits[1], 1e-4)
    assert not both.text_features.requires_grad


def test_class_features_have_no_dropout_even_while_training():
    both = scramble(two_sided(bundle(), dropout=0.5))
    text = both.train().text_features
    assert both.text_lora.training and torch.equal(text, both.text_features) and torch.equal(text, both.eval().text_features)


def test_two_sided_folder(tmp_path, images):
    clip = bundle()
    both = scramble(two_sided(clip, 2)).eval()
    both.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expert_0", "expert_1", "text"]
    again = two_sided(clip, 2, seed=5).eval()
    again(images)                                                         # features of before must not survive
    with torch.no_grad(): close(again.load(tmp_path)(images), both(images), 0)
    theirs = peft.PeftModel.from_pretrained(split_text(clip), tmp_path / "text").eval()
    close(theirs.base_model.model.encode_text(clip.tokenizer([f"a photo of a {w}." for w in WORDS]), normalize=True), both.text_features)


def test_two_sided_in_lower_precision(images):
    clip = bundle()
    both, prompt = two_sided(clip), PromptCLIP(clip, WORDS)
    for model in (both, prompt):
        full = model.train()(images)
        with torch.autocast("cpu", torch.bfloat16): low = model(images); kept_ = model.eval()(images)
        assert low.dtype == kept_.dtype == torch.float32
        close(low, full, 0.5); low.sum().backward()


def test_two_sided_refuses():
    clip = bundle()
    both = two_sided(clip)
    with pytest.raises(ValueError, match="one list of classes"): TwoSidedCLIP(both.image_model, TextLoRA(clip, WORDS[:3]))
    both.image_model.head = nn.Identity()
    with pytest.raises(ValueError, match="has a head that learns"): TwoSidedCLIP(both.image_model, both.text_lora)


def test_kept_follows_the_mode():
    layer, calls = nn.Linear(2, 2), []
    def encode(): calls.append(1); return layer.weight * 1
    assert kept(layer.train(), encode).requires_grad and kept(layer, encode).requires_grad and len(calls) == 2
    layer.eval()
    assert kept(layer, encode) is kept(layer, encode) and not kept(layer, encode).requires_grad and len(calls) == 3
    assert np.allclose(kept(layer, encode).numpy(), layer.weight.detach().numpy())
