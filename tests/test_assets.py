"""What is shipped: cards and checksums, citation, the site's table of contents, and a wheel that works outside the clone."""
import configparser
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "dmrs_nb" / "assets"
SHIPPED = {"MODEL_CARD.md", "DATA_CARD.md", "tiny-aid-96.json", "tiny-aid-96.safetensors", "ucmerced-96.zip"}


def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.mark.parametrize("card, names", [("MODEL_CARD.md", ["tiny-aid-96.safetensors", "tiny-aid-96.json"]), ("DATA_CARD.md", ["ucmerced-96.zip"])])
def test_checksums_in_cards(card, names):
    text = (ASSETS / card).read_text(encoding="utf-8")
    stated = re.findall(r"sha256.*?`([0-9a-f]{64})`", text)
    assert stated == [hashlib.sha256((ASSETS / n).read_bytes()).hexdigest() for n in names]
    assert f"({(ASSETS / names[0]).stat().st_size:,} bytes)" in text


def test_data_card_counts():
    from collections import Counter
    members = zipfile.ZipFile(ASSETS / "ucmerced-96.zip").namelist()
    counts = Counter(m.split("/")[1] for m in members)
    text = (ASSETS / "DATA_CARD.md").read_text(encoding="utf-8")
    assert f"{len(members):,} in {len(counts)} classes: 100 a class, and {counts['airplane']} airplanes" in text
    assert ", ".join(sorted(counts)) in text
    assert {n for c, n in counts.items() if c != "airplane"} == {100}


def test_model_card_counts():
    from safetensors import safe_open
    text = (ASSETS / "MODEL_CARD.md").read_text(encoding="utf-8")
    config = json.loads((ASSETS / "tiny-aid-96.json").read_text(encoding="utf-8"))
    with safe_open(ASSETS / "tiny-aid-96.safetensors", "np") as f:
        numbers = sum(f.get_tensor(k).size for k in f.keys())
        table = f.get_tensor("token_embedding.weight")
    assert f"{int(numbers / 1e5) / 10} million parameters" in text
    assert f"{table.size / 1e6:.1f} million are the token table" in text
    assert f"{int((table != 0).any(1).sum()):,} tokens were seen in training" in text
    assert f"{config['vision_cfg']['image_size']} px, patches of {config['vision_cfg']['patch_size']} px" in text
    assert f"joint space of {config['embed_dim']} dimensions" in text


def test_nothing_else_is_shipped():
    assert {p.name for p in ASSETS.iterdir()} == SHIPPED
    assert (ASSETS / "ucmerced-96.zip").stat().st_size <= 10_000_000


def test_registered_checksum_is_the_cards():
    import dmrs_nb.compat  # noqa: F401
    from dmrs_nb.data import DATASETS
    assert DATASETS["ucmerced"].sha256 in (ASSETS / "DATA_CARD.md").read_text(encoding="utf-8")


def test_citation():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cff)
    assert cff["version"] == settings()["version"] and cff["license"] == "Apache-2.0"
    paper = cff["preferred-citation"]
    assert paper["doi"] == "10.1016/j.jag.2025.104623" and (paper["volume"], str(paper["start"]), paper["year"]) == (141, "104623", 2025)
    assert [a["family-names"] for a in paper["authors"]] == ["Wang", "Zhang", "Zhao", "Hu", "Ma"]
    for entry in [paper, *cff["references"]]: assert {"type", "title", "authors"} <= set(entry)


def test_version_and_licence_are_one():
    import dmrs_nb
    assert dmrs_nb.__version__ == settings()["version"]
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def entries(contents):
    for entry in contents:
        if isinstance(entry, dict): yield from entries(entry["contents"])
        else: yield entry


def notebooks():
    "Every notebook of the book, as nbdev finds them: names that start with _ or . are not part of it."
    found = (p.relative_to(ROOT / "nbs") for p in (ROOT / "nbs").rglob("*.ipynb"))
    return {p.as_posix() for p in found if not any(part[0] in "_." for part in p.parts)}


