"""The paper's Figures 2 to 5 from run folders: python docs/figures.py DIR... --output FOLDER

A line belongs here if it chooses runs for a figure, or draws one. What the runs allow becomes a PNG
and an SVG; a line says what was drawn, or why not. Figures 2 and 5 show one personaagent run of
each task (most answers, then shortest name), Figure 3 personaagent runs that differ only in
--batch, --iterations or --top-k, Figure 4 runs that differ only in model and method.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import Run, best_constant, golds_of, runs_below, script

import lamp
from lamp import METHODS, Problem

try:
    import matplotlib.style
    from matplotlib.figure import Figure  # without pyplot: no window
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.manifold import TSNE
except ImportError:  # the choice of runs works without
    Figure = None

DIALS = {
    "batch": "alignment batch n (interactions)",
    "iterations": "alignment iterations",
    "top_k": "retrieved memories K",
}
METRICS = {
    "accuracy": "accuracy",
    "macro-F1": "macro-F1",
    "MAE": "MAE (lower is better)",
    "RMSE": "RMSE (lower is better)",
}
MARKS = "os^DvPX*"
DASHES = ("-", "--", "-.", ":")
HATCHES = " /.\\x-o|+O*"
ARROW = {
    "arrowstyle": "-|>",
    "color": "0.6",
    "linewidth": 0.7,
    "shrinkA": 3,
    "shrinkB": 4,
}
STYLE = {
    "font.size": 9,
    "svg.hashsalt": "figures",  # the same runs give the same bytes
    "hatch.linewidth": 0.4,
    "axes.axisbelow": True,
}


Bars = dict[tuple[str, str], Run]  # {(model, method): run}


@dataclass
class Picture:
    """A drawn figure. title: its lines; runs: those that it shows."""

    figure: Any
    title: list[str]
    runs: list[Run]


@dataclass
class Line:
    """A line of Figure 3. dials: {setting: {value: run}}."""

    label: str
    dials: dict[str, dict[int, Run]]


@dataclass
class Plan:
    """How a figure is made. choose: runs -> {task: what to draw}; missing: why there is nothing."""

    choose: Callable[[list[Run]], dict]
    draw: Callable[[Any], Picture]
    missing: str


# ------------------------------------------------------------------------------- choice of runs


def by_preference(runs: Iterable[Run]) -> list[Run]:
    """Most answers first, then the shortest name."""

    def order(run):
        return -len(run.rows), len(run.folder.name), str(run.folder)

    return sorted(runs, key=order)


def agents(runs: Iterable[Run]) -> list[Run]:
    """The runs of the paper's method."""
    return [run for run in runs if run.method == "personaagent"]


def one_of_each_task(runs: Iterable[Run]) -> dict[str, Run]:
    """{task: its first personaagent run}"""
    found: dict[str, Run] = {}
    for run in agents(runs):
        found.setdefault(run.task.name, run)
    return found


def groups(
    runs: Iterable[Run],
    value: Callable[[Run], Hashable],
    free: Sequence[str],
) -> list[dict[Any, Run]]:
    """[{value(run): run}] of runs that differ in no setting but the `free` ones; the largest last.

    The path of the data does not matter, its hash does."""
    found: dict[tuple, dict] = {}
    for run in runs:
        ignored = {"data", *lamp.FREE, *free}
        same = [run.task.name]
        for name, setting in sorted(run.settings.items()):
            if name not in ignored:
                same.append(json.dumps([name, setting]))
        group = found.setdefault(tuple(same), {})
        group.setdefault(value(run), run)
    return sorted(reversed(found.values()), key=len)


