"""Metrics: rules that score a model's output for one item; `METRICS` lists them by name.

Wherever a function takes the name of a metric, it also takes a `Metric`. `register_metric` makes one available by name.

`exact_match` compares texts in Unicode form NFC with full-width and half-width characters replaced by their ordinary
forms ("x²" is unchanged), without surrounding white space, and ignoring case unless the task is case-sensitive. A
generated text ends where the template would continue with the next demonstration (`answer_end`).

`prefix_match` is the rule of SITE's released code, which calls it exact match, with both texts in NFC. It is lenient:
compare it with the echo baseline.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sitelens.errors import SitelensError
from sitelens.registry import Registry
from sitelens.suggestions import did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A model's output for one item.

    Args:
        token, token_text: the most likely next token in the whole vocabulary (-1 if there is none), and its text.
        label, label_text: the most likely among the first tokens of all the task's answers (-1 unless a metric uses
            labels), and its text.
        text: the greedy continuation as decoded, without special tokens; empty unless a metric generates.
        logprob, rank: log probability (in nats) and rank of the first token of the preferred answer; NaN if no model
            was run.
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
    """What counts as correct for one item.

    Args:
        answers: the accepted answers, the preferred one first.
        tokens, token_texts: ids and texts of the first tokens of the accepted answers.
        case_sensitive: whether comparisons distinguish upper and lower case.
        end: pattern that ends a generated answer (see `answer_end`); None if only the end of the text does.
    """

    answers: tuple[str, ...]
    tokens: tuple[int, ...] = ()
    token_texts: tuple[str, ...] = ()
    case_sensitive: bool = False
    end: re.Pattern[str] | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """A rule that scores an output as correct or not.

    Args:
        name: name in tables and commands.
        score: returns whether an output is correct for a target.
        generates: whether `score` reads `Output.text`, which requires the model to generate.
        definition: one sentence for tables and help texts.
        uses_labels: whether `score` reads `Output.label`.
        prediction: returns the text of the column `predicted` (default: the generated text, or the most likely token).
        complete: returns whether a partially generated text already decides the score (default: never).
        form: returns the form in which an answer is compared, given the answer and whether case counts; an answer with
            an empty form cannot be scored.

    Raises:
        SitelensError: if the name is empty or not a text.

    Example:
        >>> contains = sl.Metric("contains", lambda output, target: target.answers[0] in output.text, generates=True)
        >>> contains.name, contains.generates
        ('contains', True)
    """

    name: str
    score: Callable[[Output, Target], bool]
    generates: bool = False
    definition: str = ""
    uses_labels: bool = False
    prediction: Callable[[Output, Target], str] | None = None
    complete: Callable[[str, Target], bool] = lambda text, target: False
    form: Callable[[str, bool], str] = lambda text, case_sensitive: text.strip()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise SitelensError(f"the name of a metric must be text and not empty, not {self.name!r}")

    def predicted(self, output: Output, target: Target) -> str:
        """The text of the column `predicted`."""
        if self.prediction is not None:
            return self.prediction(output, target)
        return output.text.strip() if self.generates else output.token_text


def answer_end(tail: str, opening: str = "", *, one_line: bool = True) -> re.Pattern[str] | None:
    r"""The pattern that ends a generated answer: the text after an answer in the template, or the start of a new item.

    A tail that begins with a newline ends an answer at its first newline if all answers of the task have one line
    (models often continue with "\nB: ..." where the template has "\n\n"); otherwise the answer ends at the whole tail,
    or at a new line that begins like the next item. White space around a separator is optional: "; " also ends the text
    "cold;".

    Args:
        tail: text of the template after an answer.
        opening: text of the template before the next input.
        one_line: whether every answer of the task is a single line.

    Returns:
        A pattern for folded text (`fold`), or None if the template has no text there.
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
    """The text in Unicode form NFC, with full-width and half-width characters made ordinary; "x²" is unchanged."""
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
    """The text up to each possible end, since an answer may itself contain the end pattern."""
    text = fold(output.text).strip()
    for match in target.end.finditer(text) if target.end else ():
        yield text[: match.start()].strip()
    yield text


