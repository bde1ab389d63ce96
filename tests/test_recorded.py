"""The recorded run of a real model replays, without a server, to the table in docs/results.md."""
import re

import pytest

import lamp
from tests.test_wire_runs import bare  # noqa: F401: a fixture

RESULTS = (lamp.HERE / "docs" / "results.md").read_text(encoding="utf-8")


def test_recorded_run_replays_to_the_published_table(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        pytest.fail("a request left the replay")

    monkeypatch.setattr("requests.Session.request", refuse)
    command = re.search(r"python lamp\.py (--task lamp2m .*--offline)", RESULTS)[1].replace("tests/recorded", str(lamp.HERE / "tests/recorded"))
    assert lamp.cli([*command.split(), "--output", str(tmp_path)]) == 0
    capsys.readouterr()
    lamp.cli(["--report", str(tmp_path)])
    table = capsys.readouterr().out.split("\n\n")[2]
    assert len(table.splitlines()) == 2 + len(lamp.METHODS) and table in RESULTS
