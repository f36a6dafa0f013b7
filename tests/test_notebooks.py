"""Each notebook runs from top to bottom with smaller settings on the real model, without errors or warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from sitelens.models.model import Bridge

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALLER = {
    'SUITE, TASKS = "fv57", None': 'SUITE, TASKS = "builtin", ["antonym", "capitalize", "choose_first_of_3"]',
    "suite = sl.run_suite(SUITE, tasks=TASKS, **SETTINGS)": (
        "suite = sl.run_suite(SUITE, tasks=TASKS, **SETTINGS, methods=["
        "sl.methods.SITE(n_steps=6, eval_every=3, n_valid=4, n_prompts=4)])"
    ),
    'grid = sl.transfer_matrix(list(suite.tasks["task"]), **SETTINGS | {"n_items": 50})': (
        'grid = sl.transfer_matrix(list(suite.tasks["task"]), n_items=6, n_prompts=4, '
        "config=sl.TrainConfig(n_steps=6, eval_every=3, n_valid=4))"
    ),
    "in SAMPLES.items()": 'in {"builtin": {"tasks": ["synonym"]}}.items()',
    '"n_items": 100': '"n_items": 6',
    "N_ITEMS = 100": "N_ITEMS = 6",
    "N_ITEMS = 50": "N_ITEMS = 6",
    "N_ITEMS, N_SHOTS = 100, 10": "N_ITEMS, N_SHOTS = 6, 4",
    "n_prompts=50, n_shots=10": "n_prompts=4, n_shots=4",
    "sl.TrainConfig()": "sl.TrainConfig(n_steps=6, eval_every=3, n_valid=4)",
    'TASKS = ["antonym", "country-capital", "capitalize", "choose_first_of_3"]': 'TASKS = ["antonym", "capitalize"]',
    'TASKS = ["antonym", "country-capital"]': 'TASKS = ["antonym", "capitalize"]',
    'TASKS = list(sl.STUDIES["transfer"].tasks)': 'TASKS = ["antonym", "capitalize", "choose_first_of_3"]',
    "N_PROMPTS, N_SHOTS = (1, 3, 5, 10, 50), (1, 2, 5, 10)": "N_PROMPTS, N_SHOTS = (1, 3), (1, 2)",
    "PROMPT_SEEDS = range(5)": "PROMPT_SEEDS = range(2)",
    "PROMPT_SEEDS, TRAINING_SEEDS = range(5), range(5)": "PROMPT_SEEDS, TRAINING_SEEDS = range(2), range(2)",
    "KS, DRAWS = None, 10": "KS, DRAWS = (0, 8, 270), 2",
    'INITS, INIT_SEEDS = (0.1, 0.3, 0.5, 0.7, 0.9, "random"), (0, 1)': 'INITS, INIT_SEEDS = (0.5, "random"), (0, 1)',
    'sl.load_model("gemma3-270m")': "sl.load_model()",
    '["fv/country-capital", "fv/antonym", "fv/singular-plural", "fv/english-french"]': '["capitalize"]',
    '["fv/choose_middle_of_3", "fv/alphabetically_first_3", "fv/animal_v_object_3", "fv/adjective_v_verb_3"]': (
        '["choose_first_of_3"]'
    ),
    'METHODS, N_ITEMS = ["zero-shot", "10-shot", sl.methods.ManyShot(limit=50), "FV", "TV", "ICV", "MTV", "I2CL",': (
        'METHODS, N_ITEMS = ["zero-shot", "10-shot", "TV",'
    ),
    '                    sl.methods.LTV(n_steps=100), "LoFiT", "LoRA", "SITE"], 100': (
        "sl.methods.SITE(n_steps=6, eval_every=3, n_valid=4, n_prompts=4)], 6"
    ),
}
EXPECTED = (
    "the heads are generic to these tasks",  # from trainings that are too short on purpose
    "first token",  # many answers of real tasks share first tokens
    "choreographer",  # it logs browser messages that it cannot parse; a failing image is an error
)


def code(notebook: Any) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def test_the_settings_that_are_made_smaller_are_there() -> None:
    everything = "\n".join(code(nbformat.read(path, as_version=4)) for path in NOTEBOOKS)
    assert [text for text in SMALLER if text not in everything] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and all(output.output_type in ("execute_result", "display_data", "stream") for output in outputs)
    shown = [output.data for output in outputs if "data" in output]
    plots = [data for data in shown if "application/vnd.plotly.v1+json" in data]
    assert plots and all("image/png" in data for data in plots)  # visible even if no script runs
    assert not any(output.get("name") == "stderr" for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(
    path: Path, packaged_model: Bridge, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for text, smaller in SMALLER.items():
            cell.source = cell.source.replace(text, smaller)
    monkeypatch.setenv("SITELENS_CACHE", str(shared_cache))
    NotebookClient(notebook, timeout=1200, kernel_name="python3").execute(cwd=str(path.parent))
    said = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stderr" and not any(text in output.text for text in EXPECTED)
    ]
    assert said == []
