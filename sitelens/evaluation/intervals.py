"""95% intervals of mean accuracies and paired differences, in closed form, valid near 0 and 1.

Scores are an array [*sample task item repeat], NaN if an item was not answered; a repeat is another seed or draw on the
same items. Leading dimensions hold many samples at once, which makes the simulation in tests/test_intervals.py cheap.
An interval can range over:

- items: the same tasks with other items and, if there are several repeats, other repeats. A single repeat does not show
  how much repeats differ, so its interval does not cover that.
- tasks: other tasks like these, each with other items and repeats.

Means over items: a Wilson interval with the variance within tasks (for one task and one repeat, Wilson's own).
Differences over items: the interval of Bonett and Price (2012) for paired proportions, with z^2/2 instead of 2
pseudo-counts. The contribution of repeats comes from the analysis of variance of items x repeats, with the t quantile
of its own degrees of freedom. Repeats are assumed to differ independently in each task; if an F test (level 0.2) finds
the same repeats better in all tasks (the same random heads, say), that is added. Over tasks: Student's t of the task
means, as a score interval, in which the variance between tasks grows with p (1 - p) or with its square, whichever
gives the wider interval.

Coverage simulated at p in {.003, .02, .5, .98}, 25 and 100 items per task, 3 to 50 tasks, and 1 to 5 repeats
(tests/test_intervals.py) is 0.93 to 0.97. It is higher if:

- fewer than about 15 hits, misses or differing pairs are expected in total: up to 0.99 for means, 1.00 for differences;
- there are only three tasks and p is not near 0.5, over tasks: up to 1.00;
- repeats do not differ, and there are two repeats or three tasks: up to 0.98.

It is below 0.93 if:

- accuracies differ strongly between tasks, over tasks: 0.89 at a standard deviation of 1.5 on the logit scale, 0.92
  at 1;
- two repeats differ strongly (a standard deviation of 1 on the logit scale): 0.91;
- the same repeats are better in all tasks: 0.75 to 0.9 with two repeats, 0.85 to 0.95 with three to five.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import f as f_distribution
from scipy.stats import norm
from scipy.stats import t as t_distribution

Array = Any  # a numpy array, or a numpy scalar if there is no leading dimension
Interval = tuple[Array, Array, Array]  # mean, lower end, upper end

Z = float(norm.ppf(0.975))
SINGLE = 0.0513  # -log(0.95): the lower end for a single hit over its mean (Brown, Cai and DasGupta 2001)
LEVEL = 0.2  # of the F test for repeats that differ in the same way in all tasks
HALVINGS = 60


@dataclass(frozen=True, eq=False)
class Repeats:
    """The variance that repeats add to a mean.

    Attributes:
        seen: variance between the means of the repeats, divided by their number.
        expected: the part of it that is due to items alone.
        freedom: degrees of freedom of `seen`.
    """

    seen: Array
    expected: Array
    freedom: Array

    def __add__(self, other: Repeats) -> Repeats:
        """The variance of a difference of two means whose repeats are independent."""
        seen = self.seen + other.seen
        freedom = _freedom(np.stack([self.seen, other.seen], -1), np.stack([self.freedom, other.freedom], -1))
        return Repeats(seen, self.expected + other.expected, freedom)


@dataclass(frozen=True, eq=False)
class Strata:
    """Statistics of each task's items, from which the intervals are computed: arrays [*sample task].

    Attributes:
        mean: mean over items of the item means (an item mean is over repeats).
        square: mean of their squares.
        absolute: mean of their absolute values.
        items: number of items.
        spread: unbiased variance of the item means.
        once: mean over items of 1 / number of answers.
        repeats: variance due to repeats, within each task.
        shared: the same for the mean over tasks [*sample]; None unless all tasks have the same repeats.
    """

    mean: Array
    square: Array
    absolute: Array
    items: Array
    spread: Array
    once: Array
    repeats: Repeats
    shared: Repeats | None

    @staticmethod
    def of(values: Float[Array, "*sample task item repeat"]) -> Strata:
        """The strata of scores, or of differences; every task needs at least one item."""
        known = ~np.isnan(values)
        filled = np.where(known, values, 0.0)
        rows = known.sum(-1)
        item = filled.sum(-1) / np.maximum(rows, 1)
        there = rows > 0
        n = there.sum(-1)
        mean = item.sum(-1) / n
        off = np.where(there, item - mean[..., None], 0.0)
        pooled = np.nanvar(np.where(there, item, np.nan), axis=(-2, -1))  # for a task with a single item
        spread = np.where(n > 1, (off**2).sum(-1) / np.maximum(n - 1, 1), pooled[..., None])
        once = np.where(there, 1 / np.maximum(rows, 1), 0.0).sum(-1) / n
        repeats, means = _repeats(filled, known, item, once, spread)
        shared = None
        if values.shape[-1] > 1 and values.shape[-3] > 1 and not np.isnan(means).any():
            size = values.shape[-1]
            seen = means.mean(-2).var(-1, ddof=1) / size
            expected = repeats.expected.sum(-1) / values.shape[-3] ** 2
            shared = Repeats(seen, expected, np.full(seen.shape, size - 1))
        return Strata(mean, (item**2).sum(-1) / n, np.abs(item).sum(-1) / n, n, spread, once, repeats, shared)

    def with_repeats_of(self, a: Strata, b: Strata) -> Strata:
        """These strata of differences, with the repeats of both sides, which must be independent."""
        shared = a.shared + b.shared if a.shared and b.shared else None
        return replace(self, repeats=a.repeats + b.repeats, shared=shared)


def mean_over_items(strata: Strata) -> Interval:
    """The mean of the tasks' mean scores in [0, 1], and its interval over items and repeats."""
    mean, size, unit = _mean(strata)
    tasks = strata.mean.shape[-1]
    own = strata.square - strata.mean**2
    most = np.maximum((own / strata.items).sum(-1) / tasks**2, size * mean * (1 - mean) * unit)
    square = Z**2 * np.minimum(_within(strata), most) + _from_repeats(strata)
    k = Z**2 * unit * size
    half, center = np.sqrt(square + k**2 / 4) / (1 + k), (mean + k / 2) / (1 + k)
    low, high = center - half, center + half
    if tasks > 1 or (strata.repeats.freedom > 0).any():
        hits, misses = mean / (unit * size), (1 - mean) / (unit * size)
        low = np.where((hits > 0) & (hits < 1.5), np.minimum(low, SINGLE * mean), low)
        high = np.where((misses > 0) & (misses < 1.5), np.maximum(high, 1 - SINGLE * (1 - mean)), high)
    return _bounded(mean, low, high, 0.0)


