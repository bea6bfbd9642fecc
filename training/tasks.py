"""The tasks, as data: what each conditions the UNet on. A third task is one more line here and its section in
config/configuration.py."""

CONDITIONS = {"t2uv": ("text",), "i2uv": ("image",), "joint": ("text", "image")}
LOSS_NAME = {"text": "t2uv", "image": "i2uv"}  # of a condition, in logs: loss/t2uv, val/i2uv
