"""Audit of a log and its split: what to check before trusting a benchmark on them."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from rec_jax.data.histories import examples

_SECS_PER_DAY = 86_400
_NO_TIMES = (
    "The log has no times: ties, item ages and leakage from the future cannot be measured.\n"
    "The order of the file is assumed to be the order in time; ties in its source are invisible."
)


@dataclass(frozen=True)
class Figure:
    """One figure of the audit. `what` completes the sentence that its value begins; `meaning` says why it
    matters."""

    section: str
    unit: Literal["share", "days", "count", "number"]
    what: str
    meaning: str


_ORDER, _REPEATS, _RULES = "Order in time", "Repeats", "Simple rules (seen items are filtered out)"
_NEW, _DISTRIBUTION, _TWINS = "New items and users", "Distribution of events", "Users with equal histories"
_FUTURE = "Leakage from the future"
FIGURES = {
    "tied_events": Figure(
        _ORDER,
        "share",
        "of events are in the same second as the user's previous or next event",
        "only the file decides their order: re-sorting it would change the sequences to learn from",
    ),
    "tied_test_targets": Figure(
        _ORDER,
        "share",
        "of test targets are in the same second as the event before them",
        "only the file decides which of the two is the target: re-sorting it would change the test",
    ),
    "repeat_events": Figure(
        _REPEATS,
        "share",
        "of events are with an item that the user had before",
        "if high, use unfiltered metrics; if 0, the log (or its cleaning) has one event per user and item",
    ),
    "repeat_test_targets": Figure(
        _REPEATS,
        "share",
        "of test targets are items that the user had before",
        "the filter of seen items keeps such a target and removes its rivals: unfiltered ranks are fairer",
    ),
    "bigram_hit@1": Figure(
        _RULES,
        "share",
        "of test targets are ranked first by how often they followed the user's last item in training",
        "the last item alone is enough for these: they do not show that a model reads longer histories",
    ),
    "bigram_hit@10": Figure(
        _RULES,
        "share",
        "of test targets are ranked in the top 10 by the same rule",
        "the HR@10 of a sequence model means something only if it is higher",
    ),
    "popularity_hit@1": Figure(
        _RULES,
        "share",
        "of test targets are the most popular item that the user has not had",
        "no knowledge of the user is needed for these",
    ),
    "popularity_hit@10": Figure(
        _RULES,
        "share",
        "of test targets are among the 10 most popular items that the user has not had",
        "any personalised model must beat this",
    ),
    "cold_test_targets": Figure(
        _NEW,
        "share",
        "of test targets are items without a training event",
        "a model that learns items by id cannot predict them: HR can reach about 1 minus this share",
    ),
    "cold_user_targets": Figure(
        _NEW,
        "share",
        "of test targets belong to users without a training event",
        "a user embedding knows nothing about them; a sequence model has only the events before the target",
    ),
    "item_age_events_days": Figure(
        _NEW,
        "days",
        "is the median age of an item at an event, counted from the item's first event with any user",
        "if this is short compared with the length of the log, items come and go, and recency matters",
    ),
    "item_age_test_days": Figure(
        _NEW,
        "days",
        "is the median age of an item at a test target",
        "if far from the line above, the items of the test differ from those that training shows",
    ),
    "events_per_user": Figure(
        _DISTRIBUTION,
        "number",
        "events are in the history of the median user",
        "short histories leave little for a sequence model to learn; long ones are cut to data.max_len",
    ),
    "popularity_gini": Figure(
        _DISTRIBUTION,
        "number",
        "is the Gini coefficient of events per item (0: equal for all items, 1: one item has all events)",
        "the closer to 1, the better popularity alone ranks, and the less HR says about rare items",
    ),
    "top_items_share": Figure(
        _DISTRIBUTION,
        "share",
        "of events are with the most popular 1 % of the items",
        "if high, averages over events mostly describe these items: look at metrics by popularity",
    ),
    "twin_users": Figure(
        _TWINS,
        "count",
        "users have exactly the history of another user",
        "copies (bots, imports, double accounts) are counted several times and reward memorisation",
    ),
    "twin_users_before_last": Figure(
        _TWINS,
        "count",
        "users have the history of another user if the last event of each is ignored",
        "one input has several answers: no model can rank all of them first",
    ),
    "targets_before_end_of_training": Figure(
        _FUTURE,
        "share",
        "of test targets are earlier than at least one training event",
        "a model may learn from events after the moment it predicts; 0 in a global temporal split",
    ),
    "training_after_target": Figure(
        _FUTURE,
        "share",
        "of training events are later than the test target (mean over test targets)",
        "this is how much of the future a model can learn from",
    ),
    "first_with_others_later": Figure(
        _FUTURE,
        "share",
        "of test targets are items that other users had only later",
        "no other user had the item at that moment: all that training knows of it comes from the future",
    ),
}


def audit(histories, split) -> dict[str, float]:
    """Returns {name: value} of the `FIGURES` of a log and the test part of its split: shares, days, counts.

    Figures that need times are left out if the log has none. The hit rates of simple rules are not computed
    here: the caller adds them. Raises ValueError if no test target has a history.
    """
    items, offsets = np.asarray(histories.items), histories.offsets
    users = np.repeat(np.arange(histories.num_users), np.diff(offsets))
    ex = examples(histories, split, "test")
    if len(ex.targets) == 0:
        raise ValueError(
            "no test target has an earlier event of its user, so there is nothing to audit: use another split"
        )
    figures = {}
    if histories.times is not None:
        times = np.asarray(histories.times)
        tied = (np.diff(times) == 0) & (np.diff(users) == 0)
        figures["tied_events"] = np.mean(np.append(tied, False) | np.append(False, tied))
        figures["tied_test_targets"] = np.mean(times[ex.ends] == times[ex.ends - 1])
    is_first = np.zeros(len(items), bool)
    is_first[np.unique(users * (histories.num_items + 1) + items, return_index=True)[1]] = True
    figures["repeat_events"] = np.mean(~is_first)
    figures["repeat_test_targets"] = np.mean(~is_first[ex.ends])
    figures["cold_test_targets"] = ex.num_unseen / len(ex.targets)
    figures["cold_user_targets"] = np.mean((split.train_end == offsets[:-1])[ex.users])
    if histories.times is not None:
        ages = item_age_days(histories)
        figures["item_age_events_days"] = np.median(ages)
        figures["item_age_test_days"] = np.median(ages[ex.ends])
    figures["events_per_user"] = np.median(np.diff(offsets))
    counts = np.sort(_item_counts(histories))
    figures["popularity_gini"] = _gini(counts)
    figures["top_items_share"] = counts[-_one_percent(counts) :].sum() / len(items)
    figures["twin_users"] = _num_twins(items, offsets[:-1], offsets[1:])
    figures["twin_users_before_last"] = _num_twins(items, offsets[:-1], offsets[1:] - 1)
    if histories.times is not None:
        train_times, target_times = np.sort(times[split.in_train(histories)]), times[ex.ends]
        num_later = len(train_times) - np.searchsorted(train_times, target_times, side="right")
        figures["targets_before_end_of_training"] = np.mean(num_later > 0)
        figures["training_after_target"] = np.mean(num_later) / len(train_times)
        first = _first_by_others(items, users, times, ex.users, ex.targets)
        figures["first_with_others_later"] = np.mean((first > target_times) & (first < _NEVER))
    return {name: float(value) for name, value in figures.items()}


def item_age_days(histories) -> np.ndarray:
    """f64[N]: for each event, the days since the first event of any user with its item."""
    times, items = np.asarray(histories.times), np.asarray(histories.items)
    first_V = np.full(histories.num_items + 1, _NEVER)
    np.minimum.at(first_V, items, times)
    return (times - first_V[items]) / _SECS_PER_DAY


_NEVER = np.iinfo(np.int64).max


def _first_by_others(items, users, times, target_users, targets) -> np.ndarray:
    """int64[E]: the first time that a user other than the target's had the item; _NEVER if none had it."""

    def first_of_each_item(events):
        """Returns (time_V, user_V): the time and user of each item's earliest event among `events`."""
        events = events[np.lexsort((times[events], items[events]))]
        present, first = np.unique(items[events], return_index=True)
        time_V, user_V = np.full(items.max() + 1, _NEVER), np.full(items.max() + 1, -1)
        time_V[present], user_V[present] = times[events[first]], users[events[first]]
        return time_V, user_V

    first_V, user_V = first_of_each_item(np.arange(len(items)))
    second_V, _ = first_of_each_item(np.flatnonzero(users != user_V[items]))
    return np.where(user_V[targets] == target_users, second_V[targets], first_V[targets])


