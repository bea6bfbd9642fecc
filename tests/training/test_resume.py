"""Stopping, dying and going on as if nothing had happened."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import STOPPED, UserError
from common.files import PROJECT_ROOT
from joint import main as joint_main
from models import checkpoints
from training import loop as training
from training.loop import train
from training.run import set_up

OPTIONS = (
    "model.lora.dropout=0.2",  # drawn from torch's own stream, unlike noise and timesteps
    "training.joint.max_steps=7",
    "training.joint.effective_batch_size=8",
    "training.joint.learning_rate=0.01",
    "output.save_every=2",
)


def state(folder: Path) -> dict:
    return torch.load(folder / checkpoints.RESUME_FILE, weights_only=True)


def assert_equal(first, second, where="state"):
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    else:
        assert first == second, where


def at_step(monkeypatch, number: int, action):
    """Runs action() at the start of optimiser step `number`."""
    original = training.optimizer_step

    def step(run, global_step, batches, log):
        if global_step == number:
            action()
        return original(run, global_step, batches, log)

    monkeypatch.setattr(training, "optimizer_step", step)


@pytest.fixture()
def config(make_config, tmp_path):
    def make(name: str, *overrides: str):
        return make_config(f"output.out_dir={tmp_path / name}", *OPTIONS, *overrides)

    return make


@pytest.mark.parametrize(
    "how,options",
    [
        (signal.SIGTERM, []),
        (signal.SIGINT, ["data.cache=none"]),
        ("crash", ["training.ema_decay=0.9"]),
        ("crash", ["training.optimizer=schedulefree"]),
        ("crash", ["training.optimizer=prodigy"]),
        ("crash", ["data.views=online", "data.views_per_texture=3"]),
    ],
)
def test_a_resumed_run_equals_an_undisturbed_one(how, options, config, monkeypatch, capsys):
    def config(name, make=config):
        return make(name, *options)

    handler = signal.getsignal(signal.SIGINT)
    whole = train(config("whole"), "joint")
    with monkeypatch.context() as patch:
        if how == "crash":

            def crash():
                raise RuntimeError("the machine is gone")

            at_step(patch, 6, crash)
            with pytest.raises(RuntimeError):
                train(config("cut"), "joint")
        else:
            at_step(patch, 3, lambda: os.kill(os.getpid(), how))
            with pytest.raises(SystemExit) as stopped:
                train(config("cut"), "joint")
            assert stopped.value.code == STOPPED
            assert "stopped at step 3" in capsys.readouterr().out, "it saves where it is, not where it would"
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = train(config("cut"), "joint", resume="auto")
    assert f"at step {4 if how == 'crash' else 3}" in capsys.readouterr().out
    assert_equal(state(whole), state(resumed))
    for name in (checkpoints.LORA_FILE, checkpoints.ALIGNER_FILE):
        assert_equal(*(load_file(folder / name) for folder in (whole, resumed)))


def test_a_signal_to_the_whole_group_saves_before_the_loaders_workers_end(config, tmp_path):
    from conftest import command_line

    steps = ("training.joint.max_steps=100000", "output.save_every=100000")
    arguments = command_line(config("run", "data.num_workers=2", *steps))
    command = [sys.executable, PROJECT_ROOT / "joint.py", *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    text = ""
    while not re.search(r" ([3-9]|\d\d+)/100000 ", text[-200:]) and (character := process.stderr.read(1)):
        text += character
    os.killpg(process.pid, signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == STOPPED, text + error
    assert "--resume auto goes on" in out and len(list((tmp_path / "run" / "joint").glob("step-*"))) == 1


def test_the_command_resumes_from_the_newest_or_a_named_checkpoint(config, tmp_path, run_script, capsys):
    from conftest import command_line

    arguments = command_line(config("run"))
    assert run_script(joint_main, *arguments, "--resume", "auto")[0] == 0, "nothing to resume: it starts"
    whole = state(tmp_path / "run" / "joint" / "step-000007")
    status, out, _ = run_script(joint_main, *arguments, "--resume", tmp_path / "run" / "joint" / "step-000002")
    assert status == 0 and "at step 2" in out
    assert_equal(whole, state(tmp_path / "run" / "joint" / "step-000007"))


def test_an_incomplete_checkpoint_is_passed_over(config, tmp_path, capsys):
    last = train(config("run"), "joint")
    (last / checkpoints.RESUME_FILE).unlink()
    assert training.newest_state(last.parent).name == "step-000006"
    assert f"{last.name} lacks training_state.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change,message",
    [
        ("model.lora.r=4", "model.lora"),
        ("model.aligner.kind=pooled", "model.aligner"),
        ("training.seed=9", "training.seed 0, not 9"),
        ("training.joint.effective_batch_size=4", "effective_batch_size 8, not 4"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(change, message, config):
    last = train(config("run", "training.joint.max_steps=1"), "joint")
    with pytest.raises(UserError, match=message):
        train(config("other", change), "joint", resume=str(last))


def test_what_cannot_be_resumed(config, tmp_path):
    last = train(config("run", "training.joint.max_steps=1"), "joint")
    with pytest.raises(UserError, match="is of task joint, not t2uv"):
        train(config("run"), "t2uv", resume=str(last))
    (last / checkpoints.RESUME_FILE).write_bytes(b"torn")
    with pytest.raises(UserError, match="resume from an earlier checkpoint"):
        train(config("run"), "joint", resume=str(last))
    with pytest.raises(UserError, match="cannot be resumed"):
        train(config("run"), "joint", resume=str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("parameters"),
        lambda state: state["parameters"].pop(),
        lambda state: state.update(parameters=[torch.zeros(1)] * len(state["parameters"])),
        lambda state: state.update(optimizer=None),
        lambda state: state.update(lr_scheduler={"last_epoch": "a"}),
    ],
)
def test_a_state_of_something_else_is_one_line(change, config):
    last = train(config("run", "training.joint.max_steps=1"), "joint")
    content = state(last)
    change(content)
    torch.save(content, last / checkpoints.RESUME_FILE)
    with pytest.raises(UserError, match=r"does not hold what this run needs.*resume from an earlier checkpoint"):
        train(config("run", "training.joint.max_steps=2"), "joint", resume=str(last))


def test_a_state_with_a_number_that_stands_for_many_is_refused(config):
    last = train(config("run", "training.joint.max_steps=1"), "joint")
    content, laughs = state(last), {}
    for _ in range(60):  # 2^60 dictionaries to whoever follows each
        laughs = {"a": laughs, "b": laughs}
    torch.save(content | {"watch": laughs}, last / checkpoints.RESUME_FILE)
    train(config("run", "training.joint.max_steps=2"), "joint", resume=str(last))
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1).expand(1 << 19, 1 << 19)
    torch.save(content, last / checkpoints.RESUME_FILE)
    with pytest.raises(UserError, match="more numbers than are in the file"):
        train(config("run", "training.joint.max_steps=2"), "joint", resume=str(last))


@pytest.mark.parametrize("text", ["[", "[]", "{}", '{"task": "joint", "global_step": 1e999}', "[" * 5000])
def test_a_damaged_step_is_one_line(text, tmp_path):
    (tmp_path / checkpoints.STATE_FILE).write_text(text)
    with pytest.raises(UserError, match="does not say the task and the step"):
        checkpoints.read_state(tmp_path)


def test_old_checkpoints_are_dropped(config, tmp_path):
    train(config("run", "output.keep_last=2"), "joint")
    assert sorted(path.name for path in (tmp_path / "run" / "joint").iterdir()) == ["step-000006", "step-000007"]


def test_a_full_disk_keeps_the_last_checkpoint(config, tmp_path, monkeypatch):
    original, saved = torch.save, []

    def fills_up(content, path):
        saved.append(path)
        if len(saved) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return original(content, path)

    monkeypatch.setattr(torch, "save", fills_up)
    with pytest.raises(UserError, match=r"No space left on device.*takes \d+ MB"):
        train(config("run"), "joint")
    assert [path.name for path in (tmp_path / "run" / "joint").iterdir()] == ["step-000002"]


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(config, monkeypatch):
    original, batches_seen = training.batch_losses, []

    def poisoned(run, batch, draws):
        batches_seen.append(batch)
        factor = float("nan") if len(batches_seen) in (3, 4) else 1
        for losses in original(run, batch, draws):
            yield {name: loss * factor for name, loss in losses.items()}

    monkeypatch.setattr(training, "batch_losses", poisoned)
    run = set_up(config("run"), "joint")
    batches, log, counted = training.open_batches(run), training.RunLog(run), []
    for step in (1, 2, 3):
        before = [parameter.clone() for parameter in run.parameters]
        losses, _ = training.optimizer_step(run, step, batches, log)
        counted.append(losses["skipped_steps"])
        moved = any(not torch.equal(*pair) for pair in zip(before, run.parameters))
        assert moved == (step != 2), step
    assert counted == [0, 1, 0] and run.skipped == 0


def test_minutes_of_training_are_measured_once(make_config, tmp_path, monkeypatch):
    def config(name: str, minutes: float):
        return make_config(*OPTIONS, f"training.joint.max_minutes={minutes}", f"output.out_dir={tmp_path / name}")

    monkeypatch.setattr(training, "steps_in", lambda run, minutes: int(10 * minutes))
    whole = train(config("whole", 0.7), "joint")
    assert whole.name == "step-000007", "max_steps does not count"

    def stop():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        at_step(patch, 5, stop)
        with pytest.raises(RuntimeError):
            train(config("cut", 0.7), "joint")
    monkeypatch.setattr(training, "steps_in", lambda *_: pytest.fail("measured again"))
    resumed = train(config("cut", 0.7), "joint", resume="auto")
    assert resumed.name == "step-000007"
    assert_equal(state(whole), state(resumed))

    monkeypatch.setattr(training, "steps_in", lambda run, minutes: int(10 * minutes))
    assert train(config("cut", 0.2), "joint", resume="auto").name == "step-000009", "other minutes begin there"


def test_the_speed_is_measured_without_a_trace(make_config):
    run = set_up(make_config(*OPTIONS, "training.joint.max_minutes=1"), "joint")
    before = [parameter.detach().clone() for parameter in run.parameters]
    few, many = training.steps_in(run, 0.05), training.steps_in(run, 5)
    assert few < many and many > 20
    assert all(torch.equal(*pair) for pair in zip(before, run.parameters))
    assert all(parameter.grad is None for parameter in run.parameters) and run.global_step == 0
