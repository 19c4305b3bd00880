"""The contract: each backbone gets images prepared as its authors prepared them. Checked against open_clip's own transform, torchvision's parts and transformers', on real photographs, without network."""
import io
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dmrs_nb.compat  # before open_clip
import open_clip
from dmrs_nb import clip as C
from dmrs_nb.checkpoints import CHECKPOINTS, Recognised, recognise
from dmrs_nb.data import Preprocess, backbone_preprocess, check_preprocess, decode, eval_batches, eval_transform, scan
from open_clip.transform import PreprocessCfg, image_transform, image_transform_v2, merge_preprocess_dict

ASSETS = Path(__file__).parents[1] / "dmrs_nb" / "assets"
SIZES = [(96, 96), (131, 77), (77, 131), (256, 256), (300, 299)]     # of the files: as they are, oblong, larger and smaller than a backbone's
HALF, IMAGENET = (.5,) * 3, ((.485, .456, .406), (.229, .224, .225))


@pytest.fixture(scope="module")
def photographs():
    "Real aerial photographs in five sizes; the oblong ones are cut, not squashed."
    def of(name, size):
        with zipfile.ZipFile(ASSETS / "ucmerced-96.zip") as z: image = Image.open(io.BytesIO(z.read(f"ucmerced/{name[:-2]}/{name}.jpg"))).convert("RGB")
        scale = max(size) / 96
        return image.resize((round(96 * scale),) * 2, Image.Resampling.LANCZOS).crop((0, 0, *size))
    return [of(name, size) for name, size in zip(("harbor03", "airplane12", "forest40", "intersection21", "tenniscourt07"), SIZES)]


def ours(preprocess, image): return eval_transform(preprocess)(torch.tensor(preprocess.fit(image)).permute(2, 0, 1))


def same_pixels(preprocess, theirs, images, atol=1e-6):
    "Every value of every image, after normalisation, within `atol`."
    for image in images: torch.testing.assert_close(ours(preprocess, image), theirs(image), rtol=0, atol=atol)


def decided(seen, backbone):
    "What load_clip would choose, without building the model."
    config, size = C._model_config(backbone), open_clip.get_model_config(backbone)["vision_cfg"]["image_size"]
    return C._decide(seen, size if isinstance(size, int) else size[0], config, {})


@pytest.fixture
def offline(monkeypatch):
    "Tags are looked up, nothing is downloaded."
    monkeypatch.setattr(C, "download_pretrained", lambda entry: "weights")
    monkeypatch.setattr(C, "read_state_dict", lambda path: ({}, {}))


def of_tag(backbone, tag):
    "Preprocess and reasons that load_clip chooses for a tag."
    return decided(C._from_tag(backbone, C._model_config(backbone), tag, True)[1], backbone)


def as_open_clip_builds_it(backbone, tag):
    "open_clip's own: defaults, then the tag's entry, then the model's image size."
    size = open_clip.get_model_config(backbone)["vision_cfg"]["image_size"]
    cfg = merge_preprocess_dict(merge_preprocess_dict(asdict(PreprocessCfg()), open_clip.get_pretrained_cfg(backbone, tag)), dict(size=size))
    return PreprocessCfg(**{k: v for k, v in cfg.items() if k in asdict(PreprocessCfg())})


TAGS = [("ViT-B-32-quickgelu", "openai"), ("ViT-L-14-336-quickgelu", "openai"), ("ViT-B-32", "laion2b_s34b_b79k"), ("ViT-L-14", "laion2b_s32b_b82k"),
        ("ViT-B-32", "datacomp_xl_s13b_b90k"), ("ViT-B-16-SigLIP", "webli"), ("ViT-B-16-SigLIP2-256", "webli"), ("ViT-L-14-CLIPA", "datacomp1b"),
        ("MobileCLIP-S1", "datacompdr"), ("EVA02-B-16", "merged2b_s8b_b131k"), ("ViTamin-B", "datacomp1b")]


@pytest.mark.parametrize("backbone, tag", TAGS, ids="-".join)
def test_a_tag_gets_open_clips_own_transform_to_the_last_bit(backbone, tag, offline, photographs):
    preprocess, facts = of_tag(backbone, tag)
    same_pixels(preprocess, image_transform_v2(as_open_clip_builds_it(backbone, tag), is_train=False), photographs)
    for field in ("mean", "std", "interpolation", "resize_mode"): assert "open_clip's table of tags" in facts[field], facts[field]


def test_every_tag_of_open_clip_gets_its_own_fields(offline):
    kinds = set()
    for backbone, tag in open_clip.list_pretrained():
        entry, wants_quick = open_clip.get_pretrained_cfg(backbone, tag), open_clip.get_pretrained_cfg(backbone, tag).get("quick_gelu", False)
        if bool(C._model_config(backbone).get("quick_gelu")) != bool(wants_quick): continue     # refused, see test_checkpoints
        theirs = as_open_clip_builds_it(backbone, tag)
        size = theirs.size if isinstance(theirs.size, int) else theirs.size[0]
        want = Preprocess(size, tuple(theirs.mean), tuple(theirs.std), theirs.interpolation, theirs.resize_mode)
        check_preprocess(of_tag(backbone, tag)[0], want)
        kinds.add((want.mean, want.std, want.interpolation, want.resize_mode))
    assert len(kinds) >= 7, "open_clip's tags are prepared in at least seven ways; one for all would be wrong"


