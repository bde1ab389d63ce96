"""What the library costs, each as a ratio to the least that it could: python -m tests.bench [--megabytes 200] [names ..]

A round measures ours and the floor one after the other, so that what else the machine does hits both; a row shows the median
of the rounds' ratios and their range. The exit code is 1 where a median misses its target. A canned server in a process of
its own stands for the models.

chat        CPU time of a chat call / of a bare requests.Session.post of the same body.
question    CPU time of a question (two RAG actions, then the answer) / of three bare posts of its three chat bodies. The
            memory embeds with a local function, so that both sides send the same.
search      time of EpisodicMemory.search(k=4) / of rows @ query alone: float32, d = 384, one thread; the query's embedding is
            a constant.
load        time of choosing 100 users from a large LaMP-3 file / of a plain json.load of it, each a process with its start;
            and how far the peak of its memory is above that of the imports.
scheduling  time of evaluating `personaagent` for 64 users with 16 workers, each chat and embedding call taking 50 ms / those
            calls x 50 ms / 16. In brackets what bare posts in 16 threads reach, which is the machine's share.
one-user    the same for one user of three queries / the longest chain of calls that need each other x 50 ms. Both time
            lamp.run; what lamp.main does round it (reading the data, testing the connection) is left out.
import      time of a process that imports the modules / of one that imports requests and numpy.
coverage    no ratio: how often the bootstrap interval holds the truth, by simulation.
"""
import argparse
import asyncio
import contextlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import requests

import lamp
import metrics
from memory import Episode, EpisodicMemory
from persona_agent import OpenAICompatible, PersonaAgent
from tools import Http

ROOT, DELAY, WORKERS = Path(__file__).resolve().parent.parent, 0.05, 16
ENV = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}  # of child processes


REPLIES = {b"meticulous and critical evaluator": "Search for the kind of product, and mind that cheap things are judged strictly.",
           b"prompt engineering assistant": "You answer for a user who is strict with cheap things. Look into the memory. " * 8,
           b"User history, oldest first": "This user gives 4 most often, writes briefly, and minds how long a product lasts. " * 3}


async def serve(delay, actions):
    """A model without a mind, until killed: answers chat and embedding requests `delay` seconds after they came, to a question
    with `actions` RAG actions and then an answer. Any GET is answered at once, with the number of calls so far. Prints its port."""
    calls = 0

    async def talk(reader, writer):
        nonlocal calls
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size, answer = re.search(rb"(?i)content-length: (\d+)", head), calls
                body = await reader.readexactly(int(size[1]) if size else 0)
                if head.startswith(b"POST"):
                    calls, turn = calls + 1, body.count(b'"role": "assistant"')
                    step = f"Action: RAG\nAction Input: products that lasted {turn}" if turn < actions else "Final Answer: 4"
                    text = next((text for mark, text in REPLIES.items() if mark in body), f"Thought: I compare.\n{step}")
                    answer = {"choices": [{"message": {"content": text}}]} if b"/chat/" in head.split(b"\r\n")[0] else {
                        "data": [{"embedding": [1.0, len(text) % 7, 0.5]} for text in json.loads(body)["input"]]}
                    await asyncio.sleep(delay)
                data = json.dumps(answer).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def canned(delay=0.0, actions=1):
    """The address of `serve` in a process of its own."""
    code = f"import asyncio; from tests import bench; asyncio.run(bench.serve({delay}, {actions}))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def python(code, *args):
    """(seconds, peak MB, lines printed) of a piece of Python in a process of its own, start-up included."""
    code, start = code + "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)", time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True, check=True)
    *printed, peak = done.stdout.splitlines()
    return time.perf_counter() - start, float(peak), printed


def ratios(ours, floor, rounds, calls=1, clock=time.perf_counter):
    """time of ours() / time of floor() in each round, over `calls` calls of the one, then of the other."""
    def spent(function):
        start = clock()
        for _ in range(calls):
            function()
        return clock() - start

    spent(ours), spent(floor)
    return [spent(ours) / spent(floor) for _ in range(rounds)]


