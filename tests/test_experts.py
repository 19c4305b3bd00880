"Golden numbers, a naive loop over PEFT models, and the faults of adapter folders."
import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dmrs_nb.compat  # noqa: F401
import open_clip
from open_clip.transformer import Attention

from dmrs_nb.experts import DenseExperts, MultiExpertCLIP, expert_attention
from dmrs_nb.lora import split_in_proj
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
