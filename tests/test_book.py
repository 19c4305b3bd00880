"The book as a whole: what every notebook and the package promise."
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts))
MODULES = sorted((ROOT / "dmrs_nb").glob("*.py"))


def name(path): return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_opens_with_a_title_and_one_sentence(path):
    first = next(c for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    assert re.match(r"# .+\n\n> .+", first.source), "expected '# Title', an empty line and '> one sentence'"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_is_small_and_has_no_errors_or_personal_paths(path):
    assert path.stat().st_size < 700_000
    notebook = nbformat.read(path, 4)
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.output_type == "stream" and o.name == "stderr"], "stored output on the error stream"
    text = json.dumps([c.source for c in notebook.cells]) + json.dumps([o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs])
    assert not re.search(r"(?<![\w.…])/(?:home|root|Users|work|tmp)/\w", text)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "nbs"], ids=name)
def test_exported_cells_are_short(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and "#| export" in cell.source: assert len(cell.source.splitlines()) <= 41, cell.source.splitlines()[:3]


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "nbs"], ids=name)
def test_figures_have_alt_text(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and any("image/png" in o.get("data", {}) for o in cell.outputs): assert "#| fig-alt:" in cell.source, cell.source[:80]


def imported(module):
    "Top-level names that a module imports anywhere, and the chapters among them."
    tree = ast.parse(module.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name.split(".")[0] if not a.name.startswith("dmrs_nb.") else "." + a.name.split(".")[1] for a in node.names)
        elif isinstance(node, ast.ImportFrom): yield ("." + (node.module or "").split(".")[0]) if node.level else (node.module or "").split(".")[0]


@pytest.mark.parametrize("module", [m for m in MODULES if m.name != "_modidx.py"], ids=name)
def test_package_does_not_import_development_tools(module):
    assert not {"nbdev", "fastcore", "execnb", "ghapi", "pytest", "sklearn", "hypothesis"} & set(imported(module))


def test_imports_run_down_the_chapter_list():
    order = [re.sub(r"^\d+_", "", p.stem) for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))]
    for module in MODULES:
        if module.stem not in order: continue
        below = [n[1:] for n in imported(module) if n.startswith(".") and n[1:] in order and order.index(n[1:]) >= order.index(module.stem)]
        assert not below, f"{module.name} imports {below}, which come later in the book"


def test_import_is_light():
    code = "import time; t = time.perf_counter(); import dmrs_nb, sys; print(time.perf_counter() - t, [m for m in ('torch', 'nbdev', 'fastcore', 'pandas') if m in sys.modules])"
    seconds, heavy = min(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(" ", 1) for _ in range(3))
    assert float(seconds) < 0.3 and heavy.strip() == "[]"


def test_readme_is_what_the_index_notebook_gives():
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "readme.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