def against_posts(ours, llm, rounds, calls):
    """CPU time of ours() / of bare posts of the bodies that it sends."""
    with mock.patch.object(llm.http.session, "request", wraps=llm.http.session.request) as sent:
        ours()
    bodies, session = [json.loads(call.kwargs["data"]) for call in sent.call_args_list], requests.Session()
    url, headers = llm.base_url + "/chat/completions", {"Authorization": "Bearer key", "Content-Type": "application/json"}

    def bare():
        for body in bodies:
            session.post(url, data=json.dumps(body), headers=headers).json()

    return ratios(ours, bare, rounds, calls, time.process_time)


def bench_chat(args):
    messages = [{"role": "system", "content": "You help. " * 150}, {"role": "user", "content": "Which? " * 100}]
    with canned() as url:
        llm = OpenAICompatible("m", base_url=url, api_key="key")
        return [("CPU of a call / a bare post", against_posts(lambda: llm.chat(messages), llm, 25, 60), 1.3)]


def bench_question(args):
    memory = EpisodicMemory(lambda texts: np.ones((len(texts), 8)))
    memory.add([Episode(f"What is the score of review {i}?", "4") for i in range(100)])
    with canned(actions=2) as url:
        llm = OpenAICompatible("m", base_url=url, api_key="key")
        agent = PersonaAgent(llm, memory, "You help. " * 100)
        return [("CPU of 3 calls / 3 bare posts", against_posts(lambda: agent.answer("What is the score?"), llm, 25, 20), 1.6)]


