"""What the library costs: python -m tests.bench

chat    CPU time of one chat call against a bare requests.Session.post of the same body to the same server, pairwise.
"""
import json
import statistics
import subprocess
import sys
import time

import requests

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


if __name__ == "__main__":
    median, low, high = bench_chat()
    print(f"chat: {median:.2f} times the CPU time of a bare post (median of 15 rounds, {low:.2f} to {high:.2f})")
    sys.exit(median > 1.3)
