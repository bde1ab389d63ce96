"""What the agent knows of its user: episodic memory (Eq. 1, 2) and the profile (Eq. 3).

A line belongs here if it stores, finds or summarises what one user did. All of it is in RAM, and a
search looks at every row: good for some 100,000 episodes of one user. Nothing is ever forgotten.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Episode:
    """One interaction (q_i, r_i, m_i) of Eq. 1. An empty `response`: the user's answer is unknown.

    query: the full question, as the agent would get it. response: what the user really answered.
    text: the compact rendering that is embedded and shown. By default date, response and query, in
    this order, so that a long query that is cut where it is shown still has its answer.
    """

    query: str
    response: str
    metadata: dict = field(default_factory=dict)
    text: str = ""

    def __post_init__(self):
        answer = self.response and f"answer: {self.response}"
        parts = [self.metadata.get("date"), answer, self.query]
        self.text = self.text or " | ".join(str(part) for part in parts if part)


@dataclass(eq=False)
class EpisodicMemory:
    """D^u with cosine top-K retrieval. Insertion order is time order, oldest first.

    embed: n texts -> array (n, d). `rows` holds unit vectors, float32 (n, d), (0, 0) while
    there are none; a zero vector stays.
    """

    embed: Callable
    episodes: list = field(default_factory=list)
    rows: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def __len__(self) -> int:
        return len(self.episodes)

    def __iter__(self):
        return iter(self.episodes)

    def add(self, episodes: Iterable):
        """Append episodes in time order. They are embedded first: if that fails, nothing changes.

        Raises ValueError where embeddings have another shape than expected or are not finite."""
        new = list(episodes)
        if new:
            rows = self._unit_rows([episode.text for episode in new])
            if len(self):
                rows = np.vstack([self.rows, rows])
            self.rows = rows
            self.episodes += new

    def remember(self, query: str, response: str, **metadata: Any):
        """Append one interaction."""
        self.add([Episode(query, response, metadata)])

    def _unit_rows(self, texts):
        # Rows of another width than those before: numpy's own ValueError, in vstack or the product.
        rows = np.asarray(self.embed(texts), float)
        if rows.shape[:-1] != (len(texts),) or not np.isfinite(rows).all():
            raise ValueError(f"{len(texts)} embeddings of shape {rows.shape}, or not all finite")
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return (rows / (norms + 1e-300)).astype("float32")

    def search(self, query: str, k: int = 4) -> list:
        """The k episodes most similar to the query (Eq. 2), each with its cosine.

        Best first; where scores tie, the older one first."""
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        k = min(k, len(self))
        if not k:
            return []
        # Rounded: equal rows may differ in the last bits, by where they stand in the product.
        scores = (self.rows @ self._unit_rows([query])[0]).round(6)
        # A partial sort finds the k-th best score; only what reaches it is sorted.
        near = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
        best = sorted(near, key=lambda i: -scores[i])[:k]
        return [(self.episodes[i], float(scores[i])) for i in best]

    def select(self, indices: Iterable) -> "EpisodicMemory":
        """A memory of the episodes at these places, in this order. Nothing is embedded again."""
        kept = list(indices)
        return EpisodicMemory(self.embed, [self.episodes[i] for i in kept], self.rows[kept])

    def save(self, path: str):
        """Write episodes and rows to one .npz file (no pickle), replaced only when complete."""
        part = f"{path}.part"
        with open(part, "wb") as out:
            np.savez(out, rows=self.rows, episodes=json.dumps(list(map(vars, self))))
        os.replace(part, path)

    @classmethod
    def load(cls, path: str, embed: Callable) -> "EpisodicMemory":
        """Read what `save` wrote. `embed` must be the model that it was filled with."""
        with np.load(path) as data:
            episodes = [Episode(**episode) for episode in json.loads(str(data["episodes"]))]
            return cls(embed, episodes, data["rows"])


# ours; read by the summarising model. {instruction} is the task's S_t, after PAG's prompts.
SUMMARY_PROMPT = """\
{instruction} Write at most 120 words, and only the profile.

User history, oldest first:
{history}"""


def summarize(
    llm: Any, episodes: Iterable, instruction: str, newest: int = 30, words: int = 150
) -> str:
    """Semantic memory P^u = f_s(S_t, D^u) (Eq. 3): a summary of the newest episodes.

    instruction: S_t. newest: at least 1. Each episode's text is cut to `words`. No episodes: no
    call and an empty profile; that of a model that refuses, or that the history is too long for, is
    empty too.
    """
    texts = [episode.text for episode in episodes][-newest:]
    return _ask(llm, SUMMARY_PROMPT.replace("{instruction}", instruction), texts, words)


def _ask(llm, prompt, texts, words):
    """The reply to `prompt` with the texts, each cut to `words`, as a list in its {history}; of no
    texts an empty one, without a call."""
    if not texts:
        return ""
    history = "\n".join(f"- {' '.join(text.split()[:words])}" for text in texts)
    filled = prompt.replace("{history}", history)
    return llm.chat([{"role": "user", "content": filled}]).text


# ours, after MemoryBank's own prompts (Zhong et al., 2024); read by the summarising model
BANK_SUMMARY = """\
Summarize these interactions with one user as concisely as possible: the themes and the user's \
answers.

{history}"""
BANK_PORTRAIT = """\
Describe the personality and the preferences of the user in these interactions, and how best to \
respond to them. Be concise.

{history}"""
BANK_OVERALL = """\
Merge these descriptions of one user, oldest first, into one highly concise description.

{history}"""
BANK_WORDS = 3000  # of a prompt's history, so that a long one fits the model's context


class MemoryBank:
    """The memory of the MemBank baseline (Zhong et al., 2024): events, summaries, a portrait.

    Made with two calls for each of up to `periods` stretches of the history (the original takes
    days; a bound keeps long histories affordable) and one that merges the portraits. Forgetting,
    off in the authors' release, is left out.
    """

    def __init__(self, llm: Any, memory: EpisodicMemory, periods: int = 5):
        self.events = memory.select(range(len(memory)))
        size = -(-len(memory) // periods)
        portraits = []
        for start in range(0, len(memory), size or 1):
            stretch = memory.episodes[start : start + size]
            texts = [episode.text for episode in stretch]
            words = min(150, BANK_WORDS // len(texts) or 1)
            portraits.append(_ask(llm, BANK_PORTRAIT, texts, words))
            summary = _ask(llm, BANK_SUMMARY, texts, words)
            date = stretch[-1].metadata.get("date") or "here"
            self.events.remember(f"Summary of the time up to {date}: {summary}", "")
        self.portrait = _ask(llm, BANK_OVERALL, portraits, 150)

    def recall(self, query: str, k: int = 4) -> str:
        """The k most similar events and summaries as lines: events by time, then summaries."""
        found = {id(episode) for episode, _ in self.events.search(query, k)}
        return "\n".join(f"- {episode.text}" for episode in self.events if id(episode) in found)
