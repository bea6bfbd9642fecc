"""What the stages of the text and the image encoder share: pictures as CLIP takes them, and words to be told."""

import torch
import torch.nn.functional as F

from embedded.grammar import BOTTOMS, COLOURS, ETHNICITIES, HAIR, HAIR_CUTS, PERSONS, STYLES, TOPS, Outfit

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOLD = {  # an outfit's attributes, and the words that each is one of
    "top_style": STYLES,
    "bottom_style": STYLES,
    "hair": tuple(HAIR),
    "ethnicity": tuple(ETHNICITIES),
    "top": (*TOPS, "dress", "tuxedo"),
    "bottom": (*BOTTOMS, "skirt"),
    "sneakers": tuple(COLOURS),
    "person": PERSONS,
    "hair_cut": HAIR_CUTS,
    "beard": (True, False),
}
ALL_TOLD = frozenset(TOLD)


def clip_normalise(pixel_values: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1] → about [-2, 2], as CLIP takes it."""
    mean, std = (torch.tensor(value, device=pixel_values.device)[:, None, None] for value in (CLIP_MEAN, CLIP_STD))
    return (pixel_values - mean) / std


def augment(pixel_values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B, 3 or more, H, W) in [0, 1]: mirrored, zoomed and shifted at random, the first three channels dimmed; the
    border's colour runs on outside."""
    batch = len(pixel_values)

    def uniform(low, high, *shape):
        return torch.empty(batch, *shape).uniform_(low, high, generator=generator)

    zoom, theta = uniform(-0.5, 0.2).exp(), torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = zoom * uniform(-1, 1).sign()
    theta[:, 1, 1] = zoom
    theta[:, :, 2] = uniform(-0.15, 0.15, 2)
    grid = F.affine_grid(theta, pixel_values.shape, align_corners=False).to(pixel_values.device)
    moved = F.grid_sample(pixel_values, grid, padding_mode="border", align_corners=False)
    moved[:, :3] *= uniform(0.85, 1.15, 1, 1, 1).to(moved.device)
    return moved.clamp(0, 1)


def region_colours(labels: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of N outfits → colours of REGIONS (N, REGIONS, 3) in [0, 1], and which there are (N, REGIONS) bool."""
    colours = torch.tensor([[colour or [0.0] * 3 for colour in label["colours"]] for label in labels])
    has_colour = torch.tensor([[colour is not None for colour in label["colours"]] for label in labels])
    return colours, has_colour


def telling_heads(width: int) -> torch.nn.ModuleDict:
    """For `telling_loss`: how much each token says about each attribute, and which word it is."""
    words = {name: torch.nn.Linear(width, len(words)) for name, words in TOLD.items()}
    return torch.nn.ModuleDict({"query": torch.nn.Linear(width, len(TOLD)), **words})


def attributes(outfits: list[Outfit], told: list[frozenset[str]]) -> torch.Tensor:
    """(B, TOLD) int64: which of its words each attribute is; -1 where it is not told or there is none."""
    rows = [
        [
            words.index(getattr(outfit, name)) if name in names and getattr(outfit, name) in words else -1
            for name, words in TOLD.items()
        ]
        for outfit, names in zip(outfits, told)
    ]
    return torch.tensor(rows)


def telling_loss(heads, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the words of TOLD, each read from states (B, L, D) as a UNet's attention would, by one query.

    targets: (B, TOLD) as `attributes` gives them.
    """
    read = heads["query"](states).softmax(1).transpose(1, 2) @ states  # (B, TOLD, D)
    return word_loss(heads, [read[:, place] for place in range(len(TOLD))], targets)


def word_loss(heads, states: list[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each attribute's words from its state (B, D); what is -1 does not count."""
    loss = 0.0
    for state, name, column in zip(states, TOLD, targets.to(states[0].device).T):
        if (column >= 0).any():
            loss = loss + F.cross_entropy(heads[name](state), column, ignore_index=-1)
    return loss
