"""What the agent knows of its user: episodic memory (Eq. 1-2) and semantic memory, the profile (Eq. 3).

Works alone: `embed` is any function from a list of texts to an array, `llm` anything with `chat(messages) -> .text`.
What it does not do: forget, merge or rewrite memories. It holds everything in RAM and compares with every row.
"""
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np


@dataclass
class Episode:
    """One interaction (q_i, r_i, m_i) of Eq. 1. An empty `response` is an event without a known answer.

    query: the full question, as the agent would get it. response: what the user really answered.
    text: the compact rendering of the whole event, which is embedded and shown (default: date, response and query, in
    this order, so that a long query that is cut where it is shown still has its answer).
    """
    query: str
    response: str
    metadata: dict = field(default_factory=dict)
    text: str | None = None

    def __post_init__(self):
        if self.text is None:
            answer = f"answer: {self.response}" if self.response else None
            self.text = " | ".join(str(part) for part in (self.metadata.get("date"), answer, self.query) if part)


class EpisodicMemory:
    """D^u with cosine top-K retrieval. Insertion order is time order, oldest first.

    embed: list of n texts -> float array (n, d). embed_query: the same for queries, where the model embeds those
    differently. Rows are unit-length float32 in one array that grows by doubling; a zero vector scores 0.
    """

    def __init__(self, embed, embed_query=None):
        self.embed, self.embed_query = embed, embed_query or embed
        self.episodes, self._rows = [], np.zeros((0, 0), np.float32)

    def __len__(self):
        return len(self.episodes)

    def __iter__(self):
        return iter(self.episodes)

    def add(self, episodes):
        """Append episodes in time order. Embeds them first: if that fails, the memory is as it was.

        Raises ValueError where the embeddings have another shape or dimension than expected, or are not finite."""
        episodes = list(episodes)
        if not episodes:
            return
        new, n = self._unit(self.embed, [e.text for e in episodes]), len(self)
        if n + len(new) > len(self._rows):  # a view of `before` is always full, so it grows into an array of its own
            rows = np.zeros((max(2 * n, n + len(new)), new.shape[1]), np.float32)
            rows[:n] = self._rows[:n] if n else 0
            self._rows = rows
        self._rows[n:n + len(new)] = new
        self.episodes = self.episodes + episodes

    def _unit(self, embed, texts):
        """Embed texts into unit rows, float32 (n, d); zero rows stay zero."""
        rows = np.asarray(embed(texts), dtype=np.float64)
        if rows.ndim != 2 or len(rows) != len(texts) or not rows.size:
            raise ValueError(f"embed must return one row per text: {len(texts)} texts gave shape {rows.shape}")
        if len(self) and rows.shape[1] != self._rows.shape[1]:
            raise ValueError(f"embeddings have {rows.shape[1]} dimensions, this memory has {self._rows.shape[1]}: "
                             "was it filled with another embedding model?")
        if not np.isfinite(rows).all():
            raise ValueError("an embedding holds nan or infinity")
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)

    def search(self, query, k=4):
        """The k most similar episodes (Eq. 2): [(Episode, cosine)], best first, the older one first where scores tie."""
        return self.search_many([query], k)[0]

    def search_many(self, queries, k=4):
        """`search` for each of several queries, with one matrix product."""
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        if not len(self) or not queries:
            return [[] for _ in queries]
        return [self._top(scores, k) for scores in self._unit(self.embed_query, queries) @ self._rows[:len(self)].T]

    def _top(self, scores, k):
        # a partial sort finds the k-th best score; only rows that reach it are rounded and sorted. Rounded, because equal rows
        # may differ in the last bits, depending on where in the product they stand.
        kept = np.flatnonzero(scores > np.partition(scores, -k)[-k] - 1e-5) if k < len(scores) else np.arange(len(scores))
        near = scores[kept].round(6)
        return [(self.episodes[kept[i]], float(near[i])) for i in np.argsort(-near, kind="stable")[:k]]

    def recent(self, n):
        """The last n episodes, oldest first."""
        return self.episodes[max(len(self) - n, 0):]

    def before(self, i):
        """A memory of the first i episodes only: what was known before episode i. Embeddings are not copied."""
        view = EpisodicMemory(self.embed, self.embed_query)
        view.episodes, view._rows = self.episodes[:i], self._rows[:len(self.episodes[:i])]
        return view

    def drop(self, indices):
        """Take episodes out. A memory that this one is a view of stays as it is."""
        gone = set(indices)
        kept = [i for i in range(len(self)) if i not in gone]
        self.episodes, self._rows = [self.episodes[i] for i in kept], self._rows[kept]

    def save(self, path):
        """Write episodes and embeddings to one file (.npz without pickle), replacing it only when complete."""
        part = f"{path}.part"
        with open(part, "wb") as out:
            np.savez(out, rows=self._rows[:len(self)], episodes=np.array(json.dumps([asdict(e) for e in self])))
        os.replace(part, path)

    @classmethod
    def load(cls, path, embed, embed_query=None):
        """Read what `save` wrote. Nothing is embedded again, so `embed` must be the model it was filled with."""
        memory = cls(embed, embed_query)
        with np.load(path, allow_pickle=False) as data:
            memory._rows = data["rows"]
            memory.episodes = [Episode(**e) for e in json.loads(str(data["episodes"]))]
        if len(memory.episodes) != len(memory._rows):
            raise ValueError(f"{path} holds {len(memory._rows)} embeddings for {len(memory.episodes)} episodes")
        return memory


