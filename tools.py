"""The agent's two tools (Appendix C): Wikipedia, and retrieval from the user's own memory.

A line belongs here if it turns a text that the agent wrote into one that it reads. A tool is a
name, a description for the model and a function from text to text; it may raise: the loop tells
the agent so.
"""

import html
import json
import os
import random
import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import requests

LIMIT = 2000  # characters of an observation


@dataclass(eq=False)
class Tool:
    """A tool that the agent can call: `tool(text)` -> observation of at most LIMIT characters."""

    name: str
    description: str
    run: Any  # a function from text to text

    def __call__(self, text: str) -> str:
        return _shorten(str(self.run(text)), LIMIT)

    def over(self, memory: Any):
        """This tool bound to another memory; a tool that reads no memory is the same for all."""
        return self


def _shorten(text, room):
    return text if len(text) <= room else f"{text[: room - 4]} ..."


# paper, Appendix C, word for word
WIKI_DESCRIPTION = """\
Use this tool to get a brief summary from Wikipedia about a specific topic.

Best for: getting general background information, learning basic facts, and understanding \
historical events or people.

Input: a clear, specific topic name (e.g., 'Albert Einstein', 'World War II').

Output: returns a concise Wikipedia summary.

Note: use precise topic names for better results."""

# paper, Appendix C, word for word
RAG_DESCRIPTION = """\
Retrieve top-k relevant items/histories from the user memory using RAG (Retrieval-Augmented \
Generation).

Best for: finding detailed information on related items, answering specific questions from \
personal data, and incorporating user preferences into the final answer.

Input: a specific search query or question about the content.

Output: relevant interaction histories from the user memory.

Note: more specific queries yield more accurate results.

Requirement: must use this tool at least once to answer the question."""

# ours; observations
WIKI_DOWN = """\
Wikipedia cannot be reached at the moment. Use another tool, or answer from what you know."""
NO_PAGE = "Wikipedia has no page about '{topic}'. Try a more precise or a more common topic name."
NO_MEMORY = "The user memory is empty: nothing is known about this user."
# behind what was recalled, in the words of the loop: a small model goes on searching without it
ENOUGH = "\n\n(If this is enough to answer, write your Final Answer now.)"


class WikiUnreachable(Exception):
    """Wikipedia gave no answer."""


class WikiFault(WikiUnreachable):
    """It did answer, but not with what was asked for."""


class _Session(requests.Session):
    def rebuild_auth(self, *_):
        """After a redirect `requests` would read a password from ~/.netrc."""


