"""What looks at finished runs: docs/report.py, docs/show.py and docs/figures.py."""

import json
import subprocess
import sys

import numpy as np
import pytest

import lamp
from tools import WIKI_DOWN

sys.path.insert(0, str(lamp.HERE / "docs"))
import figures
import report
import show

GOLDS = {"q0": "comedy", "q1": "comedy", "q2": "action", "q3": "classic"}
SETTINGS = json.loads("""{"data": "/x/LaMP", "data_hash": "d", "model": "m", "embed_model": "e",
"batch": 3, "iterations": 1, "top_k": 4, "users": 100, "queries_per_user": 3, "limit": null}""")
INITIAL = "You help a user.\n\nBe brief."
LOOK = {"thought": "I look.", "action": "RAG", "input": "a film", "observation": "comedy\x1b[31m"}
STEPS = [LOOK, LOOK | {"action": "Wiki", "observation": WIKI_DOWN}]
FAILURE = {"error": "broken", "usage": {"calls": 4, "input": 300, "output": 2, "seconds": 5.0}}
USAGE = {"calls": 2, "input": 100, "output": 10, "seconds": 1.0}
ROW = {"question": "Which tag?", "status": "answered", "usage": USAGE}
SAMPLE = {"query": "Q?", "expected": "classic", "feedback": "Say why.", "degenerate": False}


def write_run(root, method, answers, golds=GOLDS, stand_in=False, **settings):
    """A run folder by hand, a query a user. answers: {id: prediction, or 'FAILED'}.

    The first answer used both tools, and Wikipedia was down; so it was in its user's alignment."""
    rows, lines = [], []
    for name, answer in answers.items():
        steps = [] if rows else STEPS
        names = {"id": name, "user_id": f"u{name}"}
        given = {"gold": golds[name], "prediction": answer, "text": f"{answer}!", "steps": steps}
        rows.append(names | (FAILURE if answer == "FAILED" else ROW | given))
        final = INITIAL.replace("a user", f"one who likes film {name}")
        simulated = SAMPLE | {"answer": {"text": "drama", "steps": steps, "status": "forced"}}
        taken = {"before": INITIAL, "samples": [simulated], "after": final, "reasons": []}
        taken |= {"new": 0.25, "quoted": [0]}
        refused = {"samples": [], "reply": "I'm sorry", "reasons": ["refused"]}
        made = {"profile": "Likes films.", "initial": INITIAL, "final": final, "usage": USAGE}
        lines.append(names | made | {"iterations": [taken, refused]})
    folder = root / f"{method}{len(list(root.glob('*')))}"
    folder.mkdir(parents=True)
    made = {"method": method, "task": "lamp2m", "complete": len(rows) > 3}
    settings |= {"model": lamp.STAND_IN} if stand_in else {}
    (folder / "results.json").write_text(json.dumps({**made, "settings": SETTINGS | settings}))
    for file, data in (("predictions.jsonl", rows), ("personas.jsonl", lines)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in data))


@pytest.fixture
def runs(tmp_path):
    mine = ["comedy", "comedy", "classic", "FAILED"]
    write_run(tmp_path, "rag-4", dict(zip(GOLDS, ["comedy", "action", "action", None])))
    write_run(tmp_path, "personaagent", dict(zip(GOLDS, mine)))
    write_run(tmp_path, "no-alignment", {"q3": "classic"})
    return tmp_path


def test_report_equals_what_one_counts_by_hand(runs):
    text = report.report([str(runs)])
    assert "Best constant answer: accuracy 0.500, macro-F1 0.044. No intervals" in text
    assert "simulations included): rag-4 2; personaagent 2; no-alignment 2." in text
    assert "| rag-4 | 4 | 0.500 | 0.427 | 0.089 | 0.386 |  | -1.000, 0 won, 1 lost, p " in text
    assert ", 1 common | 25% | 1 | 0 | 0 |\n| personaagent | 3 | 0.667 | 0.513 | 0.067 | " in text
    versus = "+0.000, 1 won, 1 lost, p 1.000, 3 common | none in common"
    assert f" | 0.424 | {versus} | 33% | 0 | 0 | 1 |\n" in text
    assert "| no-alignment (unfinished) | 1 | 1.000 | 0.487 | 0.067 | 0.403 | +1.000" in text
    assert "| personaagent | 2.0, 100 + 10, 1.0 | 2.5, 150 + 8, 2.0 |" in text


def test_intervals_from_ten_users_on_and_no_paper_beside_a_stand_in(tmp_path):
    golds = {f"q{i}": "comedy" for i in range(12)}
    write_run(tmp_path, "rag-4", golds, golds, stand_in=True)
    write_run(tmp_path, "prompt", dict.fromkeys(golds, "action"), golds, stand_in=True)
    text = report.report([str(tmp_path)])
    assert "NO LANGUAGE MODEL" in text and "paper" not in text and "No intervals" not in text
    assert "| rag-4 | 12 | 1.000 [1.000, 1.000] | 0.067 [0.067, 0.067] |" in text
    assert "| -1.000 [-1.000, -1.000], 0 won, 12 lost, p < 0.001, 12 common |" in text


