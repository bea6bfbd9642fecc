"""Builds ATLAS-Large: renders of each texture from random cameras.

python -m atlas_dataset.build_atlas_large --textures DIR --prompts FILE --body obj:smpl_uv.obj --out atlas_large
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import datasets

from atlas_dataset.building import build_dataset
from atlas_dataset.dataset import HuggingFaceATLAS, ProceduralTextures
from errors import UserError, exit_on_user_error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--textures", required=True, help="folder of pictures, copy or hub name of ATLAS, or procedural:COUNT"
    )
    parser.add_argument("--prompts", help="text file, a prompt a line in the textures' order")
    parser.add_argument("--body", default="anny", help="anny or obj:PATH (default: %(default)s)")
    parser.add_argument("--views", type=int, default=5, help="renders of each texture (default: %(default)s)")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    datasets.disable_progress_bars()

    with exit_on_user_error():
        if min(args.views, args.height, args.width) < 1 or args.seed < 0:
            raise UserError("--views, --height and --width must be 1 or more, --seed 0 or more")
        kind, _, count = args.textures.partition(":")
        if kind == "procedural":
            if not count.isdigit():
                raise UserError(f"--textures {args.textures}: write procedural:COUNT")
            source = ProceduralTextures(int(count), seed=args.seed)
        else:
            source = HuggingFaceATLAS(args.textures, args.prompts)
        out = build_dataset(source, args.body, args.views, args.out, args.height, args.width, args.seed)
        print(f"{len(source)} textures and {len(source) * args.views} renders in {out}")


if __name__ == "__main__":
    main()
