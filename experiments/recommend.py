"""Recommends items to users of the log, or to anyone with a history, under your own ids.

    python -m experiments.recommend --workdir=runs/ml1m --user=42 --user=43 --k=10
    python -m experiments.recommend --workdir=runs/ml1m --history=260,1196,1210
    python -m experiments.recommend --workdir=runs/ml1m --users=all --output=lists.parquet

It reads --workdir/model and nothing else. A file of --users, --allow or --deny has an id a line. The file of
--output (.parquet or .csv) has a row for each recommendation: user, rank, item, title, score.
"""

from pathlib import Path

from absl import flags

from experiments.launch import launch

_WORKDIR = flags.DEFINE_list("workdir", None, "Directory of a trained run, or several, separated by commas.")
_USER = flags.DEFINE_multi_string("user", None, "A user id of the log; may be given several times.")
_HISTORY = flags.DEFINE_list("history", None, "Item ids, oldest first, separated by commas.")
_TIMES = flags.DEFINE_list("times", None, "Seconds UTC of the events of --history, separated by commas.")
_USERS = flags.DEFINE_string("users", None, "Many users: all, or a file of their ids; needs --output.")
_OUTPUT = flags.DEFINE_string("output", None, "The file that the lists of --users are written to.")
_K = flags.DEFINE_integer("k", 10, "How many items to recommend.", lower_bound=1)
_SEEN = flags.DEFINE_bool("seen", False, "Recommend items of the history again, too.")
_TRAINED_ONLY = flags.DEFINE_bool("trained_only", False, "Leave out items without a training event.")
_ALLOW = flags.DEFINE_string("allow", None, "Recommend only the items in this file.")
_DENY = flags.DEFINE_string("deny", None, "Recommend none of the items in this file.")
_SKIP_UNKNOWN = flags.DEFINE_bool(
    "skip_unknown", False, "Leave out unknown ids of --history and --users, and count them."
)
_DIMS = flags.DEFINE_integer("dims", 0, "Score by so many first dims; 0 = by all.", lower_bound=0)
flags.mark_flag_as_required("workdir")


def main():
    from rec_jax.mesh import MeshConfig, make_mesh
    from rec_jax.serve.recommender import Recommender

    given = [flag.name for flag in (_USER, _HISTORY, _USERS) if flag.value is not None]
    if len(given) != 1:
        raise ValueError("give one of --user=ID, --history=ID,ID,... and --users=all|FILE")
    if (_USERS.value is None) != (_OUTPUT.value is None):
        raise ValueError("--users and --output=FILE belong together")
    if _TIMES.value and _HISTORY.value is None:
        raise ValueError("--times belong to the events of --history")
    mesh = make_mesh(MeshConfig()) if _USERS.value else None  # for one list, one device answers sooner
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
        recommender.find_users(_USER.value)  # all of them are known, or none is answered
        for user in _USER.value:
            _show(recommender.recommend(user=user, **settings), f"user {user}: ")
    else:
        times = None if _TIMES.value is None else [_seconds(text) for text in _TIMES.value]
        settings |= {"times": times, "skip_unknown": _SKIP_UNKNOWN.value}
        _show(recommender.recommend(_HISTORY.value, **settings))


def _show(found, whose: str = "") -> None:
    print(f"{whose}history of {len(found.history)} events, the last of them:")
    for name in found.history[-5:]:
        print("  " + "  ".join(name).rstrip())
    print(found)


def _write_lists(recommender, settings) -> None:
    import numpy as np

    from rec_jax.serve.lists import check_path, write_lists

    check_path(_OUTPUT.value)
    if _USERS.value == "all":
        users = np.arange(len(recommender.model.users.ids))
    else:
        wanted = _read_ids("users", _USERS.value)
        users = recommender.find_users(wanted, skip_unknown=_SKIP_UNKNOWN.value)
        if len(users) < len(wanted):
            print(f"note: {len(wanted) - len(users):,} of {len(wanted):,} users are unknown and skipped")
    for note in settings["candidates"].notes:
        print(f"note: {note}")
    counts = write_lists(_OUTPUT.value, recommender, users, **settings)
    print(f"wrote {counts['rows']:,} rows, lists of {counts['users']:,} users, to {_OUTPUT.value}")
    if counts["short"]:
        print(f"note: {counts['short']:,} lists have fewer than {_K.value} items: no more were left or found")
    if counts["untrained"]:
        print(f"note: {counts['untrained']:,} rows are items without a training event (--trained_only)")


def _read_ids(flag: str, path: str) -> list[str]:
    try:
        ids = [line.strip() for line in Path(path).read_text().splitlines()]
    except OSError as error:
        raise ValueError(f"--{flag}={path} cannot be read ({error.strerror}): give a file of ids") from error
    if not (ids := [text for text in ids if text]):
        raise ValueError(f"--{flag}={path} is empty: give an id a line")
    return ids


def _seconds(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--times: {text!r} is no whole number of seconds") from None


if __name__ == "__main__":
    launch(main)