def mean_over_tasks(strata: Strata) -> Interval:
    """The mean of the tasks' mean scores in [0, 1], and its interval over tasks (at least two), items and repeats."""
    mean, size, unit = _mean(strata)
    quantile, between = _between(strata)
    square = quantile**2 * between + _from_shared(strata)
    chance = mean * (1 - mean)
    # At least half as wide as for items alone; without any variance, as if hits were spread over tasks at random.
    times = np.maximum(_ratio(square, quantile**2 * size * chance, 0.0), unit * (Z / quantile / 2) ** 2)
    times = np.where(chance > 0, times, unit)
    k = quantile**2 * size * times
    half, center = np.sqrt(k * chance + k**2 / 4) / (1 + k), (mean + k / 2) / (1 + k)
    linear = quantile**2 * size * np.minimum(times, unit)
    quadratic = _ratio(quantile**2 * size * np.maximum(times - unit, 0), chance, 0.0)
    low = _crossing(mean, np.zeros_like(mean), linear, quadratic)
    high = _crossing(mean, np.ones_like(mean), linear, quadratic)
    return _bounded(mean, np.minimum(low, center - half), np.maximum(high, center + half), 0.0)


def difference_over_items(strata: Strata) -> Interval:
    """The mean of the tasks' mean differences in [-1, 1], and its interval over items and repeats."""
    return _difference(strata, Z**2 * _within(strata) + _from_repeats(strata))


def difference_over_tasks(strata: Strata) -> Interval:
    """The mean of the tasks' mean differences in [-1, 1], and its interval over tasks, items and repeats."""
    quantile, between = _between(strata)
    return _difference(strata, quantile**2 * between + _from_shared(strata))


def _difference(strata: Strata, square: Array) -> Interval:
    mean, size = _over(strata.mean), _size(strata)
    unit = _ratio((strata.square / strata.items).sum(-1), (strata.absolute / strata.items).sum(-1))
    k = Z**2 / 2 * unit * size
    half, center = np.sqrt(square + 2 * k**2) / (1 + k), mean / (1 + k)
    return _bounded(mean, center - half, center + half, -1.0)


def _mean(strata: Strata) -> tuple[Array, Array, Array]:
    """The mean, 1 / effective number of items, and the weight of one hit, which is 1 or, if repeats differ, less."""
    own = ((strata.square - strata.mean**2) / strata.items).sum(-1)
    whole = (strata.mean * (1 - strata.mean) / strata.items).sum(-1)
    least = _ratio((strata.once / strata.items).sum(-1), (1 / strata.items).sum(-1))
    return _over(strata.mean), _size(strata), np.maximum(_ratio(own, whole), least)


def _over(values: Array) -> Array:
    return values.mean(-1)


def _size(strata: Strata) -> Array:
    return (1 / strata.items).sum(-1) / strata.mean.shape[-1] ** 2


def _within(strata: Strata) -> Array:
    """The variance of the mean due to items."""
    return (strata.spread / strata.items).sum(-1) / strata.mean.shape[-1] ** 2


def _between(strata: Strata) -> tuple[float, Array]:
    """Student's t quantile, and the variance of the mean as estimated between tasks."""
    tasks = strata.mean.shape[-1]
    return float(t_distribution.ppf(0.975, tasks - 1)), strata.mean.var(-1, ddof=1) / tasks