# ours. Read by the summarizing model; {instruction} is the task's S_t, after PAG's prompts.
SUMMARY_PROMPT = "{instruction} Write at most 120 words, and only the profile.\n\nUser history, oldest first:\n{history}"


def summarize(llm, episodes, instruction, newest=30, words=150):
    """Semantic memory P^u = f_s(S_t, D^u) (Eq. 3): the model's summary of the newest episodes, each cut to `words`.

    No episodes: an empty profile and no call."""
    texts = [e.text for e in list(episodes)[-newest:]]
    return _ask(llm, SUMMARY_PROMPT, texts, words, instruction=instruction) if texts else ""


def _ask(llm, prompt, texts, words, **values):
    """The model's reply to `prompt` with texts, each cut to `words`, as its {history}."""
    history = "\n".join(f"- {' '.join(text.split()[:words])}" for text in texts)
    return llm.chat([{"role": "user", "content": prompt.format(history=history, **values)}]).text.strip()


# ours, after MemoryBank's own prompts (Zhong et al., 2024): read by the summarizing model; {history}: lines, oldest first
BANK_SUMMARY = ("Summarize these interactions with one user as concisely as possible: the themes and the user's answers."
                "\n\n{history}")
BANK_PORTRAIT = ("Describe the personality and the preferences of the user in these interactions, and how best to respond to them. "
                 "Be concise.\n\n{history}")
BANK_OVERALL = "Merge these descriptions of one user, oldest first, into one highly concise description.\n\n{history}"


class MemoryBank:
    """The memory of the MemBank baseline (Zhong et al., 2024): events, summaries of periods, a user portrait.

    llm: asked when constructed: 2 calls for each of up to `periods` consecutive stretches of the history (the original takes
    days; a bound keeps long histories affordable) and 1 for the portrait; no call where `made`, the (portrait, summaries) of
    an earlier time, is given. forgetting: an event is recalled with probability exp(-t / S), t in days between it and the
    newest event, S = 1 + how often it was recalled (off, as in the release; the release computes exp(-t / 5 * S), by which
    often recalled events fade faster: a slip of precedence).
    """

    def __init__(self, llm, memory, periods=5, forgetting=False, seed=0, made=None):
        episodes, self.forgetting, self._rng = list(memory), forgetting, np.random.default_rng(seed)
        size = max(1, -(-len(episodes) // periods))
        stretches = [episodes[i:i + size] for i in range(0, len(episodes), size)]

        def ask(prompt, texts):  # 3,000 words in all, so that a long history fits the model's context
            return _ask(llm, prompt, texts, min(150, max(1, 3000 // len(texts))))

        if made is None:
            with ThreadPoolExecutor(2 * periods) as pool:
                summaries, portraits = ([pool.submit(ask, prompt, [e.text for e in s]) for s in stretches]
                                        for prompt in (BANK_SUMMARY, BANK_PORTRAIT))
            made = ask(BANK_OVERALL, [p.result() for p in portraits]) if portraits else "", [s.result() for s in summaries]
        self.portrait, self.summaries = made
        self.events, self.recalled = memory.before(len(episodes)), {}
        self.events.add([Episode("", "", {"date": s[-1].metadata.get("date")}, f"Summary of the time up to "
                                 f"{s[-1].metadata.get('date') or 'here'}: {text}") for s, text in zip(stretches, self.summaries)])

    def recall(self, query, k=4):
        """The k most similar events and summaries as text, events in the order of time, then summaries."""
        order = {id(e): i for i, e in enumerate(self.events)}
        found = sorted((e for e, _ in self.events.search(query, k) if not self._forgotten(e)), key=lambda e: order[id(e)])
        for event in found:
            self.recalled[id(event)] = self.recalled.get(id(event), 0) + 1
        return "\n".join(f"- {e.text}" for e in found)

    def _forgotten(self, event):
        if not self.forgetting or not event.metadata.get("date"):
            return False
        days = [np.datetime64(str(e.metadata["date"])) for e in (event, *self.events) if e.metadata.get("date")]
        t = (max(days) - days[0]) / np.timedelta64(1, "D")
        return self._rng.random() > np.exp(-t / (1 + self.recalled.get(id(event), 0)))
