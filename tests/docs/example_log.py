"""The log that the pages speak of: log.csv and titles.csv."""

import numpy as np


def write_log(folder, num_users: int = 120, num_items: int = 900, seed: int = 0) -> None:
    """Writes log.csv (customer, product, when, device) and titles.csv (item_id, title)."""
    rng = np.random.default_rng(seed)
    lines = ["customer,product,when,device"]
    for user in range(num_users):
        item = int(rng.integers(num_items))
        for event in range(int(rng.integers(5, 14))):
            item = (
                (item + int(rng.integers(1, 4))) % num_items
                if rng.random() < 0.8
                else int(rng.zipf(1.5)) % num_items
            )
            lines.append(
                f"u{user},i{item},{1_600_000_000 + 1000 * user + 60 * event},{rng.choice(['tv', 'phone'])}"
            )
    # Items and users that the pages name.
    lines += [f"u{user},i{item},{1_600_200_000 + item},tv" for user in (7, 8) for item in (247, 403, 777)]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    titles = [f"i{item},The title of {item}" for item in range(num_items)]
    (folder / "titles.csv").write_text("\n".join(["item_id,title", *titles]) + "\n")
