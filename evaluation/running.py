"""An evaluation from its arguments to its files: opens, makes what is missing, measures, writes."""

import argparse
import sys
from pathlib import Path

from torch import Tensor

from common import processes
from common.errors import UserError
from common.files import write_whole
from common.text import parse_json
from config.configuration import Config
from evaluation.data import (
    PROCEDURAL,
    EvaluationSet,
    foreign_textures,
    procedural_set,
    read_texture,
    stored_set,
    training_warning,
)
from evaluation.extractors import load_extractor, load_face_model
from evaluation.making import jobs_for, make_textures, model_description, texture_path
from evaluation.measuring import Measures, Observed, Textures, measure, observe
from evaluation.page import page
from evaluation.procedural import Judge, evaluate, held_out_paintings
from evaluation.report import results_of, write_results
from lora_utils import merge_lora
from models.base import load_configured_base, pick_device
from models.checkpoints import STATE_FILE, TrainedModel, load_checkpoint, newest_checkpoint
from models.diffusion import frozen_dtype, resolve_precision
from models.fast import fast_weights_hash, load_fast

PAGE = "report.html"


def load_model(args: argparse.Namespace, cfg: Config, overrides: list[str]) -> tuple[TrainedModel, Path | None, int]:
    """The model, its checkpoint's folder (None for the base alone) and its step."""
    device = processes.join(pick_device(cfg.training.device))
    if args.base:
        dtype = frozen_dtype(resolve_precision(cfg.training.mixed_precision, device), device)
        trained, folder, step = TrainedModel(load_configured_base(cfg.model, device, dtype), None, cfg), None, 0
    else:
        folder = Path(args.checkpoint) if args.checkpoint else newest_checkpoint(cfg.output.out_dir)
        own_device = [f"training.device={device}"] if processes.world_size() > 1 else []
        trained = load_checkpoint(folder, [*overrides, *own_device])
        if args.fast:
            trained = load_fast(trained, folder, args.fast)
        state = folder / STATE_FILE
        step = parse_json(state.read_text())["global_step"] if state.is_file() else 0
    merge_lora(trained.base)
    return trained, folder, step


def evaluate_model(args: argparse.Namespace, cfg: Config, overrides: list[str]) -> dict | None:
    """Makes textures and measures them → the results; None in processes that only helped to make them."""
    trained, folder, step = load_model(args, cfg, overrides)
    tasks, out = ["t2uv", "i2uv"] if args.task == "both" else [args.task], Path(args.out)
    if trained.aligner is None:
        if args.task == "i2uv":
            raise UserError("this checkpoint was trained on text alone, it has no aligner; give --task t2uv")
        tasks = ["t2uv"]
    size = trained.cfg.data.resolution or trained.base.native_resolution
    judge, samples = open_data(args, trained.cfg, size, "i2uv" in tasks, trained)
    is_known = judge is not None or args.base  # held out of every checkpoint's training, or not trained at all
    warning = None if is_known else training_warning(args.data, trained.cfg, trained.base.native_resolution)
    if warning:
        samples.warnings.append(warning)
        if processes.is_main():
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    if samples.picture is None and "i2uv" in tasks:
        if args.task == "i2uv":
            raise UserError(f"data set {samples.name} has no renders; give --task t2uv")
        samples.skipped.append(f"i2uv: data set {samples.name} has no renders")
        tasks = ["t2uv"]
    jobs = jobs_for(samples, tasks, judge is not None)
    description = model_description(trained, folder)
    if args.fast:
        description["fast"] = fast_weights_hash(folder)
    count = make_textures(trained, jobs, out, description)
    if not processes.is_main():
        return None
    print(f"{count} textures made here, {len(jobs)} in all, in {out / 'textures'}", flush=True)

    def made(folder: str, number: int) -> Tensor:
        return read_texture(texture_path(out, folder, number), samples.size)

    procedural = evaluate(judge, made, tasks) if judge else {}
    about = {"checkpoint": folder and str(folder), "base": trained.cfg.model.pretrained_model, "global_step": step}
    if args.fast:
        about["fast"] = args.fast
    textures = {task: lambda number, task=task: made(task, number) for task in tasks}
    return measure_and_write(args, samples, textures, about, procedural, str(trained.base.device))


def evaluate_textures(args: argparse.Namespace, cfg: Config) -> dict | None:
    """Measures what another system made: one task, under --task's name, or t2uv."""
    if not processes.is_main():
        return None
    truths = None
    if args.data:
        size = cfg.data.resolution or 512
        _, truths = open_data(args, cfg, size, args.task == "i2uv", None)
    body = cfg.data.body or "anny"
    samples, textures = foreign_textures(args.textures, args.prompts, body, cfg.data.resolution, truths, args.limit)
    task = "i2uv" if args.task == "i2uv" else "t2uv"
    return measure_and_write(args, samples, {task: textures}, {"textures": args.textures}, {}, "cpu")


def open_data(
    args: argparse.Namespace, cfg: Config, size: int, with_pictures: bool, trained: TrainedModel | None
) -> tuple[Judge | None, EvaluationSet]:
    """The set that --data names, and who tells its attributes; None where nobody does."""
    if args.data in (None, PROCEDURAL):
        judge = Judge(held_out_paintings(args.limit), trained)
        return judge, procedural_set(judge)
    return None, stored_set(args.data, cfg, size, with_pictures, args.limit)


def measure_and_write(
    args: argparse.Namespace,
    samples: EvaluationSet,
    textures: dict[str, Textures],
    about: dict,
    procedural: dict,
    device: str,
) -> dict:
    """All measures of each task's textures, and of the true ones, written to --out."""
    extractors = {name: load_extractor(name, device) for name in args.extractor}
    face_model = load_face_model(args.face_model, device) if args.face_model else None
    measured: dict[str, Measures] = {}
    truth: Observed | None = None
    if samples.truth:
        truth = observe(samples, samples.truth, extractors, "truth")
        measured["truth"] = measure(samples, samples.truth, extractors, truth, truth, against_truth=False)
    for task, made in textures.items():
        observed = observe(samples, made, extractors, task)
        measured[task] = measure(samples, made, extractors, observed, truth, face_model)
    results = results_of(samples, measured, about, procedural)
    write_results(Path(args.out), results, measured, about.get("global_step", 0))
    write_whole(Path(args.out) / PAGE, page(results, samples, measured, textures).encode())
    return results
