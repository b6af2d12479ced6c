"""Simulator: a seeded hidden Markov model of users, whose best possible predictor is known exactly.

Every user has a hidden interest, which changes as a Markov chain, one transition per event, and emits items.
Most items belong to two interests, so the last item alone does not determine the interest; the whole history
is informative. The forward filter gives the exact distribution of the next item: no predictor can be better.
"""

from dataclasses import dataclass

import numpy as np

from rec_jax.data.interactions import InteractionLog
from rec_jax.data.queries import Queries


@dataclass(frozen=True)
class SimulatorConfig:
    num_items: int = 1000
    num_users: int = 6000
    num_interests: int = 32
    mean_len: int = 40  # mean events per user: min_len plus a geometric number
    min_len: int = 5
    stay: float = 0.9  # probability that the interest does not change
    zipf: float = 0.8  # item popularity is rank ** -zipf
    seed: int = 0

    def __post_init__(self):
        if self.num_interests < 2 or self.num_items < 2 * self.num_interests:
            raise ValueError(
                f"num_items={self.num_items}, num_interests={self.num_interests}: num_interests must be 2 or "
                "more, and num_items at least twice num_interests (SimulatorConfig)"
            )
        if not self.min_len < self.mean_len:
            raise ValueError(f"mean_len={self.mean_len} must exceed min_len={self.min_len} (SimulatorConfig)")
        if not 0 <= self.stay < 1:
            raise ValueError(f"stay={self.stay} must be in [0, 1) (SimulatorConfig)")


