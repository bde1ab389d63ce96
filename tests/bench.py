"""What the code costs, as ratios to the least that it could: python -m tests.bench [names ..]

Both sides of a ratio are measured in turn, and the median counts, so that what else the machine
does hits both. A server in a process of its own stands for the models.

chat      CPU time of a chat call / of a bare post of the same body
question  CPU time of a question of three calls / of three bare posts of the same bodies
search    time of EpisodicMemory.search in 100,000 rows of 384 / of the bare product, one thread
load      time of choosing 100 users from LaMP-3's official layout, 0.1 GB to evaluate and 0.9 GB
          to learn from / of a json.load of both
peak      its memory over that of a process that holds the users alone / 100 MB
width     time of a run of 64 users with 16 workers, where a call takes 50 ms / of as many bare
          posts in 16 threads
import    time of a process that imports lamp / that imports requests and numpy
"""

import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from unittest import mock

import requests

import lamp
from memory import Episode, EpisodicMemory
from persona_agent import OpenAICompatible, PersonaAgent
from tests import standin
from tools import RAG

ROOT = Path(__file__).resolve().parent.parent
REVIEW = "A review of a product that I have used for a long time and would buy again. " * 6
QUESTION = "just answer with 1, 2, 3, 4, or 5 without further explanation. review: number "


class Handler(standin.Handler):
    """A model without a mind: two RAG actions, then an answer. A GET gives the number of calls."""

    calls, delay = 0, 0.0

    def do_GET(self):
        self.send(Handler.calls)

    def answer(self, body):
        Handler.calls += 1
        time.sleep(Handler.delay)
        if "input" in body:
            return self.send({"data": [{"embedding": [1, len(t) % 7]} for t in body["input"]]})
        turn = self.raw.count(b'"role": "assistant"')
        reply = "Final Answer: 4\n\nThis user is strict with products that do not last for long."
        if b"\\nRAG: " in self.raw and turn < 2:
            reply = f"Action: RAG\nAction Input: products {turn}"
        self.send({"choices": [{"message": {"content": reply}}]})


