import json
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import command_line
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from atlas_dataset.dataset import INFO_FILE
from common.errors import UserError
from i2uv import main as i2uv_main
from infer_uv import main as infer_main
from joint import main as joint_main
from lora_utils import LORA_FILE, add_lora, lora_parameters
from models.base import load_base, load_configured_base
from models.checkpoints import load_checkpoint
from models.conditioning import encode_prompts, make_aligner
from models.lora_files import load_lora
from t2uv import main as t2uv_main
from training import loop as training
from training import run
from training.loop import shuffled_batches, train

MAINS = {"t2uv": t2uv_main, "i2uv": i2uv_main, "joint": joint_main}
LOSSES = {
    "t2uv": {"loss/t2uv"},
    "i2uv": {"loss/i2uv", "loss/align"},
    "joint": {"loss/t2uv", "loss/i2uv", "loss/align"},
}
SCALARS = {"loss/combined", "learning_rate", "gradient_norm", "skipped_steps"}
SCALARS |= {"samples_per_second", "data_wait_share", "peak_memory_gb"}
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
    each_step = SCALARS | LOSSES[task]
    assert each_step <= set(logged)
    assert {name.split("/")[0] for name in set(logged) - each_step} == {"lora_norm", "final"}
    assert all(len(logged[name]) == 3 for name in each_step)

    condition = ["--prompt", "a man in red"]
    if task == "i2uv":
        condition = ["--image", str(next(Path(cfg.data.dataset).parent.parent.rglob("0.png")))]
    out_dir = f"--output.out_dir={cfg.output.out_dir}"
    status, out, error = run_script(infer_main, *condition, out_dir, "--out", tmp_path / "o.png")
    assert status == 0 and (tmp_path / "o.png").exists(), error


@pytest.mark.parametrize("task", ["t2uv", "i2uv", "joint"])
def test_only_lora_and_aligner_move_and_they_all_do(task, make_config, monkeypatch, tiny_base):
    caught = {}
    original = training.save_checkpoint

    def spy(folder, cfg, task, step, base, aligner, state, *others):
        caught.update(aligner=aligner)
        return original(folder, cfg, task, step, base, aligner, state, *others)

    monkeypatch.setattr(training, "save_checkpoint", spy)
    bases = []

    def load_and_keep(*args):
        bases.append(load_configured_base(*args))
        return bases[0]

    monkeypatch.setattr(run, "load_configured_base", load_and_keep)
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
    schedule = ("max_steps=60", "learning_rate=0.01", "lr_scheduler=constant")
    cfg = make_config(*(f"training.{task}.{setting}" for setting in schedule), "output.log_every=15", CONV_TARGETS)
    train(cfg, task)
    logged = scalars(tmp_path / "logs")
    for name in names:
        losses = logged[f"loss/{name}"]
        assert losses[-1] < 0.85 * losses[0], losses


def test_the_loop_averages_micro_batches_and_steps_once(make_config, monkeypatch):
    """Gradient of a known loss at clip time, and optimiser steps, with two micro-batches a step."""
    seen = {"norms": [], "steps": 0}
    clip, step = torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step

    def known_losses(run, batch, draws):
        total = sum(parameter.sum() for parameter in lora_parameters(run.base.unet))
        yield {"loss/t2uv": total, "loss/combined": total}

    def spy_clip(parameters, max_norm):
        seen["norms"].append(float(clip(parameters, max_norm)))
        gradients = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
        seen["clipped"] = float(torch.cat(gradients).norm())
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
    schedule = (f"lr_scheduler={kind}", "lr_warmup_steps=2", "max_steps=6", "learning_rate=0.01")
    cfg = make_config(*(f"training.t2uv.{setting}" for setting in schedule), "output.log_every=1")
    train(cfg, "t2uv")
    rates = scalars(tmp_path / "logs")["learning_rate"]
    assert rates[:3] == pytest.approx([0, 0.005, 0.01])
    assert rates[-1] == pytest.approx(0.01) if kind == "constant" else rates[-1] < 0.005


def test_the_aligner_may_have_its_own_rate(make_config, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "get_scheduler", lambda kind, optimizer, **steps: seen.append(optimizer) or 1 / 0)
    for override, rates in (("null", [0.01, 0.01]), ("0.002", [0.01, 0.002])):
        aligner_rate = f"training.joint.aligner_learning_rate={override}"
        with pytest.raises(ZeroDivisionError):
            train(make_config("training.joint.learning_rate=0.01", aligner_rate), "joint")
        assert [group["lr"] for group in seen[-1].param_groups] == rates


