"""The data set: Noto emoji with their names, out of an npm package, as one sheet of pictures and one list.

    python -m examples.emoji.data --package emoji-datasource-google-16.0.0.tgz

The package is what `npm pack emoji-datasource-google@16.0.0` fetches. The sheet and the list that it makes are kept
beside this file, so that training and evaluation need no download.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent
SIZE = 64  # Pixels, both ways: the size of the package's pictures.
COLUMNS = 32  # Of the sheet.
# Faces, hearts, hands, animals, food and plain geometry: 28 of the package's subcategories.
SUBCATEGORIES = frozenset(
    [
        "face-smiling",
        "face-affection",
        "face-tongue",
        "face-hand",
        "face-neutral-skeptical",
        "face-sleepy",
        "face-unwell",
        "face-hat",
        "face-glasses",
        "face-concerned",
        "face-negative",
        "cat-face",
        "monkey-face",
        "heart",
        "hand-fingers-open",
        "hand-fingers-partial",
        "hand-single-finger",
        "hand-fingers-closed",
        "animal-mammal",
        "animal-bird",
        "animal-amphibian",
        "animal-reptile",
        "animal-marine",
        "animal-bug",
        "food-fruit",
        "food-vegetable",
        "food-prepared",
        "geometric",
    ]
)
SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium dark skin tone",
    "1F3FF": "dark skin tone",
}
# Combinations of things that training shows apart: a colour and a form, an expression and a cat's face.
HELD_OUT = frozenset(
    (
        "green heart",
        "purple heart",
        "large blue square",
        "large orange circle",
        "large purple square",
        "smiling cat face with heart-shaped eyes",
        "crying cat face",
        "weary cat face",
    )
)
TONE_PERIOD = 5  # Every fifth pair of a hand and a skin tone is held out, shifted from hand to hand.


@dataclass(frozen=True)
class Emoji:
    """One picture's words.

    Args:
        name: what the picture shows, in lower case; the prompt that asks for it.
        group: the package's subcategory, such as "animal-bird".
        heldout: whether training leaves it out, as a new combination of what it shows apart.
    """

    name: str
    group: str
    heldout: bool


def load() -> tuple[np.ndarray, list[Emoji]]:
    """Return the pictures, (n, 64, 64, 3) uint8 on white, and their words, in one order."""
    emojis = [Emoji(**words) for words in json.loads((FOLDER / "emoji.json").read_text(encoding="utf-8"))]
    with Image.open(FOLDER / "sheet.webp") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    rows = pixels.shape[0] // SIZE
    tiles = pixels.reshape(rows, SIZE, COLUMNS, SIZE, 3).swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3)
    return tiles[: len(emojis)], emojis


def build(package: Path, folder: Path) -> None:
    """Write `sheet.webp` and `emoji.json` to `folder` from the package's archive."""
    with tarfile.open(package) as archive:
        entries = json.load(_member(archive, "emoji.json"))
        chosen = list(_choose(entries))
        tiles = [_picture(archive, file) for _, file in chosen]
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIZE, rows * SIZE), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % COLUMNS * SIZE, index // COLUMNS * SIZE))
    sheet.save(folder / "sheet.webp", quality=92, method=6)
    lines = ",\n".join(json.dumps(asdict(emoji)) for emoji, _ in chosen)
    (folder / "emoji.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _choose(entries: list[Mapping]) -> Iterator[tuple[Emoji, str]]:
    """Yield words and file of every picture of the set, in the package's order of themes."""
    hands = 0
    for entry in sorted(entries, key=lambda entry: entry["sort_order"]):
        group = entry["subcategory"]
        if group not in SUBCATEGORIES or not entry["has_img_google"]:
            continue
        name = entry["name"].lower().replace(",", "")
        yield Emoji(name, group, heldout=name in HELD_OUT), entry["image"]
        tones = {code: entry.get("skin_variations", {}).get(code) for code in SKIN_TONES}
        for number, (code, variant) in enumerate(tones.items()):
            if variant and variant["has_img_google"]:
                heldout = (hands + number) % TONE_PERIOD == 0
                yield Emoji(f"{name} {SKIN_TONES[code]}", group, heldout), variant["image"]
        hands += any(tones.values())


def _picture(archive: tarfile.TarFile, file: str) -> Image.Image:
    with Image.open(_member(archive, f"img/google/64/{file}")) as drawn:
        drawn = drawn.convert("RGBA").resize((SIZE, SIZE))
        white = Image.new("RGBA", drawn.size, "white")
        return Image.alpha_composite(white, drawn).convert("RGB")


def _member(archive: tarfile.TarFile, name: str) -> io.BufferedReader:
    file = archive.extractfile(f"package/{name}")
    if file is None:
        raise ValueError(f"the archive has no package/{name}; fetch it by: npm pack emoji-datasource-google@16.0.0")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the emoji data set from its npm package.")
    parser.add_argument("--package", type=Path, required=True, help="archive that npm pack fetched")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of sheet.webp and emoji.json")
    args = parser.parse_args()
    build(args.package, args.out)


if __name__ == "__main__":
    main()
