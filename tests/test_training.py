import json
from pathlib import Path

import pytest
import torch
from conftest import command_line
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import training
from atlas_dataset.dataset import INFO_FILE
from base_model import load_base
from checkpoints import load_checkpoint
from conditioning import make_aligner
from errors import UserError
from i2uv import main as i2uv_main
from infer_uv import main as infer_main
from joint import main as joint_main
from lora_utils import add_lora, lora_parameters
from t2uv import main as t2uv_main
from training import batch_losses, shuffled_batches, step_generator, train

MAINS = {"t2uv": t2uv_main, "i2uv": i2uv_main, "joint": joint_main}
CONV_TARGETS = "model.lora.target_modules=[to_q, to_k, to_v, to_out.0, conv1, conv2, proj_in, proj_out]"


def scalars(log_dir) -> dict[str, list[float]]:
    (folder,) = Path(log_dir).iterdir()
    events = EventAccumulator(str(folder)).Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def state(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("task", ["t2uv", "i2uv", "joint"])
def test_scripts_train_save_and_infer(task, make_config, tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = make_config("output.log_every=1", "output.save_every=2", "output.sample_every=3")
    status, out, error = run_script(MAINS[task], *command_line(cfg))
    assert status == 0, error
    folders = sorted(path.name for path in (tmp_path / "checkpoints" / task).iterdir())
    assert folders == ["step-000002", "step-000003"] and "step-000003" in out
    logged = scalars(tmp_path / "logs")
    losses = {"t2uv": {"loss/t2uv"}, "i2uv": {"loss/i2uv", "loss/align"},
              "joint": {"loss/t2uv", "loss/i2uv", "loss/align"}}  # fmt: skip
    rest = {"loss/combined", "learning_rate", "samples_per_second", "gradient_norm", "skipped_steps"}
    assert set(logged) == losses[task] | rest
    assert all(len(values) == 3 for values in logged.values())

    source = (
        ["--image", str(next(Path(cfg.data.dataset).parent.parent.rglob("0.png")))]
        if task == "i2uv"
        else ["--prompt", "a man in red"]
    )
    status, out, error = run_script(
        infer_main, *source, f"--output.out_dir={cfg.output.out_dir}", "--out", tmp_path / "o.png"
    )
    assert status == 0 and (tmp_path / "o.png").exists(), error


@pytest.mark.parametrize("task", ["t2uv", "i2uv", "joint"])
def test_only_lora_and_aligner_move_and_they_all_do(task, make_config, monkeypatch, tiny_base):
    caught = {}
    original = training.save_checkpoint

    def spy(folder, cfg, task, step, unet, aligner, state):
        caught.update(unet=unet, aligner=aligner)
        return original(folder, cfg, task, step, unet, aligner, state)

    monkeypatch.setattr(training, "save_checkpoint", spy)
    bases = []
    monkeypatch.setattr(training, "load_base", lambda *args: bases.append(load_base(*args)) or bases[0])
    cfg = make_config("training.seed=3")
    train(cfg, task)

    torch.manual_seed(3)  # the same initial weights again
    fresh = load_base(str(tiny_base))
    add_lora(fresh.unet, cfg.model.lora)
    fresh_aligner = make_aligner(cfg.model.aligner, fresh) if task != "t2uv" else None
    for name, module in bases[0].modules().items():
        after = module.state_dict()
        for key, before in state(fresh.modules()[name]).items():
            moved = not torch.equal(before, after[key])
            assert moved == ("lora_" in key), f"{name}.{key}"
    assert (caught["aligner"] is None) == (task == "t2uv")
    if fresh_aligner is not None:
        after = caught["aligner"].state_dict()
        still = [key for key, before in fresh_aligner.state_dict().items() if torch.equal(before, after[key])]
        assert still == [], still


@pytest.mark.parametrize("task,names", [("t2uv", ["t2uv"]), ("i2uv", ["i2uv"]), ("joint", ["t2uv", "i2uv"])])
def test_losses_fall(task, names, make_config, tmp_path):
    cfg = make_config(
        f"training.{task}.max_steps=60", f"training.{task}.learning_rate=0.01", "output.log_every=15", CONV_TARGETS,
        f"training.{task}.lr_scheduler=constant",
    )  # fmt: skip
    train(cfg, task)
    logged = scalars(tmp_path / "logs")
    for name in names:
        losses = logged[f"loss/{name}"]
        assert losses[-1] < 0.85 * losses[0], losses


def one_batch(cfg, base, task="joint"):
    dataset = training.open_dataset(cfg, task, base)
    return next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))


