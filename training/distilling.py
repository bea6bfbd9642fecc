"""From a checkpoint to its fast adapter: the configuration of such a run, and the way into the checkpoint's folder."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from common import processes
from common.errors import UserError, reason
from common.files import check_writable, content_hash, remove_folder, replace_folder
from config.configuration import Config, Output, dump_config, load_config
from lora_utils import FAST_FOLDER, LORA_FILE
from models.adapters import weights_hash
from models.checkpoints import ALIGNER_FILE, CONFIG_FILE, newest_checkpoint
from models.fast import Fast, save_fast
from models.interchange import layout_of
from training.loop import train

NEVER = 1_000_000  # steps


def fast_config(checkpoint: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """A checkpoint's own configuration, made that of distilling it.

    checkpoint: None is the newest of your own, or the embedded one. overrides: dotted keys, which win. Raises UserError
    for a checkpoint that joint.py did not write.
    """
    folder = Path(checkpoint) if checkpoint else newest_checkpoint(Output().out_dir)
    if layout_of(folder) != "ours" or not (folder / ALIGNER_FILE).is_file():
        raise UserError(f"--checkpoint {folder}: give one that joint.py wrote, for prompts and pictures")
    values = {
        "fast.checkpoint": folder,
        "data.validation_textures": 0,
        "training.ema_decay": 0.98,
        "output.sample_prompts": "[]",
        "output.half_precision": "true",
        "output.keep_last": 2,
        "output.save_every": 50,
        "output.sample_every": NEVER,
        "output.evaluate_every": "null",
    }
    return load_config(folder / CONFIG_FILE, [*(f"{key}={value}" for key, value in values.items()), *overrides])


def distill(cfg: Config, out_dir: str | Path) -> Path:
    """Trains the adapter that `fast_config` describes, or goes on with it → its folder, in the checkpoint's.

    out_dir: where the steps are kept meanwhile. Raises UserError for what cannot be trained or written.
    """
    checkpoint = Path(cfg.fast.checkpoint)
    check_writable(checkpoint)
    weights = weights_hash(checkpoint)
    work = Path(out_dir) / f"fast-{content_hash(dump_config(cfg).encode(), weights.encode())[:8]}"
    output = cfg.output.model_copy(update={"out_dir": str(work)})
    last = train(cfg.model_copy(update={"output": output}), "fast", resume="auto")
    if processes.is_main():
        folder, partial = checkpoint / FAST_FOLDER, checkpoint / f".{FAST_FOLDER}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            shutil.copy(last / LORA_FILE, partial)
            save_fast(partial, Fast(weights, cfg.fast.windows))
            replace_folder(partial, folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"cannot write {folder} ({reason(error)}); the adapter is whole in {last}") from None
        with suppress(OSError):  # files that are still open; the adapter is there
            remove_folder(work)
    processes.wait()
    return checkpoint / FAST_FOLDER
