"""What `accelerate launch` was told, by the variables that it sets: taken, or refused where this project has it not."""

import os

from common.errors import UserError

# Ways to cut a model up among processes; here each process holds all of it.
REFUSED = {
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
}


def check_launch() -> None:
    """Raises UserError for options of the launcher that would be without effect."""
    for variable, option in REFUSED.items():
        if _is_set(variable):
            raise UserError(f"accelerate launch {option} is not supported; launch with --multi_gpu")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise UserError(
            f"accelerate launch --dynamo_backend {backend.lower()} is not supported; set model.compile to true"
        )


def launched_precision(mixed_precision: str) -> str:
    """training.mixed_precision, or the launcher's where that is "auto".

    The launcher's "no" counts for nothing: it says so too when it was told nothing. Raises UserError when the two
    contradict each other.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched in ("no", mixed_precision):
        return mixed_precision
    if launched not in ("bf16", "fp16"):
        raise UserError(f"accelerate launch --mixed_precision {launched} is not supported; take bf16 or fp16")
    if mixed_precision != "auto":
        raise UserError(
            f"training.mixed_precision is {mixed_precision}, but accelerate was launched with --mixed_precision "
            f"{launched}; leave one of them out"
        )
    return launched


def launched_device(device: str) -> str:
    """training.device, or the CPU where that is "auto" and the launcher was told --cpu.

    Raises UserError when the two contradict each other.
    """
    if not _is_set("ACCELERATE_USE_CPU") or device == "cpu":
        return device
    if device != "auto":
        raise UserError(f"training.device is {device}, but accelerate was launched with --cpu; leave one of them out")
    return "cpu"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")
