"""verify: passes correct models, detects faults, and says what is not supported."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

import sitelens as sl
from sitelens.cli import main
from sitelens.engine import prefix
from sitelens.engine.batches import tokenize
from sitelens.engine.forward import HeadEdit
from sitelens.heads.direct import DirectPath
from sitelens.models.model import Bridge
from sitelens.reports.verification import checks, subject
from sitelens.reports.verification.verify import CHECKS, FAILS, OK, UNSUPPORTED, verify
from tests import micro, zoo

architectures = [pytest.param(name, marks=[] if name in zoo.FAST else pytest.mark.slow) for name in zoo.ZOO]
ATTENTION, LORA, DIRECT = "attention patterns", "query and value projections (LoRA)", "direct logit attribution"
NOT_SUPPORTED = {
    "OPT": {ATTENTION},
    "DeepSeek 2": {LORA},
    "DeepSeek 3": {LORA},
    "OPT, projected": {ATTENTION, DIRECT},
    "OPT, norms behind": {ATTENTION, DIRECT},
}


def results(model: Bridge) -> dict[str, str]:
    report = verify(model, task=micro.task())
    return dict(zip(report.frame["check"], report.frame["result"], strict=True))


@pytest.mark.parametrize("name", [*architectures, "OPT, projected", "OPT, norms behind"])
def test_every_architecture_holds_in_all_that_it_supports(name: str) -> None:
    expected = {check: UNSUPPORTED if check in NOT_SUPPORTED.get(name, ()) else OK for check in CHECKS}
    assert results(zoo.bridge(name)) == expected
    assert not micro.hooks_left(zoo.bridge(name)) or name.startswith("OPT")  # its bridge has some hooks of its own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_hold_within_their_own_noise(dtype: torch.dtype) -> None:
    report = verify(micro.bridge("Llama", dtype), task=micro.task())
    assert report.ok and str(dtype).removeprefix("torch.") in str(report)
    limits = report.frame["limit"].dropna()
    assert (limits <= 0.5).all() and (limits >= 1e-4).all()


def test_a_report_is_a_table_in_words(llama: Bridge) -> None:
    report = verify(llama, task=micro.task())
    assert report.ok and report.failures == [] and list(report.frame["check"]) == list(CHECKS)
    assert str(report).startswith("Llama (float32): everything supported holds\n") and repr(report).startswith(
        "Verification('Llama (float32)', "
    )
    assert all(check in str(report) for check in CHECKS)
    errors = report.frame.dropna(subset="error")
    assert len(errors) == 8 and (errors["error"] <= errors["limit"]).all() and (errors["error"] < 1e-4).all()
    assert "no BOS token" in report.frame.set_index("check")["detail"]["tokens"]


@pytest.fixture
def llama() -> Bridge:
    return micro.bridge("Llama")


# -- faults --


def wrong_edit(patch: pytest.MonkeyPatch) -> None:
    right = HeadEdit.apply
    patch.setattr(HeadEdit, "apply", lambda self, z, layer: right(self, z, layer) * (1.01 if layer else 1))


def detached_edit(patch: pytest.MonkeyPatch) -> None:
    right = HeadEdit.apply
    patch.setattr(
        HeadEdit, "apply", lambda self, z, layer: right(self, z, layer).detach() if layer else right(self, z, layer)
    )


def wrong_positions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prefix.PrefixCache, "positions", lambda self: self.mask.shape[1] - 1 + 0 * self.last)


def wrong_gain(patch: pytest.MonkeyPatch) -> None:
    right = DirectPath._contributions
    patch.setattr(DirectPath, "_contributions", lambda self, *rest: 1.001 * right(self, *rest))


def wrong_attention(patch: pytest.MonkeyPatch) -> None:
    right = checks.attention
    patch.setattr(checks, "attention", lambda *given: right(*given).roll(1, 1))


def wrong_text(patch: pytest.MonkeyPatch) -> None:
    right = checks.generate
    patch.setattr(checks, "generate", lambda *given, **options: [text[:-1] for text in right(*given, **options)])


def broken(patch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("of a library below")

    patch.setattr(checks, "capture_z", fail)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (wrong_edit, "head edit"),
        (detached_edit, "head edit, gradient"),
        (wrong_positions, "prefixes and padding"),
        (wrong_gain, DIRECT),
        (wrong_attention, ATTENTION),
        (wrong_text, "generation"),
        (broken, "head edit"),
    ],
)
def test_a_fault_is_noticed(fault: Any, check: str, llama: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fault(patch)
        report = verify(llama, task=micro.task())
    found = report.frame.set_index("check").loc[check].to_dict()
    if fault is wrong_gain:  # every function rejects contributions that do not add up
        assert found["result"] == UNSUPPORTED and "miss the logits by 0.1%" in found["detail"]
    else:
        assert not report.ok and check in report.failures
    assert verify(llama, task=micro.task()).ok


@pytest.mark.parametrize("network", [LlamaForCausalLM, GPT2LMHeadModel])
def test_a_bridge_that_computes_something_else_is_noticed(network: type) -> None:
    model = micro.bridge("Llama" if network is LlamaForCausalLM else "GPT2")
    block: Any = model.blocks[1]
    right = block.mlp.forward
    block.mlp.forward = lambda *args, **kwargs: 1.05 * right(*args, **kwargs)
    found = results(model)
    assert found["bridge against the raw network"] == FAILS


def test_how_a_text_begins_is_told_and_a_doubled_bos_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = micro.bridged(copy.deepcopy(micro.raw("Llama")), "Llama", micro.tokenizer(bos=True))
    report = verify(model, task=micro.task())
    assert report.ok and "'<bos>' is put before it" in report.frame["detail"].iloc[0]

    def doubled(*given: Any) -> Any:
        batch = tokenize(*given)
        ones = torch.ones_like(batch.tokens[:, :1])
        tokens = torch.where(batch.mask.roll(-1, 1) & ~batch.mask, 1, batch.tokens)
        return replace(
            batch, tokens=torch.cat([ones, tokens], 1), mask=torch.cat([ones.bool(), batch.mask], 1)
        )  # of the longest prompt, which comes first

    monkeypatch.setattr(subject, "tokenize", doubled)
    report = verify(model, task=micro.task())
    assert "tokens" in report.failures and "stands 2 times" in report.frame["detail"].iloc[0]


# -- the command --


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    micro.raw("Llama").save_pretrained(tmp_path / "llama")
    micro.tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_the_command_prints_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "everything supported holds" in out and all(check in out for check in CHECKS)


def test_the_command_fails_where_a_check_does(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_edit(monkeypatch)
    assert main(["verify", str(folder)]) == 1
    said = capsys.readouterr()
    assert "head edit" in said.out and "these checks fail: head edit" in said.err


def test_a_model_without_heads_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(sl.SitelensError, match="heads of 8"):
        verify(zoo.bridge("DeepSeek 3, wide values"), task=micro.task())
    assert main(["verify", "no-such-model"]) == 1
    assert "no-such-model" in capsys.readouterr().err
