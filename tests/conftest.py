"""What several test files share: a model that says what it is told to, and an embedding by hand."""

import signal
import sys
from collections.abc import Callable

import numpy as np
import pytest

from persona_agent import Reply

sys.setswitchinterval(0.001)  # a client and its server are threads here: they take turns sooner


class Scripted:
    """A model whose replies (texts or Reply) are given as a list or as a function of the messages.

    `calls` records each call's messages, stop and max_tokens."""

    def __init__(self, replies: list | Callable[[list], str | Reply]) -> None:
        self.replies = replies
        self.calls: list[dict] = []

    def chat(
        self, messages: list, stop: list[str] | None = None, max_tokens: int | None = None
    ) -> Reply:
        sent = [dict(message) for message in messages]
        self.calls.append({"messages": sent, "stop": stop, "max_tokens": max_tokens})
        if callable(self.replies):
            reply = self.replies(messages)
        else:
            reply = self.replies[len(self.calls) - 1]
        return reply if isinstance(reply, Reply) else Reply(reply)


def count_letters(texts: list[str]) -> np.ndarray:
    """Each text as its counts of the letters a to z: similar words, similar vectors."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return np.array([[text.lower().count(letter) for letter in alphabet] for text in texts], float)


@pytest.fixture
def scripted():
    return Scripted


@pytest.fixture
def embed():
    return count_letters


@pytest.fixture
def one_second():
    """Fails a test that computes for longer, even where a pattern hangs."""
    signal.signal(signal.SIGVTALRM, lambda *_: pytest.fail("more than a second"))
    signal.setitimer(signal.ITIMER_VIRTUAL, 1)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
