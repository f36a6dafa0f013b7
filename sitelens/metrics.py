"""Metrics: each one is a value of `Metric`, and `METRICS` lists them; the commands and all checks read that list.

`exact_match` compares texts in Unicode form NFC with full-width and half-width characters replaced by their ordinary
forms ("x²" stays as it is), without white space at the ends, and without regard to case unless the task is
case-sensitive. A generated text ends where the template would go on to the next demonstration (`answer_end`).

`prefix_match` is the rule of SITE's released code, with both texts in NFC: it is lenient, so read it beside the echo
baseline.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sitelens.errors import SitelensError


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a model says about one item.

    token, token_text: the most likely next token of the whole vocabulary (-1 where there is none), and its text.
    label, label_text: the most likely one among the first tokens of the task's answers (-1 unless a metric asks).
    text: the greedy continuation without special tokens, exactly as decoded; empty unless a metric generates.
    logprob, rank: of the preferred answer's first token; NaN where no model was run.
    """

    token: int = -1
    token_text: str = ""
    label: int = -1
    label_text: str = ""
    text: str = ""
    logprob: float = float("nan")
    rank: int | float = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What counts as right for one item.

    answers: the accepted answers, the preferred one first.
    tokens, token_texts: the first tokens of the accepted answers, and their texts.
    end: what ends a generated answer (see `answer_end`); None where nothing but the end of the text does.
    """

    answers: tuple[str, ...]
    tokens: tuple[int, ...] = ()
    token_texts: tuple[str, ...] = ()
    case_sensitive: bool = False
    end: re.Pattern[str] | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """How a prediction is scored.

    name: as it stands in tables and commands.
    score: whether an output is right for a target.
    generates: whether it reads `Output.text`, so that the model has to generate.
    definition: one sentence for tables and help.
    uses_labels: whether it reads `Output.label`.
    prediction: what the column `predicted` shows (default: the generated text, or the most likely token).
    complete: whether a text that is still being generated already decides the score (default: never).
    form: an answer as it is compared, given whether case counts; an answer whose form is empty cannot be scored.
    """

    name: str
    score: Callable[[Output, Target], bool]
    generates: bool = False
    definition: str = ""
    uses_labels: bool = False
    prediction: Callable[[Output, Target], str] | None = None
    complete: Callable[[str, Target], bool] = lambda text, target: False
    form: Callable[[str, bool], str] = lambda text, case_sensitive: text.strip()

    def predicted(self, output: Output, target: Target) -> str:
        """The text of the column `predicted`."""
        if self.prediction is not None:
            return self.prediction(output, target)
        return output.text.strip() if self.generates else output.token_text


def answer_end(tail: str, opening: str = "", *, one_line: bool = True) -> re.Pattern[str] | None:
    r"""Where a generated answer ends: at what the template writes after an answer, or where a next item begins.

    `tail` is what the template writes after an answer, `opening` what it writes before the next input. A tail that
    begins with a newline ends an answer at its first newline where all answers of the task have `one_line` (a model
    often goes on with "\nB: ..." where the template has "\n\n"); else it takes the whole tail, or a new line that
    begins like the next item. White space around a separator need not be exact: "; " also ends the text "cold;".
    """
    separator = fold(tail).strip()
    head = (fold(opening).strip().splitlines() or [""])[0]
    leading = tail[: len(tail) - len(tail.lstrip())]
    ends: list[str] = []
    if "\n" in leading and one_line:
        ends.append(r"\n")
    elif separator:
        before, behind = (r"\s" if leading else ""), (r"(?=\s|\Z)" if tail[-1].isspace() else "")
        ends.append(before + re.escape(separator) + behind)
    elif "\n" in leading:
        ends.append(r"\n" + r"[^\S\n]*\n" * (tail.count("\n") - 1))
        if head:
            ends.append(r"\n\s*" + re.escape(head))
    elif tail:
        ends.append(re.escape(tail))
    elif head:
        ends.append(r"\s*" + re.escape(head))
    return re.compile("|".join(ends)) if ends else None


def fold(text: str) -> str:
    """The text in NFC, with full-width and half-width characters as ordinary ones; "x²" stays as it is."""
    wide = ("<wide>", "<narrow>")
    plain = (
        unicodedata.normalize("NFKC", character) if unicodedata.decomposition(character).startswith(wide) else character
        for character in text
    )
    return unicodedata.normalize("NFC", text if text.isascii() else "".join(plain))


def _exact_form(text: str, case_sensitive: bool) -> str:
    text = fold(text).strip()
    return text if case_sensitive else unicodedata.normalize("NFC", text.casefold())


def _prefix_form(text: str, case_sensitive: bool) -> str:
    text = unicodedata.normalize("NFC", text.strip().replace("St.", "Saint").split("(")[0].strip())
    return text if case_sensitive else text.lower()


def _cuts(output: Output, target: Target) -> Iterator[str]:
    """The text up to each place where it may end. An answer may itself contain what ends a text."""
    text = fold(output.text).strip()
    for match in target.end.finditer(text) if target.end else ():
        yield text[: match.start()].strip()
    yield text


def _exact_prediction(output: Output, target: Target) -> str:
    """The text that is compared: up to the first end, or to the one at which it is right."""
    answers = {_exact_form(answer, target.case_sensitive) for answer in target.answers}
    cuts = list(_cuts(output, target))
    return next((cut for cut in cuts if _exact_form(cut, target.case_sensitive) in answers), cuts[0])


def _exact_match(output: Output, target: Target) -> bool:
    answers = {_exact_form(answer, target.case_sensitive) for answer in target.answers}
    return any(_exact_form(cut, target.case_sensitive) in answers for cut in _cuts(output, target))


def _exact_complete(text: str, target: Target) -> bool:
    if target.end is None:
        return False
    within = max(len(target.end.findall(fold(answer))) for answer in target.answers)
    # The sign behind stands for what may still come: at the end of "3." it is open whether "3.5" or "3. " follows.
    return len(target.end.findall(fold(text).lstrip() + "\0")) > within


def _prefix_prediction(output: Output, target: Target) -> str:
    return output.text.strip().split("\n")[0].strip()


def _prefix_match(output: Output, target: Target) -> bool:
    said = _prefix_form(output.text.strip().split("\n")[0], target.case_sensitive)
    return any(said.startswith(_prefix_form(answer, target.case_sensitive)) for answer in target.answers)


def _first_token_ignore_case(output: Output, target: Target) -> bool:
    if output.token in target.tokens:
        return True
    said = _exact_form(output.token_text, False)
    # A token that is white space, or a part of a character only, says nothing about letters.
    return bool(said) and "\ufffd" not in said and said in {_exact_form(text, False) for text in target.token_texts}


_LISTED = (
    Metric(
        "first_token",
        lambda output, target: output.token in target.tokens,
        definition="the most likely next token, of the whole vocabulary, is the first token of an accepted answer",
    ),
    Metric(
        "first_token_ignore_case",
        _first_token_ignore_case,
        definition="as first_token, but the token's text counts, without regard to case and to space around it",
    ),
    Metric(
        "label_token",
        lambda output, target: output.label in target.tokens,
        definition="the most likely one among the first tokens of all answers of the task (its labels) is right",
        uses_labels=True,
        prediction=lambda output, target: output.label_text,
    ),
    Metric(
        "exact_match",
        _exact_match,
        generates=True,
        definition="the generated text, up to where the template goes on, equals an accepted answer",
        prediction=_exact_prediction,
        complete=_exact_complete,
        form=_exact_form,
    ),
    Metric(
        "prefix_match",
        _prefix_match,
        generates=True,
        definition="the generated text begins with an accepted answer (rule of SITE's released code; lenient)",
        prediction=_prefix_prediction,
        complete=lambda text, target: "\n" in text.lstrip(),
        form=_prefix_form,
    ),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _LISTED}


def checked_metrics(metrics: str | Metric | Sequence[str | Metric]) -> tuple[Metric, ...]:
    """The metrics of these names; a `Metric` of one's own stands for itself.

    Raises:
        SitelensError: for an unknown name, no metric, or two metrics of one name.
    """
    listed = (metrics,) if isinstance(metrics, str | Metric) else tuple(metrics)
    unknown = [metric for metric in listed if not isinstance(metric, Metric) and metric not in METRICS]
    if unknown or not listed:
        names = ", ".join(map(repr, unknown)) or "(none given)"
        raise SitelensError(f"unknown metric {names}; one of {', '.join(METRICS)}")
    values = tuple(metric if isinstance(metric, Metric) else METRICS[metric] for metric in listed)
    names = [metric.name for metric in values]
    if len(set(names)) < len(names):
        raise SitelensError(f"each metric may be given once, got {', '.join(names)}")
    return values


def check_answers(metrics: Sequence[Metric], answers: Sequence[str], case_sensitive: bool, where: str) -> None:
    """Raise SitelensError for an answer of which a metric that generates leaves nothing to compare."""
    for metric in metrics:
        for answer in answers if metric.generates else ():
            if not metric.form(answer, case_sensitive):
                raise SitelensError(f"{where}: {metric.name} cannot score the answer {answer!r}: it is empty after "
                                    "normalization; first_token can")  # fmt: skip
