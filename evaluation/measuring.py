"""Every measure of one set of textures, a value a sample where there is one, with its interval or the reason for none.

Names are FAMILY.MEASURE: `texture`, texel by texel; `render`, on the body, those of a network under the network's name;
`uv`, consistency; `follows`, whether what was asked for is there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from common import processes
from common.pictures import prepare_image
from evaluation.attributes import told_attributes
from evaluation.consistency import NEEDED, consistency, defects, sharpness
from evaluation.data import EvaluationSet
from evaluation.distances import set_distances
from evaluation.extractors import (
    CLIP_NAMES,
    EMBEDDED_BASE,
    Extractor,
    features_of,
    network_label,
    text_features_of,
)
from evaluation.render_space import (
    clip_score,
    compare_renders,
    face_similarity,
    image_similarity,
    retrieval,
    view_features,
)
from evaluation.texture_space import compare_textures, filled
from evaluation.uncertainty import Figure, mean_figure, share_figure
from render.rigs import load_body
from render.uv_space import uv_mask

SHARES = ("follows.", "uv.defects.")  # measures whose values are hits
NO_TRUTH = "needs true textures; give a data set with --data"
NO_ATTRIBUTES = f"attributes need {CLIP_NAMES['clip']} or another CLIP model: give --extractor clip, or its folder"

Textures = Callable[[int], Tensor]  # the number of a sample → (3, size, size) in [0, 1], as written


@dataclass(frozen=True)
class Observed:
    """What is seen of N textures alone: features (N, 4, D) by extractor, and the measures of consistency."""

    features: dict[str, Tensor]
    consistency: dict[str, Tensor]


@dataclass
class Measures:
    """values: (N,) by name, NaN where a sample could not be measured; figures: of them, and of whole sets."""

    values: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, Figure | str] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, values: Tensor | str) -> None:
        """A value a sample, or why there is none."""
        figure = share_figure if name.startswith(SHARES) else mean_figure
        self.figures[name] = figure(name, values)
        if not isinstance(values, str):
            self.values[name] = values.double()


def observe(samples: EvaluationSet, textures: Textures, extractors: dict[str, Extractor | str], what: str) -> Observed:
    """extractors: by the name they were asked for. what: the textures' name for the progress bar."""
    body, loaded = load_body(samples.body), [network for network in extractors.values() if not isinstance(network, str)]
    mask, features, rows = uv_mask(body, samples.size), {}, Rows()
    for number in tqdm(range(len(samples)), f"{what}: renders, consistency", disable=not processes.is_main()):
        texture = textures(number)
        for name, views in view_features(body, filled(texture[None], mask), loaded).items():  # (1, 4, D)
            features.setdefault(name, views.new_empty(len(samples), *views.shape[1:]))[number] = views[0]
        rows.add(consistency(body, [texture]))
    return Observed(features, {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.values.items()})


class Rows:
    """What is measured on one sample after the other, as Python's numbers.

    Tensors of one number would lie between the large blocks that renders come and go in, and keep the C library from
    joining those that are free: memory grew by 2 MB a texture.
    """

    def __init__(self):
        self.values: dict[str, list[float]] = {}
        self.reasons: dict[str, str] = {}

    def add(self, measured: dict[str, Tensor | str]) -> None:
        """A measure's name → its value on this sample, (1,), or why it cannot be had."""
        for name, value in measured.items():
            if isinstance(value, str):
                self.reasons[name] = value
            else:
                self.values.setdefault(name, []).append(value.item())


def measure(
    samples: EvaluationSet,
    textures: Textures,
    extractors: dict[str, Extractor | str],
    observed: Observed,
    truth: Observed | None,
    face_model: Extractor | str | None = None,
    against_truth: bool = True,
) -> Measures:
    """All families. observed, truth: of `observe`, for these textures and the samples' true ones.

    against_truth: False leaves out what compares them with the true ones, as for the true ones themselves.
    """
    measures = Measures(features=observed.features)
    if against_truth:
        _add_distances_to_truth(measures, samples, textures, face_model)
    for asked, extractor in extractors.items():
        if isinstance(extractor, str):
            measures.figures[f"render.{network_label(asked)}"] = extractor
            continue
        features = observed.features[extractor.name]
        references = truth.features[extractor.name] if truth and against_truth else None
        _add_network(measures, samples, extractor, features, references)
    for name, values in observed.consistency.items():
        is_measured = values.isfinite().any()
        measures.add(f"uv.{name}", values if is_measured else f"{name} {NEEDED[name]}")
    energies = truth.consistency["gradient_energy"] if truth else None
    measures.add("uv.sharpness", sharpness(observed.consistency["gradient_energy"], energies))
    for name, values in defects(observed.consistency, truth.consistency if truth else None).items():
        measures.add(f"uv.defects.{name}", values)
    if samples.attributes:
        _add_attributes(measures, samples, textures)
    else:
        _add_told_attributes(measures, samples, extractors, observed)
    return measures


