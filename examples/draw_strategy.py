"""Draw which tokens of a picture each stage of a strategy keeps.

python examples/draw_strategy.py [PICTURE] [--strategy NAME] [--out FILE]
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from vflowopt import CompressedImage, Picture, Runtime, Strategy
from vflowopt.demo import model_path, picture_path

AS_IT_IS, RECYCLED = (60, 120, 200), (214, 84, 34)
"""Frames of tokens: blue ones are kept as they are, orange ones are averages of dropped tokens."""


def draw(picture: Picture, image: CompressedImage) -> Image.Image:
    """A row of panels for each token grid (overview, mosaic of tiles), a panel for each stage."""
    seen = Image.fromarray(picture.pixels)
    faded = Image.blend(seen, Image.new("RGB", seen.size, "white"), 0.85)
    grids = sorted(set(image.layout.grid.tolist()))
    sheet = Image.new("RGB", (len(image.kept) * seen.width, len(grids) * seen.height))
    recycled = set(image.recycled.tolist())
    for row, grid in enumerate(grids):
        for column, kept in enumerate(image.kept):
            panel = faded.copy()
            pen = ImageDraw.Draw(panel)
            for token in kept.tolist():
                if image.layout.grid[token] != grid or image.layout.structural[token]:
                    continue
                left, top, right, bottom = (round(side) for side in image.layout.boxes[token].tolist())
                if left < right and top < bottom:
                    panel.paste(seen.crop((left, top, right, bottom)), (left, top))
                    frame = (left, top, right - 1, bottom - 1)
                    pen.rectangle(frame, outline=RECYCLED if token in recycled else AS_IT_IS)
            sheet.paste(panel, (column * seen.width, row * seen.height))
    return sheet


def main() -> None:
    """Compress a picture by a strategy, and save what is kept of it as a PNG file."""
    parser = argparse.ArgumentParser(description="Draw which tokens of a picture each stage of a strategy keeps.")
    parser.add_argument("picture", nargs="?", type=Path, default=picture_path() / "cat.png")
    parser.add_argument("--strategy", default="diverse-10", help="one of the model's (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("kept.png"), help="default: %(default)s")
    arguments = parser.parse_args()

    runtime = Runtime.load(model_path(), kv_budget=1 << 20)
    strategies = {"full": Strategy.full(), **runtime.model.strategies}
    if arguments.strategy not in strategies:
        parser.error(f"there is no strategy {arguments.strategy!r}; choose one of {', '.join(strategies)}")
    picture = Picture.decode(arguments.picture.read_bytes())
    (image,) = runtime.compress([picture], strategies[arguments.strategy])
    draw(picture, image).save(arguments.out)
    kept = ", ".join(str(len(stage)) for stage in image.kept)
    print(f"{arguments.out}: of {image.tokens} tokens the stages keep {kept}")


if __name__ == "__main__":
    main()
