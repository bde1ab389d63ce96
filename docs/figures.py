"""Draw the paper's Figures 2 to 5 from run folders: python docs/figures.py runs [--output docs/figures]

What the folders allow becomes a PNG and an SVG each, and a line says what was drawn, what was not, and why. Figures 2 and 5 show
one personaagent run of each task (most answers, then shortest name; name its folder to see another), Figure 3 personaagent runs
that differ only in --batch, --iterations or --top-k, Figure 4 runs that differ only in model and method.
"""
import argparse
import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import metrics
from lamp import METHODS, TASKS
from metrics import Problem

try:
    import matplotlib.style
    from matplotlib.figure import Figure  # without pyplot: no window, Agg for the PNG
    from sklearn.manifold import TSNE
except ImportError:  # the choice of runs works without
    Figure = None

DIALS = {"batch": "alignment batch n (interactions)", "iterations": "alignment iterations", "top_k": "retrieved memories K"}
METRICS = {"accuracy": "accuracy", "macro-F1": "macro-F1", "MAE": "MAE (lower is better)", "RMSE": "RMSE (lower is better)"}
LINES = list(zip("os^DvPX*", 2 * ["-", "--", "-.", ":"], ["0", "0.4", "0.55", "0.2", "0.6", "0.1", "0.5", "0.3"]))
HATCHES = ["", "//", "..", "\\\\", "xx", "--", "oo", "||", "++", "O", "**", "/o", "\\o"]
STYLE = ["default", {"font.size": 9, "svg.hashsalt": "figures", "hatch.linewidth": 0.4, "axes.axisbelow": True}]


def runs_below(roots):
    """`metrics.runs_below` in the order of preference."""
    return sorted(metrics.runs_below(roots, TASKS), key=lambda r: (-r["metrics"]["n"], len(r["folder"].name), str(r["folder"])))


def with_file(runs, name):
    """{task: the first personaagent run whose folder holds the file}"""
    return {r["task"]: r for r in reversed(runs) if r["method"] == "personaagent" and (r["folder"] / name).exists()}


def groups(runs, value, *free):
    """[{value(run): run}] of runs whose settings differ in nothing but `free` and the path of the data; the largest group last."""
    found = {}
    for run in runs:
        same = json.dumps({k: v for k, v in run["settings"].items() if k not in ("data", *free)}, sort_keys=True)
        found.setdefault(same, {}).setdefault(value(run), run)
    return sorted(reversed(found.values()), key=len)


def sweeps(runs):
    """{"": {(task, data, model): {dial: {value: run}}}} of personaagent runs, the largest group of each; {} if there is none."""
    lines, agents = {}, [r for r in runs if r["method"] == "personaagent"]
    for dial in DIALS:
        for group in groups(agents, lambda run: run["settings"][dial], dial):
            settings = next(iter(group.values()))["settings"]
            if len(group) > 1:
                lines.setdefault(tuple(settings[k] for k in ("task", "data_hash", "model")), {})[dial] = dict(sorted(group.items()))
    return {"": dict(sorted(lines.items()))} if lines else {}


def bases(runs):
    """{task: {(model, method): run}}, a method of two models at least, the largest group of each task."""
    found = groups(runs, lambda run: (run["settings"]["model"], run["method"]), "model", "embed_model", "provider")
    return {next(iter(g.values()))["task"]: g for g in found if len({method for _, method in g}) < len(g)}


def described(runs, count=None):
    """'LaMP-2M, bundled sample, gpt-4o-mini, n = 297 to 300 queries' of runs of one task; without a model where it differs."""
    names, ns = {r["settings"]["model"] for r in runs}, sorted({r["metrics"]["n"] for r in runs})
    parts = [TASKS[runs[0]["task"]].title.split(":")[0], Path(runs[0]["settings"]["data"] or "bundled sample").name]
    parts += [*names] if len(names) == 1 and not runs[0]["stand_in"] else []
    return ", ".join(parts + ["n = " + (count or " to ".join(map(str, ns[:1] + ns[1:][-1:])) + " queries")])


def with_bars(title, runs):
    """The lines of a title, with what the error bars are, or why there are none."""
    some = any(r["intervals"] for r in runs)
    return title + ["error bars: 95% intervals by bootstrap over users" if some else "no intervals: fewer than 10 users"]


def finish(ax, name, points):
    """The y axis of a metric, and the intervals of points (x, run)."""
    ax.set_ylabel(METRICS[name])
    ax.grid(axis="y", color="0.85", linewidth=0.6)
    for low, high, x in [(*run["intervals"][name], x) for x, run in points if run["intervals"]]:
        ax.errorbar(x, (low + high) / 2, (high - low) / 2, fmt="none", ecolor="black", elinewidth=1.1, capsize=2.5)


