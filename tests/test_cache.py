"""The cache of answers: its keys, its one file under threads, processes and damage, and runs replayed without any server."""
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lamp import HERE, cli
from metrics import read_lines
from persona_agent import Cached, Reply, Usage
from tests import faults
from tests.test_wire_runs import ACCESS, SECRET, bare, rows, server  # noqa: F401: fixtures
from tools import Cache, ContextOverflow, ServiceError

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which tag?"}]
METHODS = "prompt,no-alignment,personaagent"


class Model:
    """Answers with how often it was asked, embeds with random numbers; raises `fault` where there is one."""

    def __init__(self):
        self.model, self.embed_model, self.temperature, self.fault, self.asked, self.texts = "m", "e", 0.1, None, 0, []

    def chat(self, messages, stop=None, max_tokens=512):
        self.asked += 1
        if self.fault:
            raise self.fault
        return Reply(f"answer {self.asked}", "length", Usage(2, 70, 30, 5, 1 / 3))

    def embed(self, texts, query=False):
        self.texts.append(list(texts))
        if self.fault:
            raise self.fault
        return np.random.default_rng(sum(map(len, self.texts))).normal(size=(len(texts), 8)).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.db"


def stored(path):
    """The lines of a cache file."""
    with sqlite3.connect(path) as db:
        return db.execute("SELECT request, model, answer FROM answers").fetchall()


# ---------------------------------------------------------------------------------------------------- requests

@pytest.mark.parametrize("again", ["the same cache", "another start", "offline"])
def test_same_request_is_asked_once_with_the_same_text_finish_and_usage(path, again):
    llm, cache = Model(), Cache(path)
    first = Cached(llm, cache).chat(ASK, ["\nObservation"], 64)
    cache = cache if again == "the same cache" else Cache(path, again == "offline")
    assert Cached(llm, cache).chat(ASK, ["\nObservation"], 64) == first
    assert first == Reply("answer 1", "length", Usage(2, 70, 30, 5, 1 / 3)) and llm.asked == 1 and cache.found == 1


@pytest.mark.parametrize("change", [
    {"messages": ASK[1:]}, {"messages": [{"role": "user", "content": "Be brief."}, ASK[1]]}, {"messages": [*ASK, *ASK]},
    {"stop": None}, {"stop": ["\nThought"]}, {"max_tokens": 65}, {"temperature": 0.2}, {"model": "m2"},
    {"kind": "bedrock"}], ids=str)
def test_any_changed_parameter_is_another_request(path, change):
    llm, cache = Model(), Cache(path)

    def ask(messages=ASK, stop=("\nObservation",), max_tokens=64, temperature=0.1, model="m", kind="openai"):
        llm.temperature, llm.model = temperature, model
        return Cached(llm, cache, kind).chat(messages, stop, max_tokens).text

    assert [ask(), ask(**change), ask(), ask(**change)] == ["answer 1", "answer 2"] * 2


def test_reply_that_is_no_valid_unicode_is_kept(path):
    llm = Model()
    llm.chat = lambda *request: Reply("half an emoji: \ud83d")
    assert Cached(llm, Cache(path)).chat(ASK).text == Cached(Model(), Cache(path)).chat(ASK).text == "half an emoji: \ud83d"


def test_embeddings_are_kept_by_text_in_order_and_to_the_last_bit(path):
    llm = Model()
    cached = Cached(llm, Cache(path))
    two = cached.embed(["a", "b"])
    three = cached.embed(["b", "c", "a"])
    assert llm.texts == [["a", "b"], ["c"]] and three.shape == (3, 8) and three.dtype == two.dtype == np.float32
    assert [row.tobytes() for row in three[[2, 0]]] == [row.tobytes() for row in two]


@pytest.mark.parametrize("change", [{"query": True}, {"embed_model": "e2"}, {"kind": "bedrock"}], ids=str)
def test_embedding_of_a_query_another_model_or_provider_is_another_request(path, change):
    llm, cache = Model(), Cache(path)

    def embed(query=False, embed_model="e", kind="openai"):
        llm.embed_model = embed_model
        return Cached(llm, cache, kind).embed(["a"], query)

    embed(), embed(**change), embed(), embed(**change)
    assert llm.texts == [["a"], ["a"]]


def test_text_that_occurs_twice_in_a_batch_is_asked_once(path):
    llm = Model()
    found = Cached(llm, Cache(path)).embed(["a", "b", "a"])
    assert llm.texts == [["a", "b"]] and (found[0] == found[2]).all() and (found[0] != found[1]).any()


