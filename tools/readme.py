"""Make README.md from nbs/index.ipynb.

    python tools/readme.py            write README.md and its pictures
    python tools/readme.py --check    exit 1 when README.md is not what the notebook gives

Quarto is not needed: nbconvert does it. Pictures go to nbs/images/.
"""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
INDEX, README, IMAGES = ROOT / "nbs" / "index.ipynb", ROOT / "README.md", ROOT / "nbs" / "images"


def convert():
    "Markdown of the notebook, and its pictures by name: code with `echo: false` is left out, alt text is put in."
    notebook = nbformat.read(INDEX, 4)
    alt = [m[1] for c in notebook.cells if c.cell_type == "code" for m in re.finditer(r'#\| fig-alt: "(.+)"', c.source)]
    for cell in notebook.cells:
        if cell.cell_type != "code": continue
        cell.metadata["hide"] = "#| echo: false" in cell.source
        cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
        for output in cell.outputs: output.get("data", {}).pop("text/html", None)
        if cell.metadata["hide"]: cell.source = ""
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    pictures = {f"readme_{i}.png": data for i, (_, data) in enumerate(sorted(resources["outputs"].items()))}
    for (old, _), new, words in zip(sorted(resources["outputs"].items()), pictures, alt): text = text.replace(f"![png]({old})", f"![{words}](nbs/images/{new})")
    text = re.sub(r"```(python)?\s*```", "", text)                  # code that is not shown
    text = re.sub(r"^[ \t]+(?=!\[|$)", "", text, flags=re.M)
    text = re.sub(r"\]\((?!https?:|nbs/|#|\.\./)([\w./-]+)\)", r"](nbs/\1)", text).replace("](../", "](")
    return "<!-- made from nbs/index.ipynb by tools/readme.py -->\n\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", pictures


if __name__ == "__main__":
    text, pictures = convert()
    if "--check" in sys.argv:
        same = README.exists() and README.read_text(encoding="utf-8") == text and all((IMAGES / n).exists() and (IMAGES / n).read_bytes() == d for n, d in pictures.items())
        sys.exit(None if same else "README.md is not what nbs/index.ipynb gives; run python tools/readme.py")
    README.write_text(text, encoding="utf-8")
    IMAGES.mkdir(exist_ok=True)
    for name, data in pictures.items(): (IMAGES / name).write_bytes(data)
    print(f"{README.relative_to(ROOT)}: {len(text):,} characters, {len(pictures)} pictures")
