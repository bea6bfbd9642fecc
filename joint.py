"""Trains text to UV and image to UV together: batches of both through one LoRA-adapted UNet.

python joint.py --config config/train_config.yaml --training.joint.max_steps=200
"""

from configuration import parse_training_args
from errors import exit_on_user_error
from training import train


def main():
    with exit_on_user_error():
        cfg, options = parse_training_args(__doc__)
        train(cfg, "joint", **options)


if __name__ == "__main__":
    main()
