"""Writes turntables and contact sheets of a textured body.

python render/render_turntable.py --texture outputs/texture.png --body anny --out turntable.gif
python render/render_turntable.py --texture outputs --format sheet --pose walking --out sheets
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from PIL import ImageColor

from common.errors import UserError, exit_on_user_error
from common.files import write_whole
from common.pictures import encode_image, open_image, picture_files
from render.rigs import load_rig
from render.turntable import SUFFIXES, contact_sheet, save_turntable, turntable_frames
from render.uv_space import texture_pixels

FORMATS = {"gif": ".gif", "webp": ".webp", "mp4": ".mp4", "frames": "", "sheet": ".png"}
TEXTURE_HELP = "picture in the body's UV layout, or a folder of them"
BODY_HELP = "anny, obj:PATH, smpl:PATH, smplh:PATH or smplx:PATH (default: %(default)s)"
OUT_HELP = ".gif, .webp, .mp4, or .png for a contact sheet; a folder for frames or for many textures"
POSE_HELP = "rest; standing, walking, reaching, sitting, 'arms out' (anny); an AMASS file (smpl)"


def jobs(texture: Path, out: Path, chosen: str | None) -> list[tuple[Path, Path]]:
    """(texture, file or folder to write) for one texture, or for each in a folder.

    Raises UserError when there is none, or when --out's suffix is not the format's.
    """
    if not texture.is_dir():
        if chosen and FORMATS[chosen] != out.suffix.lower():
            raise UserError(f"--out {out}: --format {chosen} is written to {FORMATS[chosen] or 'a folder'}")
        if out.suffix.lower() not in SUFFIXES:
            raise UserError(f"--out {out}: write .gif, .webp, .mp4, .png (a contact sheet), or a folder (frames)")
        return [(texture, out)]
    return [(path, out / (path.stem + FORMATS[chosen or "gif"])) for path in picture_files(texture)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texture", required=True, type=Path, help=TEXTURE_HELP)
    parser.add_argument("--body", default="anny", help=BODY_HELP)
    parser.add_argument("--out", required=True, type=Path, help=OUT_HELP)
    parser.add_argument("--format", choices=FORMATS, help="for a folder of textures (default: gif)")
    parser.add_argument("--pose", default="rest", help=POSE_HELP)
    parser.add_argument("--seed", type=int, default=0, help="of the pose")
    parser.add_argument("--frames", type=int, default=36)
    parser.add_argument("--size", default="512x384", help="height x width in pixels (default: %(default)s)")
    parser.add_argument("--background", default="#edf0f5", help="colour, as in CSS (default: %(default)s)")
    args = parser.parse_args()

    with exit_on_user_error():
        try:
            height, width = (int(side) for side in args.size.lower().split("x"))
            background = tuple(channel / 255 for channel in ImageColor.getrgb(args.background)[:3])
        except ValueError:
            raise UserError(
                f"--size {args.size} --background {args.background}: write --size 512x384 and a colour such as white"
            ) from None
        if min(args.frames, height, width) < 1 or args.seed < 0:
            raise UserError("--frames and --size must be 1 or more, --seed 0 or more")
        work = jobs(args.texture, args.out, args.format)
        rig = load_rig(args.body)
        body = rig.posed(rig.named_pose(args.pose, args.seed))
        options = dict(height=height, width=width, background=background)
        for source, target in work:
            image = open_image(source)
            texture = (texture_pixels(image, max(image.size)) + 1) / 2
            if target.suffix.lower() == ".png":
                write_whole(target, encode_image(contact_sheet(body, texture, **options), format="PNG"))
            else:
                save_turntable(turntable_frames(body, texture, args.frames, **options), target)
            print(target)


if __name__ == "__main__":
    main()
