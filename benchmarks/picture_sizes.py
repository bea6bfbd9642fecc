"""Does a checkpoint follow pictures better when its image encoder reads them larger, with interpolated positions?

    python benchmarks/picture_sizes.py               # the embedded checkpoint: 128 padded to a square, 192, 256, 384

The same held-out people as evaluate.py's, the same pictures and seeds; only `model.image_size` changes. The last line
is JSON.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from evaluation.making import Job, make_batch
from evaluation.procedural import (
    ROWS_AT_ONCE,
    SIZE,
    Tally,
    colour_right,
    held_out_paintings,
    resized,
    score_pixels,
    view_of,
)
from lora_utils import merge_lora
from models.checkpoints import EMBEDDED_CHECKPOINT, load_checkpoint


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=EMBEDDED_CHECKPOINT)
    parser.add_argument("--limit", type=int, default=64, help="pictures (default: %(default)s)")
    sizes = ["null", "192", "256", "384"]
    parser.add_argument("--sizes", nargs="+", default=sizes, help="null: the encoder's own square")
    args = parser.parse_args()
    truths = held_out_paintings(args.limit)
    views = [view_of(painting, index) for index, (_, painting) in enumerate(truths)]
    measures = {}
    for size in args.sizes:
        trained, tally = load_checkpoint(args.checkpoint, [f"model.image_size={size}"]), Tally()
        merge_lora(trained.base)
        jobs = [Job("i2uv", number, None) for number in range(len(views))]
        pictures, textures = [picture for picture, _ in views], []
        for start in range(0, len(jobs), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            textures += (resized(make_batch(trained, jobs[rows], pictures[rows]), SIZE) + 1) / 2
        for (outfit, painting), (_, seen), texture in zip(truths, views, textures):
            colour_right(tally, "i2uv", outfit, painting, texture)
            score_pixels(tally, painting, seen, texture)
        measures[size] = tally.nested()["i2uv"]
        print(size, json.dumps(measures[size]), flush=True)
    print(json.dumps(measures))


if __name__ == "__main__":
    main()
