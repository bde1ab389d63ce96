"""Whole runs that are killed, stopped, refused or spread over processes; the cache that carries
them; the command line. The stand-in answers, behind faults; pauses are skipped, not waited for."""

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import pytest

import lamp
from lamp import HERE, SAMPLE, TASKS, Cache, Cached, Problem, cli
from tests import standin
from tests.faults import Answer, deliver, wait

QUERY = lamp.load(TASKS["lamp2m"], SAMPLE)[0][0].queries[-1]
ASKED = QUERY.input.partition("description: ")[2][:60]  # as it stands in a request
NO_KEY, DOWN, DEAD = Answer("wrong key", 401), Answer(status=503), Answer(action="reset")
BAD = [DOWN, DEAD, Answer(status=429), Answer(action="truncate"), Answer(b'{"choices": [')]
UNFIT = Answer({"error": "caf\u00e9 \u2603 \x1b[31m\x07"}, 400)
CUT = Answer({"choices": [{"message": {"content": "drama"}, "finish_reason": "length"}]})


class Handler(standin.Handler):
    """The stand-in, but where `server.fault(number, path, body as text)` gives an Answer, that."""

    def send(self, data):
        server, request = self.server, (self.path, getattr(self, "raw", b"").decode())
        server.seen.append(request)
        server.ports.add(self.client_address[1])
        fault = server.fault(len(server.seen), *request)
        server.answered += [] if fault else [request]
        deliver(self, fault) if fault else super().send(data)


def nothing(*request):
    """No fault."""


def chats(answer, *words):
    """A fault: `answer` to the chats that hold all of these words."""
    return lambda n, *sent: answer if all(w in str(sent) for w in ("/chat/", *words)) else None


def serve():
    server = standin.start(handler=Handler)
    server.url, server.fault = f"http://127.0.0.1:{server.server_port}", nothing
    server.seen, server.answered, server.ports = [], [], set()
    server.handle_error = nothing  # its clients may die
    return server


class Connection(sqlite3.Connection):  # does not wait for the disk
    def __init__(self, *path, **options):
        super().__init__(*path, **options)
        self.execute("PRAGMA synchronous = OFF")
        Connection.last = self


