"""A small fixed evaluation while training: the same held-out textures, renders and noise each time.

It makes EVALUATED textures for each condition of the task and measures them as evaluate.py does, without networks. All
that is random follows from the numbers of the textures, so that two runs compare, a resumed run gives the figures of an
undisturbed one, and the training's own random numbers stay as they are. Each process takes its share of the textures.
"""

import math

import torch
from torch import Tensor

from common import processes
from common.pictures import image_from_pixels
from evaluation.consistency import consistency
from evaluation.making import Job, make_batch
from evaluation.render_space import compare_renders
from evaluation.texture_space import compare_textures, filled
from models.checkpoints import TrainedModel
from render.uv_space import uv_mask
from training.run import Run
from training.tasks import CONDITIONS, LOSS_NAME

EVALUATED = 8  # of the textures held out of training, at most
# Of docs/metrics.md: those that need no network and no set of references. For lower sharpness see gradient_energy.
MEASURED = {
    "texture": ("psnr", "ssim"),
    "render": ("psnr", "ssim"),
    "uv": ("seam_error", "mirror_difference", "gradient_energy", "noise"),
}
SIDE = 256  # of a render, in pixels: half of evaluate.py's


def evaluation_figures(run: Run) -> dict[str, float]:
    """The means over the textures, by their names in TensorBoard: eval/t2uv/texture/psnr and so on.

    To be called by all processes, with the weights that are to be measured. A measure that could not be taken on any of
    the textures is left out.
    """
    names = [f"{family}/{name}" for family, measures in MEASURED.items() for name in measures]
    figures = {}
    for kind in CONDITIONS[run.task]:
        sums = torch.zeros(2, len(names), dtype=torch.float64)  # of values, and of how many there are
        count = min(EVALUATED, len(run.validation))
        for number in range(processes.rank(), count, processes.world_size()):
            values = torch.tensor(_measured(run, kind, number), dtype=torch.float64)
            sums += torch.stack([values.nan_to_num(0), values.isfinite().double()])
        sums = sums.to(run.base.device, torch.float32)
        processes.mean_over_processes([sums])
        totals, counts = sums.tolist()
        for name, total, samples in zip(names, totals, counts):
            if samples:
                figures[f"eval/{LOSS_NAME[kind]}/{name}"] = total / samples
    return figures


@torch.no_grad()
def _measured(run: Run, kind: str, number: int) -> list[float]:
    """The measures of MEASURED, in their order, of the texture made from the prompt or the picture of a held-out row;
    NaN where one cannot be taken."""
    rows = run.validation
    row, size = rows[number], rows.resolution
    truth = (rows.texture(row["texture_id"]) + 1) / 2  # (3, R, R) in [0, 1]
    picture = image_from_pixels(rows.picture(number)) if kind == "image" else None
    job = Job(LOSS_NAME[kind], number, row["prompt"] if kind == "text" else None)
    texture = (make_batch(TrainedModel(run.base, run.aligner, run.cfg), [job], [picture])[0] + 1) / 2
    mask = uv_mask(run.body, size)
    textures, truths = (filled(side[None], mask) for side in (texture, truth))
    values: dict[str, dict[str, Tensor | str]] = {
        "texture": compare_textures(texture[None], truth[None], mask),
        "render": compare_renders(run.body, textures, truths, SIDE),
        "uv": consistency(run.body, [texture]),
    }
    taken = [values[family][name] for family, measures in MEASURED.items() for name in measures]
    return [math.nan if isinstance(value, str) else value.item() for value in taken]
