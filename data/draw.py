"""Draws one of the embedded scenes, and prints the document that goes with it.

python -m data.draw scene.png [--index 7] [--held-out] [--size 48] [--seed 0]
"""

import argparse
import random
from pathlib import Path

from data.config import ImageSpec
from data.scene_text import document
from data.scenes import HELD_OUT_START, draw, make_scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="image file to write")
    parser.add_argument("--index", type=int, default=0, help="number of the scene (default: 0)")
    parser.add_argument("--held-out", action="store_true", help="a scene that training never shows")
    parser.add_argument("--size", type=int, default=48, help="side of a tile in pixels (default: 48, that of tiny.py)")
    parser.add_argument("--seed", type=int, default=0, help="data.seed of the run (default: 0)")
    options = parser.parse_args()
    index = options.index + (HELD_OUT_START if options.held_out else 0)
    scene = make_scene(options.seed, index, ImageSpec(options.size, tokens_per_tile=4, max_tiles=4))
    draw(scene).save(options.path)
    print("".join(piece.text for piece in document(scene, random.Random(f"text/{options.seed}/{index}"))), end="")


if __name__ == "__main__":
    main()
