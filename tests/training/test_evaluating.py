"""The evaluation while training: fixed, of the kept weights, and without a trace in what is trained."""

import pytest
import torch

from common.errors import UserError
from models.checkpoints import RESUME_FILE
from training import evaluating, loop
from training.evaluating import MEASURED, evaluation_figures
from training.loop import train
from training.run import set_up

OPTIONS = (
    "model.lora.dropout=0.2",  # drawn from torch's own stream
    "data.validation_textures=2",
    "training.joint.max_steps=4",
    "training.joint.batch_size=2",
    "training.joint.effective_batch_size=2",
    "training.joint.learning_rate=0.01",
    "output.save_every=1",
)


@pytest.fixture()
def logged(monkeypatch):
    """(step, name) → every loss and evaluated figure, as a run logs them."""
    values = {}
    step, scalars = loop.optimizer_step, loop.RunLog.scalars

    def noted_step(run, global_step, batches, log):
        losses, prompts = step(run, global_step, batches, log)
        values.update({(global_step, name): loss for name, loss in losses.items()})
        return losses, prompts

    def noted_scalars(self, figures, global_step):
        values.update({(global_step, name): value for name, value in figures.items() if name.startswith("eval/")})
        return scalars(self, figures, global_step)

    monkeypatch.setattr(loop, "optimizer_step", noted_step)
    monkeypatch.setattr(loop.RunLog, "scalars", noted_scalars)
    return values


def evaluated(values: dict) -> dict:
    return {key: value for key, value in values.items() if key[1].startswith("eval/")}


def test_training_is_the_same_to_the_bit_with_and_without(make_config, logged, tmp_path, capsys):
    def run(name: str, *more: str):
        logged.clear()
        last = train(make_config(f"output.out_dir={tmp_path / name}", *OPTIONS, *more), "joint")
        return torch.load(last / RESUME_FILE, weights_only=True)["parameters"], dict(logged)

    parameters, losses = run("without")
    assert not evaluated(losses)
    same_parameters, values = run("with", "output.evaluate_every=2")
    assert {key: values[key] for key in losses} == losses
    assert all(torch.equal(*pair) for pair in zip(parameters, same_parameters, strict=True))
    figures = evaluated(values)
    tasks, families = ("t2uv", "i2uv"), [f"{f}/{name}" for f, names in MEASURED.items() for name in names]
    assert {key[0] for key in figures} == {2, 4}
    assert {key[1] for key in figures if key[0] == 2} <= {f"eval/{task}/{name}" for task in tasks for name in families}
    for task in tasks:
        assert figures[2, f"eval/{task}/texture/psnr"] > 0 and (2, f"eval/{task}/uv/seam_error") in figures
    assert figures[2, "eval/t2uv/texture/psnr"] != figures[4, "eval/t2uv/texture/psnr"], "of the weights of that step"
    assert "step 2: eval/t2uv/texture/psnr " in capsys.readouterr().out


def test_a_resumed_run_measures_what_an_undisturbed_one_does(make_config, logged, tmp_path):
    cfg = make_config(*OPTIONS, "output.evaluate_every=2", "training.ema_decay=0.9")
    train(cfg, "joint")
    figures = evaluated(logged)
    logged.clear()
    train(cfg, "joint", resume=str(tmp_path / "checkpoints" / "joint" / "step-000003"))
    assert evaluated(logged) == {key: value for key, value in figures.items() if key[0] == 4}


def test_processes_share_the_textures(make_config, monkeypatch):
    run = set_up(make_config(*OPTIONS), "joint")
    alone, shares = evaluation_figures(run), []
    monkeypatch.setattr(evaluating.processes, "world_size", lambda: 2)
    monkeypatch.setattr(evaluating.processes, "mean_over_processes", lambda tensors: shares.append(tensors[0].clone()))
    for rank in range(2):
        monkeypatch.setattr(evaluating.processes, "rank", lambda rank=rank: rank)
        evaluation_figures(run)
    of_texts = shares[0::2]  # then those of pictures
    totals, counts = sum(of_texts)
    assert of_texts[0][1, 0] == of_texts[1][1, 0] == 1, "a texture each"
    assert (totals / counts)[0].item() == pytest.approx(alone["eval/t2uv/texture/psnr"], rel=1e-5)


def test_it_needs_held_out_textures(make_config):
    with pytest.raises(UserError, match="measures held-out textures"):
        set_up(make_config("output.evaluate_every=2"), "joint")
