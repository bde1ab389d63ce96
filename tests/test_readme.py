"""The README is true: its example prints what it says, its commands parse, its tables name what there is."""
import contextlib
import io
import json
import re

import lamp
from memory import EpisodicMemory
from persona_agent import PersonaAgent
from tests.conftest import Scripted

README = (lamp.HERE / "README.md").read_text(encoding="utf-8")


def test_python_example_prints_what_the_readme_says():
    code, expected = re.search(r"```python\n(.*?)```\n\nprints, from the repository's folder,\n\n```\n(.*?)```", README, re.S).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == expected


def test_commands_parse():
    common = re.search(r'run\(\) \{ python lamp\.py (.*) "\$@"; \}', README)[1]
    commands = re.findall(r"python lamp\.py ([^`\n]*)", README.replace('"$@"; }', "")) + [
        f"{common} {given}" for given in re.findall(r"\brun (--[^`\n]*)`", README)]
    assert len(commands) > 12
    for command in set(commands) - {"--help"}:
        lamp.arguments(command.split("  ")[0].replace("$t", "lamp1").replace("[--method M]", "").split())


def test_story_of_the_real_run_is_the_recorded_one(tmp_path, monkeypatch, capsys):
    command = re.search(r"python lamp\.py (--task lamp2m .*--offline)", README)[1]
    monkeypatch.chdir(lamp.HERE)
    assert lamp.cli([*command.replace("--method all", "--method no-alignment").split(), "--output", str(tmp_path)]) == 0
    query, = re.findall(r"python lamp\.py --show (\d+) --method no-alignment\n", README)
    capsys.readouterr()
    lamp.cli(["--show", query, "--output", str(tmp_path)])
    told = " ".join(capsys.readouterr().out.split())
    story = re.search(r"```\n(persona   .*?)```", README, re.S)[1]
    story = re.sub(r"^\w+ +", "[..]", story, flags=re.M).replace("; the user's", "[..] the user's")  # the words in the margin are ours
    story = re.sub(r"(Wiki|RAG): ", r"\1 Action Input: ", " ".join(story.split()))
    parts = [part.strip() for part in story.split("[..]")]
    assert len(parts) > 20 and [part for part in parts if part not in told] == []


def test_files_and_tasks_are_all_named():
    for file in ("metrics.py", "memory.py", "tools.py", "persona_agent.py", "align.py", "lamp.py"):
        assert f"| `{file}` |" in README and (lamp.HERE / file).exists()
    for task in lamp.TASKS.values():
        assert f"| `{task.name}` | `{task.folder}` |" in README


def test_every_part_of_the_paper_is_where_the_table_says():
    rows = re.findall(r"^\| ((?:Eq\.|Algorithm|Appendix|Table|Figure) [^|]*) \| (.*) \|$", README, re.M)
    named = " ".join(part for part, _ in rows)
    for part in [f"Eq. {n}" for n in range(1, 6)] + ["Algorithm 1", *(f"Appendix {c}" for c in "ABCDEFG"), "Table 2", "Table 3",
                                                      *(f"Figure {n}" for n in range(2, 6))]:
        assert part in named
    for _, places in rows:
        file = None
        for place in re.findall(r"`([\w/.:]+)`", places):
            file, name = place.split(":") if ":" in place else (file, place)
            code = (lamp.HERE / file).read_text(encoding="utf-8")
            assert re.search(rf"^\s*(?:def|class) {name.split('.')[-1]}\b|^{name} = ", code, re.M), place


def test_persona_comes_back_in_three_lines(tmp_path, monkeypatch, embed):
    monkeypatch.chdir(tmp_path)
    assert lamp.cli(["--task", "lamp2m"]) == 0
    code = re.search(r"A persona comes back with [^\n]*\n\n```python\n(.*?)```", README, re.S)[1]
    memory = EpisodicMemory(embed)
    names = {"json": json, "PersonaAgent": PersonaAgent, "llm": Scripted(["Final Answer: comedy"]), "memory": memory}
    exec(compile(code, "README.md", "exec"), names)
    assert names["agent"].answer("Which tag?").text == "comedy"
    assert names["llm"].calls[0]["messages"][0]["content"].startswith(names["persona"]) and len(names["persona"]) > 100
