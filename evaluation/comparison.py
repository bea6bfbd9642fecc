"""Two results on the same samples: paired differences, and how many samples tell the two apart."""

from torch import Tensor

from common.errors import UserError
from evaluation.distances import BIASED, DISTANCES, cannot_be_had, half_samples
from evaluation.extractors import network_label
from evaluation.report import better, column, read_results, shown
from evaluation.uncertainty import (
    Figure,
    paired_difference,
    samples_needed,
    samples_needed_for_sets,
    set_difference,
)


def compare(first: str, second: str) -> dict[str, dict | str]:
    """Two folders or results.json → "t2uv.texture.psnr" and so on → the mean of first - second, its interval and the
    pairs needed; or the reason for none.

    Samples are paired by name and prompt. Raises UserError for what cannot be read, or was measured on other samples.
    """
    (results, features), (other, other_features) = read_results(first), read_results(second)
    for key in ("data", "body", "texels"):
        if results[key] != other[key]:
            raise UserError(f"{first} and {second} differ in {key}: {results[key]} and {other[key]}; nothing to pair")
    rows, other_rows = _pairs(results, other)
    if not rows:
        raise UserError(f"{first} and {second} have no sample in common")
    rows_of = {}
    for task in sorted(results["tasks"].keys() & other["tasks"].keys() - {"truth", "shuffled"}):
        ours, theirs = results["tasks"][task], other["tasks"][task]
        sets = _shared_sets(task, features, other_features)
        for name in dict.fromkeys([*ours["figures"], *theirs["figures"]]):
            label, (parent, _, leaf) = f"{task}.{name}", name.rpartition(".")
            network = parent.removeprefix("render.")
            if name in ours["values"] and name in theirs["values"]:
                left, right = (column(side["values"][name]) for side in (ours, theirs))
                rows_of[label] = _compared(label, left[rows], right[other_rows])
            elif leaf in DISTANCES and network in sets:
                ours_of, theirs_of, truth = sets[network]
                rows_of[label] = _compare_sets(leaf, label, ours_of[rows], theirs_of[other_rows], truth[rows])
            else:
                rows_of[label] = _why_not(name, ours, theirs)
    if not rows_of:
        raise UserError(f"{first} and {second} have no task in common: {[*results['tasks']]}, {[*other['tasks']]}")
    return rows_of


def _pairs(results: dict, other: dict) -> tuple[list[int], list[int]]:
    """Numbers of the samples that both have."""
    keys, others = (list(zip(side["samples"], side["prompts"])) for side in (results, other))
    number_of = {key: number for number, key in enumerate(others)}
    rows = [row for row, key in enumerate(keys) if key in number_of]
    return rows, [number_of[keys[row]] for row in rows]


def _why_not(name: str, ours: dict, theirs: dict) -> str:
    """The first reason for none that a result has for a measure."""
    figures = [side["figures"].get(name, "was not measured in both") for side in (ours, theirs)]
    return next(
        (figure for figure in figures if isinstance(figure, str)),
        "needs features.safetensors beside both results.json, of the true textures too",
    )


def _compared(name: str, left: Tensor, right: Tensor) -> dict | str:
    return _row(paired_difference(name, left, right), samples_needed(name, left, right))


def _row(difference: Figure | str, needed: int | str) -> dict | str:
    if isinstance(difference, str):
        return difference
    value, low, high = map(float, (difference.value, difference.low, difference.high))
    return {
        "difference": value,
        "low": low,
        "high": high,
        "count": difference.count,
        "skipped": difference.skipped,
        "samples_needed": needed,
        "told_apart": bool(low > 0 or high < 0),
    }


def _shared_sets(task: str, features: dict, others: dict) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By network, as rows name it: the features of both, and of the true textures."""
    names = [key.partition("/")[2] for key in features if key.startswith(f"{task}/") and key in others]
    return {
        network_label(name): (features[f"{task}/{name}"], others[f"{task}/{name}"], features[f"truth/{name}"])
        for name in names
        if f"truth/{name}" in features
    }


def _compare_sets(name: str, label: str, ours: Tensor, theirs: Tensor, truth: Tensor) -> dict | str:
    """A distance of DISTANCES: features (N, V, D) of both on the same samples, drawn together."""
    if reason := cannot_be_had(name, ours, truth):
        return reason
    difference = set_difference(label, DISTANCES[name], ours, theirs, truth, repeats=half_samples(ours))
    if name in BIASED and not isinstance(difference, str):
        return _row(difference, "cannot be said: its bias changes with their number")
    return _row(difference, samples_needed_for_sets(label, difference))


def comparison_table(rows: dict[str, dict | str]) -> str:
    """Markdown."""
    lines = ["| measure | better | first - second [95 % interval] | told apart | samples to tell them apart |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        cells = [f"`{name}`", better(name.partition(".")[2])]
        if isinstance(row, str):
            cells += [row, "", ""]
        else:
            interval = f"{shown(row['difference'])} [{shown(row['low'])}, {shown(row['high'])}] (N = {row['count']})"
            cells += [interval, "yes" if row["told_apart"] else "no", str(row["samples_needed"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
