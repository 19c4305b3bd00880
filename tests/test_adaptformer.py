"AdaptFormer against a NumPy loop and a block written out with open_clip's parts; files, crops and what is refused."
import math
from types import SimpleNamespace

import dmrs_nb.compat  # noqa: F401
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from dmrs_nb.adaptformer import AdaptFormer, AdaptFormerCLIP, adapted_features, bottleneck_of, five_crops, tte_logits
from dmrs_nb.classifiers import CosineHead, LinearHead, make_head

C, D, W, L = 5, 16, 32, 3


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def open_clip_model(seed=0, block_type="custom", **vision):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(D, dict(image_size=28, layers=L, width=W, head_width=16, patch_size=7, block_type=block_type, **vision),
                               dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1), quick_gelu=True)
    return model.eval().requires_grad_(False)


def text(classes=C): return F.normalize(torch.randn(classes, D, generator=seeded(9)), dim=-1)
def images(n=4, seed=3): return torch.randn(n, 3, 28, 28, generator=seeded(seed))


def adapted(clip=None, head="cosine", classes=C, **kw):
    return AdaptFormerCLIP(SimpleNamespace(model=clip if clip is not None else open_clip_model()), text(classes),
                           make_head(head, text(classes), 25.), **kw)


def scramble(model, seed=1):
    g = seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


def test_block_is_the_loop():
    block, tokens = scramble(AdaptFormer(6, 3)), torch.randn(2, 4, 6, generator=seeded(2))
    p = {k: v.double().numpy() for k, v in block.state_dict().items()}
    for row, out in zip(tokens.double().numpy().reshape(-1, 6), block(tokens).detach().reshape(-1, 6).numpy()):
        u = (row - row.mean()) / math.sqrt(row.var() + 1e-5) * p["ln.weight"] + p["ln.bias"]
        low = [max(0., float(w @ u) + b) for w, b in zip(p["down_proj.weight"], p["down_proj.bias"])]
        np.testing.assert_allclose(out, p["scale"] * (p["up_proj.weight"] @ low + p["up_proj.bias"]), atol=1e-5)
    assert torch.autograd.gradcheck(block.double(), tokens.double().requires_grad_())


def test_block_starts_at_zero_and_from_its_generator():
    state = torch.get_rng_state()
    a, b, c = AdaptFormer(64, 16), AdaptFormer(64, 16, seeded(0)), AdaptFormer(64, 16, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.down_proj.weight, b.down_proj.weight) and not torch.equal(a.down_proj.weight, c.down_proj.weight)
    assert a.down_proj.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=.1)
    assert a(torch.randn(3, 64)).abs().max() == 0 and a.scale.item() == 1
    a(torch.randn(3, 64)).sum().backward()
    assert {k for k, p in a.named_parameters() if p.grad.abs().max() > 0} == {"up_proj.weight", "up_proj.bias"}
    with pytest.raises(ValueError, match="bottleneck is 0"): AdaptFormer(8, 0)


def test_bottleneck():
    for classes in (1, 2, 5, 12, 23, 24, 47, 48, 96, 100, 365, 1000, 8142):
        for layers in (1, 6, 12, 24): assert bottleneck_of(classes, layers) == 2 ** max(0, int(math.floor(math.log2(classes / (2 * layers)))))
    with pytest.raises(ValueError, match="both have to be at least 1"): bottleneck_of(5, 0)


def naive_features(visual, adapters, x):
    "open_clip's own parts, the adapter on the input of ln_2, every token to the end."
    x = visual._embeds(x)
    for i, block in enumerate(visual.transformer.resblocks):
        x = x + block.ls_1(block.attn(block.ln_1(x)))
        x = x + block.ls_2(block.mlp(block.ln_2(x))) + (adapters[str(i)](x) if str(i) in adapters else 0)
    return F.normalize(visual._pool(x)[0] @ visual.proj, dim=-1)


@pytest.mark.parametrize("pool_type", ["tok", "avg"])
@pytest.mark.parametrize("vision", [dict(), dict(ls_init_value=.5)], ids=["plain", "layer scale"])
@pytest.mark.parametrize("blocks", [None, 1, 2])
def test_features_and_gradients_are_those_of_the_written_block(pool_type, vision, blocks):
    model = scramble(adapted(open_clip_model(pool_type=pool_type, **vision), bottleneck=4, blocks=blocks)).train()
    assert list(model.adapters) == [str(i) for i in range(L)][-(blocks or L):]
    naive, ours = naive_features(model.visual, model.adapters, images()), model.image_features(images())
    assert ours.shape == (1, 4, D)
    torch.testing.assert_close(ours[0], naive, rtol=1e-5, atol=1e-5)
    assert (naive - model.visual(images())).abs().max() > 1e-3
    grads = []
    for features in (naive, ours[0]):
        model.zero_grad()
        F.cross_entropy(model.head(features), torch.tensor([0, 1, 2, 3])).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name in grads[0]:
        assert grads[1][name].abs().max() > 0, name
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("head", ["cosine", "linear"])
def test_identity_at_the_start(head):
    clip = open_clip_model()
    model = adapted(clip, head)
    with torch.no_grad():
        frozen = clip.encode_image(images(), normalize=True)
        torch.testing.assert_close(model.image_features(images())[0], frozen, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(images())[0], 25 * frozen @ text().T, rtol=1e-4, atol=1e-4)
    weight, bias = model.linear_part()
    torch.testing.assert_close(model.image_features(images()) @ weight.T + bias, model(images()))


