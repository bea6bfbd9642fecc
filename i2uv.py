"""Trains image to UV: one LoRA-adapted UNet, told by pictures through an aligner.

python i2uv.py --config config/train_config.yaml --training.i2uv.max_steps=200
"""

from common.errors import exit_on_user_error
from config.configuration import parse_training_args
from training.loop import train


def main():
    with exit_on_user_error():
        cfg, options = parse_training_args(__doc__)
        train(cfg, "i2uv", **options)


if __name__ == "__main__":
    main()
