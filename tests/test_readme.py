"""The README and the pages of docs/ are true: examples print what they say, commands parse, tables
name what there is, the recorded runs replay to the published tables, modules work alone."""

import contextlib
import io
import json
import re
import runpy
import shutil
import subprocess
import sys

import pytest

import lamp
from memory import EpisodicMemory
from persona_agent import PersonaAgent
from tests.conftest import Scripted

PAGES = {path.name: path.read_text("utf-8") for path in lamp.HERE.glob("docs/*.md")}
PAGES["README.md"] = README = (lamp.HERE / "README.md").read_text(encoding="utf-8")
RESULTS, MODELS, MODULES = (PAGES[f"{name}.md"] for name in ("results", "models", "modules"))
REPLAY = re.search(r"replay\(\) \{ python lamp\.py .* (--model .*--offline) ", RESULTS)[1]
REPLAY = REPLAY.replace("tests/recorded", str(lamp.HERE / "tests" / "recorded")).split()
RECORDED = re.findall(r"^    replay (\w+) (\S+)$", RESULTS, re.M)


def script(name, *args):
    """What a script of docs/ prints."""
    printed = io.StringIO()
    before = sys.argv, sys.path
    sys.argv = [name, *map(str, args)]
    sys.path = [str(lamp.HERE / "docs"), *sys.path]
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            runpy.run_path(str(lamp.HERE / "docs" / name), run_name="__main__")
    finally:
        sys.argv, sys.path = before
    return printed.getvalue()


@pytest.fixture
def no_request(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("a request left the replay")

    monkeypatch.setattr("requests.Session.request", refuse)


@pytest.mark.parametrize("task, methods", RECORDED)
def test_recorded_run_replays_to_the_published_table(task, methods, tmp_path, no_request):
    assert RECORDED[0] == ("lamp2m", "all")
    command = ["--task", task, "--method", methods, *REPLAY, "--output", str(tmp_path)]
    assert lamp.cli(command) == 0
    blocks = script("report.py", tmp_path).split("\n\n")
    table = next(block for block in blocks if block.startswith("| method"))
    names = lamp.GROUPS.get(methods, methods.split(","))
    assert len(table.splitlines()) == 2 + len(names)
    assert table.strip() in RESULTS


def test_first_command_prints_what_the_readme_says(tmp_path, capsys):
    command, table = re.search(
        r"\.venv/bin/python lamp\.py (.*)\n\n```\n(method .*?)```", README, re.S
    ).groups()
    assert lamp.cli([*command.split(), "--output", str(tmp_path)]) == 0
    assert table in capsys.readouterr().out


def test_python_example_prints_what_its_page_says():
    pattern = r"```python\n(.*?)```\n\nprints, from the repository's folder,\n\n```\n(.*?)```"
    code, expected = re.search(pattern, MODULES, re.S).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "modules.md", "exec"), {})
    assert printed.getvalue() == expected


def test_commands_parse(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "example")
    common = re.search(r'run\(\) \{ python lamp\.py (.*) "\$@"; \}', MODELS)[1]
    text = "".join(text for name, text in PAGES.items() if name != "results.md")
    commands = re.findall(r"python lamp\.py ([^`\n]*)", text.replace('"$@"; }', ""))
    commands += [f"{common} {given}" for given in re.findall(r"\brun (--[^`\n]*)`", MODELS)]
    assert len(commands) > 14
    for command in set(commands) - {"--help"}:
        lamp.arguments(command.split("  ")[0].replace("$t", "lamp1").split())


def test_story_of_the_real_run_is_the_recorded_one(tmp_path, no_request):
    command = ["--task", "lamp2m", "--method", "no-alignment", *REPLAY, "--output", str(tmp_path)]
    assert lamp.cli(command) == 0
    pattern = r"python docs/show\.py (\d+) --output runs-recorded --method no-alignment\n"
    (query,) = re.findall(pattern, RESULTS)
    told = " ".join(script("show.py", query, "--output", tmp_path).split())
    story = re.search(r"```\n(persona   .*?)```", RESULTS, re.S)[1]
    # The words in the margin are ours.
    story = re.sub(r"^\w+ +", "[..]", story, flags=re.M).replace("; the user's", "[..] the user's")
    story = re.sub(r"(Wiki|RAG): ", r"\1 Action Input: ", " ".join(story.split()))
    parts = [part.strip() for part in story.split("[..]")]
    assert len(parts) > 20
    assert [part for part in parts if part not in told] == []


def test_files_and_tasks_are_all_named():
    for file in ("metrics", "memory", "tools", "persona_agent", "align", "lamp"):
        assert f"| `{file}.py` |" in README
    for task in lamp.TASKS.values():
        assert f"| `{task.name}` | `{task.folder}` |" in README
    for method in lamp.METHODS:
        assert f"`{method}`" in README


