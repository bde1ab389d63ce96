"""The agent's tools (Appendix C), and the one HTTP client with a retry policy that everything here uses.

A tool is a name, a description for the model and a function from text to text. What goes wrong inside a tool comes back
as its observation, in words that the model can use. One exception: where the embedding model cannot be reached,
`ServiceError` passes through, because a question asked without its memory would score an outage as an answer.
"""
import html
import json
import os
import random
import re
import threading
import time
from urllib.parse import quote, urlsplit

import requests

LIMIT = 2000  # characters of an observation; cut when it is made, so that a conversation only ever grows
NO_RETRY = re.compile(r"insufficient_quota|quota_exceeded|billing|credit balance|spend_limit|usage_limit|per day", re.I)


class ServiceError(RuntimeError):
    """A request that finally failed. `status`: HTTP status, None where no answer came. `code`: the server's own."""

    def __init__(self, message, status=None, code=None):
        super().__init__(message)
        self.status, self.code = status, code


def fault(status, body):
    """(code, message) of an error answer, in any of the shapes that servers use.

    {"error": {"message", "code" | "type"}} | {"error": text} | {"message" | "detail": text} | plain text | HTML"""
    try:
        data = json.loads(body)
    except ValueError:
        text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body)
        return None, " ".join(re.sub(r"<[^>]+>", " ", text).split())[:300] or f"HTTP {status} without a message"
    data = data.get("error", data) if isinstance(data, dict) else data
    if not isinstance(data, dict):
        return None, str(data)[:300]
    code = data.get("code") if isinstance(data.get("code"), str) else data.get("type")
    return code, str(data.get("message") or data.get("detail") or data)[:600]


class Http:
    """One `requests` session for all threads, at most `workers` requests in flight, and the retry policy.

    Tried again, up to `tries` times and `deadline` seconds in all, with full-jitter back-off or as long as the server
    asks: connections refused, reset, timed out or cut off, and the statuses 408, 409, 429 and 5xx. Never tried again:
    other 4xx, and 429s that say a quota or a credit is used up.
    """

    def __init__(self, workers=8, tries=8, deadline=900):
        self.tries, self.deadline = tries, deadline
        self.slots = threading.BoundedSemaphore(workers)
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=workers))

    def send(self, method, url, body=None, headers=None, timeout=600, tries=None):
        """The JSON of a 2xx answer to `body` (JSON-able or None). Raises ServiceError, with no secret in its message."""
        data = None if body is None else json.dumps(_valid(body)).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        start, tries = time.monotonic(), tries or self.tries
        for n in range(1, tries + 1):
            error, wait = self._once(method, url, data, headers, timeout)
            if error is None:
                return wait
            pause = random.uniform(0, min(30, 0.5 * 2 ** n)) if wait is None else wait
            if wait is False or n == tries or time.monotonic() - start + pause > self.deadline:
                break
            time.sleep(pause)
        if n > 1:
            error.args = (f"{error} (tried {n} times in {time.monotonic() - start:.0f} s)",)
        raise error

    def _once(self, method, url, data, headers, timeout):
        """(None, JSON) of one try, or (ServiceError, seconds to wait | None for the usual back-off | False for never)."""
        local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        try:
            with self.slots:  # `auth` keeps ~/.netrc from replacing our Authorization; a loopback address needs no proxy
                r = self.session.request(method, url, data=data, headers=headers, timeout=(10, timeout), auth=lambda q: q,
                                         allow_redirects=method == "GET",
                                         proxies={"http": "", "https": ""} if local else None)
        except requests.exceptions.InvalidHeader:  # its own message would print the header, and the key in it
            return ServiceError("a request header holds characters that HTTP does not allow: check the API key for "
                                "line breaks"), False
        except requests.RequestException as e:
            return ServiceError(f"no answer from {url}: {_reason(e)}"), None
        if r.status_code // 100 == 2:
            try:
                return None, r.json()
            except ValueError:
                return ServiceError(f"{url} answered with something that is not JSON: {r.text[:80]!r}", r.status_code), None
        code, message = fault(r.status_code, r.content)
        for secret in (headers.get("Authorization", "").split() or [""])[-1:]:
            message = message.replace(secret, "***") if secret else message
        error = ServiceError(f"HTTP {r.status_code} from {url}: {message}" + (f" [{code}]" if code else ""), r.status_code, code)
        worth = r.status_code in (408, 409, 429) or r.status_code >= 500
        if not worth or NO_RETRY.search(f"{code} {message}"):
            return error, False
        return error, _asked_wait(r.headers)


def _valid(value):
    """The same JSON-able value with lone surrogates, which strict servers refuse, replaced by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {k: _valid(v) for k, v in value.items()}
    return [_valid(v) for v in value] if isinstance(value, (list, tuple)) else value


def _reason(e):
    """What a `requests` exception means, in a few words."""
    text = str(e)
    for sign, words in (("refused", "nothing listens there (connection refused)"), ("timed out", "timed out"),
                        ("resolve", "the host name is unknown or the network is down"),
                        ("reset", "the connection was reset"), ("IncompleteRead", "the answer was cut off")):
        if sign in text:
            return words
    return f"{type(e).__name__}: {text[:200]}"


def _asked_wait(headers):
    """Seconds that the server asks us to wait; None where it does not say, False where it asks for over two minutes."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
        return seconds if 0 <= seconds <= 120 else False
    return None


