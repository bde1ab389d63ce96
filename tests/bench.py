"""What the library costs: python -m tests.bench

chat    CPU time of one chat call against a bare requests.Session.post of the same body to the same server, pairwise.
coverage  how often the bootstrap interval holds the truth, by simulation.
load    time and peak memory of choosing 100 users from a large generated LaMP-3 file, against a plain json.load of it.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import requests

import metrics
from persona_agent import OpenAICompatible


def cpu(function, calls):
    """CPU seconds of one call, over `calls` of them."""
    start = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - start) / calls


def bench_chat(rounds=15, calls=60):
    """Median ratio of CPU times, client / bare post, and its range over the rounds."""
    command = [sys.executable, "-m", "tests.standin", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().split()[-1]
        messages = [{"role": "system", "content": "You help. " * 150}, {"role": "user", "content": "Which? " * 100}]
        llm, session = OpenAICompatible("m", base_url=url, api_key="key"), requests.Session()
        body = {"model": "m", "messages": messages, "temperature": 0.1, "max_tokens": 512}

        def bare():
            return session.post(url + "/chat/completions", data=json.dumps(body), headers={
                "Authorization": "Bearer key", "Content-Type": "application/json"}).json()

        cpu(bare, 20), cpu(lambda: llm.chat(messages), 20)
        ratios = [cpu(lambda: llm.chat(messages), calls) / cpu(bare, calls) for _ in range(rounds)]
        server.kill()
    return statistics.median(ratios), min(ratios), max(ratios)


def coverage(tables=1000):
    """Share of simulated tables (50 users, 3 queries each) whose 95% interval holds the true accuracy."""
    rng, held = np.random.default_rng(1), 0
    users, truth = np.repeat(np.arange(50), 3), np.clip(np.random.default_rng(2).normal(0.6, 0.2, 10 ** 6), 0, 1).mean()
    for seed in range(tables):
        right = rng.random(150) < np.clip(rng.normal(0.6, 0.2, 50), 0, 1)[users]
        low, high = metrics.intervals(users.tolist(), ["a"] * 150, ["a" if r else "b" for r in right], ("a", "b"), 400, seed)["accuracy"]
        held += low <= truth <= high
    return held / tables


def generate(folder, megabytes):
    """An official LaMP-3 partition of about that size: records of 100 KB, one user each."""
    text = "A review of a product that I have used for a long time and would buy again. " * 6
    profile = [{"id": str(i), "text": f"{i} {text}", "score": str(1 + i % 5), "date": f"20{i % 20:02}-01-02"} for i in range(190)]
    body = json.dumps(profile)
    folder.mkdir(parents=True)
    gold = []
    with open(folder / "dev_questions.json", "w") as out:
        for n in range(megabytes * 10):
            question = ("What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
                        f"further explanation. review: number {n}")
            out.write(f'{"," if n else "["}{{"id": "{n}", "input": {json.dumps(question)}, "user_id": {n}, "profile": {body}}}\n')
            gold.append({"id": str(n), "output": "4"})
        out.write("]")
    (folder / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_3", "golds": gold}))


def measured(code, *args):
    """(seconds, peak MB) of a piece of Python in a process of its own, start-up included."""
    code += "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, float(done.stdout.split()[-1])


def bench_load(megabytes):
    """Streaming 100 users out of a large file against json.load of it: ratio of seconds, and both peaks in MB."""
    with tempfile.TemporaryDirectory() as root:
        generate(pathlib.Path(root, "dev"), megabytes)
        ours = measured("import sys, lamp; lamp.load(lamp.TASKS['lamp3'], sys.argv[1])", root)
        small = measured("import lamp")
        plain = measured("import sys, json; json.load(open(sys.argv[1]))", f"{root}/dev/dev_questions.json")
    return ours[0] / plain[0], ours[1] - small[1], plain[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="size of the generated data file (200)")
    size = parser.parse_args().megabytes
    median, low, high = bench_chat()
    print(f"chat: {median:.2f} times the CPU time of a bare post (median of 15 rounds, {low:.2f} to {high:.2f})")
    print(f"coverage: the 95% interval held the true accuracy in {coverage():.1%} of 1,000 simulated tables")
    ratio, ours, plain = bench_load(size)
    print(f"load: 100 users out of {size} MB in {ratio:.2f} times the time of json.load, {ours:.0f} MB against {plain:.0f} MB")
    sys.exit(median > 1.3)
