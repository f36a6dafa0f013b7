"""The packaged model, really trained and evaluated: expected results, the standard experiment, README's example."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from transformers import AutoModelForCausalLM

import sitelens as sl
from sitelens import cli
from sitelens.engine.batches import tokenize
from sitelens.engine.forward import HeadEdit, LastToken
from sitelens.engine.prefix import PrefixCache
from sitelens.engine.prompts import few_shot_prompts
from sitelens.models.model import Bridge, Model
from sitelens.settings import settings
from tests import micro, oracle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*first token"),  # many answers of real tasks share first tokens
]
ROOT = Path(__file__).parent.parent
FV_TASKS = ("fv/antonym", "fv/country-capital", "fv/capitalize", "fv/choose_first_of_3")


@pytest.fixture(autouse=True)
def model(packaged_model: Bridge) -> Bridge:
    """The packaged model, with the shared cache."""
    return packaged_model


@pytest.fixture
def fv_runs(model: Bridge, data_folder: Path) -> dict[tuple[str, int], sl.TrainResult]:
    """Four tasks with the paper's settings, country-capital with five seeds."""
    with settings.using(data_dir=data_folder):
        runs = sl.train_selections(["fv/country-capital"], model, seeds=range(5))
        return runs | sl.train_selections([task for task in FV_TASKS if task != "fv/country-capital"], model)


def test_default_model_is_what_it_says(model: Bridge) -> None:
    assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head) == (30, 9, 64)
    assert Model.of(model).weights_digest() == "35b7c564542ab21b155823a499f9b27a"  # these weights and no others
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert Model.of(model).tokenizer("Q: hot\nA:")["input_ids"][0] != Model.of(model).tokenizer.bos_token_id


def test_fast_path_equals_raw_hooks_on_full_prompts(model: Bridge, shared_cache: Path) -> None:
    folder = next((shared_cache / "models").glob("gguf-b179c9*/config.json")).parent
    raw = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    raw.requires_grad_(False)
    task, tokenizer = sl.load_task("choose_first_of_3"), Model.of(model).tokenizer
    batch = tokenize([few_shot_prompts(task, task.test[:1], shots, tokenizer)[0] for shots in (0, 1, 3)], tokenizer)
    generator = torch.Generator().manual_seed(0)
    alpha = torch.rand(3, 30, 9, generator=generator).requires_grad_()
    vectors = torch.randn(3, 30, 9, 64, generator=generator) * 0.3
    with LastToken(Model.of(model)) as last_token:
        logits = last_token(PrefixCache.of(batch, Model.of(model), 2**30), HeadEdit.mix(alpha, vectors))
    (gradient,) = torch.autograd.grad(logits.log_softmax(-1).gather(1, batch.answer[:, None]).sum(), alpha)
    for row, length in enumerate(batch.lengths):
        own_alpha = alpha[row].detach().clone().requires_grad_()
        ids = batch.tokens[row, -length:].tolist()
        expected = oracle.patched_logits(raw, [ids], own_alpha[None], vectors[row : row + 1])[0]
        (own_gradient,) = torch.autograd.grad(expected.log_softmax(-1)[batch.answer[row]], own_alpha)
        assert (logits[row] - expected).abs().max() < 1e-4 * expected.abs().max()
        assert (gradient[row] - own_gradient).abs().max() < 1e-3 * own_gradient.abs().max()


def test_fv_tasks_show_what_the_protocol_says(
    model: Bridge, fv_runs: dict[tuple[str, int], sl.TrainResult], data_folder: Path
) -> None:
    with settings.using(data_dir=data_folder):
        accuracy = {}
        for (name, seed), run in fv_runs.items():
            mean_z, alpha = sl.embed_task(name, model), run.selection
            conditions = {"zero-shot": sl.ZeroShot(), "SITE": sl.PatchHeads(alpha, mean_z)}
            if seed == 0:
                conditions["low-alpha"] = sl.PatchHeads(alpha.bottom(64), mean_z)
                conditions["all-ones"] = sl.PatchHeads(alpha.ones(), mean_z)
            scores = sl.evaluate(name, conditions, model)
            accuracy[name, seed] = scores.groupby("condition")["score"].mean()
    assert accuracy["fv/antonym", 0]["SITE"] >= 0.40
    assert accuracy["fv/capitalize", 0]["SITE"] >= 0.88
    assert accuracy["fv/choose_first_of_3", 0]["SITE"] >= 0.95
    assert sum(accuracy["fv/country-capital", seed]["SITE"] for seed in range(5)) / 5 >= 0.40
    for name in FV_TASKS:
        for condition in ("low-alpha", "all-ones"):
            assert accuracy[name, 0][condition] <= accuracy[name, 0]["zero-shot"] + 0.08, (name, condition)
    shares = [run.selection.fraction_saturated for run in fv_runs.values()]
    assert sum(shares) / len(shares) >= 0.75


def test_one_task_alone_gives_the_same_alpha_as_in_a_batch(model: Bridge) -> None:
    config = sl.TrainConfig(n_steps=12, eval_every=6, n_valid=8)
    vectors = {name: sl.embed_task(name, model, n_prompts=3, n_shots=3) for name in ("antonym", "capitalize")}
    together = sl.train_selections(list(vectors), model, embeddings=vectors, config=config)
    with settings.using(cache_dir=sl.settings.cache() / "alone"):
        alone = sl.train_selection("capitalize", model, embedding=vectors["capitalize"], config=config)
    difference = (together["capitalize", 0].selection.alpha - alone.selection.alpha).abs().max()
    assert difference < 1e-3


