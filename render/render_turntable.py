"""Writes a turntable GIF of a textured body.

python render/render_turntable.py --texture outputs/texture.png --body anny --out turntable.gif
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from errors import UserError, exit_on_user_error
from images import open_image, texture_pixels
from render.turntable import save_gif, turntable_frames
from render.utils import load_body


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texture", required=True, help="square picture in the body's UV layout")
    parser.add_argument("--body", default="anny", help="anny or obj:PATH (default: %(default)s)")
    parser.add_argument("--out", required=True, help="GIF to write")
    parser.add_argument("--frames", type=int, default=36)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=384)
    args = parser.parse_args()

    with exit_on_user_error():
        if Path(args.out).suffix.lower() != ".gif":
            raise UserError(f"--out {args.out}: a turntable is a .gif")
        if min(args.frames, args.height, args.width) < 1:
            raise UserError("--frames, --height and --width must be 1 or more")
        image = open_image(args.texture)
        body = load_body(args.body)
        texture = (texture_pixels(image, max(image.size)) + 1) / 2
        save_gif(turntable_frames(body, texture, args.frames, args.height, args.width), args.out)
        print(args.out)


if __name__ == "__main__":
    main()