def test_step_arithmetic_is_pinned(make_config, base):
    """Golden losses of one batch on the untrained stand-in: a change of ranges, noise or conditions shows here."""
    cfg = make_config("training.joint.alpha=0.5", "training.joint.beta=2")
    torch.manual_seed(1)
    aligner = make_aligner(cfg.model.aligner, base)
    losses = {}
    for part in batch_losses(one_batch(cfg, base), "joint", cfg, base, aligner, None, step_generator(0, 1, 0)):
        combined = part.pop("loss/combined")
        losses.update(part)
        schedule = cfg.training.joint
        expected = part.get("loss/t2uv", 0) * schedule.alpha + part.get("loss/i2uv", 0) * schedule.beta
        assert torch.allclose(combined, expected + part.get("loss/align", 0) * schedule.gamma)
    golden = {"loss/t2uv": 1.064, "loss/i2uv": 0.984, "loss/align": 1.891}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(golden, abs=2e-3)


def test_micro_batches_add_up_to_the_large_batch(make_config, base, monkeypatch):
    """With noise fixed by row, two micro-batches of two give the gradient of one batch of four."""
    cfg = make_config("training.joint.condition_dropout=0", "training.joint.gamma=0")
    torch.manual_seed(1)
    parameters = add_lora(base.unet, cfg.model.lora)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    aligner = make_aligner(cfg.model.aligner, base)
    parameters += list(aligner.parameters())
    batch, noise = one_batch(cfg, base), torch.randn(4, 4, 8, 8)

    def gradients(parts):
        for parameter in parameters:
            parameter.grad = None
        for rows in parts:
            monkeypatch.setattr(torch, "randn", lambda *shape, rows=rows, generator=None: noise[rows])
            monkeypatch.setattr(
                torch, "randint", lambda *args, rows=rows, generator=None: torch.tensor([100, 300, 500, 900])[rows]
            )
            part = {
                key: [value[row] for row in rows] if key == "prompt" else value[rows] for key, value in batch.items()
            }
            for losses in batch_losses(part, "joint", cfg, base, aligner, None, torch.Generator()):
                (losses["loss/combined"] / len(parts)).backward()
        monkeypatch.undo()
        return torch.cat([parameter.grad.flatten() for parameter in parameters])

    whole, parts = gradients([[0, 1, 2, 3]]), gradients([[0, 1], [2, 3]])
    assert whole.abs().max() > 0 and torch.allclose(whole, parts, rtol=1e-4, atol=1e-6)


