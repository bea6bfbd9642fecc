"""What --seam-fix does to generated textures: colour jumps across seams before and after, and what stays as it was.

    python benchmarks/seams.py                       # eight textures of the embedded checkpoint, at 1024 texels

Seam error: the mean colour difference across paired texels of the seams over the same across other edges (1: no seam to
be seen). The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from scipy.ndimage import distance_transform_edt

from common.pictures import pixels_from_image
from evaluation.procedural import held_out_paintings
from models.checkpoints import EMBEDDED_CHECKPOINT
from models.pipeline import TexturePipeline
from render.seams import REACH, fix_seams, seam_error, seam_points
from render.uv_space import fill_outside, texture_pixels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=EMBEDDED_CHECKPOINT)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--size", type=int, default=1024)
    args = parser.parse_args()
    pipeline = TexturePipeline.from_pretrained(args.checkpoint)
    body, rows = pipeline.body, []
    _, touched = seam_points(body, args.size)
    is_far = torch.from_numpy(distance_transform_edt(~touched) > REACH)
    prompts = [outfit.prompt for outfit, _ in held_out_paintings(args.count)]
    for texture in pipeline(prompts, seeds=range(args.count), size=args.size):
        mask = pixels_from_image(texture)[3] > 0
        before = (texture_pixels(texture, args.size) + 1) / 2
        began = time.perf_counter()
        after = fill_outside(fix_seams(body, before), mask)
        seconds = time.perf_counter() - began
        changed = (after - before)[:, mask & is_far].square().mean()
        psnr = float(-10 * changed.log10())  # infinite where nothing changed
        errors = seam_error(body, before), seam_error(body, after)
        rows.append((*errors, psnr, seconds))
        jumps = "seam error {:.2f} -> {:.2f}".format(*errors)
        print(f"{jumps}, PSNR of texels farther than {REACH}: {psnr:.1f} dB, {seconds:.1f} s")
    names = ("seam_error_before", "seam_error_after", "psnr_inside", "seconds")
    print(json.dumps({name: statistics.median(values) for name, values in zip(names, zip(*rows))}))


if __name__ == "__main__":
    main()
