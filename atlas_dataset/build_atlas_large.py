"""Builds ATLAS-Large: renders of each texture in random poses, from random cameras, in random light.

python -m atlas_dataset.build_atlas_large --textures DIR --prompts FILE --body obj:smpl_uv.obj --out atlas_large

What the renders show is data.render of the configuration: --data.render.full_body=1 shows the whole body each time,
--data.render.poses=AMASS_DIR poses an SMPL body. Several GPUs or machines: accelerate launch --multi_gpu
--num_processes 8 -m atlas_dataset.build_atlas_large ... with the same arguments.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import datasets

from atlas_dataset.building import build_dataset, verify_dataset
from atlas_dataset.dataset import INFO_FILE
from atlas_dataset.prompts import LAYOUTS
from common import processes
from common.errors import UserError, exit_on_user_error, exit_when_stopped
from common.files import push_folder
from config.configuration import DEFAULT_CONFIG, dotted_overrides, load_config
from embedded.sources import is_procedural, open_textures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--textures", help="folder of pictures, copy or hub name of ATLAS, or procedural:COUNT")
    parser.add_argument("--prompts", help=f"{LAYOUTS} (default: what lies with the textures)")
    bodies = "anny, obj:PATH, smpl:PATH, smplh:PATH or smplx:PATH (default: %(default)s)"
    parser.add_argument("--body", default="anny", help=bodies)
    parser.add_argument("--views", type=int, default=5, help="of each texture; 0: none (default: %(default)s)")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="only the first so many textures")
    parser.add_argument("--licence", default="unknown", help="of the textures, stored with each row")
    parser.add_argument("--workers", type=int, help="rendering processes (default: one a core, none on CUDA)")
    parser.add_argument("--verify", action="store_true", help="build nothing; decode every picture of --out")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the finished data set")
    parser.add_argument("--config", help="YAML file whose data.render is used")
    args, overrides = parser.parse_known_args()
    datasets.disable_progress_bars()

    with exit_on_user_error(), exit_when_stopped("the same command goes on after the last whole shard"):
        if args.verify:
            counts = verify_dataset(args.out)
            print(f"{args.out} is whole: {counts['textures']} textures and {counts['renders']} renders")
            return
        if args.textures is None:
            raise UserError("--textures is missing: name a folder of pictures, a copy of ATLAS, or procedural:COUNT")
        if min(args.height, args.width) < 1 or min(args.seed, args.views, args.workers or 0) < 0:
            raise UserError("--height and --width must be 1 or more, --seed, --views and --workers 0 or more")
        if args.limit is not None and args.limit < 1:
            raise UserError("--limit must be 1 or more")
        render = load_config(args.config or DEFAULT_CONFIG, dotted_overrides(overrides)).data.render
        source = open_textures(args.textures, args.prompts, seed=args.seed, limit=args.limit)
        if is_procedural(args.textures) and args.body != source.body:
            raise UserError(f"--body {args.body}: procedural textures are painted on {source.body}")
        processes.say(f"first texture: {source.pair(0)}\nlast texture:  {source.pair(len(source) - 1)}")
        picture = (args.height, args.width, args.seed, render, args.licence)
        out = build_dataset(source, args.body, args.views, args.out, *picture, args.workers)
        if not json.loads((out / INFO_FILE).read_text())["complete"]:
            print(f"{out}: this process's share is done, others are at work")
            return
        skipped = len(json.loads((out / "skipped.json").read_text()))
        textures = len(source) - skipped
        note = f"; {skipped} skipped, see {out / 'skipped.json'}" if skipped else ""
        print(f"{textures} textures and {textures * args.views} renders in {out}{note}")
        if args.push_to_hub:
            push_folder(out, args.push_to_hub, "dataset")


if __name__ == "__main__":
    main()
