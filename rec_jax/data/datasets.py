import os, pathlib
from dataclasses import dataclass
import numpy as np
from rec_jax.data.histories import *
from rec_jax.data.interactions import InteractionLog
from rec_jax.data.simulator import SimulatorConfig, World


@dataclass(frozen=True)
class DataConfig:
    path: str = ""
    format: str = "auto"
    user: str = ""
    item: str = ""
    time: str = ""
    titles: str = ""
    titles_ids: str = ""
    split: str = "leave_one_out"
    max_len: int = 200
    sim: SimulatorConfig = SimulatorConfig()


@dataclass
class Dataset:
    histories: Histories
    split: Split
    report: list
    world: object


def load_dataset(config, directory):
    world = None
    if config.format == "simulator":
        world = World(config.sim); log = world.sample()
    else:
        path = pathlib.Path(config.path)
        if not path.exists(): path = pathlib.Path(os.environ["REC_JAX_DATA"]) / path
        if config.format == "sasrec":
            a = np.loadtxt(path, dtype=np.int64); u, i = a[:, 0] - 1, a[:, 1]
        else:
            u, i = [], []
            for n, l in enumerate(open(path)):
                x = [int(t) for t in l.split()[1:]]; i += x; u += [n] * len(x)
            u, i = np.array(u), np.array(i)
        log = InteractionLog(u.astype(np.int32), i.astype(np.int32), None, None, np.array([str(x+1) for x in range(u.max() + 1)]), np.array([""] + [str(x) for x in range(1, i.max() + 1)]))
    h = build_histories(log)
    return Dataset(h, leave_one_out(h), [], world)
