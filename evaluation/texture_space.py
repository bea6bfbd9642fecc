"""How near textures are to true ones, texel by texel, inside the UV mask alone.

What lies outside the mask is never seen: both sides are filled there from their own islands (`fill_outside`), so that
windows and receptive fields across an island's edge hold the islands' colours, and maps are averaged over the mask.
All measures take pictures (N, 3, H, W) in [0, 1] and give a value a picture, (N,), or say what they need.
"""

import functools
import importlib.util

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio

from common.errors import UserError, reason
from render.uv_space import fill_outside

LARGEST_PSNR = 80.0  # decibels, of pictures that are the same to a twentieth of an 8-bit step
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # MS-SSIM's (Wang, Simoncelli and Bovik 2003)
SMALLEST_MS_SSIM = 176  # texels a side: SSIM's window of 11, four times halved
REACH, WINDOW_WIDTH = 5, 1.5  # of SSIM's Gaussian window: texels to either side, and its standard deviation
K1, K2 = 0.01, 0.03  # SSIM's constants, of a range of 1
BATCH = 8  # pictures at once: memory stays the same for any N


def check_pictures(pictures: Tensor, references: Tensor, mask: Tensor) -> None:
    """Raises UserError unless both are (N, 3, H, W) in [0, 1] and mask is (H, W) bool and not empty."""
    if not len(pictures):
        raise UserError("there are no pictures to measure; give at least one")
    if pictures.shape != references.shape or pictures.shape[-2:] != mask.shape:
        shapes = ", ".join(str(tuple(side.shape)) for side in (pictures, references, mask))
        raise UserError(f"pictures, references and mask differ in size ({shapes}); resize them to one")
    if not mask.any():
        raise UserError("the mask is empty; give a body with texture coordinates")
    for name, side in (("pictures", pictures), ("references", references)):
        if not (side.isfinite().all() and side.min() >= 0 and side.max() <= 1):
            raise UserError(f"{name} hold values outside 0 to 1, or no numbers; scale them to [0, 1]")


def filled(pictures: Tensor, mask: Tensor) -> Tensor:
    """(N, 3, H, W), what is outside mask (H, W) taken from the nearest islands."""
    return fill_outside(pictures.flatten(0, 1), mask).unflatten(0, pictures.shape[:2]).clamp(0, 1)


def mean_inside(maps: Tensor, weight: Tensor) -> Tensor:
    """Maps (N, C, H, W) averaged with weight (H, W) → (N,)."""
    return (maps.mean(1) * weight).sum((1, 2)) / weight.sum()


def mean_squared_error(pictures: Tensor, references: Tensor, mask: Tensor) -> Tensor:
    """Over RGB in [0, 1] and the texels of the mask."""
    return mean_inside((pictures - references).square(), mask.to(pictures))


def psnr(pictures: Tensor, references: Tensor, mask: Tensor) -> Tensor:
    """Decibels of a range of 1, LARGEST_PSNR at most."""
    values = peak_signal_noise_ratio(
        pictures[..., mask], references[..., mask], data_range=1.0, dim=(1, 2), reduction="none"
    )
    return values.clamp(max=LARGEST_PSNR)


def structural_similarities(pictures: Tensor, references: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | str]:
    """SSIM (Wang et al. 2004) and MS-SSIM (Wang, Simoncelli and Bovik 2003) of filled pictures.

    Gaussian window of 11 texels. MS-SSIM takes at each of five scales the mean over the mask, whose texels weigh by the
    share of them that is inside; small pictures have none.
    """
    weight = mask.to(pictures)
    whole, contrast = similarity_maps(pictures, references)
    ssim = mean_inside(whole, weight)
    if min(mask.shape) < SMALLEST_MS_SSIM:
        return ssim, f"ms_ssim needs pictures of {SMALLEST_MS_SSIM} texels a side, has {min(mask.shape)}"
    ms_ssim = torch.ones_like(ssim)
    for exponent in SCALE_WEIGHTS[:-1]:
        # torchmetrics leaves out the contrast at the picture's edge, where the window reaches over it.
        inner = F.pad(weight[REACH:-REACH, REACH:-REACH], (REACH,) * 4)
        ms_ssim *= mean_inside(contrast, inner if inner.any() else weight).relu() ** exponent
        pictures, references = (F.avg_pool2d(side, 2) for side in (pictures, references))
        weight = F.avg_pool2d(weight[None], 2)[0]
        whole, contrast = similarity_maps(pictures, references)
    return ssim, ms_ssim * mean_inside(whole, weight).relu() ** SCALE_WEIGHTS[-1]