def test_the_body_is_the_data_sets_own(make_config, mesh, monkeypatch):
    assert load_checkpoint(train(make_config("data.body=null"), "t2uv")).cfg.data.body == f"obj:{mesh}"
    with pytest.raises(UserError, match="cannot read mesh"):
        train(make_config("data.body=obj:nowhere.obj"), "t2uv", dry_run=True)


def test_a_workers_error_is_one_line(make_config, tmp_path):
    table = datasets.Dataset.from_dict(
        {"texture": [{"bytes": b"broken", "path": None}] * 4, "prompt": ["a"] * 4},
        features=datasets.Features(texture=datasets.Image(), prompt=datasets.Value("string")),
    )
    table.save_to_disk(tmp_path / "broken")
    with pytest.raises(UserError) as caught:
        train(make_config(f"data.dataset={tmp_path / 'broken'}", "data.num_workers=1"), "t2uv", dry_run=True)
    assert str(caught.value).startswith("cannot read picture texture") and "\n" not in str(caught.value)


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


def test_training_on_renders_made_online(make_config, tmp_path):
    checkpoint = train(make_config("data.views=online", "data.views_per_texture=2", "data.num_workers=1"), "joint")
    assert load_checkpoint(checkpoint).cfg.data.views == "online"
    procedural = make_config("data.views=online", "data.dataset=procedural:4", "data.body=null")
    train(procedural, "joint", dry_run=True)
    root = next((tmp_path / "cache").glob("procedural-4-*"))
    assert json.loads((root / INFO_FILE).read_text())["views"] == 0, "no render set is stored"
    with pytest.raises(UserError, match="holds no renders; set"):
        train(make_config(f"data.dataset={root}", "data.body=null"), "joint", dry_run=True)


def test_dry_run_reports_and_writes_nothing(make_config, tmp_path, run_script):
    schedule = ("effective_batch_size=8", "max_steps=null", "num_epochs=2")
    cfg = make_config(*(f"training.joint.{setting}" for setting in schedule))
    status, out, error = run_script(joint_main, *command_line(cfg), "--dry-run")
    assert status == 0, error
    for words in ("trained", "LoRA", "aligner", "12 rows", "steps     3 of 8 rows", "memory", "disk"):
        assert words in out, words
    assert "nothing was trained" in out
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "logs").exists()


def test_a_diverging_run_stops_and_keeps_the_last_checkpoint(make_config, tmp_path, monkeypatch):
    original, calls = training.batch_losses, []

    def diverges(*args):
        calls.append(1)
        factor = float("nan") if len(calls) > 2 else 1
        for losses in original(*args):
            yield {name: loss * factor for name, loss in losses.items()}

    monkeypatch.setattr(training, "batch_losses", diverges)
    cfg = make_config("output.log_every=1", "output.save_every=1", "training.max_skipped_steps=0")
    message = r"not finite in 1 .*to step 3 on the rows 'a man in.*learning_rate.*step-000002"
    with pytest.raises(UserError, match=message):
        train(cfg, "joint")
    assert load_checkpoint(tmp_path / "checkpoints" / "joint" / "step-000002")
    assert not (tmp_path / "checkpoints" / "joint" / "step-000003").exists()


def test_options_of_the_step(make_config):
    model = ("model.gradient_checkpointing=true", "model.aligner.kind=pooled", "model.lora.dropout=0.1")
    cfg = make_config(*model, "training.mixed_precision=bf16", "training.joint.max_steps=1")
    checkpoint = train(cfg, "joint")
    assert "cls_token" in load_file(checkpoint / "aligner.safetensors")


@pytest.mark.parametrize("option", ["model.gradient_checkpointing", "model.channels_last", "model.compile"])
def test_what_makes_a_step_faster_or_smaller_changes_no_loss(option, make_config, tmp_path, monkeypatch):
    # Traced as for the compiler, and run as it is: compiling takes minutes and a compiler.
    curves, compiled, original = [], [], torch.compile

    def trace(function, **options):
        compiled.append(function)
        return original(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", trace)
    for value in ("false", "true"):
        train(make_config(f"{option}={value}", f"output.log_dir={tmp_path / value}", "output.log_every=1"), "joint")
        curves.append(scalars(tmp_path / value))
    assert bool(compiled) == (option == "model.compile")
    for name in ("loss/t2uv", "loss/i2uv", "gradient_norm"):
        assert curves[0][name] == pytest.approx(curves[1][name], rel=1e-3), name


def test_a_compiler_that_is_missing_is_told(make_config, monkeypatch):
    def no_compiler(*args):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda function: no_compiler)
    with pytest.raises(UserError, match=r"model.compile cannot be used \(No working C\+\+ compiler.*set it to false"):
        run.set_up(make_config("model.compile=true"), "t2uv")


