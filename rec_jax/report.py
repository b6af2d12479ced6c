"""Tables of text for the commands' output."""


def format_table(head, rows) -> str:
    """Formats a table: the first column is aligned left, the others right; integers get thousands separators.
    A row that is shorter than the head is filled with blanks."""
    cells = [[f"{x:,}" if isinstance(x, int) else str(x) for x in row] for row in (head, *rows)]
    cells = [row + [""] * (len(head) - len(row)) for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row):
        first, *others = (x.rjust(width) for x, width in zip(row, widths, strict=True))
        return "  ".join([row[0].ljust(widths[0]), *others]).rstrip()

    return "\n".join(map(line, cells))


def print_table(head, rows) -> None:
    print(format_table(head, rows), flush=True)


def print_scores(scores: dict[str, dict], part: str) -> None:
    """Prints one row for each ranker: the metrics under the configured policy on seen items (headline), then
    hr@10 and ndcg@10 under the other policy.

    scores: {name: the dict that `evaluate` returns}.
    """
    any_metrics = next(iter(scores.values()))
    drawn, held_out = any_metrics["num_examples"], any_metrics["num_held_out"]
    seen, other = ("without", "unfiltered") if any_metrics["filter_seen"] else ("with", "filtered")
    print(
        f"\n{part}: {drawn if drawn == held_out else f'{drawn} of {held_out}'} examples, each ranked against "
        f"the whole catalogue, {seen} the items of the user's own history; tied scores: expected metric over "
        "random orderings"
    )
    first, others = ("hr@10", "ndcg@10"), ("mrr", "coverage@10", f"{other}/hr@10", f"{other}/ndcg@10")
    rows = []
    for name, metrics in scores.items():
        interval = "..".join(f"{x:.4f}" for x in metrics["ndcg@10_ci"]) if "ndcg@10_ci" in metrics else ""
        values = [f"{metrics[key]:.4f}" for key in (*first, *others)]
        rows.append([name, *values[:2], interval, *values[2:]])
    print_table(["", *first, "95 % interval", *others[:2], f"{other} hr@10", "ndcg@10"], rows)
    if num := any_metrics["untrained_items"]:
        shares = ", ".join(f"{name} {metrics['untrained@10']:.1%}" for name, metrics in scores.items())
        print(f"{num:,} items have no training event; their share of all top-10 recommendations: {shares}")
    if "oracle" in scores and "model" in scores:
        key = "unfiltered/ndcg@10"
        share = scores["model"][key] / scores["oracle"][key]
        print(f"the model reaches {share:.1%} of the oracle's {key}")


def print_breakdown(metrics: dict) -> None:
    """Prints hr@10 and ndcg@10 by the length of the history and by the popularity of the target."""
    for key, title in {
        "by_history_length": "history length",
        "by_popularity": "training events of the target",
    }.items():
        rows = [
            (name, row["num_examples"], f"{row['hr@10']:.4f}", f"{row['ndcg@10']:.4f}")
            for name, row in metrics[key].items()
        ]
        print()
        print_table((title, "examples", "hr@10", "ndcg@10"), rows)