def _from_repeats(strata: Strata) -> Array:
    """The squared half-width that repeats add.

    With few tasks and repeats, subtracting all of the variance expected from items would often leave too little. The
    part that is not subtracted, 1.5 / (repeats * tasks^2), was chosen by simulation.
    """
    own, tasks = strata.repeats, strata.mean.shape[-1]
    freedom = _freedom(own.seen, own.freedom)
    part = 1 - 1.5 / (own.freedom.max(-1) + 1) / tasks**2
    excess = np.maximum((own.seen.sum(-1) - part * own.expected.sum(-1)) / tasks**2, 0)
    return _squared_quantile(freedom) * excess + _from_shared(strata)


def _from_shared(strata: Strata) -> Array:
    """The squared half-width added by repeats that differ in the same way in all tasks, if an F test detects that."""
    own, shared, tasks = strata.repeats, strata.shared, strata.mean.shape[-1]
    nothing = np.zeros(strata.mean.shape[:-1])
    if shared is None:
        return nothing
    seen = own.seen.sum(-1) / tasks**2
    freedom = np.maximum(_freedom(own.seen, own.freedom), 1)
    limit = f_distribution.ppf(1 - LEVEL, np.maximum(shared.freedom, 1), freedom)
    excess = np.maximum(shared.seen - np.maximum(seen, shared.expected), 0)
    return np.where(shared.seen > seen * limit, _squared_quantile(shared.freedom) * excess, nothing)


def _repeats(filled: Array, known: Array, item: Array, once: Array, spread: Array) -> tuple[Repeats, Array]:
    """Each task's variance due to repeats, and the means of its repeats [*sample task repeat] (NaN if missing).

    If repeats do not differ, scores are item + noise: the means of two repeats then differ only by noise and by the
    items that they do not share.
    """
    counts = known.sum(-2)
    number = (counts > 0).sum(-1)
    means = np.where(counts > 0, filled.sum(-2) / np.maximum(counts, 1), np.nan)
    if filled.shape[-1] == 1:
        nothing = np.zeros(spread.shape)
        return Repeats(nothing, nothing, nothing), means
    several = number > 1
    center = np.nansum(means, -1) / np.maximum(number, 1)
    seen = np.nansum((means - center[..., None]) ** 2, -1) / np.maximum(number - 1, 1) / np.maximum(number, 1)
    off = np.where(known, filled - item[..., None], 0.0)
    shift = off.sum(-2) / np.maximum(counts, 1)
    rest = np.where(known, off - shift[..., None, :], 0.0)
    free = known.sum((-1, -2)) - known.any(-1).sum(-1) - (number - 1)
    noise = np.where(free > 0, (rest**2).sum((-1, -2)) / np.maximum(free, 1), 0.0)
    items = np.maximum(spread - noise * once, 0)
    share = known / np.maximum(counts, 1)[..., None, :]  # weight of an item in the mean of a repeat
    alone = (share**2).sum((-1, -2))
    together = (share.sum(-1) ** 2).sum(-1) - alone
    pairs = np.maximum(number * (number - 1), 1)
    expected = ((items + noise) * alone / np.maximum(number, 1) - items * together / pairs) / np.maximum(number, 1)
    freedom = np.maximum(number - 1, 0)
    return Repeats(np.where(several, seen, 0.0), np.where(several, np.maximum(expected, 0), 0.0), freedom), means


def _freedom(parts: Array, freedom: Array) -> Array:
    """Satterthwaite's degrees of freedom of a sum of independent variances (last axis); 0 if there are none."""
    return _ratio(parts.sum(-1) ** 2, _ratio(parts**2, freedom, 0.0).sum(-1), 0.0)


def _squared_quantile(freedom: Array) -> Array:
    return np.where(freedom > 0, t_distribution.ppf(0.975, np.maximum(freedom, 1)) ** 2, 0.0)


def _crossing(mean: Array, end: Array, linear: Array, quadratic: Array) -> Array:
    """The p between mean and end where (p - mean)^2 = linear p (1 - p) + quadratic (p (1 - p))^2, by bisection."""
    near, far = mean, end
    for _ in range(HALVINGS):
        p = (near + far) / 2
        chance = p * (1 - p)
        inside = (p - mean) ** 2 < linear * chance + quadratic * chance**2
        near, far = np.where(inside, p, near), np.where(inside, far, p)
    return near


def _bounded(mean: Array, low: Array, high: Array, least: float) -> Interval:
    return mean, np.clip(np.minimum(low, mean), least, 1.0), np.clip(np.maximum(high, mean), least, 1.0)


def _ratio(a: Array, b: Array, otherwise: float = 1.0) -> Array:
    """a / b; `otherwise` where b is 0."""
    return np.where(b > 0, a / np.where(b > 0, b, 1), otherwise)
