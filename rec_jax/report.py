"""Tables and plots of scores."""


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
    print_table(["", *first, "95 % interval", *others[:2], f"{other} hr@10", f"{other} ndcg@10"], rows)
    if num := any_metrics["untrained_items"]:
        shares = ", ".join(f"{name} {metrics['untrained@10']:.1%}" for name, metrics in scores.items())
        print(f"{num:,} items have no training event; their share of all top-10 recommendations: {shares}")
    if "oracle" in scores and "model" in scores:
        key = "unfiltered/ndcg@10"
        share = scores["model"][key] / scores["oracle"][key]
        print(f"the model reaches {share:.1%} of the oracle's unfiltered NDCG@10")


def print_better_baselines(scores: dict[str, dict], baselines: dict[str, dict]) -> None:
    """Prints a note if a baseline other than the oracle has a higher NDCG@10 than every model."""
    best = max(metrics["ndcg@10"] for metrics in scores.values())
    better = [
        f"{name} ({metrics['ndcg@10']:.4f})"
        for name, metrics in baselines.items()
        if name != "oracle" and metrics["ndcg@10"] > best
    ]
    if better:
        print(
            f"note: NDCG@10 of {', '.join(better)} is higher than that of the best model here ({best:.4f}): "
            "train longer, or try other settings"
        )


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


def draw_scores(axes, scores: dict[str, dict], baselines: dict[str, dict]) -> None:
    """Draws NDCG@10 with its interval, one line per ranker, the first at the top; baselines are grey.

    axes: Matplotlib axes. scores, baselines: {name: metrics}.
    """
    colors = {name: f"C{i % 10}" for i, name in enumerate(scores)}
    for y, (name, metrics) in enumerate(reversed((scores | baselines).items())):
        mean = metrics["ndcg@10"]
        low, high = metrics.get("ndcg@10_ci", (mean, mean))
        color = colors.get(name, "tab:grey")
        axes.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=3)
    axes.set_yticks(range(len(scores | baselines)), list(scores | baselines)[::-1])
    axes.grid(alpha=0.3)


def plot_comparison(scores, baselines, curves: dict[str, list[dict]], path) -> None:
    """Writes a plot of NDCG@10 with intervals, beside the validation curves of the runs.

    scores, baselines: {name: metrics}. curves: {name: lines of metrics.jsonl}.
    """
    from matplotlib.figure import Figure

    height = max(3.5, 1 + 0.35 * len(scores | baselines))
    figure = Figure(figsize=(12, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_scores(left, scores, baselines)
    left.set_xlabel("NDCG@10 and its 95 % interval")
    colors = {name: f"C{i % 10}" for i, name in enumerate(scores)}
    for name, lines in curves.items():
        points = [
            (line["epoch"], line["val/ndcg@10"]) for line in lines if line.get("val/ndcg@10") is not None
        ]
        if points:
            right.plot(*zip(*points, strict=True), "o-", markersize=3, label=name, color=colors[name])
    right.set(xlabel="epoch", ylabel="validation NDCG@10")
    right.grid(alpha=0.3)
    if right.lines:
        right.legend()
    figure.savefig(path, dpi=120)
