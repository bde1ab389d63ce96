"""Whole runs of the bundled sample: over Bedrock, a bad wire, a server that dies, a context that is too short."""
import functools
import json
import random
import threading
import time
from pathlib import Path

import pytest

from lamp import SAMPLE, TASKS, cli, load
from metrics import read_lines
from tests import standin
from tests.faults import Answer, deliver

ALL = "prompt,rag-4,no-alignment,personaagent"
ACCESS, SECRET, BEARER = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "bedrock-api-key-0123456789"
BAD = [Answer({"error": {"message": "slow down"}}, 429), Answer({"message": "try again"}, 500), Answer(action="reset"),
       Answer({"choices": []}, action="truncate"), Answer(b'{"choices": [')]


class Handler(standin.Handler):
    """The stand-in, but where `server.fault(path, raw body)` gives an Answer of tests/faults.py, that one instead."""

    def do_POST(self):
        self.raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(self.path, self.raw)
        deliver(self, fault) if fault else self.answer(json.loads(self.raw))

    def do_GET(self):
        fault = self.server.fault(self.path, b"")
        deliver(self, fault) if fault else super().do_GET()


def serve():
    running = standin.start(handler=Handler)
    running.url, running.fault = f"http://127.0.0.1:{running.server_port}", lambda path, raw: None
    return running


@pytest.fixture
def server():
    running = serve()
    yield running
    running.shutdown()


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No settings of the machine, and no pauses."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "WIKIPEDIA_CONTACT", "AWS_BEARER_TOKEN_BEDROCK", "AWS_REGION",
                 "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tools.time.sleep", lambda seconds: None)


def run(server, root, task="lamp2m", method=ALL, wiki=None):
    """The exit code of a run over the OpenAI wire."""
    return cli(["--task", task, "--method", method, "--users", "2", "--model", "m", "--embed-model", "e", "--base-url",
                server.url + "/v1", "--wiki-base-url", (wiki or server).url, "--output", str(root)])


def bedrock(server, root, monkeypatch, **keys):
    """The exit code of a run over the Bedrock wire."""
    for name, value in {"REGION": "us-east-1", "ENDPOINT_URL_BEDROCK_RUNTIME": server.url, **keys}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    return cli(["--task", "lamp2m", "--method", ALL, "--users", "2", "--provider", "bedrock", "--model", "m",
                "--wiki-base-url", server.url, "--output", str(root)])


def rows(root):
    """{(method, query id): line of predictions.jsonl} of every run folder below `root`."""
    return {(json.loads(file.read_text())["method"], r["id"]): r for file in Path(root).rglob("results.json")
            for r in read_lines(file.parent / "predictions.jsonl")}


def told(root):
    """{(method, query id): what the agent did and said}."""
    return {key: {k: row[k] for k in ("prediction", "text", "steps", "status")} for key, row in rows(root).items()}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A function from a task to what a run without faults tells."""
    running = serve()

    @functools.cache
    def of(task):
        root = tmp_path_factory.mktemp(task)
        assert run(running, root, task) == 0
        return told(root)

    yield of
    running.shutdown()


@pytest.mark.parametrize("keys", [
    {"BEARER_TOKEN_BEDROCK": BEARER}, {"ACCESS_KEY_ID": ACCESS, "SECRET_ACCESS_KEY": SECRET}], ids=["bearer", "SigV4"])
def test_run_through_bedrock_answers_as_the_one_through_openai(server, clean, tmp_path, monkeypatch, keys):
    paths = set()
    server.fault = lambda path, raw: paths.add(path) if raw else None
    assert bedrock(server, tmp_path, monkeypatch, **keys) == 0
    assert told(tmp_path) == clean("lamp2m") and len(told(tmp_path)) == 4 * 6
    assert paths == {"/model/m/converse", "/model/amazon.titan-embed-text-v2%3A0/invoke"}


def test_wrong_secret_ends_the_run_with_one_line(server, tmp_path, monkeypatch, capsys):
    assert bedrock(server, tmp_path, monkeypatch, ACCESS_KEY_ID=ACCESS, SECRET_ACCESS_KEY="wrong-secret") == 1
    err = capsys.readouterr().err
    assert "signature" in err and err.count("\n") == 1 and "wrong-secret" not in err
    assert not rows(tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_run_over_a_bad_wire_ends_as_one_over_a_good_wire(server, clean, tmp_path, task):
    seen, given, lock = {}, [], threading.Lock()

    def fault(path, raw):
        """Three of ten, drawn from the request and how often it came: the same whatever the threads do. Never more than
        three times in a row, and not at the first word and the first embedding, which are tried only twice."""
        with lock:
            n = seen[path, raw] = seen.get((path, raw), 0) + 1
        draw = random.Random(f"7 {path} {raw} {n}")
        if draw.random() < 0.3 and n <= 3 and b"OK" not in raw:
            given.append(draw.choice(BAD))
            return given[-1]

    server.fault = fault
    assert run(server, tmp_path, task) == 0
    assert told(tmp_path) == clean(task)
    assert all(bad in given for bad in BAD) and 0.15 < len(given) / sum(seen.values()) < 0.4


def test_server_that_dies_ends_the_run_soon_with_one_error_and_what_was_answered(clean, tmp_path, capsys):
    server, wiki, count = serve(), serve(), iter(range(10**6))

    def die(path, raw):
        n = next(count)
        if n == 40:
            server.shutdown()
            server.server_close()
        return Answer(action="reset") if n >= 40 else None

    server.fault, start = die, time.monotonic()
    assert run(server, tmp_path, wiki=wiki) == 1
    wiki.shutdown()
    out, kept = capsys.readouterr().out, told(tmp_path)
    assert time.monotonic() - start < 5
    assert 0 < len(kept) < len(clean("lamp2m")) and kept.items() <= clean("lamp2m").items()
    last = out.strip().split("\n")[-1]
    assert f"{4 * 6 - len(kept)} QUERIES FAILED" in last and out.count("QUERIES FAILED") == 1
    assert f"no answer from {server.url}" in last and "Is the server running" in last and "Traceback" not in out


@pytest.mark.parametrize("method, step", [("prompt", 0), ("rag-4", 0), ("no-alignment", 1)])
def test_conversation_over_the_context_is_the_querys_wrong_answer(server, tmp_path, capsys, method, step):
    query = load(TASKS["lamp2m"], SAMPLE)[0][0].queries[0]

    def overflow(path, raw):
        body = json.loads(raw or b"{}")
        said = "".join(m["content"] for m in body.get("messages", []))
        if query.input in said and said.count("Observation: ") == step and "chat" in path:
            return Answer({"error": {
                "code": 400, "type": "exceed_context_size_error", "n_prompt_tokens": 9000, "n_ctx": 4096,
                "message": "request (9000 tokens) exceeds the available context size (4096 tokens)"}}, 400)

    server.fault = overflow
    assert run(server, tmp_path, method=method) == 0
    found, = (json.loads(f.read_text()) for f in tmp_path.rglob("results.json"))
    row = rows(tmp_path)[method, query.id]
    assert (row["status"], row["text"], row["prediction"], len(row["steps"])) == ("overflow", "", None, step + 1)
    assert "(9000 tokens) exceeds the available context size (4096 tokens)" in row["steps"][-1]["thought"]
    assert (found["metrics"]["n"], found["status"]["overflow"], found["errors"]) == (6, 1, 0)
    assert "FAILED" not in capsys.readouterr().out
