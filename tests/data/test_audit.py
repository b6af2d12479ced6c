import numpy as np
import pytest

from rec_jax.data.audit import FIGURES, audit, format_audit
from rec_jax.data.histories import Histories, global_temporal, leave_one_out

DAY = 86_400


def make_histories(rows):
    """rows: for each user, (day, item) events."""
    events = [event for row in rows for event in row]
    num_items = max(item for _, item in events)
    return Histories(
        items=np.array([item for _, item in events], np.int32),
        times=np.array([day * DAY for day, _ in events]),
        offsets=np.cumsum([0, *map(len, rows)]),
        user_ids=np.arange(len(rows)),
        item_ids=np.arange(num_items + 1),
    )


@pytest.fixture
def log():
    """Two ties, one of them at a target; one repeat; users 2 and 3 are twins."""
    return make_histories(
        [
            [(0, 1), (10, 2), (10, 3), (20, 1)],
            [(5, 1), (15, 2), (25, 3), (25, 4)],
            [(0, 2), (1, 3), (2, 5)],
            [(40, 2), (41, 3), (42, 5)],
            [(30, 2), (31, 3), (32, 1)],
        ]
    )


def test_figures_equal_those_counted_by_hand(log):
    counts = np.array([4, 5, 5, 1, 2])  # Gini: the mean difference of two items over twice the mean
    gini = np.abs(counts[:, None] - counts).mean() / (2 * counts.mean())
    expected = {
        "tied_events": 4 / 17,
        "tied_test_targets": 1 / 5,
        "repeat_events": 1 / 17,
        "repeat_test_targets": 1 / 5,
        "cold_test_targets": 3 / 5,  # training items are 1 and 2, targets 1, 4, 5, 5, 1
        "cold_user_targets": 0,
        "item_age_events_days": 15,
        "item_age_test_days": 20,  # of 20, 0, 0, 40, 32
        "events_per_user": 3,
        "popularity_gini": gini,
        "top_items_share": 5 / 17,  # one item of five
        "twin_users": 2,
        "twin_users_before_last": 5,
        "targets_before_end_of_training": 4 / 5,  # training days: 0, 0, 5, 10, 15, 30, 40
        "training_after_target": (2 + 2 + 5 + 0 + 1) / 5 / 7,
        # User 2's item 5, which user 3 has on day 42. Only user 1 has item 4.
        "first_with_others_later": 1 / 5,
    }
    figures = audit(log, leave_one_out(log))
    assert list(figures) == list(expected)
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value), name


def test_the_report_of_a_log_without_times_says_so(log):
    untimed = Histories(log.items, None, log.offsets, log.user_ids, log.item_ids)
    timed = audit(log, leave_one_out(log))
    figures = audit(untimed, leave_one_out(untimed))
    missing = set(timed) - set(figures)
    time_sections = ("Order in time", "Leakage from the future")
    ages = {"item_age_events_days", "item_age_test_days"}
    assert missing == ages | {name for name, figure in FIGURES.items() if figure.section in time_sections}
    assert all(timed[name] == value for name, value in figures.items())
    text = format_audit(untimed, leave_one_out(untimed), figures)
    assert "The log has no times" in text and "Leakage from the future" not in text
    assert "no times" not in format_audit(log, leave_one_out(log), timed)


def test_the_report_explains_every_figure(log):
    figures = audit(log, leave_one_out(log)) | {"bigram_hit@1": 0.125}
    text = format_audit(log, leave_one_out(log), figures)
    for name in figures:
        assert FIGURES[name].what in text and FIGURES[name].meaning in text
    assert "12.50%  of test targets are ranked first by" in text
    assert "20.0 days  is the median age of an item at a test target" in text
    assert "5 test targets" in text


@pytest.mark.parametrize("seed", range(3))
def test_figures_of_random_logs_equal_those_of_loops(seed):
    rng = np.random.default_rng(seed)
    rows = [sorted(zip(*rng.integers(1, 8, (2, rng.integers(3, 7))), strict=True)) for _ in range(12)]
    log = make_histories([*rows, rows[0], rows[1][:-1] + [(9, 1)]])
    split = leave_one_out(log)
    rows = [
        [(int(log.times[i]), int(log.items[i])) for i in range(log.offsets[u], log.offsets[u + 1])]
        for u in range(log.num_users)
    ]
    training = [time for row in rows for time, _ in row[:-2]]
    tied, repeats, ages, later, first_later, twins = [], [], [], [], [], 0
    for user, row in enumerate(rows):
        others = [event for other, events in enumerate(rows) if other != user for event in events]
        for i, (time, item) in enumerate(row):
            tied.append(time in [row[j][0] for j in (i - 1, i + 1) if 0 <= j < len(row)])
            repeats.append(item in [earlier for _, earlier in row[:i]])
            ages.append((time - min(t for t, v in [*row, *others] if v == item)) / DAY)
        time, item = row[-1]
        later.append(np.mean([t > time for t in training]))
        of_others = [t for t, v in others if v == item]
        first_later.append(bool(of_others) and min(of_others) > time)
        before = [v for _, v in row[:-1]]
        twins += any(before == [v for _, v in x[:-1]] for other, x in enumerate(rows) if other != user)
    last = np.cumsum([len(row) for row in rows]) - 1
    figures = audit(log, split)
    expected = {
        "tied_events": np.mean(tied),
        "repeat_events": np.mean(repeats),
        "repeat_test_targets": np.mean(np.array(repeats)[last]),
        "item_age_events_days": np.median(ages),
        "item_age_test_days": np.median(np.array(ages)[last]),
        "training_after_target": np.mean(later),
        "targets_before_end_of_training": np.mean(np.array(later) > 0),
        "first_with_others_later": np.mean(first_later),
        "twin_users_before_last": twins,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_a_split_without_examples_is_refused():
    log = make_histories([[(0, 1)], [(1, 1)], [(2, 1)]])
    with pytest.raises(ValueError, match="no test target has an earlier event of its user"):
        audit(log, global_temporal(log, DAY, 2 * DAY))


def test_a_temporal_split_has_no_future_in_training_and_may_have_new_users(log):
    figures = audit(log, global_temporal(log, 20 * DAY, 31 * DAY))
    assert figures["targets_before_end_of_training"] == figures["training_after_target"] == 0
    # Test events from day 31 on: user 3's second and third, user 4's second and third; both are new.
    assert figures["cold_user_targets"] == 1
