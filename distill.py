"""Makes a checkpoint fast: a second LoRA with which 4 steps without guidance do what 20 with guidance did.

python distill.py --checkpoint checkpoints/joint/step-004400
python infer_uv.py --prompt "..." --checkpoint checkpoints/joint/step-004400 --fast

It trains on the checkpoint's own data set and is written into its folder, fast/. The same command goes on where it was
stopped.
"""

import argparse

from common.errors import exit_on_user_error
from training.stopping import before_the_first_step


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any key of the config can be set: --fast.windows=2 --training.fast.max_steps=500",
    )
    parser.add_argument("--checkpoint", help="of joint training (default: your newest one, or the embedded one)")
    return parser.parse_known_args()


def main():
    with exit_on_user_error():
        with before_the_first_step():
            args, unknown = parse_args()
            from config.configuration import Output, dotted_overrides
            from training.distilling import distill, fast_config  # takes seconds, which --help need not wait for

            cfg = fast_config(args.checkpoint, dotted_overrides(unknown))
        print(f"fast adapter: {distill(cfg, Output().out_dir)}")


if __name__ == "__main__":
    main()
