"""What accelerate launch says to its processes."""

import pytest
import torch

from common.errors import UserError
from training import launcher
from training.run import set_up


def test_the_launchers_precision_is_taken_where_the_configuration_leaves_it_open(make_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert set_up(make_config("training.mixed_precision=auto"), "t2uv").precision == torch.bfloat16
    assert launcher.launched_precision("bf16") == "bf16"
    with pytest.raises(UserError, match=r"training\.mixed_precision is no, but .*--mixed_precision bf16; leave one"):
        set_up(make_config("training.mixed_precision=no"), "t2uv")


@pytest.mark.parametrize("mixed_precision", ["auto", "no", "bf16", "fp16"])
def test_the_launcher_says_no_when_it_was_told_nothing(mixed_precision, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert launcher.launched_precision(mixed_precision) == mixed_precision


@pytest.mark.parametrize(
    "variable,value,message",
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8", "--mixed_precision fp8 is not supported"),
        ("ACCELERATE_USE_FSDP", "true", "--use_fsdp is not supported"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "--use_deepspeed is not supported"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--dynamo_backend inductor .* set model.compile to true"),
    ],
)
def test_what_would_be_without_effect_is_refused(variable, value, message, make_config, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message):
        set_up(make_config("training.mixed_precision=auto"), "t2uv")


def test_the_launchers_cpu(monkeypatch):
    assert launcher.launched_device("auto") == "auto"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert launcher.launched_device("auto") == launcher.launched_device("cpu") == "cpu"
    with pytest.raises(UserError, match=r"training\.device is cuda, but accelerate was launched with --cpu"):
        launcher.launched_device("cuda")