def test_the_loop_averages_micro_batches_and_steps_once(make_config, monkeypatch):
    """Gradient of a known loss at clip time, and optimiser steps, with two micro-batches a step."""
    seen = {"norms": [], "steps": 0}
    clip, step = torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step

    def known_losses(batch, task, cfg, base, aligner, precision, generator):
        yield {"loss/t2uv": (total := sum(p.sum() for p in lora_parameters(base.unet))), "loss/combined": total}

    def spy_clip(parameters, max_norm):
        seen["norms"].append(float(clip(parameters, max_norm)))
        seen["clipped"] = float(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm())
        seen["count"] = sum(p.numel() for p in parameters)
        return torch.tensor(seen["norms"][-1])

    def spy_step(*args, **kwargs):
        seen["steps"] += 1
        return step(*args, **kwargs)

    monkeypatch.setattr(training, "batch_losses", known_losses)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy_clip)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy_step)
    train(make_config("training.t2uv.batch_size=2", "training.t2uv.max_grad_norm=0.5"), "t2uv")
    assert seen["steps"] == 3 and len(seen["norms"]) == 3
    assert seen["norms"] == pytest.approx([seen["count"] ** 0.5] * 3, rel=1e-4), "an average, not a sum"
    assert seen["clipped"] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warm_up_and_decay(kind, make_config, tmp_path):
    train(make_config(f"training.t2uv.lr_scheduler={kind}", "training.t2uv.lr_warmup_steps=2", "output.log_every=1",
                      "training.t2uv.max_steps=6", "training.t2uv.learning_rate=0.01"), "t2uv")  # fmt: skip
    rates = scalars(tmp_path / "logs")["learning_rate"]
    assert rates[:3] == pytest.approx([0, 0.005, 0.01])
    assert rates[-1] == pytest.approx(0.01) if kind == "constant" else rates[-1] < 0.005


def test_the_aligner_may_have_its_own_rate(make_config, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "get_scheduler", lambda kind, optimizer, **steps: seen.append(optimizer) or 1 / 0)
    for override, rates in (("null", [0.01, 0.01]), ("0.002", [0.01, 0.002])):
        with pytest.raises(ZeroDivisionError):
            train(make_config("training.joint.learning_rate=0.01",
                              f"training.joint.aligner_learning_rate={override}"), "joint")  # fmt: skip
        assert [group["lr"] for group in seen[-1].param_groups] == rates


def test_the_body_is_the_data_sets_own(make_config, mesh, monkeypatch):
    assert load_checkpoint(train(make_config("data.body=null"), "t2uv")).cfg.data.body == f"obj:{mesh}"
    with pytest.raises(UserError, match="cannot read mesh"):
        train(make_config("data.body=obj:nowhere.obj"), "t2uv", dry_run=True)


def test_a_workers_error_is_one_line(make_config, dataset_dir, tmp_path):
    import shutil

    import datasets

    table = datasets.Dataset.from_dict(
        {"texture": [{"bytes": b"broken", "path": None}] * 4, "prompt": ["a"] * 4},
        features=datasets.Features(texture=datasets.Image(), prompt=datasets.Value("string")),
    )
    table.save_to_disk(tmp_path / "broken")
    with pytest.raises(UserError) as caught:
        train(make_config(f"data.dataset={tmp_path / 'broken'}", "data.num_workers=1"), "t2uv", dry_run=True)
    assert str(caught.value).startswith("cannot read picture texture") and "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "broken")


def test_two_runs_are_equal_to_the_bit(make_config, tmp_path):
    checkpoints = [train(make_config(f"output.out_dir={tmp_path / name}"), "joint") for name in ("first", "second")]
    for name in ("pytorch_lora_weights.safetensors", "aligner.safetensors"):
        first, second = (load_file(checkpoint / name) for checkpoint in checkpoints)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_batches_visit_every_row_each_epoch():
    class Rows:
        def __len__(self):
            return 10

        def shuffled(self, rng):
            return rng.permutation(10)

    batches = shuffled_batches(Rows(), 4, seed=1)
    rows = [row for _ in range(5) for row in next(batches)]
    assert sorted(rows[:10]) == list(range(10)) and sorted(rows[10:]) == list(range(10, 20)), "each its own numbers"
    assert rows[:10] != [row - 10 for row in rows[10:]], "and its own order"
    later = shuffled_batches(Rows(), 4, seed=1, start=3)
    assert [row for _ in range(2) for row in next(later)] == rows[12:], "from any batch on"