def embeddings(path):
    """(users in order, the embeddings of their final personas, then of the persona without a profile), at unit length."""
    try:
        with np.load(path) as file:
            order = np.argsort(file["users"])
            users, points = file["users"][order], np.vstack([file["final"][order], file["initial"]]).astype(float)
    except Exception as e:  # torn or not ours: NumPy and zipfile raise all kinds
        raise Problem(f"{path} cannot be read: {e!r}") from None
    different = len(np.unique(points[:-1], axis=0))
    if different < 5:
        raise Problem(f"{path} has {len(users)} users with {different} different personas, a map needs 5")
    return users, points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def personas(run):
    """Figure 2: t-SNE of the personas; marked are the closest two, the one farthest from both, and the one without a profile."""
    users, points = embeddings(run["folder"] / "personas.npz")
    n, near = len(users), points[:-1] @ points[:-1].T - 2 * np.eye(len(users))
    a, b = np.unravel_index(near.argmax(), near.shape)
    c = min(set(range(n)) - {a, b}, key=lambda i: near[i, a] + near[i, b])
    flat = TSNE(perplexity=min(30, n / 3), init="pca", method="exact", random_state=0).fit_transform(points)
    figure = Figure(figsize=(6, 5.4), layout="constrained")
    ax = figure.subplots()
    ax.scatter(*np.delete(flat, [a, b, c, n], 0).T, 26, color="0.65", edgecolor="black", linewidth=0.7, label="other users")
    ax.scatter(*flat[n], 190, marker="*", color="white", edgecolor="black", linewidth=0.7, label="initial, empty profile")
    for i, mark, size, fill, name in [(a, "s", 150, "none", "A"), (b, "^", 45, "black", "B"), (c, "D", 55, "black", "C")]:
        ax.scatter(*flat[i], size, marker=mark, facecolor=fill, edgecolor="black", linewidth=1.6, label=f"{name}: user {users[i]}")
    ax.set(xlabel="t-SNE dimension 1", ylabel="t-SNE dimension 2", xticks=[], yticks=[])
    figure.legend(loc="outside lower center", ncols=3)
    return figure, ["Final personas, t-SNE of their embeddings", described([run], f"{n} users"),
                    f"embeddings: {run['settings']['embed_model']}", "A, B: the closest pair; C: the farthest from both (by cosine)"], [run]


def curves(ax, lines, dial, name):
    """One metric against one setting. lines: (label, (marker, dash, grey), {dial: {value: run}})"""
    lines = [(*line, of[dial]) for *line, of in lines if dial in of and name in next(iter(of[dial].values()))["metrics"]]
    ticks = sorted({x for *_, group in lines for x in group})
    for i, (label, (mark, dash, grey), group) in enumerate(lines):
        shift = (ticks[-1] / ticks[0]) ** (0.03 * (i - (len(lines) - 1) / 2))  # intervals side by side
        points = [(x * shift, run) for x, run in group.items()]
        ax.plot([x for x, _ in points], [run["metrics"][name] for _, run in points], dash, marker=mark, color=grey, label=label)
        finish(ax, name, points)
    ax.set(xlabel=DIALS[dial], xscale="log", visible=bool(lines))
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.tick_params(labelleft=True)


def scaling(found):
    """Figure 3: what batch, iterations and memories do: a panel for each of them and each metric, a line for each task."""
    runs = [[run for group in line.values() for run in group.values()] for line in found.values()]
    lines = [(described(of), LINES[i % len(LINES)], line) for i, (of, line) in enumerate(zip(runs, found.values()))]
    dials = [d for d in DIALS if any(d in line for line in found.values())]
    names = [m for m in METRICS if any(m in of[0]["metrics"] for of in runs)]
    figure = Figure(figsize=(max(5, 3 * len(dials)), 2.3 * len(names) + 0.8 + 0.2 * len(lines)), layout="constrained")
    axes = figure.subplots(len(names), len(dials), squeeze=False, sharey="row")
    for (row, column), ax in np.ndenumerate(axes):
        curves(ax, lines, dials[column], names[row])
    if not any(run["intervals"] for of in runs for run in of):
        for ax in axes.flat:  # all are drawn: the upper ends stay
            ax.set_ylim(bottom=0)  # without intervals a closer look would only enlarge the noise
    legend = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(legend.values(), legend, loc="outside lower center", handlelength=4)
    return figure, with_bars(["Test-time scaling of PersonaAgent (logarithmic x axes)"], sum(runs, [])), sum(runs, [])