def test_links_lead_somewhere_and_every_decision_has_its_reason():
    for page, text in PAGES.items():
        folder = lamp.HERE if page == "README.md" else lamp.HERE / "docs"
        for file, anchor in re.findall(r"(?:\]\(|src=\")(?!http)([^)#\"]*)#?([^)\"]*)[)\"]", text):
            found = (folder / (file or page)).resolve()
            assert found.exists(), file
            heads = re.findall("^#+ (.*)", PAGES.get(found.name, ""), re.M)
            slugs = [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]
            assert anchor in ["", *slugs], anchor
    listed, explained = (
        re.findall(r"^(\d+)\. ", text, re.M) for text in (README, PAGES["decisions.md"])
    )
    assert listed == explained == [str(i + 1) for i in range(len(listed))]


def test_every_part_of_the_paper_is_where_the_table_says():
    pattern = r"^\| ((?:Eq\.|Algorithm|Appendix|Table|Figure) [^|]*) \| (.*) \|$"
    rows = re.findall(pattern, README, re.M)
    named = " ".join(part for part, _ in rows)
    parts = ["Eq. 1", "Eq. 2", "Eq. 3", "Eq. 4", "Eq. 5", "Algorithm 1", "Table 2", "Table 3"]
    parts += [f"Appendix {letter}" for letter in "ABCDEFG"] + [f"Figure {n}" for n in range(2, 6)]
    assert [part for part in parts if part not in named] == []
    for _, places in rows:
        file = None
        for place in re.findall(r"`([\w/.:]+)`", places):
            file, name = place.split(":") if ":" in place else (file, place)
            code = (lamp.HERE / file).read_text(encoding="utf-8")
            form = rf"^\s*(?:def|class) {name.split('.')[-1]}\b|^{name} = "
            assert re.search(form, code, re.M), place


def test_persona_comes_back_in_three_lines(tmp_path, monkeypatch, embed):
    monkeypatch.chdir(tmp_path)
    assert lamp.cli(["--task", "lamp2m", "--queries-per-user", "1", "--batch", "1"]) == 0
    next(tmp_path.glob("runs/*/*")).rename("runs/lamp2m/personaagent")
    pattern = r"A persona comes back with [^\n]*\n\n```python\n(.*?)```"
    code = re.search(pattern, MODULES, re.S)[1]
    llm = Scripted(["Final Answer: comedy"])
    names = {"json": json, "PersonaAgent": PersonaAgent, "llm": llm, "tools": []}
    names["memory"] = EpisodicMemory(embed)
    exec(compile(code, "modules.md", "exec"), names)
    assert names["agent"].answer("Which tag?").text == "comedy"
    assert llm.calls[0]["messages"][0]["content"].startswith(names["persona"])


ALONE = {
    "memory": "m.EpisodicMemory(lambda texts: [[1.0, 2.0]] * len(texts)).remember('a', 'b')",
    "tools": "assert m.Tool('T', '', str.upper)('x') == 'X'",
    "persona_agent": "m.OpenAICompatible('m'); assert m.parse_reply('Answer: x').answer == 'x'",
    "align": "assert m.unwrap('Sure! Here it is:\\nYou help.') == 'You help.'",
    "metrics": "assert m.parse_label('comedy.', m.MOVIE_TAGS) == 'comedy'",
}


def test_each_module_works_copied_alone(tmp_path):
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]"
    for module, use in ALONE.items():
        (tmp_path / module).mkdir()
        shutil.copy(lamp.HERE / f"{module}.py", tmp_path / module)
        code += f"\nsys.path.insert(0, {str(tmp_path / module)!r}); import {module} as m; {use}"
        code += f"\ndel sys.path[0], sys.modules[{module!r}]"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True)
    assert (done.stderr, done.returncode) == (b"", 0)


def test_the_lines_of_the_assistant_are_its_own():
    (shown,) = re.findall(r"Its lines that matter [^\n]*\n\n```python\n(.*?)```", README, re.S)
    code = (lamp.HERE / "docs" / "assistant.py").read_text(encoding="utf-8")
    own = {line.strip() for line in code.splitlines()}
    lines = [line.strip() for line in shown.splitlines()]
    assert len(lines) > 9 and set(lines) <= own


def test_inside_another_repository_no_commit_is_named(tmp_path):
    for module in [*ALONE, "lamp"]:
        shutil.copy(lamp.HERE / f"{module}.py", tmp_path)
    for command in ("init -q", "add .", "-c user.name=n -c user.email=e commit -qm other"):
        subprocess.run(["git", "-C", tmp_path, *command.split()], check=True)
    code = "import argparse, lamp; print(lamp._origin(argparse.Namespace(task='', model=''), []))"
    argv = [sys.executable, "-c", code]
    (tmp_path / "sub").mkdir()
    for module in [*ALONE, "lamp"]:
        shutil.move(tmp_path / f"{module}.py", tmp_path / "sub")
    done = subprocess.run(argv, cwd=tmp_path / "sub", capture_output=True, text=True, check=True)
    assert "'commit': None" in done.stdout


def test_what_users_must_know_of_peeking_and_of_lamps_scorer_is_said():
    assert "the profile is of the whole history, and may tell that answer" in README
    said = " ".join(PAGES["outputs.md"].split())
    assert "knows only the movie tags for `LaMP_2`, so that on `lamp2n` files it says 1.0" in said
