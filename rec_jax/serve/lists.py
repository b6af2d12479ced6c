"""Files of recommendations to many users, written batch by batch."""

import contextlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from tqdm import tqdm

from rec_jax.serve.recommender import Candidates, Recommender

_SCHEMA = pa.schema(
    {
        "user": pa.string(),
        "rank": pa.int32(),
        "item": pa.string(),
        "title": pa.string(),
        "score": pa.float32(),
    }
)
_WRITERS = {".parquet": pyarrow.parquet.ParquetWriter, ".csv": pyarrow.csv.CSVWriter}


def write_lists(
    path,
    recommender: Recommender,
    users: np.ndarray,
    k: int,
    *,
    seen: bool = False,
    candidates: Candidates | None = None,
) -> dict[str, int]:
    """Writes the k best items of each user, one line per item: user, rank (from 1), item, title, score.

    One batch of users is in memory at a time. `path` appears only when the file is complete.

    Args:
      path: must end in .parquet or .csv.
      users: int64[N], see `Recommender.find_users`.
      seen, candidates: see `Recommender.recommend`.

    Returns counts: "users", "rows" (lines of the file), "short" (users with fewer than k items), "untrained"
    (lines with an item that has no training event).
    Raises ValueError for another kind of file.
    """
    path = check_path(path)
    partial = path.with_name(path.name + ".partial")
    model = recommender.model
    user_ids, item_ids = model.users.ids.to_arrow(), model.item_ids.to_arrow()
    titles, counts = model.titles.to_arrow(), {"users": len(users), "rows": 0, "short": 0, "untrained": 0}
    progress = tqdm(total=len(users), unit="user")
    batches = recommender.recommend_users(users, k, seen=seen, candidates=candidates)
    try:
        with _WRITERS[path.suffix](partial, _SCHEMA) as writer, progress:
            for batch, ids_BK, scores_BK in batches:
                is_item_BK = scores_BK > -np.inf
                rows, ranks = np.nonzero(is_item_BK)
                ids = ids_BK[is_item_BK]
                columns = {
                    "user": user_ids.take(pa.array(batch[rows])),
                    "rank": pa.array((ranks + 1).astype(np.int32)),
                    "item": item_ids.take(pa.array(ids)),
                    "title": titles.take(pa.array(ids)),
                    "score": pa.array(scores_BK[is_item_BK]),
                }
                cast = [pc.cast(column, _SCHEMA.field(name).type) for name, column in columns.items()]
                writer.write_batch(pa.RecordBatch.from_arrays(cast, schema=_SCHEMA))
                counts["rows"] += len(ids)
                counts["short"] += int((is_item_BK.sum(1) < k).sum())
                counts["untrained"] += int((model.train_counts[ids] == 0).sum())
                progress.update(len(batch))
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return counts


def check_path(path) -> Path:
    """Raises ValueError unless a file of a known kind can be written to `path`."""
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise ValueError(f"--output={path} must end in {' or '.join(_WRITERS)}")
    if not path.parent.is_dir():
        raise ValueError(f"--output={path}: the directory {path.parent} does not exist: create it first")
    return path
