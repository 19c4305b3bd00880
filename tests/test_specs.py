"""Specs are read before they are run: every cell is a valid config with a name of its own, and every claim points at cells that are there."""
import importlib.util
from pathlib import Path

import pytest
import yaml

from dmrs_nb.config import RunConfig
from dmrs_nb.data import DATASETS

ROOT = Path(__file__).resolve().parents[1]
SPECS = sorted((ROOT / "nbs" / "benchmarks" / "specs").glob("*.yaml"))
PAPERS = [p for p in SPECS if p.stem.startswith("paper_")]
RECIPES = """zero-shot linear-probe tip-adapter tip-adapter-f coop ce clip-lora lift weighted-ce focal class-balanced ldam-drw logit-adjusted posthoc-la
    crt tau-norm mixup cutmix remix cmo ride sade balpoe dmrs dmrs-official""".split()


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", ROOT / "tools" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stem(path): return path.stem


def read(path): return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SPECS, ids=stem)
def test_every_cell_is_a_valid_config_with_a_name_of_its_own(path, compare, tmp_path):
    spec = read(path)
    groups = spec.get("groups") or [spec]
    for group in spec.get("groups") or []: assert set(group) <= {"seeds", "base", "each", "runs"}, set(group)
    cells = compare.cells(spec, tmp_path)     # make_config for each: a ConfigError names what is wrong
    assert len({c.run_id for c in cells}) == len(cells) > 0 and not [c for c in cells if c.open]
    assert {c.data for c in cells} <= {*DATASETS, "folder"}
    assert {seed for g in groups for seed in g.get("seeds", spec.get("seeds"))} == {c.seed for c in cells}


@pytest.mark.parametrize("path", SPECS, ids=stem)
def test_no_field_is_written_twice_in_one_run(path):
    "YAML keeps the last of two equal keys without a word."
    class Strict(yaml.SafeLoader): pass
    def mapping(loader, node):
        own = [k.value for k, _ in node.value if k.value != "<<"]
        assert len(own) == len(set(own)), f"{path.name}, line {node.start_mark.line + 1}: a field is written twice"
        loader.flatten_mapping(node)
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)
    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    yaml.load(path.read_text(encoding="utf-8"), Strict)


@pytest.mark.parametrize("path", SPECS, ids=stem)
def test_every_claim_has_a_source_and_cells_that_answer_it(path, compare, tmp_path):
    spec = read(path)
    cells = [c.model_dump() for c in compare.cells(spec, tmp_path)] if spec.get("claims") else []
    for claim in spec.get("claims", []):
        assert {"figure", "gain", "metric", "cells", "source", "where"} <= set(claim) <= {"figure", "gain", "metric", "cells", "source", "where", "against", "note"}, claim
        assert claim["source"] and isinstance(claim["gain"], bool) and claim["metric"] in ("acc1", "many", "medium", "few", "mean_per_class_recall"), claim
        assert claim["figure"] is None or (isinstance(claim["figure"], float) and claim["where"]), "a figure says where it stands; an unknown one is null"
        assert set(claim["cells"]) <= set(RunConfig.model_fields) and [c for c in cells if all(c[k] == v for k, v in claim["cells"].items())], claim
        assert claim["gain"] == ("against" in claim), "a gain says over what"


@pytest.mark.parametrize("path", PAPERS, ids=stem)
def test_the_papers_grid_holds_every_recipe_under_the_published_settings(path, compare, tmp_path):
    cells = compare.cells(read(path), tmp_path)
    assert sorted((c.method, c.seed) for c in cells) == sorted((m, s) for m in RECIPES for s in range(3))
    for c in cells:
        assert (c.backbone, c.pretrained, c.split, c.imb_type, c.imb_factor, c.batch_size, c.device) == ("ViT-B-32-quickgelu", "openai", "published", "exp", .01, 16, "cuda")
        assert c.epochs == (0 if c.method in ("zero-shot", "tip-adapter") else 40) and c.data == path.stem.removeprefix("paper_")
        assert DATASETS[c.data].thresholds == (100, 20)


def test_the_abstracts_gains_are_kept_and_unknown_figures_have_their_place():
    known = {p.stem: [c["figure"] for c in read(p)["claims"] if c["figure"] is not None] for p in PAPERS}
    assert known == {"paper_resisc45": [6.7], "paper_rsd46": [2.0]}
    assert all(len(read(p)["claims"]) > 1 for p in PAPERS)
