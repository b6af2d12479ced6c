"""Tables that people read."""


def format_scores(scores: dict[str, dict]) -> str:
    """A table with a row for each scored thing: the headline metrics, then those
    of the other policy on seen items.

    scores: name -> the dict that `evaluate` returns.
    """
    is_filtered = next(iter(scores.values()))["filter_seen"]
    other = "unfiltered" if is_filtered else "filtered"
    head = ["", "hr@10", "ndcg@10", "95 % interval", "mrr", "coverage@10", f"{other} hr@10", "ndcg@10"]
    rows = []
    for name, metrics in scores.items():
        interval = "..".join(f"{x:.4f}" for x in metrics["ndcg@10_ci"]) if "ndcg@10_ci" in metrics else ""
        rows.append(
            [
                name,
                f"{metrics['hr@10']:.4f}",
                f"{metrics['ndcg@10']:.4f}",
                interval,
                f"{metrics['mrr']:.4f}",
                f"{metrics['coverage@10']:.4f}",
                f"{metrics[f'{other}/hr@10']:.4f}",
                f"{metrics[f'{other}/ndcg@10']:.4f}",
            ]
        )
    return format_table(head, rows) + _format_untrained(scores)


def _format_untrained(scores) -> str:
    num = next(iter(scores.values()))["untrained_items"]
    shares = ", ".join(f"{name} {metrics['untrained@10']:.1%}" for name, metrics in scores.items())
    return (
        f"\n{num:,} items have no training event; their share of all top-10 places: {shares}" if num else ""
    )


def format_table(head, rows) -> str:
    """Aligned columns: the first to the left, the others to the right; integers with thousands separators. A
    row that is shorter than the head is filled with blanks."""
    cells = [[f"{x:,}" if isinstance(x, int) else str(x) for x in row] for row in (head, *rows)]
    cells = [row + [""] * (len(head) - len(row)) for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row):
        first, *others = (
            x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join(map(line, cells))


def print_table(head, rows) -> None:
    print(format_table(head, rows))


def _count(metrics: dict) -> str:
    drawn, all_ = metrics["num_examples"], metrics["num_held_out"]
    return str(all_) if drawn == all_ else f"{drawn} of {all_}"


def print_scores(scores: dict[str, dict], part: str) -> None:
    any_metrics = next(iter(scores.values()))
    seen = "without" if any_metrics["filter_seen"] else "with"
    print(
        f"\n{part}: {_count(any_metrics)} examples, each ranked against the whole catalogue, "
        f"{seen} the items of the user's own history; tied scores: expected metric over random orderings"
    )
    print(format_scores(scores), flush=True)
    if "oracle" in scores and "model" in scores:
        key = "unfiltered/ndcg@10"
        share = scores["model"][key] / scores["oracle"][key]
        print(f"the model reaches {share:.1%} of the oracle's {key}")


def print_breakdown(metrics: dict) -> None:
    """hr@10 and ndcg@10 by the length of the history and by the popularity of the target."""
    for key, title in {
        "by_history_length": "history length",
        "by_popularity": "training events of the target",
    }.items():
        print(f"\n{title:>32s}  examples   hr@10  ndcg@10")
        for name, row in metrics[key].items():
            print(f"{name:>32s}  {row['num_examples']:8d}  {row['hr@10']:.4f}   {row['ndcg@10']:.4f}")