def test_no_texts_have_no_embeddings(path):
    assert Cached(Model(), Cache(path)).embed([]).shape == (0, 0)


@pytest.mark.parametrize("fault", [ServiceError("HTTP 503", 503), ContextOverflow("too long", 400)], ids=["wire", "overflow"])
def test_failure_is_stored_nowhere_and_the_next_call_asks_again(path, fault):
    llm, cache = Model(), Cache(path)
    cached, llm.fault = Cached(llm, cache), fault
    for call in (lambda: cached.chat(ASK), lambda: cached.embed(["a"])):
        with pytest.raises(type(fault), match=str(fault)):
            call()
    assert not stored(path)
    llm.fault = None
    assert cached.chat(ASK).text == "answer 2" and cached.embed(["a"]).shape == (1, 8) and len(stored(path)) == 2


# ---------------------------------------------------------------------------------------------------- one file for all

def test_first_stored_answer_wins(path):
    one, other = Cache(path), Cache(path)
    late = one.answers("m", ["q"], lambda new: other.answers("m", ["q"], lambda new: ["first"]) and ["second"])
    assert late == ["first"] == other.answers("m", ["q"], None) and len(stored(path)) == 1


def test_many_threads_share_one_cache(path):
    cache = Cache(path)
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(cache.answers, "m", [n % 20, n % 7], lambda new, n=n: [f"{n} on {q}" for q in new])
                 for n in range(100)]
    found = {(n % 20, future.result()[0]) for n, future in enumerate(asked)}
    assert len(found) == len(stored(path)) == 20 and all(text.endswith(f" on {q}") for q, text in found)
    assert cache.found + cache.asked == 200


def test_several_processes_fill_one_file_at_the_same_time(path):
    program = ("import sys, tools\nsys.stdin.readline()\ncache = tools.Cache(sys.argv[1])\n"
               "print([cache.answers('m', [n], lambda new: [sys.argv[2]])[0] for n in range(40)])")
    running = [subprocess.Popen([sys.executable, "-c", program, str(path), name], cwd=HERE, text=True, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name in "abc"]
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120) for process in running]
    assert [err for _, err in said] == [""] * 3 and len({out for out, _ in said}) == 1 and len(stored(path)) == 40


def test_file_stands_alone_without_a_write_ahead_log(path):
    seen = set()
    cache = Cache(path)
    for n in range(3):
        cache.answers("m", [n], lambda new: seen.update(os.listdir(path.parent)) or ["x"])
        seen.update(os.listdir(path.parent))
    assert seen == {"cache.db"}


def test_path_may_hold_any_character(tmp_path):
    path = tmp_path / "a?mode=ro#b%41 ü.db"
    Cache(path).answers("m", [1], lambda new: ["x"])
    assert os.listdir(tmp_path) == [path.name] and Cache(path, offline=True).answers("m", [1], None) == ["x"]


def test_commit_cut_off_by_a_kill_is_undone_by_the_next_start(path):
    Cache(path).answers("m", [1], lambda new: ["kept"])
    program = ("import os, sqlite3, sys\ndb = sqlite3.connect(sys.argv[1])\ndb.execute('PRAGMA cache_size = 1')\n"
               "db.executemany('INSERT INTO answers VALUES (?, ?, ?)', ((b'%d' % n, 'm', 'x' * 5000) for n in range(200)))\n"
               "os.kill(os.getpid(), 9)")
    subprocess.run([sys.executable, "-c", program, str(path)], timeout=60)
    assert Path(f"{path}-journal").stat().st_size and path.stat().st_size > 500_000  # half written
    assert Cache(path).answers("m", [1], None) == ["kept"] and len(stored(path)) == 1


# ---------------------------------------------------------------------------------------------------- offline

def test_offline_reads_a_file_that_nobody_may_write(path):
    Cache(path).answers("m", [1], lambda new: ["x"])
    before = path.read_bytes(), path.stat().st_mtime_ns
    path.chmod(0o444)
    path.parent.chmod(0o555)  # root may write all the same
    try:
        cache = Cache(path, offline=True)
        assert cache.answers("m", [1], None) == ["x"]
        with pytest.raises(ServiceError):
            cache.answers("m", [2], None)
        assert os.listdir(path.parent) == [path.name]
    finally:
        path.parent.chmod(0o755)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_offline_miss_names_file_model_what_there_is_and_the_request(path):
    Cached(Model(), Cache(path)).embed(["a"])
    asked = Model()
    with pytest.raises(ServiceError) as e:
        Cached(asked, Cache(path, offline=True)).chat([{"role": "user", "content": "Which half\ud83d tag?"}])
    assert all(part in str(e.value) for part in (str(path), "openai/e", "none of openai/m", "Which half", "--offline"))
    assert asked.asked == 0 and e.value.wait is False
    str(e.value).encode()  # can be printed


