"""Tables and a figure from committed results: `python -m bench.tasks --report`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.tasks.contestants import CONTESTANTS
from bench.tasks.problems import TASKS, Task
from bench.tasks.sweep import best_third, mean, near, rate_of

# in README; the page of results has all
FIRST = ("sgd-clip", "adamw", "adamw-clip", "lion", "muon", "bngd-tensor", "bngd-row")
OURS = tuple(who for who in CONTESTANTS if who.startswith("bngd"))
Found = dict[str, dict[str, dict[str, Any]]]


def _rate(task: Task, scores: dict[str, Any]) -> float:
    return rate_of(best_third(task, scores["choice"]))


def _score(task: Task, scores: Sequence[float]) -> str:
    digits = ".1f" if task.higher else ".3f" if mean(scores) >= 0.1 else ".4f"
    return f"{mean(scores):{digits}} ± {statistics.pstdev(scores):{digits}}"


def tested(task: Task, scores: dict[str, Any]) -> str:
    """Mean and spread over the seeds that chose nothing."""
    return _score(task, scores["test"][str(_rate(task, scores))])


def rate(task: Task, scores: dict[str, Any]) -> str:
    """The rate that the other seeds chose."""
    return f"{_rate(task, scores):g}"


def span(task: Task, scores: dict[str, Any]) -> str:
    """The factor between the least and the largest rate within 5 % of the best."""
    best = mean(scores["choice"][str(best_third(task, scores["choice"]))])
    good = [int(third) for third, of in scores["choice"].items() if near(task, mean(of), best)]
    return f"{10 ** ((max(good) - min(good)) / 3):.2g}"


def default(who: str) -> Callable[[Task, dict[str, Any]], str]:
    """The score at the library's own rate."""
    own = CONTESTANTS[who].default
    return lambda task, scores: "" if own is None else _score(task, scores["test"][str(own)])


def table(found: Found, who: Sequence[str], cell: Callable[..., str] | None) -> str:
    """Optimizers against tasks; a cell is empty where an optimizer has nothing of its own to do."""
    rows = [["task", *(CONTESTANTS[name].title for name in who)], ["---"] * (len(who) + 1)]
    for name, task in TASKS.items():
        cells = [
            (cell or default(one))(task, found[name][one]) if one in found[name] else ""
            for one in who
        ]
        rows.append([task.title, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def ranks(found: Found) -> dict[str, list[int]]:
    """The place of each of our variants in each task, by the seeds that choose rates."""
    places: dict[str, list[int]] = {who: [] for who in OURS}
    for name, task in TASKS.items():
        best = {}
        for who in OURS:
            choice = found[name][who]["choice"]
            best[who] = mean(choice[str(best_third(task, choice))]) * (1 if task.higher else -1)
        for who in OURS:
            places[who].append(1 + sum(best[other] > best[who] for other in OURS))
    return places


def shortfalls(found: Found, who: str) -> dict[float, float]:
    """Of each rate, the worst share of the best score over all tasks; the rates that all ran."""
    shares: dict[str, list[float]] = {}
    for name, task in TASKS.items():
        choice = found[name][who]["choice"]
        best = mean(choice[str(best_third(task, choice))])
        for third, scores in choice.items():
            share = mean(scores) / best if task.higher else best / mean(scores)
            shares.setdefault(third, []).append(share)
    return {
        rate_of(int(third)): min(of)
        for third, of in sorted(shares.items(), key=lambda item: int(item[0]))
        if len(of) == len(TASKS)
    }


def widths(found: Found, titles: dict[str, Task]) -> str:
    """Best rates and scores of the transformer, by its width."""
    who = list(next(iter(found.values())))
    rows = [["width", *(CONTESTANTS[name].title for name in who)], ["---"] * (len(who) + 1)]
    for name, of in found.items():
        if of.keys() < set(who):
            # a sweep that is not finished
            continue
        task = titles[name]
        cells = [
            f"{_rate(task, of[one]):g} ({mean(of[one]['test'][str(_rate(task, of[one]))]):.3f})"
            for one in who
        ]
        rows.append([name.removeprefix("width-"), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def replace(page: Path, name: str, text: str) -> None:
    """Put `text` between a page's markers of that name."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def report(results: Path, root: Path, titles: dict[str, Task]) -> None:
    """Write every table of README and docs/results.md, and the figure."""
    found: Found = json.loads((results / "tasks.json").read_text())
    page = root / "docs" / "results.md"
    everyone = tuple(CONTESTANTS)
    replace(root / "README.md", "tasks", table(found, FIRST, tested))
    theirs = tuple(name for name in everyone if name not in OURS)
    for part, who in (("rivals", theirs), ("ours", OURS)):
        replace(page, f"scores of {part}", table(found, who, tested))
        replace(page, f"rates of {part}", table(found, who, rate))
        replace(page, f"spans of {part}", table(found, who, span))
        own = tuple(name for name in who if CONTESTANTS[name].default is not None)
        replace(page, f"defaults of {part}", table(found, own, None))
    lines = ["| variant | places in the ten tasks | worst | mean |", "| --- | --- | --- | --- |"]
    for who, places in ranks(found).items():
        shown = " ".join(map(str, places))
        title = CONTESTANTS[who].title
        lines.append(f"| {title} | {shown} | {max(places)} | {mean(places):.1f} |")
    replace(page, "ranks", "\n".join(lines))
    lines = ["| lr | worst share of the best score |", "| --- | --- |"]
    lines += [f"| {lr:g} | {share:.2f} |" for lr, share in shortfalls(found, "bngd-row").items()]
    replace(page, "rates by tasks", "\n".join(lines))
    memory = [f"{CONTESTANTS[who].title} {found['gru'][who]['state']:g}" for who in everyone]
    replace(page, "memory", ", ".join(memory))
    wide: Found = json.loads((results / "widths.json").read_text())
    replace(page, "widths", widths(wide, titles))
    _draw(found, root / "docs" / "tasks.png")


def _draw(found: Found, path: Path) -> None:
    """Score against rate, a panel a task."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(13, 6), layout="constrained")
    looks = {
        "sgd-clip": ("#E69F00", "--"), "adamw": ("#0072B2", "-"), "muon": ("#CC79A7", "-."),
        "bngd-tensor": ("#000000", ":"), "bngd-row": ("#009E73", "-"),
    }  # fmt: skip
    for axes, (name, task) in zip(figure.subplots(2, 5).flat, TASKS.items(), strict=True):
        for who, (color, line) in looks.items():
            if who not in found[name]:
                continue
            choice = found[name][who]["choice"]
            thirds = sorted(choice, key=int)
            x = [rate_of(int(third)) for third in thirds]
            y = [mean(choice[third]) for third in thirds]
            axes.plot(x, y, color=color, linestyle=line, label=CONTESTANTS[who].title)
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        if not task.higher:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_minor_formatter("{x:.2g}" if high < 10 * low else "")
            axes.yaxis.set_major_formatter("{x:.2g}")
        axes.set_title(task.title, fontsize=9)
        axes.tick_params(which="both", labelsize=7)
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    figure.supxlabel("learning rate", fontsize=9)
    figure.savefig(path, dpi=90)
