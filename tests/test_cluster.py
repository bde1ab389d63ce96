"""The evaluation of docs/cluster.md, as it stands there."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lamp import HERE, cli
from metrics import read_lines
from tests import standin

METHODS = ("rag-4", "personaagent")


class Slow(standin.Handler):
    """The stand-in as a server that takes a while; `server.seen` holds the port of each request's sender."""

    def do_POST(self):
        time.sleep(0.03)
        self.server.seen.append(self.client_address)
        super().do_POST()


def answers(root):
    """{(method, query id): what the agent did and said} of the runs below `root`."""
    files = {m: file for m in METHODS for file in root.rglob(f"{m}*/predictions.jsonl")}
    return {(m, r["id"]): (r["prediction"], r["text"], r["steps"]) for m, file in files.items() for r in read_lines(file)}


def children(pid):
    """Processes that `pid` started with multiprocessing and that are no mere trackers of resources."""
    started = [p for file in Path(f"/proc/{pid}/task").glob("*/children") for p in file.read_text().split()]
    return [int(p) for p in started if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc to find the workers")
def test_dask_cluster_that_loses_a_worker_gives_the_same_answers(tmp_path):
    pytest.importorskip("distributed", reason="pip install -e '.[cluster]'")
    server = standin.start(handler=Slow)
    server.seen, url = [], f"http://127.0.0.1:{server.server_port}"
    flags = ["--base-url", url + "/v1", "--model", "m", "--embed-model", "e", "--wiki-base-url", url]
    code = re.search(r"```python\n(.*?)```", (HERE / "docs" / "cluster.md").read_text(encoding="utf-8"), re.S)[1]
    code = code.replace('"--output"', ", ".join(map(repr, flags)) + ', "--output"') + "    raise SystemExit(code)\n"
    (tmp_path / "cluster.py").write_text(code)
    run = subprocess.Popen([sys.executable, "cluster.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)},
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and len(server.seen) < 60:  # every worker is in the middle of a user
        time.sleep(0.01)
    os.kill(children(run.pid)[0], signal.SIGKILL)
    out, err = run.communicate(timeout=100)
    assert run.returncode == 0, err
    assert cli(["--task", "lamp2m", "--method", ",".join(METHODS), "--output", str(tmp_path / "threads"), *flags]) == 0
    assert len(answers(tmp_path / "threads")) == 36
    assert answers(tmp_path / "runs-dask") == answers(tmp_path / "threads")
