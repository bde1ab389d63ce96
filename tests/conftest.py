"""What several test files share: a model that says what it is told to, and an embedding by hand."""
import numpy as np
import pytest

from persona_agent import Reply


class Scripted:
    """A model whose replies are given: a list, or a function of the messages. Records every call."""

    def __init__(self, replies):
        self.replies, self.calls = replies, []

    def chat(self, messages, stop=None, max_tokens=512):
        self.calls.append({"messages": [dict(m) for m in messages], "stop": stop, "max_tokens": max_tokens})
        reply = self.replies(messages) if callable(self.replies) else self.replies[len(self.calls) - 1]
        return reply if isinstance(reply, Reply) else Reply(reply)


def count_letters(texts, query=False):
    """Texts to counts of the letters a to z: similar words, similar vectors."""
    return np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], float)


@pytest.fixture
def scripted():
    return Scripted


@pytest.fixture
def embed():
    return count_letters