def _exact_prediction(output: Output, target: Target) -> str:
    """The text that is compared: cut where it is correct, otherwise at the first end."""
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
    # The added character stands for text still to come: "3." may become "3.5" or "3. ".
    return len(target.end.findall(fold(text).lstrip() + "\0")) > within


def _prefix_prediction(output: Output, target: Target) -> str:
    return output.text.strip().split("\n")[0].strip()


def _prefix_match(output: Output, target: Target) -> bool:
    form = _prefix_form(output.text.strip().split("\n")[0], target.case_sensitive)
    return any(form.startswith(_prefix_form(answer, target.case_sensitive)) for answer in target.answers)


def _first_token_ignore_case(output: Output, target: Target) -> bool:
    if output.token in target.tokens:
        return True
    form = _exact_form(output.token_text, False)
    # A token that is white space, or only part of a character, has no letters to compare.
    return bool(form) and "\ufffd" not in form and form in {_exact_form(text, False) for text in target.token_texts}


_LISTED = (
    Metric(
        "first_token",
        lambda output, target: output.token in target.tokens,
        definition="the most likely next token, of the whole vocabulary, is the first token of an accepted answer",
    ),
    Metric(
        "first_token_ignore_case",
        _first_token_ignore_case,
        definition="as first_token, but comparing the tokens' texts, ignoring case and surrounding space",
    ),
    Metric(
        "label_token",
        lambda output, target: output.label in target.tokens,
        definition="among the first tokens of all the task's answers (its labels), the most likely one belongs to an "
        "accepted answer",
        uses_labels=True,
        prediction=lambda output, target: output.label_text,
    ),
    Metric(
        "exact_match",
        _exact_match,
        generates=True,
        definition="the generated text, up to where the template would continue, equals an accepted answer",
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
METRICS: Registry[Metric] = Registry("metric", Metric, _LISTED, definition=lambda metric: metric.score)


def register_metric(metric: Metric) -> Metric:
    """Register a metric, so that functions and commands accept its name; returns the metric.

    An installed package registers metrics through entry points of the group "sitelens.metrics". A metric that is only
    passed as a value need not be registered.

    Args:
        metric: the metric. One whose `score` has the same module and name as an earlier one's replaces it.

    Raises:
        SitelensError: if it is not a `Metric`, or another metric has the same name.

    Example:
        >>> vowel = sl.Metric("vowel", lambda output, target: output.token_text.strip()[:1] in "aeiou")
        >>> vowel = sl.register_metric(vowel)
        >>> sl.evaluate(task, sl.ZeroShot(), model, n_items=2, metrics=["vowel"])["metric"].tolist()
        ['vowel', 'vowel']
    """
    return METRICS.register(metric)


def checked_metrics(metrics: str | Metric | Sequence[str | Metric]) -> tuple[Metric, ...]:
    """The metrics with these names; a `Metric` is returned unchanged.

    Raises:
        SitelensError: for an unknown name, an empty list, or two metrics with the same name.
    """
    listed = (metrics,) if isinstance(metrics, str | Metric) else tuple(metrics)
    unknown = [metric for metric in listed if not isinstance(metric, Metric) and metric not in METRICS]
    if unknown or not listed:
        names = ", ".join(map(repr, unknown)) or "(none given)"
        hint = did_you_mean(unknown[0], METRICS) if unknown else ""
        raise SitelensError(f"unknown metric {names}{hint and f' ({hint})'}; one of {', '.join(METRICS)}")
    values = tuple(metric if isinstance(metric, Metric) else METRICS[metric] for metric in listed)
    names = [metric.name for metric in values]
    if len(set(names)) < len(names):
        raise SitelensError(f"each metric may be given once, got {', '.join(names)}")
    return values


def check_answers(metrics: Sequence[Metric], answers: Sequence[str], case_sensitive: bool, where: str) -> None:
    """Raise SitelensError for an answer that is empty in the form in which a generating metric compares it."""
    for metric in metrics:
        for answer in answers if metric.generates else ():
            if not metric.form(answer, case_sensitive):
                raise SitelensError(f"{where}: {metric.name} cannot score the answer {answer!r}: it is empty after "
                                    "normalization; first_token can")  # fmt: skip
