"""Markdown tables of runs: python docs/report.py DIR...

A line belongs here if it reads run folders, for docs/show.py and docs/figures.py too, or makes the
tables. All figures are recomputed from the rows of every run below the folders.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lamp
import metrics
from lamp import METHODS, TASKS, Problem
from persona_agent import ServiceError
from tools import WIKI_DOWN

# The paper's Tables 2 and 3: accuracy and F1, for LaMP-3 MAE and RMSE. All accuracies of LaMP-1 are
# k/123, of LaMP-2M k/300, all MAEs of LaMP-3 k/112: so small are the test sets.
PAPER_TASKS = ("lamp1", "lamp2m", "lamp2n", "lamp3")
PAPER_TABLE = """\
prompt          0.772 0.771   0.387 0.302   0.660 0.386   0.295 0.590
icl             0.780 0.766   0.283 0.217   0.388 0.145   0.277 0.543
rag-1           0.683 0.705   0.320 0.256   0.687 0.439   0.304 0.655
rag-4           0.715 0.714   0.427 0.386   0.742 0.484   0.313 0.713
pag-4           0.837 0.837   0.430 0.387   0.768 0.509   0.339 0.835
react           0.837 0.853   0.450 0.378   0.639 0.381   0.313 0.590
membank         0.862 0.861   0.470 0.391   0.741 0.456   0.321 0.582
personaagent    0.919 0.918   0.513 0.424   0.796 0.532   0.241 0.509
no-alignment    0.894 0.893   0.487 0.403   0.775 0.502   0.259 0.560
no-persona      0.846 0.855   0.463 0.361   0.769 0.483   0.277 0.542
no-memory       0.821 0.841   0.460 0.365   0.646 0.388   0.348 0.661
no-action       0.764 0.789   0.403 0.329   0.626 0.375   0.375 0.756"""
PAPER = {line.split()[0]: line.split()[1:] for line in PAPER_TABLE.splitlines()}
BASELINES = ("rag-4", "no-alignment")  # what every method is compared with

# What is read of each file
SETTINGS = "data model embed_model batch iterations top_k users queries_per_user limit"
ANSWER = "id user_id question gold prediction text steps status usage"
PERSONA = "user_id profile initial final iterations usage"
CHOICE = ("users", "queries_per_user", "limit")  # the settings that choose the queries


class NoRun(Problem):
    """There is nothing to look at."""


# ------------------------------------------------------------------------------- run folders


@dataclass
class Run:
    """A run folder. failed: the rows with an error; lines: of personas.jsonl; outages: answers,
    simulated ones too, that did not reach Wikipedia; changed: the settings in which the runs of a
    table differ."""

    folder: Path
    method: str
    task: lamp.Task
    stand_in: bool
    complete: bool
    settings: dict
    rows: dict[str, dict] = field(default_factory=dict)  # by query, those with an answer
    failed: list[dict] = field(default_factory=list)
    lines: list[dict] = field(default_factory=list)
    both_tools: int = 0  # answers that used Wiki and RAG
    outages: int = 0
    changed: dict = field(default_factory=dict)

    def column(self, key: str, ids: Iterable[str] | None = None) -> list:
        """One value of the answered rows, or of those named."""
        if ids is None:
            ids = self.rows
        return [self.rows[i][key] for i in ids]

    @cached_property
    def scores(self) -> dict[str, float]:
        return metrics.score(self.column("gold"), self.column("prediction"), self.task.labels)

    @cached_property
    def intervals(self) -> dict[str, list[float]]:
        users, gold, pred = map(self.column, ("user_id", "gold", "prediction"))
        return metrics.interval(users, gold, pred, self.task.labels)

    @property
    def label(self) -> str:
        """'personaagent, batch 1': the method and what makes this run another than its like."""
        parts = [self.method]
        for name, value in self.changed.items():
            # With another history the hash of the data says nothing more.
            explained = name == "data_hash" and self.changed.keys() & {"max_history", "seed"}
            if not explained:
                parts.append(f"{name} {value}")
        return ", ".join(parts)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What is wrong with a file or a folder becomes a Problem that names it."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        what = " ".join(f"{type(e).__name__}: {e}".split())
        raise Problem(f"{path} cannot be used ({what[:200]})") from None


def _check(found, names):
    missing = [name for name in names.split() if name not in found]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")


def _read_lines(path, names):
    """The rows of a JSON lines file: each with an error, or with the values named."""
    rows = []
    with reading(path), open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if "error" not in row:
                _check(row, names)
            rows.append(row)
        lamp.total(rows)  # raises where a cost is none of ours
    return rows


def load(file: Path) -> Run:
    """The run of a results.json. Raises Problem."""
    with reading(file):
        made = json.loads(file.read_text(encoding="utf-8"))
        _check(made["settings"], SETTINGS)
        run = Run(
            folder=file.parent,
            method=made["method"],
            task=TASKS[made["task"]],
            stand_in=made["settings"]["model"] == lamp.STAND_IN,
            complete=made["complete"],
            settings=made["settings"],
        )
    path = run.folder / "predictions.jsonl"
    rows = _read_lines(path, ANSWER)
    with reading(path):
        for row in rows:
            _add_answer(run, row)
    path = run.folder / "personas.jsonl"
    run.lines = _read_lines(path, PERSONA)
    with reading(path):
        for line in run.lines:
            for iteration in line.get("iterations", []):
                for sample in iteration["samples"]:
                    run.outages += _met_outage(sample["answer"])
    return run


def _add_answer(run, row):
    if "error" in row:
        run.failed.append(row)
        return
    if row["gold"] not in run.task.labels:
        raise ValueError(f"query {row['id']} has the gold {row['gold']!r}")
    used = {step["action"] for step in row["steps"]}
    run.rows[row["id"]] = row
    run.both_tools += {"Wiki", "RAG"} <= used
    run.outages += _met_outage(row)


def _met_outage(answer):
    return WIKI_DOWN in [step["observation"] for step in answer["steps"]]


def runs_below(roots: Iterable[str]) -> list[Run]:
    """Every run below the folders that got as far as a query, by path. Raises Problem."""
    files: set[Path] = set()
    for root in roots:
        files.update(Path(root).rglob("results.json"))
    runs = [run for run in map(load, sorted(files)) if run.rows or run.failed]
    if not runs:
        raise NoRun(f"no run with a query below {', '.join(roots)}")
    return runs


# ------------------------------------------------------------------------------- sections


def sections(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs over the same queries, each with `changed`, in the order of their table."""
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        data = os.path.normpath(run.settings["data"] or "")
        chosen = [str(run.settings[name]) for name in CHOICE]
        found.setdefault((run.task.name, run.stand_in, data, *chosen), []).append(run)
    for group in found.values():
        _set_changed(group)
        group.sort(key=_place)
    return list(found.values())


