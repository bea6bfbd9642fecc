"""From a few examples to a personal adapter: the configuration of such a run, and the way from folder to folder.

Steps are kept in a hidden folder beside the result, named by all that decides them, so that the same command goes on
where it was stopped; the result is a copy of that folder's best step.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from atlas_dataset.examples import LAYOUT_SIDE, MOST_EXAMPLES
from atlas_dataset.fits import find_fit, read_fit
from common import processes
from common.errors import UserError, reason
from common.files import check_writable, content_hash, remove_folder, replace_folder, write_whole
from common.pictures import encode_image, is_picture, open_image, picture_files
from config.configuration import Config, Output, dump_config, load_config
from lora_utils import ADAPTER_FILE
from models.adapters import weights_hash
from models.checkpoints import CONFIG_FILE, newest_checkpoint
from models.generation import check_takes_pictures
from models.interchange import layout_of, updated
from models.pipeline import TexturePipeline
from training.loop import train

NEVER = 1_000_000  # steps


def personal_config(
    checkpoint: str | Path | None,
    examples: str | Path,
    word: str,
    class_prompt: str,
    class_images: str | Path | None = None,
    steps: int | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """A checkpoint's own configuration, made that of a personal run on its top.

    checkpoint: None is the newest of your own, or the embedded one. steps: train so many and keep the last; None: until
    nothing is won any more. overrides: dotted keys, which win. Raises UserError for a folder without pictures, and for
    a checkpoint that is none of ours.
    """
    if not any(map(is_picture, Path(examples).glob("*"))):  # said before anything is loaded
        raise UserError(f"no pictures in {examples}; give a folder of 1 to {MOST_EXAMPLES} textures, or pictures")
    folder = Path(checkpoint) if checkpoint else newest_checkpoint(Output().out_dir)
    if layout_of(folder) != "ours":
        raise UserError(f"--base-checkpoint {folder}: give a checkpoint that joint.py or t2uv.py wrote")
    values = {
        "personal.checkpoint": folder,
        "personal.weights": weights_hash(folder),
        "personal.word": word.lower(),
        "personal.class_prompt": " ".join(class_prompt.split()),
        "personal.class_images": class_images or "null",
        "data.dataset": examples,
        "data.cache": "latents",
        "data.validation_textures": 0,
        "training.ema_decay": "null",
        "training.outside_weight": 0,  # what lies beside the islands is nobody's
        "output.sample_prompts": "[]",
        "output.half_precision": "true",
        "output.keep_last": "null",
        "output.save_every": NEVER,  # each best step is saved
        "output.sample_every": NEVER,
    }
    if steps is not None:
        values |= {"training.personal.max_steps": steps, "personal.patience": "null", "personal.keep_best": "false"}
    return load_config(folder / CONFIG_FILE, [*(f"{key}={value}" for key, value in values.items()), *overrides])


def personalise(cfg: Config, out: Path, pictures: bool = False) -> Path:
    """Trains the adapter that `personal_config` describes → its folder, `out`.

    pictures: the examples are pictures of a person, of which image-to-UV makes textures first. Raises UserError for
    what is wrong with the examples, and where `out` is something else already.
    """
    out = out.resolve() if out.is_symlink() else out
    if out.exists() and not (out / ADAPTER_FILE).is_file():
        raise UserError(f"--out {out} is there already and is no adapter; choose another name")
    folders = [cfg.data.dataset, *filter(None, [cfg.personal.class_images])]
    contents = [file.read_bytes() for folder in folders for file in sorted(Path(folder).glob("*")) if file.is_file()]
    key = content_hash(dump_config(cfg), str(pictures), *contents)[:8]
    work = out.with_name(f".{out.name}-{key}.training")
    settings = {"output.out_dir": str(work), "data.cache_dir": str(work / "cache")}
    is_new = not work.exists()
    try:
        if pictures:
            settings["data.dataset"] = str(textures_of_pictures(cfg, work / "textures"))
        best = train(updated(cfg, settings), "personal", resume="auto")
    except UserError:
        if is_new:  # nothing half-written
            shutil.rmtree(work, ignore_errors=True)
        raise
    if processes.is_main():
        check_writable(out.parent)
        partial = out.with_name(f".{out.name}.partial")
        try:  # a copy, so that the same command still has all of the run if it is killed before its end
            shutil.rmtree(partial, ignore_errors=True)
            replace_folder(shutil.copytree(best, partial), out)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"cannot write {out} ({reason(error)}); the adapter is whole in {best}") from None
        with suppress(OSError):  # files that are still open; the adapter is there
            remove_folder(work)
    processes.wait()
    return out


def textures_of_pictures(cfg: Config, folder: Path) -> Path:
    """What image-to-UV makes of each picture of cfg.data.dataset, with the pictures' captions → folder.

    A picture beside which its fit lies (NAME.json, .npz or .pkl) keeps its own pixels.
    """
    source = Path(cfg.data.dataset)
    files = picture_files(source)
    pipeline = TexturePipeline.from_pretrained(cfg.personal.checkpoint, overrides=[])
    check_takes_pictures(pipeline.trained)
    size = max(pipeline.trained.base.native_resolution, LAYOUT_SIDE)  # at less its layout could not be told
    for file in files:
        picture, fit, partial = open_image(file), find_fit(source, file), None
        if fit:
            sighting = read_fit(fit, pipeline.body_spec, picture.height, picture.width)
            partial = pipeline.own_pixels([picture], [sighting], size)
        (texture,) = pipeline(images=[picture], partial=partial, size=size)
        write_whole(folder / f"{file.stem}.png", encode_image(texture, format="PNG"))
        caption = file.with_suffix(".txt")
        if caption.is_file():
            write_whole(folder / caption.name, caption.read_bytes())
    return folder
