"""Runs that are killed, stopped, refused or out of disk space, and what the same command makes of them afterwards."""
import json
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context

import pytest

import lamp
from lamp import HERE, SAMPLE, TASKS, cli, load
from metrics import read_lines
from tests.faults import Answer, wait
from tests.test_wire_runs import BAD, bare, serve  # noqa: F401: a fixture

resource = pytest.importorskip("resource")  # POSIX
METHODS = "prompt,no-alignment,personaagent"
PATIENCE = 300  # seconds that a test waits at most, whatever else the machine does


@pytest.fixture
def server():
    running = serve()
    running.handle_error = lambda *request: None  # its clients die here
    yield running
    running.shutdown()


@pytest.fixture
def start():
    """A function that runs the command as a process of its own. limit: bytes that a file may have at most."""
    started = []

    def run(argv, limit=None, code=("lamp.py",)):
        def prepare():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        started.append(subprocess.Popen([sys.executable, *code, *argv], cwd=HERE, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, preexec_fn=prepare))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def flags(server, root, *more, method=METHODS):
    return ["--task", "lamp2m", "--method", method, "--model", "m", "--embed-model", "e", "--base-url", server.url + "/v1",
            "--wiki-base-url", server.url, "--output", str(root), *map(str, more)]


def end(process):
    """(exit code, stdout, stderr) of a process once it has ended."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def timeless(data):
    """Data without what every run measures anew."""
    if isinstance(data, dict):
        return {k: timeless(v) for k, v in data.items() if k != "seconds"}
    return [timeless(v) for v in data] if isinstance(data, list) else data


def lines(root):
    """{(method, file, id of the query or user): line} of all run folders. Every line must be whole, and its id occur once."""
    found = {}
    for results in root.rglob("results.json"):
        for file, key in (("predictions.jsonl", "id"), ("personas.jsonl", "user_id")):
            text = (results.parent / file).read_text() if (results.parent / file).exists() else ""
            assert text.endswith("\n") or not text
            for row in map(json.loads, text.splitlines()):
                place = json.loads(results.read_text())["method"], file, row[key]
                assert place not in found
                found[place] = timeless(row)
    return found


def hold(server):
    """Let the server keep every request to itself, but for the one that tries it: (requests that arrived, gate to open)."""
    arrived, gate = [], threading.Event()

    def fault(path, raw):
        if raw and b"the word OK" not in raw:
            arrived.append(raw)
            gate.wait()

    server.fault = fault
    return arrived, gate


def until(true):
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        wait(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """`lines` of a run that nothing happens to."""
    running, root = serve(), tmp_path_factory.mktemp("undisturbed")
    assert cli(flags(running, root)) == 0
    running.shutdown()
    found = lines(root)
    assert len(found) == 3 * 18 + 2 * 6
    return found


# ---------------------------------------------------------------------------------------------------- killed

def bad_wire():
    """A function from a request to a fault, for three of ten: drawn from the request and how often it came."""
    seen = {}

    def fault(path, raw):
        n = seen[path, raw] = seen.get((path, raw), 0) + 1
        draw = random.Random(f"7 {path} {raw} {n}")
        return draw.choice(BAD) if draw.random() < 0.3 and n <= 3 and b"OK" not in raw else None

    return fault


NO_PAUSE = ("-c", "import runpy, time; time.sleep = lambda s: None; runpy.run_path('lamp.py', run_name='__main__')")


@pytest.mark.parametrize("wire, kills, latest, code", [(lambda: lambda path, raw: None, 10, 110, ("lamp.py",)),
                                                       (bad_wire, 5, 250, NO_PAUSE)], ids=["good wire", "bad wire"])
def test_run_killed_at_any_moment_ends_as_an_undisturbed_one(server, start, undisturbed, tmp_path, wire, kills, latest, code):
    draw, lock, fault, n, at, killed = random.Random(4), threading.Lock(), wire(), 0, 0, 0
    updates, done, again = [], [], []  # updates of personas asked for; personas on disk; updates of those

    def watch(path, raw):
        """Kills the process while its request number `at` waits for an answer."""
        nonlocal n
        with lock:
            n, mine, answer = n + 1, n + 1, fault(path, raw)
            if b"prompt engineering assistant" in raw and not answer:
                updates.append("\n".join(m["content"] for m in json.loads(raw)["messages"]))
                again.extend(persona for persona in done if persona in updates[-1])
        wait(0.005)
        if mine == at:
            process.kill()
        return answer

    server.fault = watch
    for at in [0, *(draw.randint(1, latest) for _ in range(kills - 1)), None]:
        n, process = 0, start(flags(server, tmp_path, "--workers", "2"), code=code)
        if at == 0:
            wait(draw.uniform(0.1, 0.5))
            process.kill()
        status, _, err = end(process)
        assert status in (0, -signal.SIGKILL), err
        killed += status != 0
        done = [line["initial"] for file in tmp_path.rglob("personaagent*/personas.jsonl") for line in read_lines(file)]
    assert status == 0 and killed > kills // 2
    assert lines(tmp_path) == undisturbed
    assert not again and 6 <= len(updates) <= 6 + 2 * killed  # at most what 2 workers were at


def test_run_is_refused_while_another_is_alive_and_goes_on_once_that_was_killed(server, start, tmp_path, capsys):
    arrived, gate = hold(server)
    command = flags(server, tmp_path, method="prompt")
    process = start(command)
    until(lambda: arrived)
    assert cli(command) == 2
    err = capsys.readouterr().err
    assert "is in use by another run" in err and err.count("\n") == 1
    process.kill()
    end(process)
    gate.set()
    assert cli(command) == 0 and len(lines(tmp_path)) == 18


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_worker_process_that_outlives_its_run_does_not_keep_the_folder(tmp_path):
    folder, ready = lamp.Folder(tmp_path, {}), get_context("fork").Event()
    worker = get_context("fork").Process(target=lambda: (ready.set(), time.sleep(60)))
    worker.start()
    try:
        ready.wait(30)
        folder.held.close()  # as the end of the process that holds it does
        lamp.Folder(tmp_path, {}).held.close()
    finally:
        worker.kill()


def test_torn_last_lines_are_dropped_and_made_anew(server, undisturbed, tmp_path):
    command = flags(server, tmp_path, method="personaagent")
    assert cli(command) == 0
    answers, personas = (next(tmp_path.rglob(f)) for f in ("predictions.jsonl", "personas.jsonl"))
    whole, people = (file.read_bytes().splitlines(keepends=True) for file in (answers, personas))
    lost = json.loads(people[-1])["user_id"]
    kept = [line for line in whole if json.loads(line)["user_id"] != lost]
    personas.write_bytes(b"".join(people[:-1]) + people[-1][:-1])  # but for the line feed it is whole
    answers.write_bytes(b"".join(kept[:-1]) + kept[-1][:99])
    sent = []
    server.fault = lambda path, raw: sent.append(raw)
    assert cli(command) == 0
    assert lines(tmp_path) == {place: line for place, line in undisturbed.items() if place[0] == "personaagent"}
    assert sum(b"prompt engineering assistant" in raw for raw in sent) == 1
    assert answers.read_bytes().startswith(b"".join(kept[:-1])) and personas.read_bytes().startswith(b"".join(people[:-1]))


# ---------------------------------------------------------------------------------------------------- stopped

def test_ctrl_c_takes_no_more_work_saves_what_is_in_flight_and_says_how_to_go_on(server, start, tmp_path):
    arrived, gate = hold(server)
    command = flags(server, tmp_path, "--workers", "4", method="prompt")
    process = start(command)
    until(lambda: len(arrived) == 4)
    process.send_signal(signal.SIGINT)
    process.stderr.readline()
    assert "requests in flight are finished" in process.stderr.readline()
    gate.set()
    status, _, err = end(process)
    assert status == 130 and "the same command goes on from there" in err and "Traceback" not in err
    assert len(arrived) == 4 and len(lines(tmp_path)) == 4 and not list(tmp_path.rglob("errors.jsonl"))
    assert cli(command) == 0 and len(lines(tmp_path)) == 18 and len(arrived) == 18


def test_ctrl_c_twice_ends_at_once_though_the_server_hangs(server, start, tmp_path):
    arrived, gate = hold(server)
    process = start(flags(server, tmp_path, method="prompt"))
    until(lambda: arrived)
    process.send_signal(signal.SIGINT)
    process.stderr.readline()
    assert "Ctrl-C again stops at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    status, _, err = end(process)
    assert status == 130 and "the same command goes on from there" in err and "Traceback" not in err
    gate.set()


# ---------------------------------------------------------------------------------------------------- no room

@pytest.mark.parametrize("limit", [100, 20_000])
def test_full_disk_ends_the_run_with_one_line_and_loses_nothing(server, start, undisturbed, tmp_path, limit):
    command = flags(server, tmp_path)
    status, _, err = end(start(command, limit))
    assert status == 1 and err.count("\n") == 1 and str(tmp_path) in err and "File too large" in err
    before = lines(tmp_path)
    assert before.items() <= undisturbed.items() and len(before) < len(undisturbed)
    assert bool(before) == (limit > 100)
    assert cli(command) == 0 and lines(tmp_path) == undisturbed


def test_full_cache_is_named_in_the_failures_and_keeps_what_it_holds(server, start, undisturbed, tmp_path):
    cache = tmp_path / "cache.db"
    command = flags(server, tmp_path, "--users", "2", "--cache", cache)
    status, out, err = end(start(command, 60_000))
    assert status == 1 and f"the cache {cache} cannot be used" in out and "Traceback" not in out + err
    before = lines(tmp_path)
    assert before and before.items() <= undisturbed.items()
    with sqlite3.connect(cache) as db:
        held = db.execute("SELECT * FROM answers").fetchall()
    assert cli(command) == 0 and len(lines(tmp_path)) == 3 * 6 + 2 * 2 and lines(tmp_path).items() <= undisturbed.items()
    with sqlite3.connect(cache) as db:
        assert {*held} < {*db.execute("SELECT * FROM answers")}


def test_memory_that_could_not_be_embedded_is_not_empty_for_the_next_method(server, undisturbed, tmp_path):
    server.fault = lambda path, raw: Answer({"error": "no"}, 400) if "/embeddings" in path and b"tag: " in raw else None
    command = flags(server, tmp_path)
    assert cli(command) == 1 and {method for method, *_ in lines(tmp_path)} == {"prompt"}
    server.fault = lambda path, raw: None
    assert cli(command) == 0 and lines(tmp_path) == undisturbed


@pytest.mark.parametrize("place", ["below a file", pytest.param("read-only", marks=pytest.mark.skipif(
    os.geteuid() == 0, reason="root may write everywhere"))])
def test_output_that_cannot_be_written_gets_one_line_and_exit_2(server, tmp_path, capsys, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir(0o555)
    root = tmp_path / ("file" if place == "below a file" else "folder") / "runs"
    assert cli(flags(server, root, method="prompt")) == 2
    err = capsys.readouterr().err
    assert "cannot use the folder" in err and str(root) in err and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------- executors

class Elsewhere(Executor):
    """Runs jobs one after the other; they and their results go through pickle, as between processes."""

    def __init__(self):
        self.jobs, self.futures = [], []

    def submit(self, work, job):
        future = Future()
        future.set_result(pickle.loads(pickle.dumps(work(pickle.loads(pickle.dumps(job))))))
        self.jobs.append(job)
        self.futures.append(weakref.ref(future))
        return future


def test_processes_answer_as_threads_do(server, undisturbed, tmp_path):
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        assert lamp.main(flags(server, tmp_path, method="no-alignment,personaagent"), pool) == 0
    assert lines(tmp_path) == {place: line for place, line in undisturbed.items() if place[0] != "prompt"}


def test_jobs_and_results_are_plain_data(server, undisturbed, tmp_path):
    pool = Elsewhere()
    assert lamp.main(flags(server, tmp_path), pool) == 0 and lines(tmp_path) == undisturbed
    assert [job.user for job in pool.jobs] == load(TASKS["lamp2m"], SAMPLE)[0]
    assert all(pickle.loads(pickle.dumps(job)) == job for job in pool.jobs)
    rows = lamp.evaluate(pool.jobs[0]._replace(methods=["prompt"]))
    assert len(rows) == 3 and [list(row) for row in rows] == json.loads(json.dumps(rows))


def test_results_of_users_are_let_go_once_they_are_written(server, tmp_path, monkeypatch):
    pool, alive, append = Elsewhere(), [], lamp.Folder.append

    def count(*row):
        alive.append(sum(future() is not None for future in pool.futures))
        append(*row)

    monkeypatch.setattr(lamp.Folder, "append", count)
    assert lamp.main(flags(server, tmp_path, method="prompt"), pool) == 0
    assert alive == sorted(alive, reverse=True) and {alive[0], alive[-1]} == {6, 1} and len(alive) == 18
