"""A small network that says of each pixel of a picture whether it is body, where on the body, and in which light.

Trained on renders of procedurally dressed Anny, whose exact answer the rasteriser knows: see
`embedded/pretrain/body_map.py`. For photographs of real people it is a guess; who has a fit brings it.
"""

from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError, reason
from common.pictures import prepare_image
from render.bodies import Body
from render.projection import Sighting, sight_map

MAP_SIZE = (192, 144)  # of the picture that it reads: height, width
CENTRE, SCALE = (0.0, 0.8, 0.1), 0.5  # metres: what places on the resting body are told relative to
CHANNELS = (24, 48, 72, 96, 128)  # at 1/2, 1/4 ... 1/32 of the picture's size
OUTPUTS = 7  # whether it is body (logit), where (3), and the light there (3, logarithm)
FOLDER = "body_map"  # of a base


class Block(nn.Module):
    """A convolution and one beside it, residual."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.enter = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.norm = nn.GroupNorm(outputs // 8, outputs)
        self.turn = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        features = self.enter(features)
        return features + self.turn(F.silu(self.norm(features)))


class BodyMap(ModelMixin, ConfigMixin):
    """pixel_values (B, 3, H, W) in [-1, 1], sides multiples of 16 → (B, OUTPUTS, H, W): a U-Net whose deepest features
    are joined by their mean, so that every pixel knows of the whole picture."""

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = CHANNELS):
        super().__init__()
        sides = [3, *channels]
        self.down = nn.ModuleList(Block(a, b, stride=2) for a, b in zip(sides, channels))
        self.whole = nn.Linear(channels[-1], channels[-1])
        self.middle = Block(channels[-1], channels[-1])
        ups = list(zip(channels[:0:-1], channels[-2::-1]))
        self.up = nn.ModuleList(Block(below + beside, beside) for below, beside in ups)
        self.head = nn.Conv2d(channels[0], OUTPUTS * 4, 3, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        features, beside = pixel_values, []
        for block in self.down:
            features = block(features)
            beside.append(features)
        features = self.middle(features + self.whole(features.mean((2, 3)))[:, :, None, None])
        for block, skipped in zip(self.up, beside[-2::-1]):
            larger = F.interpolate(features, size=skipped.shape[-2:], mode="bilinear", align_corners=False)
            features = block(torch.cat([larger, skipped], dim=1))
        return F.pixel_shuffle(self.head(F.silu(features)), 2)

    @torch.no_grad()
    def read(self, image: Image.Image) -> tuple[Tensor, Tensor, Tensor]:
        """Of a picture: places on the resting body (H, W, 3) metres, whether it is body (H, W) bool, and the light
        there (H, W, 3)."""
        pixels = prepare_image(image, MAP_SIZE)[None].to(self.device, self.dtype)
        told = self(pixels).float().cpu()
        # Back from the middle of the padded picture: the inverse of `prepare_image`.
        scale = max(image.height / MAP_SIZE[0], image.width / MAP_SIZE[1])
        height, width = max(image.height, round(MAP_SIZE[0] * scale)), max(image.width, round(MAP_SIZE[1] * scale))
        told = F.interpolate(told, size=(height, width), mode="bilinear", align_corners=False)[0]
        top, left = (height - image.height) // 2, (width - image.width) // 2
        told = told[:, top : top + image.height, left : left + image.width].permute(1, 2, 0)
        return told[..., 1:4] * SCALE + torch.tensor(CENTRE), told[..., 0] > 0, told[..., 4:].exp()

    def sight(self, image: Image.Image, body: Body, size: int) -> Sighting:
        """Where a picture shows the texels of a size x size texture of Anny."""
        positions, is_body, light = self.read(image)
        sighting = sight_map(body, positions, is_body, size)
        row, column = sighting.y.long(), sighting.x.long()
        return sighting.lit(light[row, column])


def has_body_map(base: str) -> bool:
    return (Path(base) / FOLDER).is_dir()


def load_body_map(base: str, device: torch.device) -> BodyMap:
    """Of a base's folder. Raises UserError for a base that has none."""
    folder = Path(base) / FOLDER
    if not has_body_map(base):
        raise UserError(f"--fit auto needs a body map, and {base} has none: give a file with --fit")
    try:
        return BodyMap.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot read {folder}: {reason(error)}; train it again or give a file with --fit") from None
