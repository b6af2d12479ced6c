"""Scores and other figures as tables that people read."""


def format_scores(scores: dict[str, dict]) -> str:
    """A table with a row for each scored thing: the headline metrics, then those
    of the other policy on seen items.

    scores: name -> the dict that `evaluate` returns.
    """
    is_filtered = next(iter(scores.values()))["filter_seen"]
    other = "unfiltered" if is_filtered else "filtered"
    head = ["", "hr@10", "ndcg@10", "95 % interval", "mrr", "coverage@10", f"{other} hr@10", "ndcg@10"]
    rows = [head]
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
    return _format_table(rows)


def _format_table(rows) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def print_table(head: tuple, rows: list[tuple]) -> None:
    """Right-aligned columns of texts."""
    print(_format_table([head, *rows]))


def _count(metrics: dict) -> str:
    drawn, all_ = metrics["num_examples"], metrics["num_held_out"]
    return str(all_) if drawn == all_ else f"{drawn} of {all_}"


def print_scores(scores: dict[str, dict], part: str) -> None:
    any_metrics = next(iter(scores.values()))
    seen = "without" if any_metrics["filter_seen"] else "with"
    print(
        f"\n{part}: {_count(any_metrics)} examples, each ranked against the whole catalogue, "
        f"{seen} the items of the user's own history; ties broken at random, in expectation"
    )
    print(format_scores(scores), flush=True)
    if "oracle" in scores and "model" in scores:
        key = "unfiltered/ndcg@10"
        share = scores["model"][key] / scores["oracle"][key]
        print(f"the model reaches {share:.1%} of what anything could reach ({key})")


def print_breakdown(metrics: dict) -> None:
    """hr@10 and ndcg@10 by the length of the history and by the popularity of the target."""
    for key, title in {
        "by_history_length": "history length",
        "by_popularity": "training events of the target",
    }.items():
        print(f"\n{title:>32s}  examples   hr@10  ndcg@10")
        for name, row in metrics[key].items():
            print(f"{name:>32s}  {row['num_examples']:8d}  {row['hr@10']:.4f}   {row['ndcg@10']:.4f}")
