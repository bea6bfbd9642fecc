"""Trains text to UV and image to UV together: batches of both through one LoRA-adapted UNet.

python joint.py --config config/train_config.yaml --training.joint.max_steps=200
"""

from common.errors import exit_on_user_error
from training.stopping import before_the_first_step


def main():
    with exit_on_user_error():
        with before_the_first_step():
            from config.configuration import parse_training_args

            cfg, options = parse_training_args(__doc__)
            from training.loop import train  # takes seconds, which --help need not wait for
        train(cfg, "joint", **options)


if __name__ == "__main__":
    main()