@pytest.mark.parametrize("bottleneck, blocks", [(None, None), (4, 2), (1, 1)])
def test_trainable_parameters_by_formula(bottleneck, blocks):
    model = adapted(classes=30, bottleneck=bottleneck, blocks=blocks)
    b, n = bottleneck or 4, blocks or L               # 30 classes, 3 blocks: 2^⌊log₂ 5⌋ = 4
    assert model.bottleneck == b and sum(model.trainable_parameters().values()) == n * (W * (2 * b + 3) + b + 1) + 30 * D
    assert all(n.startswith(("adapters.", "head.")) for n in model.trainable_parameters())


def test_training_leaves_the_clip_alone():
    clip = open_clip_model()
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    model = adapted(clip).train()
    assert model.training and model.adapters.training and not any(m.training for m in model.visual.modules())
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], .05, momentum=.9)
    losses = []
    for _ in range(15):
        sgd.zero_grad()
        loss = F.cross_entropy(model(images())[0], torch.tensor([0, 1, 2, 3]))
        loss.backward(); sgd.step(); losses.append(loss.item())
    assert losses[-1] < losses[0] / 2 and all(torch.equal(v, before[k]) for k, v in clip.state_dict().items())
    assert all(p.grad is None for p in clip.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in clip.modules())


def test_nothing_is_kept_below_the_first_adapter():
    def kept(blocks):
        bytes_ = {}
        model = adapted(blocks=blocks)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        def pack(t):
            if t.untyped_storage().data_ptr() not in own: bytes_[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): y = model(images())
        assert y.requires_grad
        return sum(bytes_.values())
    assert kept(1) < kept(2) < kept(3)


def test_float32_logits_under_autocast():
    model = scramble(adapted())
    with torch.autocast("cpu", torch.bfloat16): logits = model(images())
    assert logits.dtype == torch.float32 and logits.shape == (1, 4, C)
    assert (logits - model(images())).abs().max() < 1


def test_exports_as_one_graph():
    model = scramble(adapted()).eval()
    graph = torch.export.export(model, (images(),), strict=False).module()
    torch.testing.assert_close(graph(images()), model(images()))


def test_file_round_trip(tmp_path):
    model = scramble(adapted())
    model.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adaptformer.safetensors", "head.safetensors"]
    again = adapted(generator=seeded(5))
    assert again.load(tmp_path) is again
    assert torch.equal(again(images()), model(images()))


@pytest.mark.parametrize("kw, sentence", [
    (dict(bottleneck=2), "0.down_proj.bias is (1,) there and (2,) here"), (dict(blocks=2), "0.down_proj.bias is unknown here"),
    (dict(head="linear"), "bias is missing there"), (dict(classes=6), "weight is (5, 16) there and (6, 16) here")],
    ids=["bottleneck", "blocks", "head", "classes"])
def test_a_misfit_is_refused_and_changes_nothing(kw, sentence, tmp_path):
    scramble(adapted()).save(tmp_path)
    model = adapted(**kw)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="does not fit") as e: model.load(tmp_path)
    assert sentence in str(e.value)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_damaged_file(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="cannot be read as adapters"): model.load(tmp_path)
    model.save(tmp_path)
    (tmp_path / "adaptformer.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read as adapters"): model.load(tmp_path)


def test_refusals():
    for blocks in (0, 4):
        with pytest.raises(ValueError, match=f"blocks is {blocks}; the image encoder has 3 blocks"): adapted(blocks=blocks)
    with pytest.raises(ValueError, match="bottleneck is 0"): adapted(bottleneck=0)
    clip = SimpleNamespace(model=open_clip_model())
    with pytest.raises(ValueError, match="head has a weight of shape"): AdaptFormerCLIP(clip, text(), CosineHead(text(6)))
    with pytest.raises(ValueError, match="expected \\(classes, 16\\)"): AdaptFormerCLIP(clip, text()[:, :8], LinearHead(text(), 25.))
    with pytest.raises(ValueError, match="not frozen"): adapted(open_clip_model().requires_grad_(True))
    with pytest.raises(ValueError, match="nn.MultiheadAttention"): adapted(open_clip_model(block_type=None))


@pytest.mark.parametrize("side, expand", [(28, 3), (28, 4), (96, 10), (224, 24), (29, 7)])
def test_crops_are_torchvisions(side, expand):
    x = torch.rand(2, 3, side, side, generator=seeded(1))
    large = F.interpolate(x, size=side + expand, mode="bilinear", align_corners=False)
    crops = five_crops(x, expand)
    assert crops.shape == (5, 2, 3, side, side) and torch.equal(crops, torch.stack(v2.FiveCrop(side)(large)))


def test_crops_by_default_and_without_room():
    x = images()
    assert torch.equal(five_crops(x), five_crops(x, 3)) and torch.equal(five_crops(x, 0), x.expand(5, -1, -1, -1, -1))
    flat = torch.full((1, 3, 8, 8), .3)
    torch.testing.assert_close(five_crops(flat, 2), flat.expand(5, -1, -1, -1, -1))
    with pytest.raises(ValueError, match="expand is -1"): five_crops(x, -1)
    for bad in (x[..., :20], x[0]):
        with pytest.raises(ValueError, match="expected \\(B, 3, S, S\\)"): five_crops(bad)


def test_answers_are_mean_logits():
    model = scramble(adapted()).eval()
    with torch.no_grad():
        torch.testing.assert_close(tte_logits(model, images(), 0), model(images()))
        by_loop = sum(model(crop) for crop in five_crops(images(), 4)) / 5
        torch.testing.assert_close(tte_logits(model, images(), 4), by_loop)
    two = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 2))          # a model without experts: (B, C)
    assert tte_logits(two, images()).shape == (4, 2)
    x = images().requires_grad_()
    tte_logits(two, x).sum().backward()
    assert x.grad.abs().max() > 0
