"""docs/assistant.py: dialogues, at a terminal and through a pipe, that are killed and stopped."""

import os
import pty
import select
import subprocess
import sys

import pytest

from lamp import HERE
from tests.faults import Answer, wait
from tests.test_run import nothing, serve

sys.path.insert(0, str(HERE / "docs"))
import assistant
from report import script


class Terminal:
    def __init__(self, folder, n, server):
        self.server, url = server, server.url
        given = f"--align-every {n} --model m --embed-model e --base-url {url}/v1"
        line = [sys.executable, assistant.__file__, folder, *given.split(), "--wiki-base-url", url]
        self.pid, self.end = pty.fork()
        if not self.pid:
            os.execv(line[0], line)
        self.play("> ")

    def play(self, *texts):
        """Type what stands behind '< ' and hear the others, in this order; all that was heard."""
        heard, at = "", 0
        for text in texts:
            if text.startswith("< "):
                text = text[2:]
                os.write(self.end, b"\x03" if text == "^C" else f"{text}\n".encode())
            while text not in heard[at:]:
                assert select.select([self.end], [], [], 10)[0], (text, heard)
                heard += os.read(self.end, 4096).decode()
            at = heard.index(text, at) + len(text)
        return heard

    def hang(self, line, word):
        """Type a line that leads to a request with this word, which is not answered."""
        since = len(self.server.seen)
        self.server.fault = lambda n, *sent: wait(20) and None if word in str(sent) else None
        self.play(f"< {line}")
        assert any(word in str(self.server.seen[since:]) or wait(0.005) for _ in range(2000))
        self.server.fault = nothing

    def ended(self, signal=0):
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            os.kill(self.pid, signal)  # again: input() may miss one
            wait(0.03)
        return os.waitstatus_to_exitcode(found[1])


def test_a_dialogue_that_is_killed_goes_on(tmp_path):
    folder = tmp_path / "a" / "anna"
    at = Terminal(folder, 2, serve())
    at.play("< What should I cook tonight?", "I do not know yet.", "Right?", "< risotto", "> ")
    at.play("< What should I cook on Friday?", "\nrisotto\r", "Right?", "< ", "> ")
    at.play("< Which film?", "Right?", "< Alien", "{+Most frequent", "'risotto' for", "'Alien' for")
    at.play("< /undo", "{+nothing is known.+}", "[-User", "'risotto' for", "'Alien' for", "> ")
    at.play("< Which drink is good?", "Right?", "< tea", "> ")  # one correction since the undo
    at.play("< Which drink, then?", "\ntea\r", "Right?")
    at.hang("milk", "milk")  # while it is embedded
    assert at.ended(9) == -9
    (folder / "memory.jsonl").open("a").write('\n{"query": "cut by a cra')
    at = Terminal(folder, 2, at.server)
    at.play("< /memory", "risotto | What should I cook on Friday?", "answer: milk | Which", "> ")
    assert "for texts about" not in at.play("< /undo", "/quit", "> ", "< /persona", "RULES", "> ")
    at.play("< Which drink for Anna?", "Right?", "< ", "accepted", "'milk' for texts about", "> ")
    at.play("< /forget", f"delete {folder}: ", "< yes")
    assert at.ended() == 0 and not folder.exists() and folder.parent.exists()


@pytest.mark.parametrize("lines, word", [(["risotto"], "meticulous"), (["/", "And then?"], "And")])
def test_ctrl_c_or_a_failed_call_and_the_dialogue_goes_on(tmp_path, lines, word):
    at = Terminal(tmp_path, 1, serve())
    at.play("< What should I cook tonight?", "Right?", *[f"< {line}" for line in lines[:-1]])
    at.hang(lines[-1], word)
    at.play("< ^C", "Stopped. Nothing that you said is lost.", "> ")
    at.play("< What should I cook on Sunday?", "Right?", "< pasta", "'pasta' for", "> ")
    at.server.fault = lambda n, *sent: Answer("wrong key", 401)
    assert at.play("< Friday?", "\nThat failed: HTTP 401 ", "wrong key", "> ").count("\n") == 2
    at.server.fault = nothing
    (tmp_path / "other").mkdir()  # so that the folder is not deleted
    at.play("< Pasta?", "\npasta\r", "Right?", "< /", "> ", "< /forget", "/quit", "> ")
    assert at.ended(2) == 0


def test_a_pipe_and_the_help_and_what_is_refused(tmp_path, capsys):
    code = "import sys, runpy; sys.modules.update(pytest=None, matplotlib=None, sklearn=None)"
    code += f"; sys.path[0] = '{HERE}/docs'; runpy.run_module('assistant', None, '__main__')"
    asked = "What should I cook?\nrisotto\n\nAnd what should I cook later?\n\n/memory\n"
    options = {"cwd": tmp_path, "stdout": -1, "text": True, "check": True, "input": asked}
    lines = [[sys.executable, "-c", code, "anna", more] for more in ("--show", "--help")]
    out, shown = (subprocess.run(line, **options).stdout for line in lines)
    assert f"{tmp_path}/anna: 0 episodes; model: stand-in" in out and "Action: RAG\n" in out
    assert "answer: risotto | And what should I cook later?" in out and "--align-every" in shown
    assert (tmp_path / "anna").stat().st_mode & 0o777 == 0o700
    for given in ("--align-every 0", "--model m", "--model m --base-url http://h/v1", "--no"):
        with pytest.raises(SystemExit, match="2"):
            script("assistant.py", assistant.main, [f"{tmp_path}/new", *given.split()])
    assert "assistant.py: error: " in capsys.readouterr().err and os.listdir(tmp_path) == ["anna"]
    assert script("assistant.py", assistant.main, [str(tmp_path)]) == 1
    told, end = capsys.readouterr().err.split("\n")
    assert told.startswith(f"assistant.py: {tmp_path} cannot be used (") and end == ""