def test_training_on_renders_made_online(make_config, dataset_dir, tmp_path):
    checkpoint = train(make_config("data.views=online", "data.views_per_texture=2", "data.num_workers=1"), "joint")
    assert load_checkpoint(checkpoint).cfg.data.views == "online"
    procedural = make_config("data.views=online", "data.dataset=procedural:4", "data.body=null")
    train(procedural, "joint", dry_run=True)
    root = next((tmp_path / "cache").glob("procedural-4-*"))
    assert json.loads((root / INFO_FILE).read_text())["views"] == 0, "no render set is stored"
    with pytest.raises(UserError, match="holds no renders; set"):
        train(make_config(f"data.dataset={root}", "data.body=null"), "joint", dry_run=True)


def test_random_numbers_depend_on_seed_and_step():
    draws = {
        torch.rand(1, generator=step_generator(*numbers)).item()
        for numbers in [(0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1)]
    }
    assert len(draws) == 4
    assert step_generator(0, 1, 0).initial_seed() == step_generator(0, 1, 0).initial_seed()


def test_dry_run_reports_and_writes_nothing(make_config, tmp_path, run_script):
    cfg = make_config(
        "training.joint.effective_batch_size=8", "training.joint.max_steps=null", "training.joint.num_epochs=2"
    )
    arguments = [argument for argument in command_line(cfg)] + ["--training.joint.max_steps=null"]
    status, out, error = run_script(joint_main, *arguments, "--dry-run")
    assert status == 0, error
    for word in (
        "trained",
        "LoRA",
        "aligner",
        "12 rows",
        "steps     3 of 8 rows",
        "memory",
        "disk",
        "nothing was trained",
    ):
        assert word in out, word
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "logs").exists()


def test_a_diverging_run_stops_and_keeps_the_last_checkpoint(make_config, tmp_path, monkeypatch):
    original, calls = training.batch_losses, []

    def diverges(*args):
        calls.append(1)
        for losses in original(*args):
            yield {name: loss * float("nan") if len(calls) > 2 else loss for name, loss in losses.items()}

    monkeypatch.setattr(training, "batch_losses", diverges)
    cfg = make_config("output.log_every=1", "output.save_every=1", "training.max_skipped_steps=0")
    with pytest.raises(
        UserError, match=r"not finite in 1 .*to step 3 on the rows 'a man in.*learning_rate.*step-000002"
    ):
        train(cfg, "joint")
    assert load_checkpoint(tmp_path / "checkpoints" / "joint" / "step-000002")
    assert not (tmp_path / "checkpoints" / "joint" / "step-000003").exists()


def test_options_of_the_step(make_config):
    cfg = make_config(
        "model.gradient_checkpointing=true", "model.aligner.kind=pooled", "model.lora.dropout=0.1",
        "training.mixed_precision=bf16", "training.joint.max_steps=1",
    )  # fmt: skip
    checkpoint = train(cfg, "joint")
    assert "cls_token" in load_file(checkpoint / "aligner.safetensors")


def test_a_texture_is_encoded_once(make_config, base, monkeypatch):
    batch, calls = one_batch(make_config(), base), []
    assert batch["texture_id"].tolist() == [0, 0, 0, 1]
    original = training.encode_posterior
    monkeypatch.setattr(
        training, "encode_posterior", lambda vae, pixels: calls.append(len(pixels)) or original(vae, pixels)
    )
    first, second = training.posteriors(base, batch), training.posteriors(base, batch)
    assert calls == [1, 1] and all(torch.equal(*pair) for pair in zip(first, second))
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(first, original(base.vae, batch["texture"])))
    monkeypatch.setattr(training, "POSTERIORS_KEPT", 1)
    training.posteriors(base, batch)
    assert list(base.posteriors) == [1]


def test_too_few_rows(make_config):
    with pytest.raises(UserError, match="batch_size is 16"):
        train(make_config("training.t2uv.batch_size=16", "training.t2uv.effective_batch_size=16"), "t2uv")


def test_lora_parameters_are_named(base, make_config):
    assert len(lora_parameters(base.unet)) == 0
    assert len(add_lora(base.unet, make_config().model.lora)) == len(lora_parameters(base.unet)) > 10
