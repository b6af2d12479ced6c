"""Recommends items to users of the log, or after any history of item ids. Ids are those of the log.

    python -m experiments.recommend --workdir=runs/ml1m --user=42 --user=43 --k=10
    python -m experiments.recommend --workdir=runs/ml1m --history=260,1196,1210
    python -m experiments.recommend --workdir=runs/ml1m --users=all --output=lists.parquet

Give one of --user, --history and --users. The command reads only the folder model/ of the working directory.
The files of --users, --allow and --deny contain one id per line. The file of --output (.parquet or .csv) gets
one line per recommendation: user, rank, item, title, score.
"""

from pathlib import Path

from absl import flags

from experiments.launch import launch

_WORKDIR = flags.DEFINE_list(
    "workdir", None, "Directory of a trained run. Several, separated by commas, form an ensemble."
)
_USER = flags.DEFINE_multi_string("user", None, "User id of the log. Can be given several times")
_HISTORY = flags.DEFINE_list("history", None, "Item ids of a history, oldest first, separated by commas.")
_TIMES = flags.DEFINE_list(
    "times",
    None,
    "Times of the events of --history, for models that read times: seconds UTC, separated by commas.",
)
_USERS = flags.DEFINE_string("users", None, "Many users: 'all', or a file of user ids. Requires --output.")
_OUTPUT = flags.DEFINE_string("output", None, "File for the lists of --users: .parquet or .csv.")
_K = flags.DEFINE_integer("k", 10, "Number of items to recommend to each user.", lower_bound=1)
_SEEN = flags.DEFINE_bool("seen", False, "Allow items of the history to be recommended again.")
_TRAINED_ONLY = flags.DEFINE_bool("trained_only", False, "Leave out items that have no training event.")
_ALLOW = flags.DEFINE_string("allow", None, "File of item ids: recommend only these items.")
_DENY = flags.DEFINE_string("deny", None, "File of item ids: never recommend these items.")
_SKIP_UNKNOWN = flags.DEFINE_bool(
    "skip_unknown", False, "Skip unknown ids in --history and --users instead of stopping with an error."
)
_DIMS = flags.DEFINE_integer(
    "dims", 0, "Score by the first DIMS dims of the vectors (loss.matryoshka); 0 = all.", lower_bound=0
)
flags.mark_flag_as_required("workdir")


def main():
    from rec_jax.mesh import MeshConfig, make_mesh
    from rec_jax.serve.recommender import Recommender

    given = [flag.name for flag in (_USER, _HISTORY, _USERS) if flag.value is not None]
    if len(given) != 1:
        raise ValueError("give exactly one of --user=ID, --history=ID,ID,... and --users=all|FILE")
    if (_USERS.value is None) != (_OUTPUT.value is None):
        raise ValueError("--users requires --output=FILE, and --output requires --users: give both or none")
    if _TIMES.value and _HISTORY.value is None:
        raise ValueError("--times are the times of --history: give --history, or leave out --times")
    mesh = make_mesh(MeshConfig()) if _USERS.value else None  # a single list is faster on one device
    recommender = Recommender.load(*_WORKDIR.value, dims=_DIMS.value, mesh=mesh)
    candidates = recommender.candidates(
        allow=None if _ALLOW.value is None else _read_ids("allow", _ALLOW.value),
        deny=() if _DENY.value is None else _read_ids("deny", _DENY.value),
        trained_only=_TRAINED_ONLY.value,
    )
    settings = {"k": _K.value, "seen": _SEEN.value, "candidates": candidates}
    if _USERS.value is not None:
        _write_lists(recommender, settings)
    elif _USER.value is not None:
        recommender.find_users(_USER.value)  # stops at an unknown user before printing any list
        for user in _USER.value:
            _show(recommender.recommend(user=user, **settings), f"user {user}: ")
    else:
        times = None if _TIMES.value is None else [_seconds(text) for text in _TIMES.value]
        settings |= {"times": times, "skip_unknown": _SKIP_UNKNOWN.value}
        _show(recommender.recommend(_HISTORY.value, **settings))


def _show(recommendations, prefix: str = "") -> None:
    history = recommendations.history
    print(f"{prefix}history of {len(history)} events; the last {min(5, len(history))}, oldest first:")
    for name in history[-5:]:
        print("  " + "  ".join(name).rstrip())
    print(recommendations)


def _write_lists(recommender, settings) -> None:
    import numpy as np

    from rec_jax.serve.lists import check_path, write_lists

    check_path(_OUTPUT.value)
    if _USERS.value == "all":
        users = np.arange(len(recommender.model.users.ids))
    else:
        ids = _read_ids("users", _USERS.value)
        users = recommender.find_users(ids, skip_unknown=_SKIP_UNKNOWN.value)
        if len(users) < len(ids):
            print(f"note: {len(ids) - len(users):,} of {len(ids):,} users are unknown and were skipped")
    for note in settings["candidates"].notes:
        print(f"note: {note}")
    counts = write_lists(_OUTPUT.value, recommender, users, **settings)
    print(f"wrote {counts['rows']:,} recommendations to {counts['users']:,} users: {_OUTPUT.value}")
    if counts["short"]:
        print(
            f"note: {counts['short']:,} lists have fewer than {_K.value} items, as no other items were left"
        )
    if counts["untrained"]:
        print(
            f"note: {counts['untrained']:,} of the recommended items have no training event; --trained_only "
            "leaves such items out"
        )


def _read_ids(flag: str, path: str) -> list[str]:
    try:
        ids = [line.strip() for line in Path(path).read_text().splitlines()]
    except OSError as error:
        raise ValueError(
            f"--{flag}={path} cannot be read ({error.strerror}): give a file with one id per line"
        ) from error
    if not (ids := [text for text in ids if text]):
        raise ValueError(f"--{flag}={path} is empty: give a file with one id per line")
    return ids


def _seconds(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--times: {text!r} is not a whole number of seconds") from None


if __name__ == "__main__":
    launch(main)