def sweeps(runs: Iterable[Run]) -> dict[str, list[Line]]:
    """{'': the lines of Figure 3}, one for each task, data and model; {} where there is none."""
    found: dict[tuple, Line] = {}
    for dial in DIALS:
        for group in _of_one_dial(agents(runs), dial):
            first, *others = group.values()
            if others:
                settings = first.settings
                key = first.task.name, settings["data_hash"], settings["model"]
                line = found.setdefault(key, Line("", {}))
                line.dials[dial] = dict(sorted(group.items()))
    lines = [found[key] for key in sorted(found)]
    for line in lines:
        line.label = described(runs_of(line))
    return {"": lines} if lines else {}


def _of_one_dial(runs, dial):
    def value(run):
        return run.settings[dial]

    return groups(runs, value, [dial])


def runs_of(line: Line) -> list[Run]:
    """All runs of a line of Figure 3, each once."""
    runs = {}
    for run in chain(*(group.values() for group in line.dials.values())):
        runs[run.folder] = run
    return list(runs.values())


def bases(runs: Iterable[Run]) -> dict[str, Bars]:
    """{task: the bars of Figure 4}, some method of two models; the largest group of each task."""

    def value(run):
        return run.settings["model"], run.method

    found = {}
    for group in groups(runs, value, ["model", "embed_model"]):
        first = next(iter(group.values()))
        methods = {method for _, method in group}
        if len(methods) < len(group):
            found[first.task.name] = group
    return found


# ------------------------------------------------------------------------------- words of a figure


def described(runs: Sequence[Run], count: str = "") -> str:
    """'LaMP-2M, bundled sample, gpt-4o-mini, n = 297 to 300 queries' of runs of one task; without
    a model where it differs."""
    first = runs[0]
    parts = [first.task.title.split(":")[0]]
    parts.append(Path(first.settings["data"] or "bundled sample").name)
    models = {run.settings["model"] for run in runs}
    if len(models) == 1 and not first.stand_in:
        parts += models
    numbers = [len(run.rows) for run in runs]
    queries = f"{min(numbers)} to {max(numbers)} queries"
    if min(numbers) == max(numbers):
        queries = f"{numbers[0]} queries"
    parts.append(f"n = {count or queries}")
    return ", ".join(parts)


def about_bars(runs: Iterable[Run]) -> str:
    """What the error bars are, or why there are none."""
    if any(run.intervals for run in runs):
        return "error bars: 95% intervals by bootstrap over users"
    return "no intervals: fewer than 10 users"


# ------------------------------------------------------------------------------- Figures 2 and 5


def personas_of(run: Run, key: str) -> dict[str, str]:
    """{user: persona}, users in order. key: 'initial' or 'final'."""
    lines = {line["user_id"]: line for line in run.lines if "error" not in line}
    return {user: lines[user][key] for user in sorted(lines)}


def tfidf(texts: Sequence[str]) -> np.ndarray:
    """Texts as TF-IDF vectors of their words, unit rows. Raises Problem where there is no word."""
    try:
        return TfidfVectorizer(token_pattern=r"\w+").fit_transform(texts).toarray()
    except ValueError as e:
        raise Problem(f"no words in the personas ({e})") from None


def personas(run: Run) -> Picture:
    """Figure 2: t-SNE of the personas' TF-IDF vectors, and each user's way from the initial to the
    final one. Marked are the closest two users and the one farthest from both."""
    initial = personas_of(run, "initial").values()
    final = personas_of(run, "final").values()
    different = len(set(final))
    if different < 5:
        raise Problem(f"{run.folder} has {different} different final personas, a map needs 5")
    texts = sorted({*initial, *final})
    place = {text: i for i, text in enumerate(texts)}  # the same text is one point
    before = [place[text] for text in initial]
    after = [place[text] for text in final]
    rows = tfidf(texts)
    perplexity = min(30, len(texts) / 3)
    tsne = TSNE(
        perplexity=perplexity,
        init="pca",
        method="exact",
        random_state=0,
    )
    points = tsne.fit_transform(rows)
    figure = Figure(figsize=(6, 5.8), layout="constrained")
    ax = figure.subplots()
    users = list(personas_of(run, "final"))
    _draw_map(ax, points[before], points[after], users, _examples(rows[after]))
    figure.legend(loc="outside lower center", ncols=2)
    title = [
        "Personas before and after alignment",
        described([run], f"{len(users)} users"),
        "t-SNE of TF-IDF vectors of their words (no embedding model)",
        "A, B: the closest final personas; C: the farthest from both",
    ]
    return Picture(figure, title, [run])