def _set_changed(runs):
    for name in runs[0].settings:
        values = {str(run.settings.get(name)) for run in runs}
        if len(values) > 1 and name not in lamp.FREE and name != "data":
            for run in runs:
                run.changed[name] = run.settings.get(name)


def _place(run):
    changed = str(run.changed)
    order = [*METHODS, run.method]
    return len(changed), changed, order.index(run.method)  # 'batch 3' before 'batch 10'


def best_constant(task: lamp.Task, golds: Sequence[str]) -> dict[str, float]:
    """{metric: the best that one constant answer reaches}: what a method must beat."""
    constants = [metrics.score(golds, [label] * len(golds), task.labels) for label in task.labels]
    best = max
    if task.labels == metrics.RATINGS:
        best = min
    return {name: best(scores[name] for scores in constants) for name in constants[0]}


def golds_of(runs: Iterable[Run]) -> list[str]:
    """The gold of every query that some run answered."""
    golds: dict[str, str] = {}
    for run in runs:
        golds.update(zip(run.rows, run.column("gold")))
    return list(golds.values())


# ------------------------------------------------------------------------------- tables


def table(head: list[str], rows: Iterable[list]) -> list[str]:
    """Lines of a Markdown table."""
    lines = []
    for row in (head, ["---"] * len(head), *rows):
        cells = [str(cell).replace("|", r"\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def number(value: float, interval: list[float] | None, sign: str = "") -> str:
    """'0.611 [0.500, 0.720]'; '+0.100' of a difference without an interval."""
    text = f"{value:{sign}.3f}"
    if interval:
        low, high = interval
        text += f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return text


def paper(run: Run, metric: str) -> str:
    """The paper's figure; '' for a method or a task that it does not have."""
    figures = PAPER.get(run.method)
    if not figures or run.task.name not in PAPER_TASKS:
        return ""
    place = 2 * PAPER_TASKS.index(run.task.name)
    return figures[place + list(run.scores).index(metric)]


def _like(run, runs, method):
    """Another run, of the method and of the same settings."""
    for other in runs:
        if other.method == method and other.changed == run.changed and other is not run:
            return other
    return None


def versus(run: Run, runs: Iterable[Run], method: str) -> str:
    """The difference from a method of the same settings on the queries that both answered:
    '+0.111 [-0.050, +0.230], 3 won, 1 lost, p 0.625, 18 common'; '' where it did not run."""
    other = _like(run, runs, method)
    if not other:
        return ""
    ids = [i for i in run.rows if i in other.rows]
    if not ids:
        return "none in common"
    found = metrics.compare(
        run.column("user_id", ids),
        run.column("gold", ids),
        run.column("prediction", ids),
        other.column("prediction", ids),
        run.task.labels,
    )
    metric = next(iter(found["difference"]))
    difference = number(found["difference"][metric], found["interval"].get(metric), "+")
    p = f"p {found['p']:.3f}"
    if found["p"] < 0.001:
        p = "p < 0.001"
    return f"{difference}, {found['won']} won, {found['lost']} lost, {p}, {len(ids)} common"


def results_table(runs: list[Run], real: bool) -> list[str]:
    """What the runs reached; with the paper's figures where the data are real."""
    names = list(runs[0].scores)
    head = ["method", "n"]
    for name in names:
        head.append(name)
        if real:
            head.append("paper")
    head += [f"{names[0]} vs {method}" for method in BASELINES]
    head += ["both tools", "unparsed", "forced", "errors"]
    rows = []
    for run in runs:
        mark = "" if run.complete else " (unfinished)"
        row = [run.label + mark, len(run.rows)]
        for name in names:
            row.append(number(run.scores[name], run.intervals.get(name)))
            if real:
                row.append(paper(run, name))
        row += [versus(run, runs, method) for method in BASELINES]
        row.append(f"{run.both_tools / max(len(run.rows), 1):.0%}")
        row.append(run.column("prediction").count(None))
        row.append(run.column("status").count("forced"))
        row.append(len(run.failed))
        rows.append(row)
    return table(head, rows)


def costs_table(runs: list[Run]) -> list[str]:
    """What a query cost, those that failed included: they were paid for."""
    rows = []
    for run in runs:
        asked = [*run.rows.values(), *run.failed]
        personas = cost(run.lines, len(asked))
        rows.append([run.label, personas, cost(asked, len(asked))])
    head = [
        "per query: calls, tokens in + out, seconds",
        "personas (profile, alignment)",
        "answers",
    ]
    return table(head, rows)


def cost(parts: Iterable[dict], queries: int) -> str:
    """'3.0, 2777 + 77, 0.1': what rows or lines cost per query."""
    used = lamp.total(parts)
    tokens = f"{used.input / queries:.0f} + {used.output / queries:.0f}"
    return f"{used.calls / queries:.1f}, {tokens}, {used.seconds / queries:.1f}"


def section(runs: list[Run]) -> list[str]:
    """Heading, remarks and both tables of runs over the same queries."""
    first = runs[0]
    settings = first.settings
    facts = [f"Data: {settings['data'] or 'the bundled sample'}"]
    facts += [f"{name} {settings[name]}" for name in CHOICE if settings[name]]
    if first.stand_in:
        facts.append("NO LANGUAGE MODEL (stand-in)")
    elif "model" not in first.changed:
        facts.append(f"model {settings['model']}")
    best = best_constant(first.task, golds_of(runs))
    constant = ", ".join(f"{name} {value:.3f}" for name, value in best.items())
    remarks = [f"{', '.join(facts)}. Best constant answer: {constant}."]
    if not any(run.intervals for run in runs):
        remarks.append("No intervals: a bootstrap over users tells nothing below 10 users.")
    outages = [f"{run.label} {run.outages}" for run in runs if run.outages]
    if outages:
        remarks.append(
            "WIKIPEDIA WAS NOT REACHED in some answers (alignment's simulations included): "
            f"{'; '.join(outages)}."
        )
    real = bool(settings["data"]) and not first.stand_in
    head = [f"### {first.task.title}", "", " ".join(remarks), ""]
    return [*head, *results_table(runs, real), "", *costs_table(runs), ""]


def report(roots: Sequence[str]) -> str:
    """Markdown of every run below the folders, a section per task, data and choice of queries."""
    lines = []
    for runs in sections(runs_below(roots)):
        lines += section(runs)
    return lamp.printable("\n".join(lines))


# ------------------------------------------------------------------------------- command line


def script(name: str, main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """`main`, with what a user can cause as one line on stderr; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have every character
    try:
        main(argv)
        sys.stdout.flush()
    except ServiceError as e:
        print(f"{name}: {lamp.printable(str(e))}", file=sys.stderr)
        return 2 if isinstance(e, NoRun) else 1
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("report.py", description="Markdown tables of runs.")
    parser.add_argument("roots", nargs="+", metavar="DIR", help="run folders, or folders above")
    print(report(parser.parse_args(argv).roots))


if __name__ == "__main__":
    sys.exit(script("report.py", main, sys.argv[1:]))
