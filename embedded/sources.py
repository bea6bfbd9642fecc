"""Where textures come from, by one spec: painted here (`procedural:COUNT`), or the user's own (a folder, ATLAS)."""

from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from atlas_dataset.sources import HuggingFaceATLAS, fingerprint
from common.errors import UserError
from common.pictures import encode_image, image_from_pixels
from embedded.captions import CAPTIONER, sentence
from embedded.grammar import sample_outfit
from embedded.painter import PAINTER, paint


def is_procedural(spec: str) -> bool:
    return spec.partition(":")[0] == "procedural"


def open_textures(
    spec: str, prompts: str | Path | None = None, size: int = 256, seed: int = 0, limit: int | None = None
) -> "HuggingFaceATLAS | ProceduralTextures":
    """spec: procedural:COUNT, painted at size x size texels from seed; or what HuggingFaceATLAS reads with the prompts
    `prompts`. limit: only the first so many. Raises UserError for what cannot be opened."""
    if not is_procedural(spec):
        return HuggingFaceATLAS(spec, prompts, limit=limit)
    count = spec.partition(":")[2]
    if not count.isdigit() or int(count) == 0:
        raise UserError(f"{spec!r}: write procedural:COUNT, the number of textures")
    return ProceduralTextures(min(int(count), limit or int(count)), size, seed)


class ProceduralTextures(Dataset):
    """`count` textures painted on Anny, each with its prompt, every second one a sentence; held_out gives combinations
    never trained on."""

    body = "anny"  # whose UV layout they have

    def __init__(self, count: int, size: int = 256, seed: int = 0, held_out: bool = False):
        self.count, self.size, self.seed, self.held_out = count, size, seed, held_out

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        return fingerprint(self.count, self.size, self.seed, self.held_out, PAINTER, CAPTIONER)

    def name(self, index: int) -> str:
        return f"procedural texture {index}"

    def pair(self, index: int) -> str:
        return f"{self.name(index)}: {self[index][1]}"

    def __getitem__(self, index: int) -> tuple[bytes, str]:
        rng = np.random.default_rng([self.seed, index, self.held_out])
        outfit = sample_outfit(rng, self.held_out)
        texture = paint(outfit, self.seed * 1_000_003 + index, self.size).texture
        caption = sentence(outfit, rng).text if index % 2 else outfit.prompt
        return encode_image(image_from_pixels(texture * 2 - 1), format="PNG"), caption
