"""Trains text to UV and image to UV together: batches of both through one LoRA-adapted UNet.

python joint.py --config config/train_config.yaml --training.joint.max_steps=200
"""

from common.errors import exit_on_user_error
from config.configuration import parse_training_args
from training.loop import train


def main():
    with exit_on_user_error():
        cfg, options = parse_training_args(__doc__)
        train(cfg, "joint", **options)


if __name__ == "__main__":
    main()
