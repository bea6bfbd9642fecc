"""What joint training shows of a texture to a share of its rows of pictures: the part that a picture would."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from atlas_dataset.views import frame_bodies, sample_view
from config.configuration import Config
from models.base import BaseModel
from models.partial import partial_channels
from render.projection import Fit, sight_fit, sureness
from render.rigs import load_rig

VIEWS = 64  # of the body, in other poses and from other sides each
HEIGHT, WIDTH = 256, 192  # pixels of their pictures, of which only what they see is wanted
TEXTURE = 2**32 - 3  # a number that no texture has, for `sample_view`


@dataclass
class Partials:
    """visible: (V, 1, h, w) of the latents in [0, 1], how much of each a picture shows; share: of the rows."""

    visible: Tensor
    share: float

    @classmethod
    def of(cls, cfg: Config, base: BaseModel, resolution: int, share: float) -> "Partials":
        """Views as of the configured renders. resolution: side of the textures."""
        rig = load_rig(cfg.data.body)
        views = [sample_view(cfg.data.render, rig, cfg.training.seed, TEXTURE, view) for view in range(VIEWS)]
        visible = []
        for view in views:
            vertices = rig.vertices([view]).cpu()
            fit = Fit(vertices[0], frame_bodies(vertices, [view], WIDTH / HEIGHT))
            sighting = sight_fit(rig.body, fit, HEIGHT, WIDTH, resolution)
            sure = torch.zeros(resolution * resolution)
            sure[sighting.texel] = sureness(sighting.weight)
            visible.append(F.avg_pool2d(sure.view(1, resolution, resolution), base.vae_scale))
        return cls(torch.stack(visible).to(base.device), share)

    def rows(self, kind: str, latents: Tensor, draws) -> Tensor:
        """latents: (B, C, h, w) → their `partial_channels`, 0 in rows that are shown nothing. draws:
        `objective.RowDraws`."""
        if kind != "image":
            return partial_channels(latents, torch.zeros_like(latents[:, :1]))
        is_shown = (draws.uniform() < self.share).to(latents.device)  # (B,)
        views = draws.integers(len(self.visible)).to(latents.device)
        return partial_channels(latents, self.visible[views] * is_shown[:, None, None, None])