@pytest.fixture(scope="module", autouse=True)
def quick():
    """No settings of this machine, and nothing to wait for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.environ", {"PATH": os.environ["PATH"]})
        patch.setattr("time.sleep", nothing)
        patch.setattr("sqlite3.connect", Connection)
        yield


@pytest.fixture
def server(monkeypatch):
    running = serve()
    aws = {"REGION": "a", "BEARER_TOKEN_BEDROCK": "b", "ENDPOINT_URL_BEDROCK_RUNTIME": running.url}
    for name, value in aws.items():
        monkeypatch.setitem(os.environ, f"AWS_{name}", value)
    yield running
    threading.Thread(target=running.shutdown).start()


@pytest.fixture
def start():
    """A function that runs the command as a process."""
    started = []

    def run(argv, *python, **settings):
        line = [sys.executable, *python, HERE / "lamp.py", *map(str, argv)]
        options = {"stdout": -1, "stderr": -1, "text": True, "env": {**os.environ, **settings}}
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        started.append(subprocess.Popen(line, **options))
        return started[-1]

    yield run
    for process in started:
        process.kill()


def command(server, root, *more, method="rag-4,personaagent"):
    size = f"--task lamp2m --method {method} --users 2 --queries-per-user 2 --batch 1"
    where = f"--base-url {server.url}/v1 --wiki-base-url {server.url} --output {root}"
    return [*f"{size} --model m --embed-model e {where}".split(), *map(str, more)]


def files(root):
    """{method/file: text} of all runs, but for paths and what every start measures anew."""
    anew = r"seconds|kept|time|command|commit|offline|workers|\w*base_url"
    form = rf'"({anew})": ("[^"]*"|[\w.-]+)|"/[^"]*"'
    found = sorted(root.rglob("lamp*/*/*.*"))
    return {f"{p.parent.name}/{p.name}": re.sub(form, "", p.read_text()) for p in found}


def read(root, file="predictions.jsonl", method="personaagent"):
    """The lines of a file of a run, or its only object."""
    (path,) = root.rglob(f"{method}*/{file}")
    text = path.read_text() if file.endswith("l") else path.read_text().replace("\n", "")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def observe(server, root, *more):
    """What a run sends, and what it leaves behind."""
    run = SimpleNamespace(code=cli(command(server, root, *more)), ports=server.ports)
    run.lines, run.rows, run.files = read(root, "personas.jsonl"), read(root), files(root)
    run.cache, run.names = root / "cache.sqlite", " ".join(map(str, root.rglob("*")))
    run.seen, run.paths = {*server.seen}, " ".join(path for path, _ in server.seen)
    run.chats = [json.loads(sent) for path, sent in server.seen if "chat" in path]
    run.texts = [json.loads(sent) for path, sent in server.seen if "embed" in path]
    return run


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """A run to which nothing happens, and the cache with its answers."""
    return observe(serve(), tmp_path_factory.mktemp("usual"))


def test_killed_at_any_moment_the_same_command_goes_on(server, start, usual, tmp_path):
    for moment in random.Random(3).sample(range(20), 4):
        server.seen, process = [], start(command(server, tmp_path))
        while process.poll() is None and len(server.seen) <= moment:
            wait(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    kept, server.seen = Cache(f"{tmp_path}/cache.sqlite").count("openai/m"), []
    assert cli(command(server, tmp_path)) == 0 and files(tmp_path) == usual.files
    assert 0 < kept == 28 - sum("/chat/" in path for path, _ in server.seen)


@pytest.mark.parametrize("moment, answered", [(1, 0), (35, 2)])
def test_ctrl_c_ends_a_run_at_once(server, start, tmp_path, moment, answered):
    server.fault = lambda n, *request: wait(9) or None if n >= moment else None
    process = start(command(server, tmp_path, "--workers", 1))
    while process.poll() is None and len(server.seen) < moment:
        wait(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=2)
    assert process.returncode == 130 and "the same command goes on" in err
    assert "Traceback" not in err and len(read(tmp_path)) == answered


# a batch of 20 texts that gets a 5xx is halved, with two tries each
@pytest.mark.parametrize("fault, tries", [(NO_KEY, 1), (DEAD, 2), (DOWN, 12)], ids=str)
def test_a_server_that_never_answers_ends_the_run(server, tmp_path, capsys, fault, tries):
    server.fault = lambda *request: fault
    assert cli(command(server, tmp_path)) == 1 and len(server.seen) <= 2 * tries  # of two users
    err = capsys.readouterr().err
    assert err.startswith("lamp.py: ") and server.url in err and err.count("\n") == 1
    assert read(tmp_path, "results.json")[0]["metrics"]["accuracy"] is None


# fault, exit code, what is told, requests that failed at most: one round of tries
LOST = [lambda n, path, sent: NO_KEY if n > 20 and sent else None, 1, "lamp.py: HTTP 401", 8]
GONE = [lambda n, path, sent: DEAD if n > 20 and sent else None, 1, "lamp.py: no answer", 64]
AWAY = [lambda n, path, sent: None if sent else DOWN, 0, "NOT REACHED in 6 questions", 48]
ODD = [chats(UNFIT, ASKED, "Observation"), 1, "1 QUERIES FAILED", 1]


@pytest.mark.parametrize("case", [LOST, GONE, AWAY, ODD], ids=lambda case: case[2])
def test_the_same_command_makes_good(server, usual, tmp_path, capsys, case):
    server.fault, code, told, most = case
    assert cli(command(server, tmp_path)) == code and told in "".join(capsys.readouterr())
    assert 0 < len(server.seen) - len(server.answered) <= most
    end = time.monotonic() + 20
    while "ThreadPool" in str(threading.enumerate()) and time.monotonic() < end:
        wait(0.01)  # a process would have taken the threads of the ended run along
    server.fault = nothing
    assert cli(command(server, tmp_path)) == 0 and files(tmp_path) == usual.files
    assert len(server.answered) == len(set(server.answered))


def test_passing_faults_and_delays_change_nothing(server, usual, tmp_path):
    def fault(n, *request):
        count = server.seen.count(request)
        draw = random.Random(f"{request} {count}")
        wait(draw.random() / 50)
        return draw.choice(BAD) if n > 10 and count < 4 and draw.random() < 0.3 else None

    server.fault = fault
    assert cli(command(server, tmp_path)) == 0 and files(tmp_path) == usual.files
    assert len(server.seen) - len(server.answered) > 15


def test_a_failed_question_is_outside_the_metric_and_its_cost_counts(server, tmp_path):
    server.fault = chats(UNFIT, ASKED, "Observation: ")
    assert cli(command(server, tmp_path)) == cli(command(server, tmp_path)) == 1
    rows, (found,) = read(tmp_path), read(tmp_path, "results.json")
    (failed,) = [row for row in rows if "error" in row]
    assert (failed["id"], failed["usage"]["calls"]) == (QUERY.id, 1) and "caf" in failed["error"]
    assert (found["metrics"]["n"], found["errors"]) == (3, [failed["error"]])
    assert found["usage"]["answers"]["calls"] == sum(row["usage"]["calls"] for row in rows)


def test_the_very_first_text_that_cannot_be_embedded_fails_alone(server, tmp_path):
    first = lamp.load(TASKS["lamp2m"], SAMPLE)[0][0].history[0].text[20:60]
    fault = Answer({"data": [{"embedding": ["NaN"]}]})
    server.fault = lambda n, path, sent: fault if "/embed" in path and first in sent else None
    assert cli(command(server, tmp_path, "--workers", 1)) == 1
    rows = read(tmp_path)
    assert ["error" in row for row in rows] == [True, True, False, False]
    assert first in rows[0]["error"]


@pytest.mark.parametrize("why, status", [("too many tokens", "overflow"), ("flagged", "refused")])
def test_what_the_model_fails_to_say_is_empty_and_wrong(server, tmp_path, why, status):
    fault = Answer({"error": why}, 400)
    answer, profile = chats(fault, ASKED, "Observation: "), chats(fault, "oldest first")
    server.fault = lambda *request: answer(*request) or profile(*request)
    assert cli(command(server, tmp_path)) == cli(command(server, tmp_path)) == 0  # kept, too
    (row,) = [row for row in read(tmp_path) if row["status"] == status]
    assert (row["id"], row["text"], row["prediction"]) == (QUERY.id, "", None)
    assert read(tmp_path, "results.json")[0]["metrics"]["n"] == 4
    for line in read(tmp_path, "personas.jsonl"):
        assert (line["profile"], line["usage"]["lost"]) == ("", 1)


TOLD = [(chats(CUT), "4 REPLIES OF 4 WERE CUT")]
TOLD += [(nothing, "\n2/2 users, 4 calls (0 from the cache), 0k tokens\n")]


@pytest.mark.parametrize("fault, told", TOLD, ids=["cut", "progress"])
def test_what_a_run_tells(server, tmp_path, capsys, fault, told):
    server.fault = fault
    assert cli(command(server, tmp_path, method="prompt")) == 0
    assert told in "".join(capsys.readouterr())


def test_the_same_command_asks_nothing(server, usual, tmp_path, capsys):
    assert cli(command(server, tmp_path)) == cli(command(server, tmp_path)) == 0
    assert len(server.seen) == len(set(server.seen)) and files(tmp_path) == usual.files
    assert f"28 answers of it are in {tmp_path}/cache.sqlite" in capsys.readouterr().out
    assert {row["usage"]["kept"] - row["usage"]["calls"] for row in read(tmp_path)} == {0}


@pytest.mark.parametrize("provider", ["openai", "bedrock"])
def test_offline_needs_neither_network_nor_key(server, tmp_path, monkeypatch, provider):
    names = f"--provider {provider} --model m --embed-model e --wiki-base-url {server.url}"
    size = "--task lamp2m --users 1 --queries-per-user 1"
    run = f"{size} {names} --cache {tmp_path}/c --output {tmp_path}"
    monkeypatch.setitem(os.environ, "OPENAI_BASE_URL", f"{server.url}/v1")
    assert cli(f"{run}/a".split()) == 0
    monkeypatch.setattr("os.environ", {})
    monkeypatch.setattr("socket.socket.connect", lambda *address: pytest.fail(str(address)))
    assert cli(f"{run}/b --offline".split()) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("size", [1e9, 1e-8])  # too large, too small for half precision
def test_embeddings_are_kept_as_unit_rows_of_one_dimension(tmp_path, size):
    path, width, llm = f"{tmp_path}/c?mode=ro#%41 ü", 2, SimpleNamespace(model="m", embed_model="e")
    llm.embed = lambda texts: [[size] * width] * len(texts)
    rows = Cached(llm, Cache(path)).embed(["a", "b", "a"])
    assert rows.tolist() == [pytest.approx([0.5**0.5] * 2, abs=1e-3)] * 3
    width = 3
    with pytest.raises(Problem, match=f"{re.escape(path)}.* 2 .* 3"):
        Cached(llm, Cache(path)).embed(["c"])
    assert Cache(path).count("embeddings e") == 2 and os.listdir(tmp_path) == ["c?mode=ro#%41 ü"]


def test_all_zero_rows_are_told_once(tmp_path):
    llm = SimpleNamespace(model="m", embed_model="e", embed=lambda texts: [[0.0, 0.0]] * len(texts))
    model = Cached(llm, Cache(f"{tmp_path}/c"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        rows = [model.embed([text]).tolist() for text in "ab"]
    assert rows == [[[0, 0]]] * 2 and [str(told[0].message)] == [str(w.message) for w in told]


def test_what_is_stored_first_stays(tmp_path):
    one, other = Cache(f"{tmp_path}/c"), Cache(f"{tmp_path}/c")

    def slow(requests):
        return ["second" for _ in other.answers("m", requests, lambda same: ["first"])]

    assert one.answers("m", ["q"], slow) == other.answers("m", ["q"], slow) == ["first"]


SPOILED = {"folder": os.mkdir, "garbage": lambda path: path.write_bytes(b"no database " * 1000)}
SPOILED["earlier"] = lambda path: sqlite3.connect(path).execute("CREATE TABLE answers (answer)")


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_is_no_cache_is_refused_and_stays_as_it_is(tmp_path, spoil):
    path = tmp_path / "c"
    spoil(path)
    before = path.is_file() and path.read_bytes()
    with pytest.raises(Problem, match=f"^the cache {path} cannot be used.*name another --cache$"):
        Cache(str(path))
    assert before == (path.is_file() and path.read_bytes())


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/chat", "/w/"])
def test_a_cache_that_cannot_be_written_ends_the_run(server, usual, tmp_path, capsys, path):
    def spoil(n, at, sent):
        if at.startswith(path):
            Connection.last.execute("PRAGMA query_only = ON")

    server.fault = spoil
    assert cli(command(server, tmp_path)) == 1
    assert f"\nlamp.py: the cache {tmp_path}/cache.sqlite" in "\n" + capsys.readouterr().err
    server.fault = nothing
    assert cli(command(server, tmp_path)) == 0 and files(tmp_path) == usual.files
    assert set(server.seen) == usual.seen


def test_what_a_killed_writer_left_does_not_stop_offline(tmp_path):
    Cache(f"{tmp_path}/c").answers("m", [*range(50)], lambda asked: ["kept" * 500] * 50)
    writer = sqlite3.Connection(f"{tmp_path}/c")
    writer.execute("PRAGMA cache_size = 1")
    writer.execute("UPDATE replies SET answer = answer || answer")
    for end in ("", "-journal"):  # half written
        (tmp_path / f"killed{end}").write_bytes((tmp_path / f"c{end}").read_bytes())
    assert (tmp_path / "killed").read_bytes().count(b"kept") > 50 * 600
    assert Cache(f"{tmp_path}/killed", "rw").get("m", 49) == "kept" * 500


def test_processes_answer_as_threads_do_even_where_one_is_killed(server, usual, tmp_path):
    context = get_context("forkserver")
    context.set_forkserver_preload(["lamp", "pytest"])  # imported once
    with ProcessPoolExecutor(1, context) as pool:
        worker = pool.submit(os.getpid).result()
        server.fault = lambda n, *request: os.kill(worker, 9) if n == 35 else None
        with pytest.raises(Problem, match="^a worker process died.*the same command goes on.*$"):
            lamp.main(command(server, tmp_path), pool)
    assert len(read(tmp_path)) == 2
    with ProcessPoolExecutor(2, context) as pool:
        assert lamp.main(command(server, tmp_path), pool) == 0
    assert files(tmp_path) == usual.files


def test_workers_hash_seed_and_missing_docstrings_change_nothing(start, tmp_path):
    asked = ["--task", "lamp2m", "--method", "no-action,personaagent", "--output"]
    a, b = tmp_path / "a", tmp_path / "b"
    one = start([*asked, a, "--workers", 1], "-OO", PYTHONHASHSEED="0")
    other = start([*asked, b, "--workers", 8], PYTHONHASHSEED="1")
    out, _ = one.communicate()
    assert one.returncode == other.wait() == 0 and re.search("^personaagent +18 ", out, re.M)
    assert out.startswith(lamp.NO_MODEL) and out.endswith(f"{lamp.NO_MODEL}\n")
    assert files(a) == files(b) != {} and not [*tmp_path.rglob("*.sqlite")]


def test_the_recipe_for_a_cluster(server, usual, tmp_path):
    pytest.importorskip("distributed", reason="pip install -e '.[cluster]'")
    text = (HERE / "docs" / "cluster.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    given, script = json.dumps(command(server, tmp_path)), tmp_path / "run.py"
    script.write_text(re.sub(r"\[\"--task.*?\]", given, code, flags=re.S))
    settings = {**os.environ, "PYTHONPATH": str(HERE)}
    subprocess.run([sys.executable, script], env=settings, timeout=60, check=True)
    assert files(tmp_path) == usual.files


def test_a_folder_with_another_run_is_refused(server, tmp_path, capsys):
    assert cli(command(server, tmp_path, method="prompt")) == 0
    (path,) = tmp_path.rglob("results.json")
    path.write_text(path.read_text().replace('"data_hash": "', '"data_hash": "0'))
    assert cli(command(server, tmp_path, method="prompt")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lamp.py: ") and "data_hash" in last and "another --output" in last


def test_every_model_has_a_folder_of_its_own(server, tmp_path):
    models = ["a/b", "a_b", "a b", "é", "ü", f"/{'x' * 300}/1", f"/{'x' * 300}/2"]
    for name in models:
        assert cli(command(server, tmp_path, "--limit", 1, "--model", name, method="prompt")) == 0
    names = "\n".join(path.name for path in (tmp_path / "lamp2m").iterdir())
    assert len(re.findall(r"^[-.=\w]{9,150}$", names, re.A | re.M)) == len(models)


def test_what_a_poor_terminal_cannot_print_is_replaced(server, start, tmp_path):
    server.fault = chats(UNFIT, ASKED)
    given = command(server, tmp_path, "--workers", 1, method="prompt")
    process = start(given, PYTHONIOENCODING="ascii")
    out, err = process.communicate()
    assert process.returncode == 1 and "caf? ? " in out and "Traceback" not in err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out + err)


WRONG = """\
--cache c; --offline; --embed-model e; --embed-base-url http://h/v1; --model m; --provider bedrock
--base-url http://h/v1; --nothing; --task lamp4; --method nothing; --users -1; --top-k 0; --data=
--workers few; --temperature -1; --temperature nan; --model m --base-url http://u:secret@h/v1
--model m --base-url http://h/v1?key=secret; --model m --embed-base-url http://u:secret@h/v1
--wiki-base-url http://u:secret@h; OPENAI_BASE_URL=http://u:secret@h/v1 --model m --embed-model e
AWS_REGION=a AWS_BEARER_TOKEN_BEDROCK=b AWS_ENDPOINT_URL_BEDROCK_RUNTIME=//:secret@h --model m"""


