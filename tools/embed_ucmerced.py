"""Make `dmrs_nb/assets/ucmerced-96.zip`: UC Merced as an image folder at 96 px.

    python tools/embed_ucmerced.py FOLDER_OF_CLASS_FOLDERS

The result is the same byte for byte for the same images and the same Pillow.
"""
import hashlib
import io
import sys
import zipfile
from pathlib import Path

from PIL import Image

SIZE, QUALITY = 96, 88
TARGET = Path(__file__).parents[1] / "dmrs_nb" / "assets" / "ucmerced-96.zip"


def encode(path):
    "One image as a 96 px JPEG."
    buffer = io.BytesIO()
    Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()


def main(root):
    files = sorted(p for p in Path(root).glob("*/*") if p.suffix.lower() in {".jpg", ".jpeg", ".tif", ".tiff", ".png"})
    if not files: sys.exit(f"{root}: found no class folders with images; expected {root}/<class>/<image>")
    with zipfile.ZipFile(TARGET, "w", zipfile.ZIP_STORED) as z:
        for path in files:
            info = zipfile.ZipInfo(f"ucmerced/{path.parent.name}/{path.stem}.jpg", date_time=(2010, 11, 1, 0, 0, 0))
            z.writestr(info, encode(path))
    print(f"{TARGET}: {len(files)} images, {TARGET.stat().st_size:,} bytes, sha256 {hashlib.sha256(TARGET.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    main(sys.argv[1])