PATTERNS = {c.name: c.files[0].replace("*", "x") for c in CHECKPOINTS.values() if c.tag is None and c.name != C.TINY}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_file_of_a_remote_sensing_clip_gets_what_its_authors_use(name, photographs):
    c = CHECKPOINTS[name]
    with torch.device("meta"): state = open_clip.CLIP(**open_clip.get_model_config(c.backbone)).state_dict()     # names and shapes, no numbers
    preprocess, facts = decided(recognise(state, Path(PATTERNS[name] + ".pt"), {}), c.backbone)
    assert "because the shapes and the name of the file are those of" in facts["mean"]
    size = 224     # RemoteCLIP, RS5M and SkyScript all call open_clip.create_model_and_transforms(<model>), whose transform this is
    same_pixels(preprocess, image_transform(size, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD), photographs[:3])


@pytest.mark.parametrize("name", [c.name for c in CHECKPOINTS.values() if c.tag])
def test_the_table_of_checkpoints_and_open_clips_say_the_same(name, offline):
    c = CHECKPOINTS[name]
    check_preprocess(of_tag(c.backbone, c.tag)[0], Preprocess(c.image_size, c.mean, c.std, c.interpolation))


def test_openais_own_five_lines(offline, photographs):
    from torchvision import transforms as T
    theirs = T.Compose([T.Resize(224, T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor(),
                        T.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))])
    same_pixels(of_tag("ViT-B-32-quickgelu", "openai")[0], theirs, photographs)


def test_transformers_prepares_openais_model_the_same_way(offline, photographs):
    transformers = pytest.importorskip("transformers")
    try: theirs = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil()
    except AttributeError: theirs = transformers.CLIPImageProcessor()
    as_tensor = lambda image: torch.as_tensor(np.asarray(theirs(image, return_tensors="np")["pixel_values"][0]))
    same_pixels(of_tag("ViT-B-32-quickgelu", "openai")[0], as_tensor, photographs, atol=1.01 / 255 / 0.26)     # a grey level: another rounding


def test_from_files_to_features_nothing_is_done_twice_or_forgotten(photographs, tmp_path):
    for k, image in enumerate(photographs):
        for name in ("a", "b"):
            (tmp_path / "d" / name).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "d" / name / f"{k}.png")
    clip, items = C.load_clip(), scan(tmp_path / "d")
    cache = decode(items, clip.preprocess, tmp_path / "cache", progress=False)
    features = C.encode_images(clip, eval_batches(cache, np.arange(len(items)), 4, eval_transform(clip.preprocess)))
    model, _, theirs = open_clip.create_model_and_transforms(C.TINY, pretrained=str(ASSETS / f"{C.TINY}.safetensors"))
    with torch.no_grad(): want = model.eval().encode_image(torch.stack([theirs(image) for image in photographs]), normalize=True)
    torch.testing.assert_close(features, torch.cat([want, want]), rtol=0, atol=1e-5)


WRONG = dict(mean=IMAGENET[0], std=HALF, interpolation="bilinear", resize_mode="squash")


@pytest.mark.parametrize("field, value", WRONG.items())
def test_each_field_is_seen_in_pixels_and_caught_by_name(field, value, offline, photographs):
    right = of_tag("ViT-B-32-quickgelu", "openai")[0]
    wrong = replace(right, **{field: value})
    assert (ours(wrong, photographs[1]) - ours(right, photographs[1])).abs().max() > .01, "an oblong photograph shows it"
    with pytest.raises(ValueError, match=f"preprocess.{field}: found"): check_preprocess(wrong, right)


def test_a_square_photograph_of_the_right_size_hides_geometry(photographs):
    right = Preprocess(96)
    for field in ("interpolation", "resize_mode"):
        assert torch.equal(ours(replace(right, **{field: WRONG[field]}), photographs[0]), ours(right, photographs[0]))


def test_what_the_kit_cannot_do_the_same_way_is_refused():
    cfg = asdict(PreprocessCfg())
    assert backbone_preprocess(cfg) == Preprocess(224)
    with pytest.raises(ValueError, match="resize_mode 'longest'"): backbone_preprocess(cfg | dict(resize_mode="longest"))
    with pytest.raises(ValueError, match="expected a square"): backbone_preprocess(cfg | dict(size=(224, 448)))


def test_nothing_known_means_openais_and_says_so():
    preprocess, facts = decided(Recognised(["ViT-B-32"]), "ViT-B-32")
    assert preprocess == Preprocess(224) and "it is OpenAI's, and nothing is known of the weights" in facts["mean"]