def search_ratios(n):
    rng = np.random.default_rng(0)
    rows, query = rng.normal(size=(n, 384)).astype(np.float32), rng.normal(size=(1, 384))
    memory = EpisodicMemory(lambda texts: rows, lambda texts: query)
    memory.add([Episode("", "", text="")] * n)
    rows, unit = rows.copy(), (query[0] / np.linalg.norm(query)).astype(np.float32)
    return ratios(lambda: memory.search("q"), lambda: rows @ unit, 41, max(200_000 // n, 5))


def bench_search(args):
    code = "from tests import bench; print(bench.search_ratios({}))"  # in a process of its own, for the one thread
    return [(f"{n:,} rows / rows @ query", json.loads(python(code.format(n))[2][0]), 1.1) for n in (1000, 10_000, 100_000)]


def generate(folder, users, items, queries=1):
    """An official LaMP-3 partition: `queries` records for each user, with a profile of `items` reviews of 0.5 KB."""
    text = "A review of a product that I have used for a long time and would buy again. " * 6
    profile = [{"id": f"i{n}", "text": f"{n} {text}", "score": str(1 + n % 5), "date": f"20{n % 20:02}-01-02"} for n in range(items)]
    body, gold = json.dumps(profile), []
    folder.mkdir(parents=True)
    with open(folder / "dev_questions.json", "w") as out:
        for n in range(users * queries):
            question = ("What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
                        f"further explanation. review: number {n}")
            record = {"id": str(n), "input": question, "user_id": n // queries, "profile": None}
            out.write(("," if n else "[") + json.dumps(record).replace("null", body) + "\n")
            gold.append({"id": str(n), "output": "4"})
        out.write("]")
    (folder / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_3", "golds": gold}))


def bench_load(args):
    with tempfile.TemporaryDirectory() as root:
        generate(Path(root, "dev"), args.megabytes * 10, 190)
        small = python("import lamp")[1]
        runs = [(python("import sys, lamp; lamp.load(lamp.TASKS['lamp3'], sys.argv[1])", root),
                 python("import sys, json; json.load(open(sys.argv[1]))", f"{root}/dev/dev_questions.json")) for _ in range(5)]
    return [(f"100 users of {args.megabytes} MB / json.load", [ours[0] / plain[0] for ours, plain in runs], 1.0),
            (f"peak memory (json.load {runs[0][1][1]:.0f} MB)", [ours[1] - small for ours, _ in runs], 100, " MB")]


def chain(folder):
    """The longest chain of calls in a run of one user: the profile (the history is embedded meanwhile), in each iteration the
    longest simulation, its gradient and the update, then the longest answer; a RAG action embeds its query."""
    def turns(answer):
        return sum(1 + (step["action"] == "RAG") for step in answer["steps"])

    line, = metrics.read_lines(folder / "personas.jsonl")
    aligned = sum(max(turns(s["answer"]) for s in i["samples"]) + 2 for i in line["iterations"])
    return 1 + aligned + max(map(turns, metrics.read_lines(folder / "predictions.jsonl")))


def evaluate(url, users):
    """(seconds, calls, longest chain of calls if it is one user, else 0) of lamp.run."""
    run, found = lamp.run, []

    def timed(*given):
        before, start = requests.get(url).json(), time.perf_counter()
        results = run(*given)
        found.extend([time.perf_counter() - start, requests.get(url).json() - before])
        return results

    with tempfile.TemporaryDirectory() as root:
        generate(Path(root, "data"), users, 12, queries=3)
        with mock.patch.object(lamp, "run", timed), contextlib.redirect_stdout(io.StringIO()):
            assert lamp.main(["--task", "lamp3", "--data", f"{root}/data", "--base-url", url, "--model", "m", "--embed-model", "e",
                              "--workers", str(WORKERS), "--output", f"{root}/runs"]) == 0
        return *found, chain(next(Path(root).rglob("personas.jsonl")).parent) if users == 1 else 0


def posts(url, calls, threads):
    """Seconds of so many bare posts."""
    session, start = Http(threads).session, time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: session.post(url + "/chat/completions", json={}).json(), range(calls)))
    return time.perf_counter() - start


def bench_scheduling(args, users=64, workers=WORKERS, rounds=3, what="64 users"):
    found = []
    with canned(DELAY) as url:
        for _ in range(rounds):
            seconds, calls, longest = evaluate(url, users)
            floor = (longest or calls) * DELAY / workers
            found.append((seconds / floor, posts(url, longest or calls, workers) / floor))
    ours, bare = zip(*found)
    return [(f"{what} / {longest or calls} x 50 ms / {workers} (bare {statistics.median(bare):.2f})", ours, 1.15)]


def bench_one_user(args):
    return bench_scheduling(args, 1, 1, 9, "3 queries")


def bench_import(args):
    ours, floor = (lambda modules=modules: python(f"import {modules}") for modules in (
        "persona_agent, align, memory, tools", "requests, numpy"))
    return [("the modules / requests, numpy", ratios(ours, floor, 25), 1.1)]


def coverage(tables=1000):
    """Share of simulated tables (50 users, 3 queries each) whose 95% interval holds the true accuracy."""
    rng, held = np.random.default_rng(1), 0
    users, truth = np.repeat(np.arange(50), 3), np.clip(np.random.default_rng(2).normal(0.6, 0.2, 10 ** 6), 0, 1).mean()
    for seed in range(tables):
        right = rng.random(150) < np.clip(rng.normal(0.6, 0.2, 50), 0, 1)[users]
        low, high = metrics.intervals(users.tolist(), ["a"] * 150, ["a" if r else "b" for r in right], ("a", "b"), 400, seed)["accuracy"]
        held += low <= truth <= high
    return held / tables


def show(name, what, values, target, unit=""):
    """Print one row of the table; returns whether it meets its target."""
    middle, *ends = (f"{value:.{0 if unit else 2}f}" for value in (statistics.median(values), min(values), max(values)))
    met = statistics.median(values) <= target
    print(f"{name:<11} {what:<42} {middle + unit:>7}  {' to '.join(ends):<13} {f'{target}{unit}':>7}  {'ok' if met else 'MISSED'}",
          flush=True)
    return met


BENCHES = {name[6:].replace("_", "-"): function for name, function in list(globals().items()) if name.startswith("bench_")}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="size of the generated data file (200)")
    parser.add_argument("names", nargs="*", help="rows to measure (all)")
    given, known = parser.parse_args(), [*BENCHES, "coverage"]
    wanted = given.names or known
    if set(wanted) - set(known):
        parser.error(f"choose from {', '.join(known)}")
    print(f"{'name':<11} {'what / against what':<42} {'ratio':>7}  {'range':<13} {'target':>7}")
    met = [show(name, *row) for name, bench in BENCHES.items() if name in wanted for row in bench(given)]
    if "coverage" in wanted:
        print(f"\ncoverage: the 95% interval held the true accuracy in {coverage():.1%} of 1,000 simulated tables")
    sys.exit(not all(met))