@pytest.mark.parametrize("name,rate", [("adamw", 0.01), ("prodigy", 1.0), ("schedulefree", 0.01)])
def test_optimizers_learn(name, rate, make_config, tmp_path):
    schedule = ("training.t2uv.max_steps=40", "training.t2uv.lr_scheduler=constant", "output.log_every=10")
    optimizer = (f"training.optimizer={name}", f"training.t2uv.learning_rate={rate}")
    train(make_config(*optimizer, *schedule, CONV_TARGETS), "t2uv")
    losses = scalars(tmp_path / "logs")["loss/t2uv"]
    assert losses[-1] < losses[0], losses


def test_an_optimizer_that_is_not_installed_is_told(make_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"training\.optimizer adamw8bit needs the package bitsandbytes"):
        run.set_up(make_config("training.optimizer=adamw8bit"), "t2uv")


def test_checkpoints_hold_the_moving_average(make_config):
    """Against one worked out here: decay min(0.5, n / (9 + n)) at the n-th step, after the first."""
    cfg = make_config("training.ema_decay=0.5", "training.t2uv.learning_rate=0.1", "output.save_every=1")
    checkpoint = train(cfg, "t2uv")
    files = [checkpoint.parent / f"step-{step:06d}" / "training_state.pt" for step in (1, 2, 3)]
    steps = [torch.load(file, weights_only=True)["parameters"] for file in files]
    average = steps[0]
    for number, parameters in enumerate(steps[1:], 2):
        decay = min(0.5, number / (9 + number))
        average = [decay * before + (1 - decay) * now for before, now in zip(average, parameters)]
    base = load_base(cfg.model.pretrained_model)
    load_lora(base, checkpoint)
    saved = lora_parameters(base.unet)
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(saved, average))
    assert any(not torch.allclose(*pair, atol=1e-4) for pair in zip(saved, steps[-1]))


@pytest.mark.parametrize("schedule", ["alternate", "paired"])
def test_the_text_encoder_may_have_a_lora_too(schedule, make_config, tiny_base, tmp_path):
    settings = [f"training.joint.schedule={schedule}", "model.lora.text_encoder_r=2", "data.cache=latents"]
    settings += ["training.joint.learning_rate=0.1", "training.joint.lr_scheduler=constant"]
    checkpoint = train(make_config(*settings), "joint")
    trained, plain = load_checkpoint(checkpoint), load_base(str(tiny_base))
    prompt = ["a man in red"]
    with torch.no_grad():
        ours, before = encode_prompts(trained.base, prompt), encode_prompts(plain, prompt)
        assert (ours - before).abs().max() > 0.01, "it was trained"
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
        pipeline.load_lora_weights(checkpoint)
        plain.text_encoder = pipeline.text_encoder
        assert torch.allclose(encode_prompts(plain, prompt), ours, atol=1e-5), "and loads in plain diffusers"
    # To the bit after a resume, as everything else.
    once_more = make_config(*settings, "output.save_every=1", f"output.out_dir={tmp_path / 'again'}")
    train(once_more, "joint")
    shutil.rmtree(tmp_path / "again" / "joint" / "step-000003")
    again = train(once_more, "joint", resume="auto")
    before, after = load_file(checkpoint / LORA_FILE), load_file(again / LORA_FILE)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_zero_terminal_snr(make_config, tiny_base, tmp_path):
    with pytest.raises(UserError, match=r"model\.zero_terminal_snr needs a base that predicts v"):
        run.set_up(make_config("model.zero_terminal_snr=true"), "t2uv")
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    file = base / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "prediction_type": "v_prediction"}))
    cfg = make_config("model.zero_terminal_snr=true", f"model.pretrained_model={base}", "training.min_snr_gamma=5")
    trained = load_checkpoint(train(cfg, "t2uv"))
    assert trained.base.noise_scheduler.alphas_cumprod[-1] < 1e-6, "in inference too"
    assert load_base(str(base)).noise_scheduler.alphas_cumprod[-1] > 1e-3


def test_hyperparameters_are_written_beside_the_final_losses(make_config, tmp_path):
    train(make_config(), "t2uv")
    logged = scalars(tmp_path / "logs")
    assert logged["final/loss/t2uv"] == [logged["loss/t2uv"][-1]]


def test_too_few_rows(make_config):
    with pytest.raises(UserError, match="batch_size is 16"):
        train(make_config("training.t2uv.batch_size=16", "training.t2uv.effective_batch_size=16"), "t2uv")


def test_lora_parameters_are_named(base, make_config):
    assert len(lora_parameters(base.unet)) == 0
    assert len(add_lora(base.unet, make_config().model.lora)) == len(lora_parameters(base.unet)) > 10