BROKEN = ["missing", "garbage", "short garbage", "foreign", "foreign answers", "truncated", "directory", "empty"]


def broken(path, fault):
    """A path with one fault, by name."""
    if "garbage" in fault:
        path.write_bytes(b"no database, " * (1 if fault.startswith("short") else 1000))
    elif fault.startswith("foreign"):
        with sqlite3.connect(path) as db:
            db.execute(f"CREATE TABLE {'answers' if fault.endswith('answers') else 'bookmarks'} (address TEXT)")
    elif fault == "truncated":
        Cache(path).answers("m", list(range(100)), lambda new: ["x" * 500] * 100)
        os.truncate(path, path.stat().st_size // 2)
    elif fault == "directory":
        path.mkdir()
    elif fault == "empty":
        path.touch()


@pytest.mark.parametrize("fault, offline", [(fault, offline) for fault in BROKEN for offline in (True, False)
                                            if offline or fault not in ("missing", "empty")])
def test_file_that_is_no_cache_gets_one_line_and_stays_as_it_is(path, fault, offline):
    broken(path, fault)
    before = path.read_bytes() if path.is_file() else os.path.exists(path)
    with pytest.raises(ServiceError) as e:
        Cache(path, offline)
    assert str(path) in str(e.value) and "cannot be used" in str(e.value) and "\n" not in str(e.value)
    assert before == (path.read_bytes() if path.is_file() else os.path.exists(path))
    assert set(os.listdir(path.parent)) <= {path.name}


# ---------------------------------------------------------------------------------------------------- command line

def flags(root, *more, method=METHODS):
    return ["--task", "lamp2m", "--method", method, "--users", "1", "--output", str(root), *map(str, more)]


def names(server):
    """The model flags of a run over `server`, as an offline run needs them too."""
    return ["--model", "m", "--embed-model", "e", "--wiki-base-url", server.url]


def record(server, root, path, *more, **which):
    """The exit code of a run over `server` that fills the cache."""
    return cli(flags(root, *names(server), "--base-url", server.url + "/v1", "--cache", path, *more, **which))


def table(capsys):
    """The table of metrics that a run has printed."""
    names = tuple(METHODS.split(","))
    return [line for line in capsys.readouterr().out.split("\n") if line.startswith(names) and ": " not in line]


def answers(root):
    """`rows` without the seconds that our side took."""
    return {key: {k: v for k, v in row.items() if k != "seconds"} for key, row in rows(root).items()}


def count(server):
    """The list of (path, raw body) of what reaches `server` from now on."""
    sent = []
    server.fault = lambda path, raw: sent.append((path, raw.decode()))
    return sent


@pytest.fixture
def unplugged(monkeypatch):
    """A function that ends all requests: a list of those tried all the same."""
    def unplug():
        tried = []
        monkeypatch.setattr("requests.Session.request", lambda self, method, url, **more: tried.append(url) or 1 / 0)
        return tried
    return unplug


def test_offline_run_repeats_a_run_without_any_request_or_key(server, tmp_path, path, capsys, unplugged):
    assert record(server, tmp_path / "a", path) == 0
    expected, before, tried = table(capsys), path.read_bytes(), unplugged()
    assert cli(flags(tmp_path / "b", *names(server), "--cache", path, "--offline")) == 0
    assert table(capsys) == expected and len(expected) == 3
    assert answers(tmp_path / "b") == answers(tmp_path / "a") and len(answers(tmp_path / "b")) == 9
    assert not tried and path.read_bytes() == before


def test_stand_in_run_is_repeated_offline(tmp_path, path, unplugged):
    assert cli(flags(tmp_path / "a", "--cache", path)) == 0
    tried = unplugged()
    assert cli(flags(tmp_path / "b", "--cache", path, "--offline")) == 0
    assert answers(tmp_path / "b") == answers(tmp_path / "a") and not tried


def test_run_through_bedrock_is_repeated_offline_without_aws_settings(server, tmp_path, path, monkeypatch, unplugged):
    through = ["--provider", "bedrock", "--model", "m", "--wiki-base-url", server.url, "--cache", path]
    with monkeypatch.context() as settings:
        for name, value in {"REGION": "us-east-1", "ENDPOINT_URL_BEDROCK_RUNTIME": server.url, "ACCESS_KEY_ID": ACCESS,
                            "SECRET_ACCESS_KEY": SECRET}.items():
            settings.setenv(f"AWS_{name}", value)
        assert cli(flags(tmp_path / "a", *through)) == 0
    tried = unplugged()
    assert cli(flags(tmp_path / "b", *through, "--offline")) == 0
    assert answers(tmp_path / "b") == answers(tmp_path / "a") and len(answers(tmp_path / "b")) == 9 and not tried


def test_unreachable_wikipedia_is_repeated_offline_with_the_same_answers(server, tmp_path, path, capsys, unplugged):
    away = ["--wiki-base-url", faults.dead_address()]
    assert record(server, tmp_path / "a", path, *away) == 0
    told = [line for line in capsys.readouterr().out.split("\n") if "WIKIPEDIA WAS NOT REACHED" in line]
    tried = unplugged()
    assert cli(flags(tmp_path / "b", *names(server), *away, "--cache", path, "--offline")) == 0
    assert answers(tmp_path / "b") == answers(tmp_path / "a") and not tried
    assert len(told) == 1 and told[0].split(".")[0] in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--cache", "c", "--base-url", "http://127.0.0.1:9/v1"]], ids=["no cache", "no model"])
def test_offline_without_a_cache_or_a_models_name_is_refused(tmp_path, capsys, more):
    assert cli(flags(tmp_path, *more, "--offline")) == 2
    err = capsys.readouterr().err
    assert "--offline needs --cache FILE, and --model" in err and err.count("\n") == 1


def test_cache_in_a_missing_folder_gets_one_line(tmp_path, capsys):
    path = tmp_path / "nowhere" / "cache.db"
    assert cli(flags(tmp_path, "--cache", path)) == 1
    err = capsys.readouterr().err
    assert f"the cache {path} cannot be used" in err and err.count("\n") == 1


def test_offline_run_that_misses_something_says_what_and_is_completed_online(server, tmp_path, path, capsys):
    assert record(server, tmp_path / "a", path, method="prompt") == 0
    offline = flags(tmp_path / "b", *names(server), "--cache", path, "--offline", method="prompt,rag-4")
    assert cli(offline) == 1
    assert "3 QUERIES FAILED" in capsys.readouterr().out and len(rows(tmp_path / "b")) == 3
    missed, = (read_lines(f) for f in tmp_path.rglob("rag-4*/errors.jsonl"))
    assert len(missed) == 3 and all(f"{path} has answers of openai/m, but none of openai/e to: " in e["error"] for e in missed)
    sent = count(server)
    assert record(server, tmp_path / "b", path, method="prompt,rag-4") == 0 and len(rows(tmp_path / "b")) == 6
    assert sum("/chat/" in where for where, _ in sent) == 3 + 1  # and the one that tries the server
    shutil.rmtree(tmp_path / "b")
    assert cli(offline) == 0


def test_runs_share_embeddings_and_profiles_through_the_cache(server, tmp_path, path):
    first = count(server)
    assert record(server, tmp_path / "a", path, method="no-alignment") == 0
    second = count(server)
    assert record(server, tmp_path / "a", path, "--top-k", "2", method="no-alignment,personaagent") == 0

    def embedded(sent):
        return [text for where, raw in sent if "/embeddings" in where for text in json.loads(raw)["input"]]

    once, new = embedded(first), embedded(second)
    assert len(once) == len(set(once)) > 20 and len(new) == len(set(new)) and set(new) & set(once) == {"OK"}  # tries the server
    assert [sum("oldest first" in raw for _, raw in sent) for sent in (first, second)] == [1, 0]
    assert len(list(tmp_path.rglob("results.json"))) == 3


def test_full_cache_asks_for_nothing_more_that_it_cannot_keep(tmp_path):
    cache, asked = Cache(tmp_path / "cache.db"), []
    cache.answers("m", ["kept"], lambda new: ["x"])
    cache._db.execute("PRAGMA max_page_count = 1")
    for request in ("first", "second"):
        with pytest.raises(ServiceError, match="is full"):
            cache.answers("m", [request], lambda new: asked.append(new) or ["x" * 100_000])
    assert asked == [["first"]] and cache.answers("m", ["kept"], None) == ["x"]