def _examples(rows):
    """Places of the closest two rows by cosine, and of the one farthest from both."""
    near = rows @ rows.T
    np.fill_diagonal(near, -1)
    a, b = map(int, np.unravel_index(near.argmax(), near.shape))
    others = set(range(len(rows))) - {a, b}
    c = min(others, key=lambda i: near[i, a] + near[i, b])
    return a, b, c


def _draw_map(ax, starts, ends, users, examples):
    """Both personas of each user, an arrow where they differ, the examples with their names."""
    for start, end in zip(starts, ends):
        if (start != end).any():
            ax.annotate("", end, start, arrowprops=ARROW, zorder=0)
    others = np.delete(ends, examples, 0)
    ax.scatter(
        *starts.T,
        16,
        color="white",
        edgecolor="0.45",
        label="initial",
    )
    ax.scatter(
        *others.T,
        26,
        color="0.65",
        edgecolor="black",
        label="final",
    )
    sizes = (150, 45, 55)
    fills = ("none", "black", "black")
    for i, name, mark, size, fill in zip(examples, "ABC", "s^D", sizes, fills):
        ax.scatter(
            *ends[i],
            size,
            marker=mark,
            facecolor=fill,
            edgecolor="black",
            label=f"{name}: final, user {users[i]}",
        )
    ax.set(xlabel="t-SNE dimension 1", ylabel="t-SNE dimension 2")
    ax.set(xticks=[], yticks=[])
    ax.margins(0.08)


def jaccard(texts: Sequence[str]) -> np.ndarray:
    """Similarity |A & B| / |A | B| of every pair of texts as word sets, (n, n); two texts without
    a word: 1.

    Appendix G says 'pairwise Jaccard similarities between the personas'. Ours: lower-case words of
    the whole persona, so that the template's own words count as similarity, too."""
    words = []
    for text in texts:
        words.append(set(re.findall(r"\w+", text.lower())))
    matrix = np.ones((len(words), len(words)))
    for i, one in enumerate(words):
        for j, other in enumerate(words):
            if one or other:
                matrix[i, j] = len(one & other) / len(one | other)
    return matrix


