"""Learns one person or one garment from a few UV textures, or from pictures: an adapter of less than two megabytes.

python personalise.py --examples textures/ --name sks --class "a man"
python infer_uv.py --prompt "sks in a red hoodie" --adapter adapters/sks

The examples' captions are NAME.txt beside NAME.png, if any; the name stands in them for the class. Training stops by
itself, and the step with the best measures is kept. The same command goes on where it was stopped.
"""

import argparse
from pathlib import Path

from common.errors import UserError, exit_on_user_error
from training.stopping import before_the_first_step


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any key of the config can be set: --personal.r=16 --training.personal.learning_rate=5e-4",
    )
    parser.add_argument("--examples", required=True, help="a folder of 1 to 20 textures of one person or garment")
    parser.add_argument("--pictures", action="store_true", help="the examples are pictures of a person, not textures")
    parser.add_argument("--name", required=True, help="a new word for prompts, such as sks")
    parser.add_argument("--class", required=True, dest="class_prompt", help='what it is one of, such as "a man"')
    parser.add_argument("--base-checkpoint", help="of joint training (default: your newest one, or the embedded one)")
    parser.add_argument("--class-images", help="textures of the class to keep, instead of what the base makes of it")
    parser.add_argument("--steps", type=int, help="train so many, and keep the last (default: stops by itself)")
    parser.add_argument("--out", type=Path, help="the adapter's folder (default: adapters/NAME)")
    return parser.parse_known_args()


def main():
    with exit_on_user_error():
        with before_the_first_step():
            args, unknown = parse_args()
            if args.steps is not None and args.steps < 1:
                raise UserError(f"--steps {args.steps}: give 1 or more")
            from config.configuration import dotted_overrides
            from training.personalising import personal_config, personalise  # takes seconds, which --help need not

            cfg = personal_config(
                args.base_checkpoint,
                args.examples,
                args.name,
                args.class_prompt,
                args.class_images,
                args.steps,
                dotted_overrides(unknown),
            )
        print(personalise(cfg, args.out or Path("adapters") / cfg.personal.word, args.pictures))


if __name__ == "__main__":
    main()
