"""Persona similarity, and docs/figures.py: which runs a figure takes, without Matplotlib; the pictures, with it."""
import json
import re
import os
import subprocess
import sys

import numpy as np
import pytest

import lamp
from metrics import Problem, jaccard

sys.path.insert(0, str(lamp.HERE / "docs"))
import figures

USAGE = {"calls": 1, "input": 10, "cached": 0, "output": 5, "seconds": 0.1}
SETTINGS = {"data": None, "data_hash": "d", "prompt_hash": "p", "model": "m", "embed_model": "e", "provider": None,
            "temperature": 0.1, "batch": 3, "iterations": 1, "top_k": 4}


def made(path, method="personaagent", task="lamp2m", users=4, stand_in=False, right=0.5, **settings):
    """A run folder written by hand, one query a user; as an unfinished run leaves it, without metrics in results.json."""
    labels, path = lamp.TASKS[task].labels, path / task / (method + "".join(f"-{k}={v}" for k, v in settings.items()))
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps({"complete": False, "method": method, "task": task, "stand_in": stand_in,
                                                   "settings": {"task": task, **SETTINGS, **settings}}))
    with open(path / "predictions.jsonl", "w") as rows, open(path / "personas.jsonl", "w") as lines:
        for u in range(users):
            gold = labels[u % len(labels)]
            answer = gold if u < right * users else labels[0]
            print(json.dumps({"id": f"q{u}", "user_id": f"u{u}", "gold": gold, "prediction": answer, "text": answer, "usage": USAGE,
                              "status": "answered", "steps": [], "seconds": 0.1}), file=rows)
            print(json.dumps({"user_id": f"u{u}", "initial": "You help a user.", "final": f"You help user {u} who likes {gold}.",
                              "usage": {"profile": USAGE, "alignment": USAGE}, "iterations": []}), file=lines)
    return path


def embedded(folder, vectors):
    """personas.npz as a run leaves it."""
    np.savez(folder / "personas.npz", users=np.array([f"u{i}" for i in range(len(vectors))]),
             final=np.array(vectors, np.float32), initial=np.ones(len(vectors[0]), np.float32))


def shown(line):
    """A line of Figure 3 as {dial: values}"""
    return {dial: list(group) for dial, group in line.items()}


# ---------------------------------------------------------------------------------------------------- similarity

def test_jaccard_counts_shared_words():
    found = jaccard(["Likes dark comedy", "likes: COMEDY, comedy!", "watches horror", "likes dark comedy."])
    assert found == pytest.approx(np.array([[1, 2 / 3, 0, 1], [2 / 3, 1, 0, 2 / 3], [0, 0, 1, 0], [1, 2 / 3, 0, 1]]))


def test_jaccard_of_empty_texts():
    assert jaccard(["", "...", "a"]).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert jaccard([]).shape == (0, 0) and jaccard(["a"]).tolist() == [[1]]


def test_jaccard_is_symmetric_and_knows_other_scripts():
    found = jaccard(["né à Paris", "NÉ à Rome", "история кино", "История театра"])
    assert (found == found.T).all() and found[0, 1] == 0.5 and found[2, 3] == pytest.approx(1 / 3)


# ---------------------------------------------------------------------------------------------------- choice of runs

def test_runs_are_measured_from_their_lines_and_empty_ones_left_out(tmp_path):
    made(tmp_path, right=0.75), made(tmp_path, "rag-4", users=0), made(tmp_path, "prompt", users=8)
    runs = figures.runs_below([str(tmp_path)])
    assert [(r["method"], r["metrics"]["n"]) for r in runs] == [("prompt", 8), ("personaagent", 4)]
    assert runs[1]["metrics"]["accuracy"] == 0.75 and runs[1]["folder"] == tmp_path / "lamp2m" / "personaagent"


def test_no_run_and_foreign_results(tmp_path):
    with pytest.raises(Problem, match="no run with answers below"):
        figures.runs_below([str(tmp_path)])
    (tmp_path / "results.json").write_text('{"accuracy": 1}')
    with pytest.raises(Problem, match="not a results file of ours"):
        figures.runs_below([str(tmp_path)])


