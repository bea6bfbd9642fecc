"""Results as files: JSON, a table in Markdown, scalars for TensorBoard, and the features that a comparison needs."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from common.errors import UserError, reason
from common.files import write_whole
from common.text import parse_json, read_text
from evaluation.consistency import DEFECTS
from evaluation.data import EvaluationSet
from evaluation.measuring import Measures
from evaluation.uncertainty import Figure

RESULTS, TABLE, FEATURES = "results.json", "results.md", "features.safetensors"
DIGITS = 6
TITLES = {
    "truth": "True textures (the ceiling)",
    "shuffled": "True textures under shuffled prompts (the floor)",
    "t2uv": "From prompts",
    "i2uv": "From pictures",
}
SMALLER_IS_BETTER = ("mse", "lpips", "dists", "fid", "kid", "cmmd", "mind", "seam_error", "seam_jump", *DEFECTS)
LARGER_IS_BETTER = ("psnr", "ssim", "ms_ssim", "clip_score", "similarity")


def better(name: str) -> str:
    """Which way is better, as an arrow; "" for what is read against the true textures' row."""
    leaf = name.rpartition(".")[2]
    if leaf in SMALLER_IS_BETTER:
        return "↓"
    return "↑" if leaf.endswith(LARGER_IS_BETTER) or name.startswith("follows.") else ""


def results_of(samples: EvaluationSet, measured: dict[str, Measures], about: dict, procedural: dict) -> dict:
    """What results.json holds. measured: a task's name → its measures. about: where the textures come from.
    procedural: what `procedural.evaluate` gives, or {}."""
    return {
        **about,
        "data": samples.name,
        "body": samples.body,
        "texels": samples.size,
        "samples": samples.names,
        "prompts": samples.prompts,
        "tasks": {
            task: {
                "figures": {name: _as_json(figure) for name, figure in measures.figures.items()},
                "values": {name: list(map(_number, values.tolist())) for name, values in measures.values.items()},
            }
            for task, measures in measured.items()
        },
        "procedural": procedural,
        "skipped": samples.skipped,
        "warnings": samples.warnings,
    }


def _number(value: float) -> float | None:
    """None for what was not measured: JSON has no NaN."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _as_json(figure: Figure | str) -> dict | str:
    if isinstance(figure, str):
        return figure
    return {name: value if isinstance(value, int) else _number(value) for name, value in asdict(figure).items()}


def summary(results: dict) -> dict:
    """The last line of the command: the procedural set's shares by their old names, and each task's figures beside
    them, nested by name; where a figure could not be had, the reason."""
    nested = json.loads(json.dumps(results["procedural"]))
    for task, measures in results["tasks"].items():
        for name, figure in measures["figures"].items():
            *parents, leaf = name.split(".")
            level = nested.setdefault(task, {})
            for parent in parents:
                level = level.setdefault(parent, {})
            level[leaf] = figure
    return {**nested, "skipped": results["skipped"], "warnings": results.get("warnings", [])}


def shown(value: float | None) -> str:
    """A number as a table has it: three or four digits."""
    if value is None:
        return "–"
    if abs(value) >= 1 or value == 0:
        return f"{value:.4g}"
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"


def shown_figure(figure: dict | str) -> str:
    if isinstance(figure, str):
        return figure
    interval = f"{shown(figure['value'])} [{shown(figure['low'])}, {shown(figure['high'])}]"
    left_out = f", {figure['skipped']} could not be measured" if figure["skipped"] else ""
    return f"{interval} (N = {figure['count']}{left_out})"


def markdown(results: dict) -> str:
    """A table for each task, a row a measure, and what was skipped."""
    lines = ["# Evaluation", "", heading(results), ""]
    for warning in results.get("warnings", []):
        lines += [f"**Warning:** {warning}.", ""]
    for task, measures in results["tasks"].items():
        lines += [
            f"## {TITLES[task]}: {task}",
            "",
            "| measure | better | value [95 % interval] |",
            "| --- | --- | --- |",
        ]
        for name, figure in measures["figures"].items():
            lines.append(f"| `{name}` | {better(name)} | {shown_figure(figure).replace('|', '/')} |")
        lines.append("")
    lines += ["## Skipped", "", *([f"- {line}" for line in results["skipped"]] or ["Nothing."]), ""]
    return "\n".join(lines)


def heading(results: dict) -> str:
    made_by = results.get("checkpoint") or results.get("textures") or results.get("base")
    count, texels = len(results["samples"]), results["texels"]
    return f"{made_by} on {count} samples of {results['data']} ({texels} texels, body {results['body']})."


def write_results(out: Path, results: dict, measured: dict[str, Measures], global_step: int) -> None:
    """results.json, results.md, features.safetensors, and TensorBoard's scalars, under eval/. Raises UserError when
    they cannot be written."""
    write_whole(out / RESULTS, (json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())
    write_whole(out / TABLE, markdown(results).encode())
    features = {
        f"{task}/{extractor}": values.contiguous()
        for task, measures in measured.items()
        for extractor, values in measures.features.items()
    }
    write_whole(out / FEATURES, safetensors.torch.save(features))
    for old in (out / "tensorboard").glob("events.*"):  # of the same command run again
        old.unlink()
    try:
        with SummaryWriter(str(out / "tensorboard")) as writer:
            for task, measures in results["tasks"].items():
                for name, figure in measures["figures"].items():
                    if not isinstance(figure, str) and figure["value"] is not None:
                        writer.add_scalar(f"eval/{task}/{name.replace('.', '/')}", figure["value"], global_step)
    except OSError as error:
        raise UserError(f"cannot write {out / 'tensorboard'}: {reason(error)}; choose another place") from None


def read_results(source: str) -> tuple[dict, dict[str, Tensor]]:
    """A folder that was written here, or its results.json → the results, and features by task/network; {} where there
    are none. Raises UserError for anything else."""
    path = Path(source) / RESULTS if Path(source).is_dir() else Path(source)
    try:
        results = parse_json(read_text(path))
        for measures in results["tasks"].values():
            assert all(len(values) == len(results["samples"]) for values in measures["values"].values())
    except UserError as error:
        raise UserError(f"{error}; give a folder that evaluate.py wrote with --out") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{path} holds no results of evaluate.py ({reason(error)})") from None
    features = path.with_name(FEATURES)
    try:
        return results, safetensors.torch.load_file(features) if features.is_file() else {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {features} ({reason(error)}); run that evaluation again") from None


def column(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