def similarity(run: Run) -> Picture:
    """Figure 5: Jaccard similarity of every two final personas."""
    users = list(personas_of(run, "final"))
    if len(users) < 2:
        raise Problem(f"{run.folder} has {len(users)} personas, no pair")
    initial = jaccard(list(personas_of(run, "initial").values()))
    final = jaccard(list(personas_of(run, "final").values()))
    figure = Figure(figsize=(6.2, 6), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(final, cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, label="Jaccard similarity of word sets", shrink=0.8)
    axis = "user (place in the order of ids)"
    ax.set(xlabel=axis, ylabel=axis)
    if len(users) <= 30:
        ax.set(xlabel="user", ylabel="user")
        ax.set_xticks(range(len(users)), users, rotation=90)
        ax.set_yticks(range(len(users)), users)
    title = [
        "Jaccard similarity of the final personas",
        described([run], f"{len(users)} users"),
        f"pairs after alignment: {_pairs(final)}; before: {_pairs(initial)}",
    ]
    return Picture(figure, title, [run])


def _pairs(matrix):
    """'mean 0.43, 33% up to 0.4' of the pairs of different users."""
    values = matrix[np.triu_indices(len(matrix), 1)]
    return f"mean {values.mean():.2f}, {np.mean(values <= 0.4):.0%} up to 0.4"


# ------------------------------------------------------------------------------- Figures 3 and 4


def _finish(ax, metric, points):
    """The y axis of a metric, and the intervals of points {x: run}."""
    ax.set_ylabel(METRICS[metric])
    ax.grid(axis="y", color="0.85", linewidth=0.6)
    for x, run in points.items():
        if run.intervals:
            low, high = run.intervals[metric]
            middle = (low + high) / 2
            ax.errorbar(
                x,
                middle,
                high - middle,
                fmt="none",
                ecolor="black",
                elinewidth=1.1,
                capsize=2.5,
            )


def _draw_panel(ax, lines, dial, metric):
    """One metric against one setting; nothing where no line has both."""
    shown = []
    for line in lines:
        if dial in line.dials and metric in runs_of(line)[0].scores:
            shown.append(line)
    ticks = sorted({value for line in shown for value in line.dials[dial]})
    ax.set(xlabel=DIALS[dial], xscale="log", visible=bool(shown))
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.tick_params(labelleft=True)
    for i, line in enumerate(shown):
        # a little to the side, so that intervals do not cover each other
        aside = 0.03 * (i - (len(shown) - 1) / 2)
        shift = (ticks[-1] / ticks[0]) ** aside
        points = {value * shift: run for value, run in line.dials[dial].items()}
        _draw_curve(ax, lines.index(line), line.label, points, metric)


def _draw_curve(ax, place, label, points, metric):
    heights = [run.scores[metric] for run in points.values()]
    ax.plot(
        [*points],
        heights,
        label=label,
        marker=MARKS[place % len(MARKS)],
        linestyle=DASHES[place // 2 % len(DASHES)],
        color=str(0.3 * (place % 3)),
    )
    _finish(ax, metric, points)


def scaling(lines: list[Line]) -> Picture:
    """Figure 3: what batch, iterations and memories do, a panel for each of them and each metric, a
    line for each task."""
    runs = []
    for line in lines:
        runs += runs_of(line)
    used = set(chain(*(line.dials for line in lines)))
    dials = [dial for dial in DIALS if dial in used]
    measured = set(chain(*(run.scores for run in runs)))
    names = [name for name in METRICS if name in measured]
    width = max(5, 3 * len(dials))
    height = 2.3 * len(names) + 0.8 + 0.2 * len(lines)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(
        len(names),
        len(dials),
        squeeze=False,
        sharey="row",
    )
    legend: dict[str, Any] = {}
    for (row, column), ax in np.ndenumerate(axes):
        _draw_panel(ax, lines, dials[column], names[row])
        handles, labels = ax.get_legend_handles_labels()
        legend.update(zip(labels, handles))
    if not any(run.intervals for run in runs):
        for ax in axes[:, 0]:  # a row shares its axis
            # Without intervals a closer look would only enlarge the noise.
            ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
    figure.legend(
        list(legend.values()),
        list(legend),
        loc="outside lower center",
        handlelength=4,
    )
    title = ["Test-time scaling of PersonaAgent (logarithmic x axes)", about_bars(runs)]
    return Picture(figure, title, runs)


def models(group: Bars) -> Picture:
    """Figure 4: base models side by side, a bar for each method."""
    names = sorted({model for model, _ in group})
    used = [method for _, method in group]
    methods = [name for name in METHODS if used.count(name) > 1]  # one alone compares nothing
    runs = [run for run in group.values() if run.method in methods]
    kinds = list(runs[0].scores)
    width = max(6, 0.22 * len(names) * (len(methods) + 1) + 1)
    height = 2.4 * len(kinds) + 1.2
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(len(kinds), sharex=True)
    best = best_constant(runs[0].task, golds_of(runs))
    for ax, kind in zip(axes, kinds):
        _draw_bars(ax, kind, group, names, methods)
        ax.axhline(
            best[kind],
            color="black",
            linestyle=":",
            linewidth=1,
            label="best constant answer",
        )
    ax.set_xticks(range(len(names)), map(_folded, names))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    title = ["Base models", described(runs), about_bars(runs)]
    return Picture(figure, title, runs)


def _draw_bars(ax, kind, group, names, methods):
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        shift = (i - (len(methods) - 1) / 2) * width
        points = {}
        for x, name in enumerate(names):
            if (name, method) in group:
                points[x + shift] = group[name, method]
        heights = [run.scores[kind] for run in points.values()]
        ax.bar(
            [*points],
            heights,
            width,
            label=method,
            color=str(1 - 0.4 * i / len(methods)),
            edgecolor="black",
            linewidth=0.7,
            hatch=(2 * HATCHES[i % len(HATCHES)]).strip(),
        )
        _finish(ax, kind, points)
        for x, height in zip(points, heights):
            if not height:  # a bar without height, unlike one that was not run
                ax.text(x, 0, "0", ha="center", va="bottom")


def _folded(name):
    """A long name of a model in lines: 'us.anthropic.' / 'claude-3-5-sonnet-' / '20241022-v2:0'."""
    return re.sub(r"(.{6,18}[-./:_])(?=.{8})", "\\1\n", name)


# ------------------------------------------------------------------------------- command line

NO_AGENT = "no personaagent run"
NO_SWEEP = "no two personaagent runs differ only in --batch, --iterations or --top-k"
NO_PAIR = "no two runs differ only in the model"
FIGURES = {
    "figure2": Plan(one_of_each_task, personas, NO_AGENT),
    "figure3": Plan(sweeps, scaling, NO_SWEEP),
    "figure4": Plan(bases, models, NO_PAIR),
    "figure5": Plan(one_of_each_task, similarity, NO_AGENT),
}


def save(picture: Picture, path: Path) -> None:
    """Write PNG and SVG. The picture says what must be known of its runs; the same runs give the
    same bytes."""
    title = list(picture.title)
    if picture.runs[0].stand_in:
        title.append("stand-in, no language model")
    if not all(run.complete for run in picture.runs):
        title.append("unfinished: answers are missing")
    figure = picture.figure
    width = int(13 * figure.get_figwidth())  # characters of a line
    lines = [textwrap.fill(lamp.printable(line), width) for line in title]
    figure.suptitle("\n".join(lines), fontsize=9)
    figure.savefig(f"{path}.png", dpi=160, metadata={"Software": None})
    figure.savefig(f"{path}.svg", metadata={"Date": None})


def draw(plan: Plan, what: Any, path: Path) -> str:
    """Draw and save one figure; returns what to say of it."""
    try:
        with matplotlib.style.context(["default", STYLE]):
            picture = plan.draw(what)
            save(picture, path)
    except Problem as e:
        return f"not drawn, {e}"
    source = f"{len(picture.runs)} runs"
    if len(picture.runs) == 1:
        source = str(picture.runs[0].folder)
    return f"{path}.png and .svg from {source}"


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("figures.py", description="Figures 2 to 5 from run folders.")
    add = parser.add_argument
    add("roots", nargs="+", metavar="DIR", help="run folders, or folders above them")
    add("--output", type=Path, required=True, metavar="FOLDER", help="of the pictures")
    settings = parser.parse_args(argv)
    if not Figure:
        raise Problem("matplotlib and scikit-learn are missing: pip install -e '.[figures]'")
    found = by_preference(runs_below(settings.roots))
    runs = [run for run in found if not run.stand_in] or found
    if len(runs) < len(found):
        print(f"left out: {len(found) - len(runs)} of the stand-in")
    settings.output.mkdir(parents=True, exist_ok=True)
    for name, plan in FIGURES.items():
        chosen = plan.choose(runs)
        if not chosen:
            print(f"{name}: not drawn, {plan.missing}")
        for task, what in sorted(chosen.items()):
            title = name
            if len(chosen) > 1:
                title = f"{name}-{task}"
            print(f"{title}: {draw(plan, what, settings.output / title)}", flush=True)


if __name__ == "__main__":
    sys.exit(script("figures.py", main, sys.argv[1:]))