def test_other_queries_are_another_table_and_other_settings_other_rows(tmp_path):
    for settings in ({}, {"batch": 10}, {"limit": 2}, {"max_history": 9, "data_hash": "h"}):
        write_run(tmp_path, "rag-4", GOLDS, **({"max_history": None} | settings))
    text = report.report([str(tmp_path)])
    assert text.count("### LaMP-2M") == 2 and "queries_per_user 3, limit 2, model m." in text
    assert "| rag-4, batch 3, max_history 9 | 4 |" in text and " won, " not in text


def test_show_tells_the_whole_story_of_every_run(runs, capsys):
    show.main(["q0", "--output", str(runs)])
    text = capsys.readouterr().out
    assert text.count("=== ") == 2 and "\x1b" not in text and "q1" not in text
    parts = ["query q0 of user uq0", "Likes films.", INITIAL, "Q?", "Thought: I look.", WIKI_DOWN]
    parts += ["'drama' (forced)", "the user's: 'classic'", "--- feedback\nSay why."]
    parts += ["You help [-a user.-] {+one who likes film q0.+}\n\nBe brief.", "unchanged: refused"]
    parts += ["I'm sorry", "alignment: 2 calls, 100 + 10 tokens, 1.0 s", "question\nWhich tag?"]
    parts += ["Thought", "Action: RAG\nAction Input: a film\nObservation: comedy", WIKI_DOWN]
    parts += ["'comedy!' (answered), read as 'comedy'", "'comedy', RIGHT", "2 calls, 100 + 10"]
    at = 0
    for part in parts:
        at = text.index(part, at)
    show.main(["q3", "--output", str(runs), "--method", "personaagent,prompt"])
    text = capsys.readouterr().out
    assert text.count("=== ") == 1 and "--- FAILED: broken\n\n4 calls, 300 + 2 tokens" in text


def test_changes_are_marked_by_words():
    assert show.marked("a\n\nb c", "a b\nd") == "a b\n[-c-] {+d+}"
    assert show.marked("a b.\n\nc", "b. c d") == "[-a-] b. c {+d+}"
    assert show.marked("a b", "a") == "a [-b-]" and show.marked(" ", "a b") == "{+a b+}"


BAD = """results.json 5
results.json {"score":1}
predictions.jsonl {"id":
predictions.jsonl {"id":1}
predictions.jsonl {"error":"x","usage":{"cost":1}}
personas.jsonl {}"""


@pytest.mark.parametrize("case", BAD.splitlines())
def test_a_bad_file_is_named_in_one_line(runs, capsys, case):
    file, text = case.split()
    (runs / "rag-40" / file).write_text(text)
    assert report.script("x.py", report.main, [str(runs)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"rag-40/{file}" in err


def test_no_run_is_wrong_usage(runs, capsys):
    assert report.script("show.py", show.main, ["q9", "--output", str(runs)]) == 2
    assert capsys.readouterr().err == f"show.py: no query 'q9' in 3 runs below {runs}\n"
    assert report.script("report.py", report.main, [str(runs / "none")]) == 2


def test_scripts_run_from_anywhere_on_what_lamp_writes(tmp_path):
    options = ["--task", "lamp3", "--method", "prompt,personaagent", "--users", "1"]
    assert lamp.cli([*options, "--output", str(tmp_path / "runs")]) == 0
    command = [sys.executable, lamp.HERE / "docs" / "report.py", "runs"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    assert b"| personaagent | 3 |" in text


def test_jaccard_counts_shared_words():
    expected = [[1, 2 / 3, 0, 0], [2 / 3, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    found = figures.jaccard(["Likes comedy", "likes: COMEDY, war", "", "..."])
    assert found == pytest.approx(np.array(expected))


def test_figures_are_drawn_from_all_their_runs(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    golds = {f"q{i}": ("comedy", "action")[i % 2] for i in range(6)}
    for settings in ({}, {"batch": 1}, {"batch": 9}, {"top_k": 1}, {"model": "large"}):
        write_run(tmp_path / "runs", "personaagent", golds, golds, **settings)
    write_run(tmp_path / "runs", "personaagent", golds, golds, stand_in=True, batch=2)
    axes, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda *of: axes.append(of[0].figure.axes) or save(*of))
    figures.main([str(tmp_path / "runs"), "--output", str(tmp_path)])
    assert "left out: 1 of the stand-in" in capsys.readouterr().out
    assert "TF-IDF vectors of their words" in (tmp_path / "figure2.svg").read_text()
    assert all((tmp_path / f"figure{n}.png").stat().st_size > 9999 for n in (2, 3, 4, 5))
    places = [len(points.get_offsets()) for points in axes[0][0].collections]
    assert places == [6, 3, 1, 1, 1] and len(axes[0][0].texts) == 6  # the arrows
    assert [ax.lines[0].get_xdata().tolist() for ax in axes[1][:2]] == [[1, 3, 9], [1, 4]]
    assert len(axes[2][0].patches) == 2 and axes[3][0].images[0].get_array().shape == (6, 6)
