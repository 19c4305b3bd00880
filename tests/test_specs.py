"""Specs are read before they are run: every cell is a valid config with a name of its own, and every claim points at cells that are there."""
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from dmrs_nb.config import RunConfig
from dmrs_nb.data import DATASETS
from dmrs_nb.grid import open_grid, read_spec

ROOT = Path(__file__).resolve().parents[1]
SPECS = sorted((ROOT / "nbs" / "benchmarks" / "specs").glob("*.yaml"))
PAPERS = [p for p in SPECS if p.stem.startswith("paper_")]
RECIPES = """zero-shot linear-probe tip-adapter tip-adapter-f coop ce clip-lora lift weighted-ce focal class-balanced ldam-drw logit-adjusted posthoc-la
    crt tau-norm mixup cutmix remix cmo ride sade balpoe dmrs dmrs-official""".split()


def stem(path): return path.stem


def read(path): return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SPECS, ids=stem)
def test_every_cell_is_a_valid_config_with_a_name_of_its_own(path, tmp_path):
    spec, grid = read_spec(path), open_grid(path, tmp_path)     # a GridError names what is wrong
    cells = grid.cells
    assert len({c.run_id for c in cells}) == len(cells) > 0
    assert {c.fields["data"] for c in cells} <= {*DATASETS, "folder"} and grid.notebook == ROOT / "nbs" / "benchmarks" / "01_run.ipynb"
    assert {seed for g in spec.groups or [spec] for seed in g.seeds or spec.seeds} == {c.fields["seed"] for c in cells}


@pytest.mark.parametrize("path", [p for p in SPECS if (ROOT / "nbs" / "benchmarks" / "results" / p.stem / "runs.csv").exists()], ids=stem)
def test_the_stored_results_of_a_spec_are_those_of_its_cells(path, tmp_path):
    stored = pd.read_csv(ROOT / "nbs" / "benchmarks" / "results" / path.stem / "runs.csv").run_id
    assert stored.is_unique and set(stored) <= {c.run_id for c in open_grid(path, tmp_path).cells}


@pytest.mark.parametrize("path", SPECS, ids=stem)
def test_every_claim_has_a_source_and_cells_that_answer_it(path, tmp_path):
    spec = read(path)
    cells = [c.fields for c in open_grid(path, tmp_path).cells] if spec.get("claims") else []
    for claim in spec.get("claims", []):
        assert {"figure", "gain", "metric", "cells", "source", "where"} <= set(claim) <= {"figure", "gain", "metric", "cells", "source", "where", "against", "note"}, claim
        assert claim["source"] and isinstance(claim["gain"], bool) and claim["metric"] in ("acc1", "many", "medium", "few", "mean_per_class_recall"), claim
        assert claim["figure"] is None or (isinstance(claim["figure"], float) and claim["where"]), "a figure says where it stands; an unknown one is null"
        assert set(claim["cells"]) <= set(RunConfig.model_fields) and [c for c in cells if all(c[k] == v for k, v in claim["cells"].items())], claim
        assert claim["gain"] == ("against" in claim), "a gain says over what"


@pytest.mark.parametrize("path", PAPERS, ids=stem)
def test_the_papers_grid_holds_every_recipe_under_the_published_settings(path, tmp_path):
    cells = [SimpleNamespace(**c.fields) for c in open_grid(path, tmp_path).cells]
    assert sorted((c.method, c.seed) for c in cells) == sorted((m, s) for m in RECIPES for s in range(3))
    for c in cells:
        assert (c.backbone, c.pretrained, c.split, c.imb_type, c.imb_factor, c.batch_size, c.device) == ("ViT-B-32-quickgelu", "openai", "published", "exp", .01, 16, "cuda")
        assert c.epochs == (0 if c.method in ("zero-shot", "tip-adapter") else 40) and c.data == path.stem.removeprefix("paper_")
        assert DATASETS[c.data].thresholds == (100, 20)


def test_the_abstracts_gains_are_kept_and_unknown_figures_have_their_place():
    known = {p.stem: [c["figure"] for c in read(p)["claims"] if c["figure"] is not None] for p in PAPERS}
    assert known == {"paper_resisc45": [6.7], "paper_rsd46": [2.0]}
    assert all(len(read(p)["claims"]) > 1 for p in PAPERS)