class World:
    """The random parameters: start_Z, transition_ZZ (rows sum to 1), and the items that each interest emits.

    Item v belongs to interest first_V[v] with share 1, and to second_V[v] with share 0.5. Interest z emits
    item v with probability share * popularity_V[v] / total_Z[z]. Index 0 of arrays over items is padding,
    with popularity 0.
    """

    def __init__(self, config: SimulatorConfig):
        self.config = config
        rng = np.random.default_rng(config.seed)
        num_z, num_v = config.num_interests, config.num_items
        popularity_V = np.arange(1, num_v + 1, dtype=np.float64) ** -config.zipf
        self.popularity_V = np.pad(rng.permutation(popularity_V), (1, 0))
        first_V, second_V = rng.integers(num_z, size=(2, num_v))
        first_V[:num_z] = np.arange(num_z)  # no interest is empty
        self.first_V, self.second_V = (np.pad(x.astype(np.int32), (1, 0)) for x in (first_V, second_V))
        self.total_Z = np.array([self._emitted(z)[1].sum() for z in range(num_z)])
        # With alpha = 0.1, an interest changes to one of few others, mostly to the same one.
        moves_ZZ = rng.dirichlet(np.full(num_z, 0.1), size=num_z)
        self.transition_ZZ = config.stay * np.eye(num_z) + (1 - config.stay) * moves_ZZ
        self.start_Z = np.full(num_z, 1 / num_z)

    def _emitted(self, interest: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (items, weights): the items of an interest, ascending, and share * popularity of each."""
        is_first_V, is_second_V = self.first_V == interest, self.second_V == interest
        items = np.flatnonzero(is_first_V | is_second_V)
        return items, self.popularity_V[items] * np.where(is_first_V[items], 1.0, 0.5)

    def emission(self, items: np.ndarray) -> np.ndarray:
        """f64[..., Z]: the probability that each interest emits each item."""
        out = np.zeros((*items.shape, self.config.num_interests))
        for owner_V, share in ((self.second_V, 0.5), (self.first_V, 1.0)):
            owners = owner_V[items]
            probs = share * self.popularity_V[items] / self.total_Z[owners]
            np.put_along_axis(out, owners[..., None], probs[..., None], axis=-1)
        return out

    def sample(self) -> InteractionLog:
        """Samples a log. Users start at random times; a user's events are one hour apart."""
        config = self.config
        rng = np.random.default_rng((config.seed, 1))
        lengths = config.min_len + rng.geometric(1 / (config.mean_len - config.min_len), config.num_users)
        longest = lengths.max()
        interest_US = np.empty((config.num_users, longest), np.int64)
        interest_US[:, 0] = rng.integers(config.num_interests, size=config.num_users)
        transition_cdf = np.cumsum(self.transition_ZZ, axis=1)
        for event in range(1, longest):
            uniform_U1 = rng.random((config.num_users, 1))
            moved_U = np.sum(transition_cdf[interest_US[:, event - 1]] <= uniform_U1, axis=1)
            interest_US[:, event] = np.minimum(moved_U, config.num_interests - 1)
        real_US = np.arange(longest) < lengths[:, None]
        interests = interest_US[real_US]
        items = np.empty(len(interests), np.int32)
        for interest in range(config.num_interests):
            emitted, weights = self._emitted(interest)
            cdf = np.cumsum(weights / self.total_Z[interest])
            events = np.flatnonzero(interests == interest)
            drawn = np.searchsorted(cdf, rng.random(len(events)) * cdf[-1], side="right")
            items[events] = emitted[np.minimum(drawn, len(emitted) - 1)]  # rounding may give len(emitted)
        users = np.repeat(np.arange(config.num_users, dtype=np.int32), lengths)
        start_U = rng.integers(10**6, size=config.num_users)
        times_US = 1_600_000_000 + 3600 * (start_U[:, None] + np.arange(longest))
        return InteractionLog(
            users=users,
            items=items,
            times=times_US[real_US],
            ratings=None,
            user_ids=np.array([f"u{user}" for user in range(config.num_users)]),
            item_ids=np.array(["", *(f"i{item}" for item in range(1, config.num_items + 1))]),
        )

    def next_item_probs(self, queries: Queries, world_item_V=None) -> np.ndarray:
        """f64[B, V + 1]: the exact P(next item | history). Histories with the same start share one pass.

        world_item_V: int[V + 1], this world's number of each item of the queries; None = the same numbers.
        Source: the forward algorithm, Rabiner 1989, eq. 19 to 20.
        """
        starts_G, group_B = np.unique(queries.starts, return_inverse=True)
        lengths_G = np.zeros(len(starts_G), np.int64)
        np.maximum.at(lengths_G, group_B, queries.lengths)
        longest_first = np.argsort(-lengths_G, kind="stable")
        starts_G, lengths_G = starts_G[longest_first], lengths_G[longest_first]
        row_G = np.argsort(longest_first)
        by_length = np.argsort(queries.lengths, kind="stable")
        steps = np.arange(lengths_G[0] + 1)
        num_done = np.searchsorted(queries.lengths[by_length], steps, side="right")
        num_active = np.searchsorted(-lengths_G, -steps)
        belief_GZ = np.tile(self.start_Z, (len(starts_G), 1))  # P(interest of the next event)
        belief_BZ = np.empty((len(queries), len(self.start_Z)))
        for step in steps[:-1]:
            active = num_active[step]
            items = queries.columns["item"][starts_G[:active] + step]
            items = items if world_item_V is None else world_item_V[items]
            posterior_GZ = belief_GZ[:active] * self.emission(items)
            posterior_GZ /= np.maximum(posterior_GZ.sum(axis=1, keepdims=True), 1e-300)
            belief_GZ[:active] = posterior_GZ @ self.transition_ZZ
            ended = by_length[num_done[step] : num_done[step + 1]]
            belief_BZ[ended] = belief_GZ[row_G[group_B[ended]]]
        # Sum over the two interests of an item, or count an interest once if it is both.
        per_total_BZ = belief_BZ / self.total_Z
        share_V = np.where(self.first_V == self.second_V, 0.0, 0.5)
        both_BV = per_total_BZ[:, self.first_V] + share_V * per_total_BZ[:, self.second_V]
        return both_BV * self.popularity_V

    def oracle(self, histories):
        """Returns a function of Queries that gives f32[B, V + 1], the best possible scores for a log sampled
        from this world.

        They are the best only if seen items are not filtered out, because items repeat in this world. The log
        may number its items differently: an item id like i17 contains this world's number.
        """
        world_item_V = np.array([0, *(int(name[1:]) for name in histories.item_ids[1:])])

        def scores(queries):
            return self.next_item_probs(queries, world_item_V)[:, world_item_V].astype(np.float32)

        return scores