def models(group):
    """Figure 4: base models side by side, a bar for each method."""
    names, used = sorted({model for model, _ in group}), [method for _, method in group]
    methods = [m for m in METHODS if used.count(m) > 1]  # one model alone is nothing to compare
    runs = [run for (_, m), run in group.items() if m in methods]
    kinds = [m for m in METRICS if m in runs[0]["metrics"]]
    width = 0.8 / len(methods)
    figure = Figure(figsize=(max(6, 0.22 * len(names) * (len(methods) + 1) + 1), 2.4 * len(kinds) + 1.2), layout="constrained")
    for ax, kind in zip(figure.subplots(len(kinds), sharex=True), kinds):
        for i, m in enumerate(methods):
            shift = (i - (len(methods) - 1) / 2) * width
            points = [(x + shift, group[name, m]) for x, name in enumerate(names) if (name, m) in group]
            ax.bar([x for x, _ in points], [run["metrics"][kind] for _, run in points], width, label=m, edgecolor="black",
                   linewidth=0.7, color=str(1 - 0.4 * i / len(methods)), hatch=HATCHES[i % len(HATCHES)])
            finish(ax, kind, points)
            for x in (x for x, run in points if not run["metrics"][kind]):  # a bar without height, unlike one that was not run
                ax.text(x, 0, "0", ha="center", va="bottom")
        ax.axhline(runs[0]["floors"][kind], color="black", linestyle=":", linewidth=1, label="best constant answer")
    ax.set_xticks(range(len(names)), [re.sub(r"(.{6,18}[-./:_])(?=.{8})", "\\1\n", name) for name in names])
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure, with_bars(["Base models", described(runs)], runs), runs


def similarity(run):
    """Figure 5: Jaccard similarity of every two final personas."""
    lines = {line["user_id"]: line for line in metrics.read_lines(run["folder"] / "personas.jsonl")}
    n, users, pairs = len(lines), sorted(lines), np.triu_indices(len(lines), 1)
    if n < 2:
        raise Problem(f"{run['folder']} has {n} personas, no pair")
    final, initial = (metrics.jaccard([lines[user][key] for user in users]) for key in ("final", "initial"))
    figure = Figure(figsize=(6.2, 6), layout="constrained")
    ax = figure.subplots()
    figure.colorbar(ax.imshow(final, cmap="viridis", vmin=0, vmax=1), label="Jaccard similarity of word sets", shrink=0.8)
    ax.set(xlabel="user (place in the order of ids)", ylabel="user (place in the order of ids)")
    if n <= 30:
        ax.set(xlabel="user", ylabel="user", yticks=range(n), yticklabels=users)
        ax.set_xticks(range(n), users, rotation=90)
    said = [f"mean {m[pairs].mean():.2f}, {np.mean(m[pairs] <= 0.4):.0%} up to 0.4" for m in (final, initial)]
    return figure, ["Jaccard similarity of the final personas", described([run], f"{n} users"),
                    f"{len(pairs[0])} pairs: {said[0]} (before alignment {said[1]})"], [run]


FIGURES = {  # name -> (choice of runs: {task: what to draw}, drawing: (figure, lines of its title, runs), why there is nothing)
    "figure2": (lambda runs: with_file(runs, "personas.npz"), personas, "no personaagent run has a personas.npz"),
    "figure3": (sweeps, scaling, "no two personaagent runs differ only in --batch, --iterations or --top-k"),
    "figure4": (bases, models, "no two runs differ only in the model"),
    "figure5": (lambda runs: with_file(runs, "personas.jsonl"), similarity, "no personaagent run has a personas.jsonl")}


def save(figure, title, runs, path):
    """Write PNG and SVG; the picture says what must be known of its runs. The same runs give the same bytes."""
    title += ["stand-in, no language model"] * runs[0]["stand_in"]
    title += ["unfinished: answers are missing"] * any(not r["complete"] for r in runs)
    width = int(13 * figure.get_figwidth())  # characters of a line
    figure.suptitle("\n".join(textwrap.fill(line, width) for line in title), fontsize=9)
    figure.savefig(f"{path}.png", dpi=160, metadata={"Software": None})
    figure.savefig(f"{path}.svg", metadata={"Date": None})
    print(f"{path.name}: {path}.png and .svg from " + (str(runs[0]["folder"]) if len(runs) == 1 else f"{len(runs)} runs"))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("roots", nargs="+", metavar="DIR", help="run folders, or folders above them")
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), metavar="DIR", help="of the pictures (docs/figures)")
    args = parser.parse_args(argv)
    if not Figure:
        raise Problem("matplotlib and scikit-learn are missing: pip install -e '.[figures]'")
    found = runs_below(args.roots)
    runs = [r for r in found if not r["stand_in"]] or found
    print(f"left out: {len(found) - len(runs)} of the stand-in\n" * (len(runs) < len(found)), end="")
    args.output.mkdir(parents=True, exist_ok=True)
    for name, (choose, draw, missing) in FIGURES.items():
        chosen = choose(runs)
        print(f"{name}: not drawn, {missing}\n" * (not chosen), end="")
        for task, what in sorted(chosen.items()):
            path = args.output / (name + f"-{task}" * (len(chosen) > 1))
            try:
                with matplotlib.style.context(STYLE):
                    save(*draw(what), path)
            except Problem as e:
                print(f"{path.name}: not drawn, {e.args[0]}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Problem as e:
        print(f"figures.py: {e.args[0]}", file=sys.stderr)
        sys.exit((*e.args, 1)[1])