@contextlib.contextmanager
def served(delay=0.0):
    """The address of a server in a process of its own."""
    code = f"from tests.bench import *; Handler.delay = {delay}; s = standin.start(0, Handler)"
    line = [sys.executable, "-c", f"{code}; print(s.server_port, flush=True); time.sleep(999)"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def python(code, *args):
    """What a piece of Python prints in a process of its own, and then its peak in MB."""
    code += "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    line = ["env", "OPENBLAS_NUM_THREADS=1", sys.executable, "-c", code, *args]
    return [float(text) for text in subprocess.check_output(line, cwd=ROOT, text=True).split()]


def ratio(ours, floor, rounds, clock=time.perf_counter):
    """The median of time of ours() / time of floor()."""
    found = []
    for _ in range(rounds + 1):
        start = clock()
        ours()
        middle = clock()
        floor()
        found.append((middle - start) / (clock() - middle))
    return statistics.median(found[1:])  # the first one warms up


def against_posts(call, url):
    """CPU time of call() / of bare posts of the bodies that it sends."""
    post, session = requests.Session.post, requests.Session()
    with mock.patch.object(requests.Session, "post", autospec=True, side_effect=post) as sent:
        call()
    bodies = [json.loads(each.kwargs["data"]) for each in sent.call_args_list]

    def bare():
        for body in bodies * 20:
            session.post(f"{url}/chat/completions", json=body).json()

    return ratio(lambda: [call() for _ in range(20)], bare, 25, time.process_time)


def chat():
    messages = [{"role": role, "content": "Which? " * 200} for role in ("system", "user")]
    with served() as url:
        llm = OpenAICompatible("m", base_url=url, api_key="key")
        return against_posts(lambda: llm.chat(messages), url)


def question():
    memory = EpisodicMemory(lambda texts: [[1, 2]] * len(texts))
    memory.add(Episode(f"What is the score of review {i}?", "4") for i in range(100))
    with served() as url:
        llm = OpenAICompatible("m", base_url=url, api_key="key")
        agent = PersonaAgent(llm, memory, "You help. " * 100, [RAG(memory)])
        return against_posts(lambda: agent.answer("What is the score?"), url)


SEARCH = """
import numpy as np
from tests.bench import *
found = np.random.default_rng(0).normal(size=(100_000, 384))
memory = EpisodicMemory(lambda texts: found[: len(texts)])
memory.add([Episode("", "", text="x")] * len(found))
rows, query = memory.rows.copy(), memory.rows[0].copy()
print(ratio(lambda: memory.search("q"), lambda: rows @ query, 41))"""


def search():
    return python(SEARCH)[0]


def generate(folder, users, records, items):
    """A partition in LaMP-3's official layout: reviews of 0.5 KB, `items` of them in a record."""
    item = {"text": REVIEW, "score": "4", "date": "2012-01-02"}
    profile = json.dumps([{**item, "id": f"{n}", "text": f"{n} NAME {REVIEW}"} for n in range(items)])
    names = [f"{folder.name}{n}" for n in range(records)]
    folder.mkdir()
    with open(folder / "dev_questions.json", "w") as out:
        for n, name in enumerate(names):
            record = {"id": name, "user_id": n % users, "input": QUESTION + name, "profile": None}
            out.write(("," if n else "[") + json.dumps(record).replace("null", profile).replace("NAME", f"by {n % users}"))
        out.write("]")
    golds = {"task": "LaMP_3", "golds": [{"id": name, "output": "4"} for name in names]}
    (folder / "dev_outputs.json").write_text(json.dumps(golds))


@lru_cache
def layout():
    root = tempfile.TemporaryDirectory()
    generate(Path(root.name, "dev"), 1000, 1000, 190)
    generate(Path(root.name, "train"), 1000, 9000, 190)
    return root


LOAD = "import lamp, pickle, sys; users = lamp.load(lamp.TASKS['lamp3'], sys.argv[1])"
PLAIN = "import json, sys\nfor path in sys.argv[1:]: json.load(open(path))"


def load():
    paths = [str(path) for path in Path(layout().name).rglob("dev_questions.json")]
    return ratio(lambda: python(LOAD, layout().name), lambda: python(PLAIN, *paths), 1)


def peak():
    kept = f"{layout().name}/users"
    ours = python(LOAD, layout().name)[-1]
    python(f"{LOAD}; pickle.dump(users, open(sys.argv[2], 'wb'))", layout().name, kept)
    return (
        ours
        - python("import lamp, pickle, sys; users = pickle.load(open(sys.argv[1], 'rb'))", kept)[-1]
    ) / 100


def width():
    with tempfile.TemporaryDirectory() as root, served(0.05) as url:
        generate(Path(root, "dev"), 64, 192, 12)
        argv = ["--task", "lamp3", "--data", root, "--model", "m", "--embed-model", "e"]
        argv += ["--base-url", url, "--workers", "16", "--output", root]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            lamp.main(argv)
        (path,) = Path(root).rglob("results.json")
        session, calls = requests.Session(), requests.get(url).json()
        session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=16))
        start = time.perf_counter()
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda _: session.post(f"{url}/chat", json={}).json(), range(calls)))
        return json.loads(path.read_text())["seconds"] / (time.perf_counter() - start)


def imports():
    return ratio(lambda: python("import lamp"), lambda: python("import requests, numpy"), 15)


GOALS = {chat: 1.3, question: 1.5, search: 1.1, load: 1.0, peak: 1.0, width: 1.1, imports: 1.1}

if __name__ == "__main__":
    wanted = sys.argv[1:] or [bench.__name__ for bench in GOALS]
    for bench, goal in GOALS.items():
        if bench.__name__ in wanted:
            print(f"{bench.__name__:<8} {bench():5.2f}  goal {goal}", flush=True)