def _add_distances_to_truth(
    measures: Measures, samples: EvaluationSet, textures: Textures, face_model: Extractor | str | None
) -> None:
    """Texture space, the same on renders, and faces."""
    if samples.truth is None:
        measures.figures |= dict.fromkeys(("texture", "render.pixels"), NO_TRUTH)
        return
    body, rows = load_body(samples.body), Rows()
    mask = uv_mask(body, samples.size)
    for number in tqdm(range(len(samples)), "against the truth", disable=not processes.is_main()):
        pair = textures(number)[None], samples.truth(number)[None]
        sides = [filled(side, mask) for side in pair]
        of_families = {"texture": compare_textures(*pair, mask), "render": compare_renders(body, *sides)}
        if face_model is not None:
            of_families["render"]["face_similarity"] = face_similarity(body, *sides, face_model)
        for family, measured in of_families.items():
            rows.add({f"{family}.{name}": value for name, value in measured.items()})
    for name in [*rows.values, *rows.reasons]:
        measures.add(name, rows.reasons.get(name) or torch.tensor(rows.values[name], dtype=torch.float64))


def _add_network(
    measures: Measures, samples: EvaluationSet, extractor: Extractor, features: Tensor, references: Tensor | None
) -> None:
    """What one network says of the renders. features, references: (N, 4, D)."""
    prefix = network_label(extractor.name)
    keys = text_features_of(extractor, samples.prompts)
    if isinstance(keys, str):
        measures.figures[f"render.{prefix}.clip_score"] = keys
    else:
        measures.add(f"render.{prefix}.clip_score", clip_score(features, keys.cpu()))
        measures.add(f"follows.retrieval.{prefix}", retrieval(features, keys.cpu(), samples.prompts))
    if samples.picture:
        pictures = (prepare_image(samples.picture(number), extractor.side) for number in range(len(samples)))
        shown = torch.cat([features_of(extractor, (picture[None] + 1) / 2).cpu() for picture in pictures])
        measures.add(f"follows.picture_retrieval.{prefix}", retrieval(features, shown, samples.names))
    if references is not None:
        measures.add(f"render.{prefix}.image_similarity", image_similarity(features, references))
        for name, figure in set_distances(features, references).items():
            measures.figures[f"render.{prefix}.{name}"] = figure


def _add_attributes(measures: Measures, samples: EvaluationSet, textures: Textures) -> None:
    """A texture's share of right answers to each kind of attribute, NaN where its prompt has none of the kind."""
    by_sample = [samples.attributes(number, textures(number)) for number in range(len(samples))]
    for name in dict.fromkeys(name for shares in by_sample for name in shares):
        values = torch.tensor([shares.get(name, torch.nan) for shares in by_sample])
        measures.add(f"follows.{name}", values)


def _add_told_attributes(
    measures: Measures, samples: EvaluationSet, extractors: dict[str, Extractor | str], observed: Observed
) -> None:
    """The same by CLIP models, where nobody knows the truth of the texels. The embedded encoders do not count as one:
    they know painted outfits on one body."""
    asked = {name: extractor for name, extractor in extractors.items() if CLIP_NAMES.get(name, name) != EMBEDDED_BASE}
    if not any(isinstance(extractor, str) or extractor.encode_texts for extractor in asked.values()):
        measures.figures["follows.attributes"] = NO_ATTRIBUTES
    for name, extractor in asked.items():
        prefix = f"follows.attributes.{network_label(name if isinstance(extractor, str) else extractor.name)}"
        if isinstance(extractor, str):
            measures.figures[prefix] = extractor
        elif extractor.encode_texts:
            told = told_attributes(extractor, observed.features[extractor.name], samples.prompts)
            if isinstance(told, str):
                measures.figures[prefix] = told
                continue
            for kind, hits in told.items():
                measures.add(f"{prefix}.{kind}", hits)


def rolled(textures: Textures, count: int) -> Textures:
    """Each sample's texture replaced by the next one's: what a system shows that does not listen."""
    return lambda number: textures((number + 1) % count)


def ranking(measures: Measures) -> tuple[str, Tensor] | None:
    """The measure by which cases are called best and worst, and its values."""
    scores = [name for name in measures.values if name.endswith("clip_score")]
    for name in ("render.ms_ssim", "render.ssim", *scores):
        if name in measures.values and measures.values[name].isfinite().any():
            return name, measures.values[name]
    return None