def test_one_run_serves_all_three_sweeps(tmp_path):
    for settings in ({}, {"batch": 10}, {"batch": 1}, {"iterations": 2}, {"top_k": 1}, {"top_k": 8, "iterations": 3}):
        made(tmp_path, **settings)
    made(tmp_path, "rag-4", batch=2)
    line, = figures.sweeps(figures.runs_below([str(tmp_path)]))[""].values()
    assert shown(line) == {"batch": [1, 3, 10], "iterations": [1, 2], "top_k": [1, 4]}


@pytest.mark.parametrize("other", [{"prompt_hash": "q"}, {"data_hash": "x"}, {"model": "n"}, {"temperature": 0.0}, {"task": "lamp2n"}])
def test_runs_that_differ_elsewhere_are_no_sweep(tmp_path, other):
    made(tmp_path / "a"), made(tmp_path / "b", batch=1, **other)
    assert figures.sweeps(figures.runs_below([str(tmp_path)])) == {}


def test_path_of_the_data_does_not_matter(tmp_path):
    made(tmp_path / "a", data="LaMP"), made(tmp_path / "b", data="old/LaMP/", batch=1)
    assert len(figures.sweeps(figures.runs_below([str(tmp_path / "a"), str(tmp_path / "b")]))[""]) == 1


def test_longest_sweep_is_taken(tmp_path):
    for batch, iterations in [(1, 1), (2, 1), (1, 2), (2, 2), (5, 2), (1, 3), (2, 3)]:
        made(tmp_path, batch=batch, iterations=iterations)
    line, = figures.sweeps(figures.runs_below([str(tmp_path)]))[""].values()
    assert shown(line)["batch"] == [1, 2, 5] and {r["settings"]["iterations"] for r in line["batch"].values()} == {2}


def test_run_with_the_most_answers_is_taken(tmp_path):
    made(tmp_path / "a"), made(tmp_path / "a", batch=1)
    full = made(tmp_path / "b", users=9)
    runs = figures.runs_below([str(tmp_path)])
    line, = figures.sweeps(runs)[""].values()
    assert line["batch"][3]["folder"] == full == figures.with_file(runs, "personas.jsonl")["lamp2m"]["folder"]


def test_lines_of_several_tasks_and_models(tmp_path):
    for settings in ({"task": "lamp3"}, {"task": "lamp2m"}, {"task": "lamp2m", "model": "large"}):
        made(tmp_path / str(settings), **settings), made(tmp_path / str(settings), batch=1, **settings)
    assert list(figures.sweeps(figures.runs_below([str(tmp_path)]))[""]) == [
        ("lamp2m", "d", "large"), ("lamp2m", "d", "m"), ("lamp3", "d", "m")]


def test_base_models_may_differ_in_provider_and_embeddings_only(tmp_path):
    for method in ("personaagent", "rag-4"):
        made(tmp_path, method), made(tmp_path, method, model="large", provider="bedrock", embed_model="titan")
    made(tmp_path, model="huge", temperature=1.0), made(tmp_path, task="lamp3")
    found = figures.bases(figures.runs_below([str(tmp_path)]))
    assert {task: sorted(group) for task, group in found.items()} == {"lamp2m": [
        ("large", "personaagent"), ("large", "rag-4"), ("m", "personaagent"), ("m", "rag-4")]}


def test_personas_of_one_run_a_task(tmp_path):
    made(tmp_path / "a", batch=1), made(tmp_path / "a", "no-alignment"), made(tmp_path / "b")
    embedded(made(tmp_path, task="lamp3"), np.eye(4))
    runs = figures.runs_below([str(tmp_path)])
    assert {t: r["folder"].name for t, r in figures.with_file(runs, "personas.jsonl").items()} == {
        "lamp2m": "personaagent", "lamp3": "personaagent"}
    assert list(figures.with_file(runs, "personas.npz")) == ["lamp3"]