def _num_twins(items, starts, ends) -> int:
    """The number of users with a non-empty items[start:end] equal to that of another user."""
    spans = zip(starts, ends, strict=True)
    digests = (hashlib.sha256(items[start:end]).digest() for start, end in spans if end > start)
    return sum(num for num in Counter(digests).values() if num > 1)


def _item_counts(histories) -> np.ndarray:
    """int64[V]: events of each item, without padding."""
    return np.bincount(histories.items, minlength=histories.num_items + 1)[1:]


def _gini(ascending: np.ndarray) -> float:
    num = len(ascending)
    return 2 * np.sum(np.arange(1, num + 1) * ascending) / (num * ascending.sum()) - (num + 1) / num


def _one_percent(counts: np.ndarray) -> int:
    return -(-len(counts) // 100)


def format_audit(histories, split, figures: dict[str, float]) -> str:
    """The text report: each figure with its meaning."""
    num_test = len(examples(histories, split, "test").users)
    lines = [f"Audit: {_title(histories, split)}, {num_test:,} test targets with a history"]
    if histories.times is None:
        lines += ["", _NO_TIMES]
    section = ""
    for name, figure in FIGURES.items():
        if name in figures:
            if figure.section != section:
                section = figure.section
                lines += ["", section]
            value = _text(figures[name], figure.unit)
            lines += [f"{value:>10}  {figure.what}", f"{'':10}  -> {figure.meaning}"]
    return "\n".join(lines)


def _title(histories, split) -> str:
    return (
        f"{histories.num_users:,} users, {histories.num_items:,} items, {histories.num_events:,} events, "
        f"{split.kind}"
    )


def _text(value: float, unit: str) -> str:
    texts = {"share": f"{value:.2%}", "days": f"{value:,.1f} days", "count": f"{value:,.0f}"}
    return texts[unit] if unit in texts else f"{value:.3g}"


def plot_audit(histories, split, figures: dict[str, float], path: Path) -> None:
    """Saves four panels: history lengths, popularity, item ages (or popularity of targets), shares."""
    canvas = Canvas(figsize=(13, 9), layout="constrained")
    (lengths, popularity), (ages, shares) = canvas.subplots(2, 2)
    _plot_lengths(histories, lengths)
    _plot_popularity(histories, figures, popularity)
    ex = examples(histories, split, "test")
    if histories.times is not None:
        days = item_age_days(histories)
        _plot_shares_up_to(ages, {"all events": days, "test targets": days[ex.ends]})
        ages.set(xlabel="days since the first event with the item", title="Age of items at their events")
    else:
        counts_V = split.train_item_counts(histories)
        in_training = np.repeat(counts_V, counts_V)
        _plot_shares_up_to(ages, {"training events": in_training, "test targets": counts_V[ex.targets]})
        ages.set_xscale("symlog", linthresh=1)
        ages.set(
            xlabel="training events of the item (0: cold)",
            title="Popularity of the test items",
            xlim=(0, None),
        )
        ages.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _plot_shares(figures, shares)
    canvas.suptitle(_title(histories, split))
    canvas.savefig(path, dpi=110)


def _plot_lengths(histories, axes) -> None:
    lengths = np.diff(histories.offsets)
    edges = np.geomspace(lengths.min(), lengths.max() + 1, 40)
    axes.hist(lengths, np.unique(np.floor(edges)))
    median = np.median(lengths)
    axes.axvline(median, color="black", linestyle="--", label=f"median {median:,.0f}")
    axes.set(xscale="log", xlabel="events per user", ylabel="users", title="History lengths")
    _plain_numbers(axes.xaxis)
    axes.legend()


def _plot_popularity(histories, figures, axes) -> None:
    counts = np.sort(_item_counts(histories))[::-1]
    axes.loglog(np.arange(1, len(counts) + 1), counts)
    top = f"top 1 %: {figures['top_items_share']:.1%} of events"
    axes.axvspan(1, max(_one_percent(counts), 1.05), color="tab:orange", alpha=0.3, label=top)
    axes.legend(loc="lower left")
    title = f"Item popularity, Gini {figures['popularity_gini']:.2f}"
    axes.set(xlabel="item, most popular first", ylabel="events", title=title)
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)


def _plot_shares_up_to(axes, parts: dict[str, np.ndarray]) -> None:
    share = np.linspace(0, 1, 1001)
    for name, values in parts.items():
        axes.plot(np.quantile(values, share), share, label=name)
    axes.set(ylabel="cumulative share", ylim=(0, 1))
    axes.legend(loc="upper left")


def _plot_shares(figures, axes) -> None:
    names = [name for name in figures if FIGURES[name].unit == "share" and name != "top_items_share"][::-1]
    values = [figures[name] for name in names]
    bars = axes.barh([name.replace("_", " ") for name in names], values)
    axes.bar_label(bars, fmt="{:.1%}", padding=3)
    xlabel = "share (audit.json explains each one)"
    axes.set(xlim=(0, 1.12), xlabel=xlabel, title="Shares to check before trusting a benchmark")


def _plain_numbers(axis) -> None:
    """Labels a logarithmic axis with 1, 10, 100, ..., and with 2, 5, 20, ... if there is room."""
    low, high = axis.get_data_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set_minor_formatter(NullFormatter())