def similarity_maps(pictures: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM's map and its factors of contrast and structure alone, (N, 3, H, W) each.

    The same as torchmetrics, whose filter of 11 x 11 takes many times as long as one of rows and one of columns.
    """
    down, across = (gaussian_filter(side).to(pictures) for side in pictures.shape[-2:])
    planes = (pictures, references, pictures * references, pictures.square() + references.square())
    mean, reference_mean, product, squares = (down @ plane @ across.T for plane in planes)
    means, mean_squares = mean * reference_mean, mean.square() + reference_mean.square()
    contrast = (2 * (product - means) + K2**2) / ((squares - mean_squares).clamp(min=0) + K2**2)
    return contrast * (2 * means + K1**2) / (mean_squares + K1**2), contrast


@functools.lru_cache(maxsize=16)
def gaussian_filter(side: int) -> Tensor:
    """SSIM's window as a matrix (side, side), each row the weights of one place; reflected at the ends."""
    steps = torch.arange(-REACH, REACH + 1)
    window = (steps.square() / (-2 * WINDOW_WIDTH**2)).exp()
    reach = (torch.arange(side)[:, None] + steps).abs()
    reach = torch.where(reach >= side, 2 * (side - 1) - reach, reach)
    return torch.zeros(side, side).scatter_add_(1, reach, (window / window.sum()).expand(side, -1))


@functools.lru_cache(maxsize=2)
def perceptual_network(name: str) -> nn.Module | str:
    """torchmetrics' network for "lpips" (AlexNet) or "dists" (VGG16), or what it needs.

    Both stand on torchvision's classifiers, whose weights it downloads, or finds in TORCH_HOME/hub/checkpoints.
    """
    backbone = {"lpips": "AlexNet", "dists": "VGG16"}[name]
    if importlib.util.find_spec("torchvision") is None:
        return f"{name} needs torchvision, with the weights of {backbone}"
    try:
        if name == "lpips":
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            return LearnedPerceptualImagePatchSimilarity(net_type="alex").net.eval().requires_grad_(False)
        from torchmetrics.functional.image.dists import DISTSNetwork

        return DISTSNetwork().eval().requires_grad_(False)
    except Exception as error:  # no network, no such file, another version of torchvision
        return f"{name} needs the weights of {backbone} ({reason(error)})"


@torch.no_grad()
def lpips(pictures: Tensor, references: Tensor) -> Tensor | str:
    """Learned perceptual distance (Zhang et al. 2018) of filled pictures, whole: what is outside follows the islands'
    edges on both sides."""
    network = perceptual_network("lpips")
    if isinstance(network, str):
        return network
    return network.to(pictures.device)(pictures, references, normalize=True).flatten()


@torch.no_grad()
def dists(pictures: Tensor, references: Tensor) -> Tensor | str:
    """Deep structure and texture distance (Ding et al. 2020) of filled pictures, whole."""
    network = perceptual_network("dists")
    if isinstance(network, str):
        return network
    return network.to(pictures.device)(pictures, references).flatten()


def compare_textures(
    textures: Tensor, references: Tensor, mask: Tensor, fill: bool = True, batch: int = BATCH
) -> dict[str, Tensor | str]:
    """psnr, ssim, ms_ssim, mse, lpips and dists → a value a texture, (N,), or what the measure needs.

    textures, references: (N, 3, S, S) in [0, 1]; mask: (S, S) bool, the body's UV mask. fill: False for pictures whose
    outside is the same on both sides, as renders' background. Raises UserError as `check_pictures` does.
    """
    check_pictures(textures, references, mask)
    batches = []
    for pair in zip(textures.split(batch), references.split(batch)):
        pictures, truths = (filled(side, mask) for side in pair) if fill else pair
        ssim, ms_ssim = structural_similarities(pictures, truths, mask)
        batches.append({
            "psnr": psnr(pictures, truths, mask),
            "ssim": ssim,
            "ms_ssim": ms_ssim,
            "mse": mean_squared_error(pictures, truths, mask),
            "lpips": lpips(pictures, truths),
            "dists": dists(pictures, truths),
        })  # fmt: skip
    return {
        name: value if isinstance(value, str) else torch.cat([values[name] for values in batches])
        for name, value in batches[0].items()
    }
