"""What the code costs, as ratios to the least that it could: python -m tests.bench [names ..]

chat, question: CPU time of a chat call, of a question of three / of bare posts of the same bodies.
search: in 100,000 rows of 384, one thread / the bare product. load: choosing 100 users from 0.1 GB
to evaluate and 0.9 GB to learn from, as LaMP-3 lays them out / json.load of both; then its peak of
memory over that of a process with the users alone / 100 MB. width: a run of 64 users, 16 workers,
calls of 50 ms / the same requests as bare posts in 16 threads. modules: a process that imports lamp
/ one that imports requests and numpy. Both sides are measured in turn, and the median counts.
"""

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from timeit import timeit
from unittest import mock

import requests

import lamp
from memory import Episode, EpisodicMemory
from persona_agent import OpenAICompatible, PersonaAgent
from tests import standin
from tools import RAG


class Handler(standin.Handler):
    """A model without a mind: two RAG actions, then an answer; below /slow 50 ms after it came."""

    def answer(self, body):
        time.sleep(0.05 * self.path.startswith("/slow"))
        if "input" in body:
            return self.send({"data": [{"embedding": [1, len(t) % 7]} for t in body["input"]]})
        reply = "Final Answer: 4\n\nThis user is strict with products that do not last for long."
        if b"\\nRAG: " in self.raw and self.raw.count(b'"assistant"') < 2:
            reply = f"Action: RAG\nAction Input: products {len(self.raw)}"
        self.send({"choices": [{"message": {"content": reply}}]})


def python(code):
    """What a piece of Python prints in a process of its own, and then its peak in MB."""
    code += "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    line = ["env", "OPENBLAS_NUM_THREADS=1", sys.executable, "-c", code]
    return list(map(float, subprocess.check_output(line, cwd=lamp.HERE, text=True).split()))


def ratio(ours, floor, rounds, clock=time.perf_counter):
    """The median of time of ours() / time of floor()."""
    found = []
    for _ in range(rounds + 1):
        found.append(timeit(ours, timer=clock, number=1) / timeit(floor, timer=clock, number=1))
    return sorted(found[1:])[rounds // 2]  # the first one warms up


def bare_posts(call, each=map):
    """A function that sends again what call() sends now."""
    post, sent, session = requests.Session.post, [], requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=16))

    def record(self, url, **given):
        sent.append((url, given["data"]))
        return post(self, url, **given)

    with mock.patch.object(requests.Session, "post", record), mock.patch("builtins.print"):
        call()
    return lambda: list(each(lambda request: session.post(*request).json(), sent))


def against_posts(calls):
    return [ratio(calls, bare_posts(calls), 25, time.process_time)]


def chat(llm):
    messages = [{"role": "user", "content": "Which? " * 400}]
    return against_posts(lambda: [llm.chat(messages) for _ in range(20)])


def question(llm):
    memory = EpisodicMemory(lambda texts: [[1, 2]] * len(texts))
    memory.add(Episode(f"What is the score of review {i}?", "4") for i in range(100))
    agent = PersonaAgent(llm, memory, "You help. " * 100, [RAG(memory)])
    return against_posts(lambda: [agent.answer("What is the score?") for _ in range(20)])


def search(llm):
    return python("""import numpy; from tests.bench import *
found = numpy.random.default_rng(0).normal(size=(100_000, 384))
memory = EpisodicMemory(lambda texts: found[: len(texts)])
memory.add([Episode("", "", text="x")] * len(found))
print(ratio(lambda: memory.search("q"), lambda: memory.rows @ memory.rows[0], 41))""")[:1]


def generate(folder, users, records, items):
    """A partition in LaMP-3's official layout: reviews of 0.5 KB, `items` of them in a record."""
    form = '{"id": "%d", "text": "%d by USER %s", "score": "4", "date": "2012-01-02"}'
    profile = ", ".join(form % (n, n, "I would buy it again. " * 20) for n in range(items))
    golds = [{"id": f"{folder.name}{n}", "output": "4"} for n in range(records)]
    folder.mkdir()
    with open(folder / "dev_questions.json", "w") as out:
        for n, gold in enumerate(golds):
            record = {"id": gold["id"], "user_id": n % users, "profile": "PROFILE"}
            record["input"] = f"without further explanation. review: {n}"
            own = profile.replace("USER", f"{n % users}")
            out.write("," if n else "[")
            out.write(json.dumps(record).replace('"PROFILE"', f"[{own}]"))
        out.write("]")
    (folder / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_3", "golds": golds}))


def load(llm):
    with tempfile.TemporaryDirectory() as root:
        generate(Path(root, "dev"), 1000, 1000, 190)
        generate(Path(root, "train"), 1000, 9000, 190)
        ours = f"import lamp, pickle; users = lamp.load(lamp.TASKS['lamp3'], '{root}')"
        kept = f"import lamp, pickle; users = pickle.load(open('{root}/users', 'rb'))"
        plain = f"import glob, json\nfor p in glob.glob('{root}/*/*_q*'): json.load(open(p))"
        times = ratio(lambda: python(ours), lambda: python(plain), 2)
        python(f"{ours}; pickle.dump(users, open('{root}/users', 'wb'))")
        return times, (python(ours)[-1] - python(kept)[-1]) / 100


def width(llm):
    slow = llm.base_url.replace("/v1", "/slow/v1")
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(16) as pool:
        generate(Path(root, "dev"), 64, 192, 12)
        argv = f"--task lamp3 --data {root} --output {root} --workers 16 --model m --embed-model e"
        seconds, run = [], lamp.run

        def timed(*given):
            start = time.monotonic()
            results = run(*given)
            seconds.append(time.monotonic() - start)
            return results

        with mock.patch("lamp.run", timed):  # reading the data is no part of it
            again = bare_posts(lambda: lamp.main([*argv.split(), "--base-url", slow]), pool.map)
        return [seconds[0] / timeit(again, number=1)]


def modules(llm):
    return [ratio(lambda: python("import lamp"), lambda: python("import requests, numpy"), 15)]


GOALS = {chat: [1.3], question: [1.5], search: [1.1], load: [1, 1], width: [1.1], modules: [1.1]}

if __name__ == "__main__":
    code = "from tests.bench import *; print(standin.start(0, Handler).server_port, flush=True)"
    line, pipe = [sys.executable, "-c", f"{code}; sys.stdin.read()"], subprocess.PIPE
    with subprocess.Popen(line, cwd=lamp.HERE, stdin=pipe, stdout=pipe, text=True) as server:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        llm = OpenAICompatible("m", base_url=url, api_key="key")
        for bench, goals in GOALS.items():
            if bench.__name__ in (sys.argv[1:] or bench.__name__):
                found = " ".join(f"{value:.2f}" for value in bench(llm))
                print(f"{bench.__name__:<8} {found:<9} goal {goals}", flush=True)
