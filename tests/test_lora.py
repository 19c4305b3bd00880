"What chapter 11 does not show: every projection against PEFT, dropout, names in whole towers, faults."
import copy
import math

import dmrs_nb.compat  # noqa: F401
import open_clip
import peft
import pytest
import torch
from torch import nn

from dmrs_nb.lora import (TARGETS, LoRALinear, add_lora, check_blocks, check_targets, init_lora_A, join_in_proj, merge_lora, split_in_proj)


def tower(block_type="custom", seed=0, **vision):
    torch.manual_seed(seed)
    cfg = dict(image_size=28, layers=3, width=32, head_width=16, patch_size=7, block_type=block_type, **vision)
    return open_clip.CLIP(16, cfg, dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1), quick_gelu=True).visual.eval()


def images(n=3): return torch.randn(n, 3, 28, 28, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", TARGETS)
def test_each_projection_agrees_with_peft(name):
    base = tower().requires_grad_(False)
    ours = add_lora(copy.deepcopy(base), r=3, lora_alpha=6, target_modules=(name,))
    for block in base.transformer.resblocks: block.attn = split_in_proj(block.attn)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[f"transformer.resblocks.{i}.{TARGETS[name]}" for i in range(3)])
    theirs = peft.get_peft_model(base, config).eval()
    g = torch.Generator().manual_seed(1)
    pairs = list(zip([p for n, p in ours.named_parameters() if "lora_" in n], [p for n, p in theirs.named_parameters() if "lora_" in n]))
    assert len(pairs) == 6
    with torch.no_grad():
        for mine, yours in pairs: mine.copy_(0.1 * torch.randn(mine.shape, generator=g)); yours.copy_(mine)
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-5, atol=1e-6)
    for model in (ours, theirs): model(images()).square().mean().backward()
    for mine, yours in pairs: torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-4, atol=1e-6)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {n for n, p in ours.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("blocks, adapted", [(None, {0, 1, 2}), ([-1], {2}), ([0, 2], {0, 2})])
def test_blocks(blocks, adapted):
    model = add_lora(tower(), r=2, lora_alpha=2, target_modules=("v",), blocks=blocks)
    assert {int(n.split(".")[2]) for n, p in model.named_parameters() if p.requires_grad} == adapted


def test_a_whole_tower_goes_back_to_open_clip_names():
    plain, model = tower(), add_lora(tower(), r=2, lora_alpha=4, target_modules=tuple(TARGETS))
    state = join_in_proj(merge_lora(model).state_dict())
    assert state.keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items(): assert torch.equal(state[key], value), key


def test_no_bias_in_the_input_projection():
    attention = open_clip.transformer.Attention(16, num_heads=2, qkv_bias=False)
    split, x = split_in_proj(attention), torch.randn(2, 5, 16)
    torch.testing.assert_close(split(x), attention(x), rtol=1e-5, atol=1e-6)
    assert set(join_in_proj(split.state_dict())) == {"in_proj_weight", "out_proj.weight", "out_proj.bias"}
    assert split_in_proj(split) is split


def test_normalised_queries_and_keys_are_kept():
    model = tower(qk_norm=True)
    before = model(images())
    torch.testing.assert_close(add_lora(model, r=2, lora_alpha=4, target_modules=("q", "k"))(images()), before, rtol=1e-5, atol=1e-5)


def test_dropout_is_on_the_adapter_only_and_keeps_the_mean():
    base = nn.Linear(6, 6)
    lora = LoRALinear(base, r=6, lora_alpha=6, lora_dropout=0.5)
    with torch.no_grad(): lora.lora_A.copy_(torch.eye(6)); lora.lora_B.copy_(torch.eye(6))
    x = torch.ones(20000, 6)
    torch.manual_seed(0)
    update = (lora.train()(x) - base(x)).detach()
    assert set(update.round().unique().tolist()) == {0., 2.}
    assert abs(update.mean() - 1) < 0.02
    torch.testing.assert_close(lora.eval()(x), base(x) + x)


def test_initialisation_is_a_function_of_the_generator_alone():
    torch.manual_seed(1); first = init_lora_A(4, 9, torch.Generator().manual_seed(5))
    torch.manual_seed(2); second = init_lora_A(4, 9, torch.Generator().manual_seed(5))
    assert torch.equal(first, second) and first.abs().max() <= 1 / math.sqrt(9)
    before, plain = torch.get_rng_state(), tower()
    torch.set_rng_state(before)
    model = add_lora(plain, r=2, lora_alpha=2)
    assert torch.equal(torch.get_rng_state(), before)
    A = [p for n, p in model.named_parameters() if n.endswith("lora_A")]
    assert not torch.equal(A[0], A[1])


def test_a_merged_layer_owns_its_memory():
    attention = open_clip.transformer.Attention(8, num_heads=2)
    before = attention.in_proj_weight.clone()
    lora = LoRALinear(split_in_proj(attention).k, r=1, lora_alpha=1)
    with torch.no_grad(): lora.lora_B.fill_(1.)
    lora.merge()
    assert torch.equal(attention.in_proj_weight, before)


def test_gradcheck():
    torch.manual_seed(0)
    lora = LoRALinear(nn.Linear(4, 3), r=2, lora_alpha=3).double()
    with torch.no_grad(): lora.lora_B.normal_()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, A, B: torch.func.functional_call(lora, {"lora_A": A, "lora_B": B}, x), (x, lora.lora_A, lora.lora_B))


@pytest.mark.parametrize("make, words", [
    (lambda: check_blocks(tower("default")), ["Block 0", "nn.MultiheadAttention", "block_type='custom'"]),
    (lambda: check_blocks(nn.Linear(2, 2)), ["Linear", "VisionTransformer"]),
    (lambda: check_blocks(tower(attentional_pool=True)), ["class-token or average pooling"]),
    (lambda: check_blocks(tower(scale_heads=True)), ["Block 0", "head scales"]),
    (lambda: check_targets(()), ["target_modules is empty"]),
    (lambda: check_targets(("cproj",)), ["'cproj'", "did you mean 'c_proj'"]),
    (lambda: add_lora(tower(), r=0, lora_alpha=1), ["r (the rank of the adapter) is 0"]),
    (lambda: add_lora(tower(), r=1, lora_alpha=1, lora_dropout=-0.1), ["lora_dropout is -0.1"]),
    (lambda: split_in_proj(nn.Linear(2, 2)), ["found Linear"]),
])
def test_faults_are_sentences(make, words):
    with pytest.raises(ValueError) as error: make()
    for word in words: assert word in str(error.value)
