"""The recorded runs of a real model replay, without a server, to the tables in docs/results.md."""
import re

import pytest

import lamp
from tests.test_wire_runs import bare  # noqa: F401: a fixture

RESULTS = (lamp.HERE / "docs" / "results.md").read_text(encoding="utf-8")
MODEL = re.search(r"replay\(\) .* (--model .*--offline)", RESULTS)[1].replace("tests/recorded", str(lamp.HERE / "tests/recorded")).split()
METHODS = dict.fromkeys(lamp.TASKS, re.search(r"replay \$t (\S+);", RESULTS)[1]) | {"lamp2m": "all"}


@pytest.mark.parametrize("task", lamp.TASKS)
def test_recorded_run_replays_to_the_published_table(task, tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        pytest.fail("a request left the replay")

    monkeypatch.setattr("requests.Session.request", refuse)
    assert lamp.cli(["--task", task, "--method", METHODS[task], *MODEL, "--output", str(tmp_path)]) == 0
    capsys.readouterr()
    lamp.cli(["--report", str(tmp_path)])
    table = capsys.readouterr().out.split("\n\n")[2]
    methods = lamp.GROUPS.get(METHODS[task], METHODS[task].split(","))
    assert len(table.splitlines()) == 2 + len(methods) and table in RESULTS