class Tool:
    """A tool that the agent can call: `tool(text)` -> observation of at most LIMIT characters."""

    def __init__(self, name, description, run):
        self.name, self.description, self.run = name, description, run

    def __call__(self, text):
        try:
            observation = self.run(text)
        except ServiceError:
            raise
        except Exception as e:  # a fault in one tool must not end the question
            observation = f"{self.name} failed ({type(e).__name__}: {e}). Try another input or another tool."
        return observation if len(observation) <= LIMIT else observation[:LIMIT - 4] + " ..."

    def over(self, memory):
        """This tool bound to another memory; a tool that reads no memory is the same for all."""
        return self


# paper, Appendix C, word for word
WIKI_DESCRIPTION = """\
Use this tool to get a brief summary from Wikipedia about a specific topic.
Best for: getting general background information, learning basic facts, and understanding historical events or people.
Input: a clear, specific topic name (e.g., 'Albert Einstein', 'World War II').
Output: returns a concise Wikipedia summary.
Note: use precise topic names for better results."""

# paper, Appendix C, word for word
RAG_DESCRIPTION = """\
Retrieve top-k relevant items/histories from the user memory using RAG (Retrieval-Augmented Generation).
Best for: finding detailed information on related items, answering specific questions from personal data, and \
incorporating user preferences into the final answer.
Input: a specific search query or question about the content.
Output: relevant interaction histories from the user memory.
Note: more specific queries yield more accurate results.
Requirement: must use this tool at least once to answer the question."""

WIKI_DOWN = "Wikipedia cannot be reached at the moment. Use another tool, or answer from what you know."  # ours


class Wiki(Tool):
    """Wikipedia: full-text search, then the summary of the best page, over the REST endpoints.

    base_url: a host root (another language, a mirror). contact: who runs this, an e-mail or web address, for the
    User-Agent that Wikimedia's policy asks for (default: $WIKIPEDIA_CONTACT). One request at a time, each page once.
    After a whole round of tries has failed, Wikipedia is not tried again; `failed` counts the calls that got WIKI_DOWN.
    """

    def __init__(self, base_url="https://en.wikipedia.org", contact=None, http=None):
        super().__init__("Wiki", WIKI_DESCRIPTION, self._summary)
        contact = contact or os.environ.get("WIKIPEDIA_CONTACT", "")
        self.base, self.http = base_url.rstrip("/"), http or Http(workers=1, tries=4, deadline=120)
        self.agent = f"PersonaAgent/0.1 ({contact or 'no contact given'}) python-requests/{requests.__version__}"
        self.calls, self.failed, self.down = 0, 0, None  # down: why Wikipedia was given up
        self._seen, self._lock = {}, threading.Lock()

    def _summary(self, topic):
        topic = " ".join(topic.split())[:300]
        if not topic:
            return "Wiki needs a topic name as its input."
        with self._lock:
            self.calls += 1
            if topic not in self._seen and not self.down:
                try:
                    self._seen[topic] = self._look_up(topic)
                except ServiceError as e:
                    self.down = str(e)
            if topic not in self._seen:
                self.failed += 1
            return self._seen.get(topic, WIKI_DOWN)

    def _get(self, path):
        return self.http.send("GET", self.base + path, timeout=30, headers={"User-Agent": self.agent.encode("ascii", "replace")})

    def _look_up(self, topic):
        pages = self._get(f"/w/rest.php/v1/search/page?q={quote(topic, safe='')}&limit=5").get("pages", [])[:5]
        if not pages:
            return f"Wikipedia has no page about '{topic}'. Try a more precise or a more common topic name."
        try:
            page = self._get("/api/rest_v1/page/summary/" + quote(pages[0]["key"], safe=""))
        except ServiceError as e:
            if e.status != 404:
                raise
            page = {}
        title, extract = page.get("title") or pages[0]["title"], (page.get("extract") or "").strip()
        if page.get("type") == "disambiguation":
            others = "; ".join(f"{p['title']} ({p.get('description') or 'no description'})" for p in pages[1:])
            return f"'{title}' may refer to several topics. {extract} Search again with one of: {others or 'a longer name'}"
        if not extract:
            extract = _plain(pages[0].get("description")) + " " + _plain(pages[0].get("excerpt"))
        return f"{title}: {extract.strip() or 'this page has no summary.'}"


def _plain(text):
    """'<span class="searchmatch">AC</span>&amp;DC' -> 'AC&DC'."""
    return html.unescape(re.sub(r"<[^>]+>", "", text or ""))


class RAG(Tool):
    """Top-k retrieval from one user's episodic memory."""

    def __init__(self, memory, k=4):
        super().__init__("RAG", RAG_DESCRIPTION, self._recall)
        self.memory, self.k = memory, k

    def over(self, memory):
        return RAG(memory, self.k)

    def _recall(self, query):
        if not query.strip():
            return "RAG needs a search query as its input."
        found = [episode for episode, _ in self.memory.search(query, self.k)]
        room = LIMIT // max(len(found), 1) - 8  # every hit is shown, the long ones cut
        lines = [f"[{i}] {e.text if len(e.text) <= room else e.text[:room - 4] + ' ...'}" for i, e in enumerate(found, 1)]
        return "\n".join(lines) or "The user memory is empty: nothing is known about this user."