def test_site_lists_every_chapter_once_and_in_order():
    site = yaml.safe_load((ROOT / "nbs" / "_quarto.yml").read_text(encoding="utf-8"))
    listed = list(entries(site["website"]["sidebar"]["contents"]))
    assert sorted(set(listed)) == sorted(listed), "an entry is listed twice"
    missing, forgotten = sorted(set(listed) - notebooks()), sorted(notebooks() - set(listed))
    assert not missing, f"_quarto.yml lists {missing}, which nbs/ does not hold"
    assert not forgotten, f"nbs/ holds {forgotten}, which _quarto.yml does not list"
    chapters = [e for e in listed if re.match(r"\d\d_", e)]
    assert chapters == sorted(chapters)


def test_site_is_one_file_and_its_styles_are_there():
    assert (ROOT / "nbs" / "_quarto.yml").read_bytes() == (ROOT / "_quarto.yml").read_bytes()
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    assert site["project"]["type"] == "website"
    for name in [site["format"]["html"]["css"], *site["metadata-files"]]: assert (ROOT / "nbs" / name).is_file(), name
    generated, facts = yaml.safe_load((ROOT / "nbs" / "nbdev.yml").read_text(encoding="utf-8")), settings()
    assert generated["website"]["description"] == facts["description"] and generated["website"]["repo-url"] == facts["git_url"]
    assert generated["project"]["output-dir"] == facts["doc_path"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "A folder with nothing but the package, put there from a wheel that was built from a copy of the tracked files."
    base = tmp_path_factory.mktemp("wheel")
    copy, wheels, target = base / "copy", base / "wheels", base / "target"
    copy.mkdir()
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists(): shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "dmrs_nb", copy / "dmrs_nb", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    env = {**os.environ, "PIP_NO_INPUT": "1"}
    for command in (["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(wheels), str(copy)], None):
        command = command or ["install", "--no-deps", "--no-index", "--no-compile", "--target", str(target), *map(str, wheels.glob("*.whl"))]
        done = subprocess.run(pip + command, cwd=base, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return next(wheels.glob("*.whl")), target


def outside(target, code, cwd, **env):
    "Run Python in another folder, where only the installed package can be found, and read what it prints."
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env={**clean, "PYTHONPATH": str(target), **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_wheel_holds_assets_licence_and_every_module(installed):
    wheel, _ = installed
    held = {n: z for z in [zipfile.ZipFile(wheel)] for n in z.namelist()}
    assert {f"dmrs_nb/assets/{n}" for n in SHIPPED} <= set(held)
    assert {f"dmrs_nb/{p.name}" for p in (ROOT / "dmrs_nb").glob("*.py")} <= set(held)
    assert any(n.endswith("LICENSE") for n in held)
    metadata = next(z.read(n).decode() for n, z in held.items() if n.endswith("METADATA"))
    assert f"Version: {settings()['version']}" in metadata and "Requires-Python: >=3.11" in metadata
    assert not any(n.startswith(("tests", "nbs")) for n in held)


def test_wheel_works_outside_the_clone(installed, tmp_path):
    wheel, target = installed
    code = """
import json, sys, dmrs_nb
light = not ({"torch", "open_clip", "nbdev", "fastcore"} & set(sys.modules))
import dmrs_nb.compat
from dmrs_nb.clip import load_clip, encode_text
from dmrs_nb.data import load_items
clip, items = load_clip(), load_items()
print(json.dumps(dict(file=dmrs_nb.__file__, light=light, kit=[n for n in ("nbdev", "fastcore", "execnb") if n in sys.modules],
    images=len(items), classes=len(items.classnames), root=str(items.root), shape=list(encode_text(clip, ["river", "forest"]).shape))))
"""
    lying = lambda: {p: p.stat().st_mtime_ns for p in (target / "dmrs_nb" / "assets").rglob("*")}
    before = lying()
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    elsewhere.mkdir()
    found = outside(target, code, elsewhere, DMRS_NB_CACHE=str(cache), OMP_NUM_THREADS="1")
    assert Path(found["file"]).is_relative_to(target) and found["light"] and found["kit"] == []
    assert (found["images"], found["classes"], found["shape"]) == (2099, 21, [2, 192])
    assert Path(found["root"]).is_relative_to(cache)
    assert not list(elsewhere.iterdir()), "the package wrote into the folder it was called from"
    assert lying() == before, "the package wrote beside its assets"