@pytest.mark.parametrize("given", re.split("; |\n", WRONG))
def test_what_cannot_be_meant_is_refused(given, tmp_path, capsys, monkeypatch):
    settings = dict(re.findall(r"([A-Z_]{4,})=(\S+)", given))
    monkeypatch.setattr("os.environ", {**os.environ, **settings})
    argv = re.sub(r"[A-Z_]{4,}=\S+", "", given).split()
    with pytest.raises(SystemExit, match="2"):
        cli(["--task", "lamp1", "--output", str(tmp_path), *argv])
    assert re.search("(?s)^(?!.*secret).*lamp.py: error: ", "".join(capsys.readouterr()))


# option: value, and what it changes in a run of one user that finds all else in the cache
OPTIONS = {
    "task": ("lamp3", lambda run: "/lamp3/" in run.names),
    "method": ("icl,prompt,personaagent", lambda run: "/icl-" in run.names),
    "data": ("{data}/time/LaMP_2/new/dev", lambda run: "-data=dev" in run.names),
    "users": ("3", lambda run: len(run.lines) == 3),
    "queries_per_user": ("1", lambda run: len(run.rows) == 1),
    "limit": ("1", lambda run: len(run.rows) == 1),
    "max_history": ("5", lambda run: run.lines[0]["history"] == 5),
    "seed": ("1", lambda run: run.chats and not run.texts),
    "top_k": ("2", lambda run: run.rows[0]["steps"][0]["observation"].count("\n- ") == 1),
    "batch": ("2", lambda run: len(run.lines[0]["iterations"][0]["samples"]) == 2),
    "iterations": ("2", lambda run: len(run.lines[0]["iterations"]) == 2),
    "max_steps": ("1", lambda run: run.rows[0]["status"] == "forced"),
    "workers": ("1 --seed 2 --users 2", lambda run: len(run.ports) == 2),  # and Wikipedia's
    "output": ("{root}/out", lambda run: "/out/lamp2m/" in run.names),
    "cache": ("{root}/new/kept", lambda run: "/new/kept" in run.names),
    "offline": ("--seed 3", lambda run: run.code == 1),
    "provider": ("bedrock", lambda run: "/model/m/converse" in run.paths),
    "model": ("x", lambda run: run.chats[0]["model"] == "x"),
    "embed_model": ("x", lambda run: run.texts[0]["model"] == "x"),
    "base_url": ("{url}/x/v1 --seed 4", lambda run: "/x/v1/chat/completions" in run.paths),
    "embed_base_url": ("{url}/x/v1 --embed-model y", lambda run: "/x/v1/embeddings" in run.paths),
    "wiki_base_url": ("{url}/x", lambda run: "/x/w/rest.php/v1/search/page" in run.paths),
    "temperature": ("0.5", lambda run: run.chats[0]["temperature"] == 0.5),
    "max_tokens": ("65", lambda run: run.chats[0]["max_tokens"] == 65),
}


@pytest.mark.parametrize("name", vars(lamp.arguments(["--task", "lamp1"])))
def test_every_option_acts(server, usual, tmp_path, name):
    value, acts = OPTIONS[name]
    more = f"--{name.replace('_', '-')} {value}".format(url=server.url, root=tmp_path, data=SAMPLE)
    short = ["--method", "personaagent", "--users", 1, "--cache", usual.cache]
    assert acts(observe(server, tmp_path, *short, *more.split())) and not acts(usual)