def test_the_command_writes_all_of_a_run_and_makes_it_again(
    model: Bridge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [
        "--n-prompts",
        "5",
        "--n-shots",
        "4",
        "--n-steps",
        "40",
        "--eval-every",
        "20",
        "--n-valid",
        "10",
        "--n-items",
        "12",
        "--draws",
        "2",
    ]
    out = tmp_path / "first"
    assert cli.main(["run", "antonym", "choose_first_of_3", *small, "--out", str(out), "--no-progress"]) == 0
    printed = capsys.readouterr().out
    for word in ("zero-shot", "4-shot", "SITE", "hard", "high-alpha", "low-alpha", "random", "echo", "antonym"):
        assert word in printed
    record = json.loads((out / "run.json").read_text())
    assert record["model"]["fingerprint"] == sl.fingerprint(model)
    assert all((out / name).exists() for name in [*record["files"], "antonym.html", "plotly.min.js"])
    alpha = sl.HeadSelection.load(out / "antonym.selection.safetensors")
    alpha.check_fits(model)
    with settings.using(cache_dir=sl.settings.cache() / "again"):  # only run.json is taken from the first run
        (sl.settings.cache()).mkdir()
        (sl.settings.cache() / "models").symlink_to(sl.settings.cache().parent / "models")
        again = tmp_path / "again"
        assert cli.main(["run", "--again", str(out / "run.json"), "--out", str(again), "--no-progress"]) == 0
    first, second = (pd.read_csv(folder / "scores.csv") for folder in (out, again))
    pd.testing.assert_frame_equal(first, second, atol=1e-3)
    assert record["results"] == json.loads((again / "run.json").read_text())["results"]


def test_the_suite_command_makes_a_table_and_goes_on_where_it_was(
    model: Bridge, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suite with small settings; a second call runs no model."""
    small = ["SITE.n_prompts=5", "SITE.n_steps=60", "SITE.eval_every=20", "SITE.n_valid=10"]
    words = ["suite", "builtin", "--tasks", "capitalize", "choose_first_of_3", "antonym", "--set", *small,
             "--n-items", "20", "--no-progress"]  # fmt: skip
    assert cli.main([*words, "--out", str(tmp_path / "first")]) == 0
    first = capsys.readouterr().out
    assert "| condition | abstractive (2 tasks, n=40) | extractive (1 task, n=20) | all (3 tasks, n=60) |" in first
    means = pd.read_csv(tmp_path / "first" / "suite-builtin.csv").set_index(["task", "condition"])["mean"]
    assert means["choose_first_of_3", "10-shot"] > 0.8 and means["choose_first_of_3", "SITE"] > 0.8
    assert means["choose_first_of_3", "zero-shot"] < 0.2
    record = json.loads((tmp_path / "first" / "suite-builtin.json").read_text())
    assert len(record["left_out"]) == 45 and record["made_by"].startswith("sitelens suite builtin --tasks capitalize")
    micro.silence(monkeypatch)
    assert cli.main([*words, "--out", str(tmp_path / "second")]) == 0
    assert capsys.readouterr().out.replace(str(tmp_path / "second"), str(tmp_path / "first")) == first


def test_a_benchmark_with_long_prompts_runs(model: Bridge, data_folder: Path) -> None:
    site = sl.methods.SITE(n_prompts=2, n_shots=3, n_steps=4, eval_every=2, n_valid=3)
    found = sl.run_suite("bbh", model, tasks=["bbh/date_understanding"], methods=[site], n_items=3, n_shots=3)
    assert found.scores["item"].nunique() == 3
    assert found.tasks["dropped"].tolist() == [0] and len(found.left_out) == 26


def test_the_compare_command_sets_costs_beside_accuracy(
    model: Bridge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["ICV.strengths=[0.1]", "LoRA.n_steps=5", "LoRA.learning_rates=[0.001]", "many-shot.limit=12"]
    words = ["compare", "choose_first_of_3", "--methods", "zero-shot", "many-shot", "ICV", "LoRA"]
    assert cli.main([*words, "--set", *small, "--n-items", "10", "--no-progress", "--out", str(tmp_path)]) == 0
    assert "LoRA" in capsys.readouterr().out
    rows = pd.read_csv(tmp_path / "comparison.csv").set_index("method")
    assert rows["accuracy"]["many-shot"] > 0.8 > rows["accuracy"]["zero-shot"]
    assert rows.loc["LoRA", "trained"] == 30 * 8 * (576 + 576 + 576 + 192)
    assert (rows.loc[["ICV", "LoRA"], "forward_tokens"] > 0).all()


def test_the_readmes_example_runs_as_printed(model: Bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "figures").mkdir()
    monkeypatch.chdir(tmp_path)
    shown: list[go.Figure] = []
    monkeypatch.setattr(sl.figures.Figure, "show", lambda figure: shown.append(figure))
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    scores, grid = names["scores"], names["grid"]
    assert isinstance(scores, pd.DataFrame) and isinstance(grid, sl.TransferMatrix)
    means = scores.groupby("condition")["score"].mean()
    assert means["SITE"] > means["10-shot"] > means["zero-shot"]
    assert sl.generate(["Q: hot\nA:"], names["site"], model) == ["cold"]  # type: ignore[arg-type]
    assert len(shown) == 1 and (tmp_path / "figures" / "transfer.html").stat().st_size > 10_000
    assert (grid.own > grid.zero_shot).all()