class Wiki(Tool):
    """Wikipedia: full-text search, then the summary of the best page, over its REST interface.

    base_url: the root of a host (another language, a mirror). contact: who runs this, an e-mail or
    web address, for the User-Agent that Wikimedia's policy asks for (default: WIKIPEDIA_CONTACT).
    One request at a time in a process. After three searches in a row without an answer it is given
    up; `down` says what the first of all failures was.
    """

    patience = 30.0  # seconds that one request may take, with all its tries
    failures = 0  # searches in a row without an answer
    down = ""
    _one_at_a_time = threading.Lock()

    def __init__(self, base_url: str = "https://en.wikipedia.org", contact: str = ""):
        super().__init__("Wiki", WIKI_DESCRIPTION, self.summary)
        contact = contact or os.environ.get("WIKIPEDIA_CONTACT") or "no contact given"
        agent = f"PersonaAgent/0.2 ({contact}) python-requests/{requests.__version__}"
        self.base_url = base_url.rstrip("/")
        self.session = _Session()
        self.session.auth = lambda request: request  # keeps `requests` from reading ~/.netrc
        self.session.headers["User-Agent"] = re.sub(r"[^ -~]+", "?", agent)

    def summary(self, text: str) -> str:
        """The observation for a topic; WIKI_DOWN where Wikipedia gives no answer."""
        topic = " ".join(text.encode("utf-8", "replace").decode().split())[:250]
        try:
            return self.look_up(topic)
        except WikiUnreachable as e:
            self.down = self.down or str(e)
            return WIKI_DOWN

    def look_up(self, topic: str) -> str:
        """Search, then the best page's summary, or what the search says of it if that gives none.

        Raises WikiUnreachable where the search gets no answer, or the page for want of a
        connection."""
        with self._one_at_a_time:
            if self.failures >= 3:
                raise WikiUnreachable(self.down)
            self.failures += 1
            path = f"/w/rest.php/v1/search/page?q={quote(topic, safe='')}&limit=5"
            pages = self._get(path).get("pages")
            self.failures = 0
            if not pages:
                return NO_PAGE.format(topic=topic)
            page, *others = pages
            with suppress(WikiFault):
                page |= self._get(f"/api/rest_v1/page/summary/{quote(page['key'], safe='')}")
        extract = page.get("extract") or ""
        if page.get("type") == "disambiguation":
            others = [f"{p.get('title')} ({p.get('description')})" for p in others[:4]]
            advice = f"Search again with one of: {'; '.join(others) or 'a longer name'}"
            return f"'{page['title']}' may refer to several topics. {extract} {advice}"
        # tags and escapes go: '<span class="searchmatch">AC</span>&amp;DC' -> 'AC&DC'
        about = f"{page.get('description') or ''} {page.get('excerpt') or ''}"
        excerpt = html.unescape(re.sub(r"<[^<>]*>|&#\d{99,}", "", about)).strip()
        return f"{page['title']}: {extract.strip() or excerpt or 'this page has no summary.'}"

    def _get(self, path):
        """The JSON object at `path`; {} where Wikipedia has none (400, 404, 414).

        Raises WikiUnreachable after four tries or `patience` seconds; at once for any other 4xx
        but 429."""
        end = time.monotonic() + self.patience
        wait = 0.0
        for attempt in range(4):
            try:
                time.sleep(wait)
                wait = random.uniform(0.5, 1) * 2**attempt
                with self.session.get(self.base_url + path, stream=True, timeout=10) as response:
                    status = response.status_code
                    if status in (400, 404, 414):
                        return {}
                    if status == 200:
                        return _read_object(response, end)
                fault = WikiFault(f"HTTP {status}")
                if status < 500 and status != 429:
                    break
                with suppress(KeyError, ValueError):  # there may be none, or it is a date
                    wait = float(response.headers["Retry-After"])
            except (TypeError, ValueError) as e:  # of json, or no object
                fault = WikiFault(f"{e!r:.400}")
            except Exception as e:  # of requests, urllib3, ssl: no answer, for any reason
                fault = WikiUnreachable(f"{e!r:.400}")
            if time.monotonic() + wait > end:
                break
        raise fault


def _read_object(response, end):
    """The JSON object of an answer. Raises ValueError, TypeError where the JSON is no object, or
    TimeoutError where it goes on after `end`."""
    body = bytearray()
    # byte by byte, so that an answer that drips meets the end, too
    for byte in response.iter_content(1):
        body += byte
        if time.monotonic() > end:
            raise TimeoutError("the answer does not end")
    answer = {**json.loads(body)}  # fails where it is no object
    if "error" in answer:
        raise ValueError(f"no page: {body[:100]!r}")
    return answer


class RAG(Tool):
    """Top-k retrieval from one user's episodic memory; the k hits share an observation's room."""

    def __init__(self, memory: Any, k: int = 4):
        super().__init__("RAG", RAG_DESCRIPTION, self.recall)
        self.memory = memory
        self.k = k

    def over(self, memory: Any):
        return RAG(memory, self.k)

    def recall(self, query: str) -> str:
        """The k most similar episodes, each behind '- ', the long ones cut; then ENOUGH."""
        found = self.memory.search(query, self.k)
        if not found:
            return NO_MEMORY
        room = max((LIMIT - 70) // len(found) - 8, 40)  # 70: for ENOUGH
        # Not numbered: '[1]' would look like an answer of LaMP-1.
        return "\n".join(f"- {_shorten(episode.text, room)}" for episode, _ in found) + ENOUGH