def test_described(tmp_path):
    made(tmp_path, users=12, data="/x/LaMP", model="large"), made(tmp_path, users=11, data="/x/LaMP", batch=1, model="large")
    runs = figures.runs_below([str(tmp_path)])
    assert figures.described(runs) == "LaMP-2M, LaMP, large, n = 11 to 12 queries"
    assert figures.described(runs[:1], "7 users") == "LaMP-2M, LaMP, large, n = 7 users"


# ---------------------------------------------------------------------------------------------------- command line

def test_missing_libraries_end_in_one_line(tmp_path):
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise ImportError")
    run = subprocess.run([sys.executable, "docs/figures.py", "runs"], cwd=lamp.HERE, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr == "figures.py: matplotlib and scikit-learn are missing: pip install -e '.[figures]'\n"


@pytest.fixture
def draw(capsys):
    """draw(root, output) -> the lines that figures.py prints"""
    pytest.importorskip("matplotlib"), pytest.importorskip("sklearn")

    def run(root, output):
        capsys.readouterr()
        figures.main([str(root), "--output", str(output)])
        return capsys.readouterr().out.splitlines()
    return run


def drawn(folder):
    """Names of the pictures; each is a PNG with something on it and an SVG beside it."""
    from matplotlib.image import imread
    for file in folder.glob("*.png"):
        image = imread(file)[..., :3]
        assert min(image.shape[:2]) > 500 and 0.005 < (image < 0.9).mean() < 0.9, file
        assert "<svg" in file.with_suffix(".svg").read_text(encoding="utf-8")
    return sorted(file.stem for file in folder.glob("*.png"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Runs of the stand-in: a sweep of each setting over three users of the sample."""
    root = tmp_path_factory.mktemp("swept")
    for flags in (["--method", "personaagent,rag-4"], *(["--batch", n] for n in "12"), ["--iterations", "2"], ["--top-k", "1"]):
        assert lamp.cli(["--task", "lamp2m", "--users", "3", "--output", str(root), *flags]) == 0
    return root


def test_sweeps_of_the_stand_in(swept, tmp_path, draw):
    lines = draw(swept, tmp_path)
    assert drawn(tmp_path) == ["figure3", "figure5"]
    assert [line.split(",")[0].split(tmp_path.name)[0] for line in lines if "not drawn" in line] == [
        "figure2: not drawn", "figure4: not drawn"] and lines[1].endswith("from 7 runs")
    for name in ("figure3", "figure5"):
        assert "stand-in, no language model" in (tmp_path / f"{name}.svg").read_text(encoding="utf-8")


def test_the_same_runs_give_the_same_bytes(swept, tmp_path, draw):
    draw(swept, tmp_path / "a"), draw(swept, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_panels_of_labels_and_ratings(tmp_path, draw):
    for settings in ({}, {"batch": 1}, {"batch": 10}, {"top_k": 1}):
        made(tmp_path, users=15, right=0.8, **settings), made(tmp_path, users=15, task="lamp2n", **settings)
    made(tmp_path, users=15, task="lamp3"), made(tmp_path, users=15, task="lamp3", batch=2)
    figure, title, runs = figures.scaling(figures.sweeps(figures.runs_below([str(tmp_path)]))[""])
    assert [(ax.get_ylabel(), ax.get_xlabel(), ax.get_xticks().tolist(), ax.get_visible()) for ax in figure.axes[::2]] == [
        (label, "alignment batch n (interactions)", ticks, True) for label, ticks in [
            ("accuracy", [1, 3, 10]), ("macro-F1", [1, 3, 10]), ("MAE (lower is better)", [2, 3]), ("RMSE (lower is better)", [2, 3])]]
    assert [ax.get_visible() for ax in figure.axes[1::2]] == [True, True, False, False] and len(runs) == 12
    assert title[1:] == ["error bars: 95% intervals by bootstrap over users"]
    assert [text.get_text().split(",")[0] for text in figure.legends[0].get_texts()] == ["LaMP-2M", "LaMP-2N", "LaMP-3"]
    assert draw(tmp_path, tmp_path / "out")[1].endswith("from 12 runs") and "figure3" in drawn(tmp_path / "out")


def test_curves_without_intervals_start_at_zero_and_show_every_point(tmp_path, draw):
    for k, right in ((1, 0.3), (2, 0.9), (4, 0.5)):
        made(tmp_path, users=3, right=right, top_k=k)
    figure, title, runs = figures.scaling(figures.sweeps(figures.runs_below([str(tmp_path)]))[""])
    assert title[1:] == ["no intervals: fewer than 10 users"]
    for ax in figure.axes:
        low, high = ax.get_ylim()
        assert low == 0 and all(y <= high for line in ax.lines for y in line.get_ydata())


def test_models_side_by_side(tmp_path, draw):
    for model in ("us.anthropic.claude-3-5-sonnet-20241022-v2:0", "small"):
        for method in lamp.METHODS:
            made(tmp_path / model[:2], method, users=12, model=model)
    (tmp_path / "sm" / "lamp2m" / "icl-model=small" / "predictions.jsonl").unlink()  # one model alone: nothing to compare
    wrong = tmp_path / "sm" / "lamp2m" / "prompt-model=small" / "predictions.jsonl"
    wrong.write_text(re.sub(r'"prediction": "[^"]*"', '"prediction": null', wrong.read_text()))
    figure, *_ = figures.models(figures.bases(figures.runs_below([str(tmp_path)]))["lamp2m"])
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == [
        "small", "us.anthropic.\nclaude-3-5-sonnet-\n20241022-v2:0"]
    assert len(figure.axes[0].patches) == 2 * (len(lamp.METHODS) - 1)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0"]
    draw(tmp_path, tmp_path / "out")
    assert "figure4" in drawn(tmp_path / "out")


def test_map_of_personas(tmp_path, draw):
    vectors = np.random.default_rng(0).normal(size=(8, 5))
    vectors[6] = 3 * vectors[2] + 0.01
    embedded(made(tmp_path, users=8), vectors)
    figure, title, _ = figures.personas(figures.runs_below([str(tmp_path)])[0])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:4] == ["other users", "initial, empty profile", "A: user u2", "B: user u6"] and "n = 8 users" in title[1]
    assert [len(points.get_offsets()) for points in figure.axes[0].collections] == [5, 1, 1, 1, 1]
    draw(tmp_path, tmp_path / "out")
    assert drawn(tmp_path / "out") == ["figure2", "figure5"]


@pytest.mark.parametrize("vectors, said", [
    (np.eye(4), "has 4 users with 4 different personas, a map needs 5"),
    (np.ones((9, 3)), "has 9 users with 1 different personas, a map needs 5"), (None, "cannot be read")])
def test_a_map_that_cannot_be_drawn(tmp_path, draw, vectors, said):
    folder = made(tmp_path)
    embedded(folder, vectors) if vectors is not None else (folder / "personas.npz").write_bytes(b"PK torn")
    assert said in draw(tmp_path, tmp_path / "out")[0] and drawn(tmp_path / "out") == ["figure5"]


def test_matrix_says_its_mean(tmp_path, draw):
    made(tmp_path, users=3)
    figure, title, _ = figures.similarity(figures.runs_below([str(tmp_path)])[0])
    assert title[2] == "3 pairs: mean 0.43, 33% up to 0.4 (before alignment mean 1.00, 0% up to 0.4)"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["u0", "u1", "u2"]


def test_several_tasks_and_single_personas(tmp_path, draw):
    made(tmp_path), made(tmp_path, task="lamp3", users=1)
    lines = draw(tmp_path, tmp_path / "out")
    assert drawn(tmp_path / "out") == ["figure5-lamp2m"] and "figure5-lamp3: not drawn" in lines[-1] and "no pair" in lines[-1]


def test_stand_in_is_left_out_where_there_is_a_model(tmp_path, draw):
    made(tmp_path / "a", stand_in=True), made(tmp_path / "b", users=3), made(tmp_path / "b", users=3, batch=1)
    assert draw(tmp_path, tmp_path / "out")[0] == "left out: 1 of the stand-in"
    for file in (tmp_path / "out").glob("*.svg"):
        text = file.read_text(encoding="utf-8")
        assert "stand-in" not in text and "unfinished: answers are missing" in text
