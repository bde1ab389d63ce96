"""Labels, from an answer text to a label, LaMP's metrics, intervals and paired comparisons.

A line belongs here if it takes answers and golds and gives labels or numbers; nothing here opens a
file or prints. Parsing and scoring are apart: `parse_label` and `parse_rating` read an answer
leniently but never guess; the metrics then follow LaMP's official scorer (eval/evaluation.py),
which strips white space and compares exactly. They pool all queries, nothing averages per user.
"""

import html
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress

import numpy as np

# ------------------------------------------------------------------------------------- labels

# LaMP's labels, in the order of the official scorer
CITATIONS = ("[1]", "[2]")
MOVIE_TAGS = (
    "sci-fi",
    "based on a book",
    "comedy",
    "action",
    "twist ending",
    "dystopia",
    "dark comedy",
    "classic",
    "psychology",
    "fantasy",
    "romance",
    "thought-provoking",
    "social commentary",
    "violence",
    "true story",
)
NEWS_CATEGORIES = (
    "food & drink",
    "sports",
    "education",
    "parents",
    "religion",
    "travel",
    "business",
    "crime",
    "science & technology",
    "culture & arts",
    "entertainment",
    "politics",
    "women",
    "style & beauty",
    "healthy living",
)
RATINGS = ("1", "2", "3", "4", "5")


# --------------------------------------------------------------------------- answers to labels

# A sentence ends here: 'comedy. It ..', '[1] because ..; ..'
SENTENCE = r"[.!;](?=\s|$)(?!\s*or\b)|(?<=\?)|\n"
# It speaks about the answer: 'the tag is', 'score:', 'I would choose'
CUE = r"""(?x)\b(?:answer|tags?|genre|category|score|rating|rated?|stars:|reference|option|paper
    |label|prediction|give|choose|pick|cite|relate[sd]?|described\ as|think\ it'?s|boxed)(?!\w)"""
# It denies or doubts what it says, or asks, or speaks of a habit.
DENIES = re.compile(
    r"""(?x)\b(?:no|not|never|neither|nor|cannot|unlikely|wrong|incorrect|unrelated|or|if|maybe
    |might|usual|average|typical|favou?rite|frequent|common|between|least|more\ than|below|above)\b
    |n't\b|\?"""
)
# From here on it explains: 'comedy, because it is no romance', 'comedy, not romance'
EXPLAINS = r"""(?x)\b(?:because|since|although|rather|instead|than|though)\b[^,]*
    |\bas\ (?:the|it|this)\b.*|[,(]\s*not\b.*"""
QUOTED = r'"[^"]*"'
# What may follow a label that begins its sentence, where it is the answer.
ENDED = (
    r"""[\s"')\]}>]*(?:(?:-?stars?|points?|tag)\b[\s"')\]}>]*)?(?:$|[,:(\[{"-]|(?:is|as|fits)\b)"""
)
NUMBER = r"\d+(?:\.\d+)?"
# '/5', ' out of five stars', ' on a scale of 1 to 5'
SCALE = r"""(?x)(?<!\s)\s*(?:/|\bout\ of\b|(?<=[\ds]\ )of\b)\s*5(?:\.0+)?\b(?!\.\d)(?:\ stars?)?
    |\b(?:on\ )?(?:a\ )?scale\ (?:of|from)\ 1\s*(?:to|-)\s*5\b,?|\b1\s*(?:to|-)\s*5\b"""
# Characters as others that mean the same; emphasis and invisible ones go.
PLAIN = str.maketrans(
    "\u2010\u2011\u2012\u2013\u2014\u201c\u201d\u2018\u2019_", "-----\"\"'' ", "*`\u200b\ufeff\\$"
)


def _clean(text):
    """'**Dark_Comedy**' -> 'dark comedy': one case, plain quotes and dashes, no emphasis."""
    text = html.unescape(re.sub(r"&#\d{99,}", "", str(text)))  # longer ones raise ValueError
    text = unicodedata.normalize("NFKC", text).lower().translate(PLAIN)
    return re.sub(r"</?(?:answer|score|tag|label|category)>", "", text).strip()


def _find(text, label, read):
    """The one answer of a clean text, or None. label: the pattern of one; read: its text -> label.

    Looked at in turn: lines that are a label and nothing else; in sentences that speak about the
    answer and deny nothing, the quoted labels, then all; sentences that begin with a label."""
    lines = re.findall(rf"^[^\w\n]*(?<!-)({label})[^\w\n]*$", text, re.M)
    mention = re.compile(rf"(?<![\w-])(?<!\d[./])(?:{label})(?!\w|-(?!stars?\b)\w|[./]\d)")
    first = rf"(?:an? )?(?:{label})"
    leads = rf"[^\w[-]*(?:\[[^\w-]*{first}|{first}{ENDED})"
    cued = []
    leading = []
    for sentence in re.split(SENTENCE, text):
        said = re.sub(EXPLAINS, "", sentence)
        if DENIES.search(re.sub(QUOTED, "", said)):
            continue
        for after in re.split(CUE, said, maxsplit=1)[1:]:
            quoted = " ".join(re.findall(QUOTED, after))
            cued += mention.findall(quoted) or mention.findall(after)
        if re.match(leads, said):
            leading += mention.findall(said)
    found = {read(form) for form in lines or cued or leading}
    return found.pop() if len(found) == 1 else None


def _key(form):
    return re.sub(r"(?:[\s&-]|\band\b)+", " ", form).strip("[] ")


def parse_label(text: str, labels: Sequence) -> str | None:
    """The one label that an answer text gives, or None: leniently, but never by guessing.

    'The tag is **Comedy**.' gives 'comedy', as does 'comedy, because it is no romance'; 'comedy or
    romance' and 'not a comedy' give None. 'food and drink', 'sci fi' and 'option 2' are 'food &
    drink', 'sci-fi' and '[2]'."""
    names = {_key(label): label for label in labels}
    longest_first = "|".join(sorted(names, key=len, reverse=True))
    pattern = longest_first.replace(" ", r"(?:[^\S\n]|[&-]|and\b){1,5}")
    return _find(_clean(text), pattern, lambda form: names.get(_key(form)))


def parse_rating(text: str) -> str | None:
    """The one rating from 1 to 5 that an answer text gives, or None: '4/5', 'four stars' -> '4'.

    '4.5' stays '4.5', as LaMP's scorer takes any number. '7', '-3' and '3 or 4' give None."""

    def _read(form):
        return f"{float(form):g}" if 1 <= float(form) <= 5 else None

    text = re.sub("([★⭐]{2,})☆*", lambda m: f" {len(m[1])} stars", _clean(text))
    text = re.sub("[★⭐]☆*", " stars", text)
    for word, digit in zip(("one", "two", "three", "four", "five"), RATINGS):
        text = re.sub(rf"\b{word}\b", digit, text)
    return _find(re.sub(SCALE, "", text), NUMBER, _read)


# ------------------------------------------------------------------------------------- metrics


def _label_terms(gold, pred, labels):
    """Whether each answer is wrong, then for every label whether it is right there, and whether it
    is missing or given without reason, (n, 1 + 2 * labels). What is outside `labels` counts as one
    more label (official rule: strip, then exact). Raises ValueError where the lists differ in
    length."""
    marks = []
    for texts in (gold, pred):
        stripped = np.array([str(text).strip() for text in texts], object)
        marks.append(stripped[:, None] == np.array(labels, object))
    golds, preds = np.stack(marks)
    differ = golds != preds
    return np.column_stack([differ.any(axis=1), golds & preds, differ])


def _rating_terms(gold, pred):
    """The error of each rating and its square, (n, 2). An answer that is no number is taken as the
    end of the scale farther from the gold (official rule); so is nan or inf, which would stop the
    scorer."""
    errors = []
    for truth, answer in zip(map(float, gold), pred, strict=True):
        error = math.nan
        with suppress(TypeError, ValueError):
            error = abs(float(answer) - truth)
        if not math.isfinite(error):
            error = max(truth - 1, 5 - truth)
        errors.append([error, error**2])
    return np.reshape(errors, (-1, 2))


def _terms(gold, pred, labels):
    if tuple(labels) == RATINGS:
        return _rating_terms(gold, pred)
    return _label_terms(gold, pred, labels)


def _scores(terms):
    """{metric: value} of the terms of some answers, two a rating and more a label; nan of none."""
    error, *others = terms.sum(axis=0)
    n = len(terms) or math.nan
    if len(others) == 1:
        return {"MAE": float(error / n), "RMSE": math.sqrt(others[0] / n)}
    right, differ = np.split(np.array(others), 2)
    f1 = 2 * right / np.maximum(2 * right + differ, 1e-300)
    macro = float(f1.mean()) if len(terms) else math.nan
    return {"accuracy": float((n - error) / n), "macro-F1": macro}


def accuracy(gold: Iterable, pred: Iterable, labels: Sequence) -> float:
    """Share of answers whose label equals the gold one; nan of none. What is outside `labels`
    counts as one more label, as in the official scorer."""
    return _scores(_label_terms(gold, pred, labels))["accuracy"]


def macro_f1(gold: Iterable, pred: Iterable, labels: Sequence) -> float:
    """Mean F1 over ALL `labels`, those that never occur counting 0; nan of no answers.

    As scikit-learn's f1_score(labels=range(n), average='macro'), which the official scorer calls.
    """
    return _scores(_label_terms(gold, pred, labels))["macro-F1"]


def mae(gold: Iterable, pred: Iterable) -> float:
    """Mean absolute error of ratings given as text; nan of none."""
    return _scores(_rating_terms(gold, pred))["MAE"]


def rmse(gold: Iterable, pred: Iterable) -> float:
    """Root mean squared error of ratings given as text; nan of none."""
    return _scores(_rating_terms(gold, pred))["RMSE"]


def score(gold: Iterable, pred: Iterable, labels: Sequence) -> dict:
    """{metric: value} as the official scorer has it; None is an answer that it cannot read."""
    return _scores(_terms(gold, pred, labels))


# ---------------------------------------------------------------- intervals and paired comparisons

RESAMPLES = 2000


def _bootstrap(users, statistic):
    """{metric: [low, high]} of statistic(rows), 95% percentile intervals over samples of whole
    users, whose queries are not independent; {} below 10 users, where that tells nothing."""
    names, owner = np.unique(list(map(str, users)), return_inverse=True)
    n = len(names)
    if n < 10:
        return {}
    rows = [np.flatnonzero(owner == i) for i in range(n)]
    values = []
    for draw in np.random.default_rng(0).integers(n, size=(RESAMPLES, n)):
        values.append(statistic(np.concatenate([rows[i] for i in draw])))
    return {
        name: np.percentile([value[name] for value in values], [2.5, 97.5]).tolist()
        for name in values[0]
    }


def interval(users: Iterable, gold: Iterable, pred: Iterable, labels: Sequence) -> dict:
    """{metric: [low, high]}: 95% intervals by bootstrap over users; {} below 10 users.

    users: the user of each query."""
    terms = _terms(gold, pred, labels)
    return _bootstrap(users, lambda rows: _scores(terms[rows]))


def compare(
    users: Iterable, gold: Iterable, first: Iterable, second: Iterable, labels: Sequence
) -> dict:
    """Two methods on the same queries: 'won' and 'lost' by the first, 'p' of the exact sign test
    (for labels McNemar's), which takes queries as independent, {metric: 'difference'} and {metric:
    'interval' of it}."""
    ours = _terms(gold, first, labels)
    theirs = _terms(gold, second, labels)

    def _difference(rows):
        others = _scores(theirs[rows])
        return {name: value - others[name] for name, value in _scores(ours[rows]).items()}

    won = int(np.sum(ours[:, 0] < theirs[:, 0]))
    lost = int(np.sum(ours[:, 0] > theirs[:, 0]))
    n = won + lost
    tail = sum(math.comb(n, i) for i in range(min(won, lost) + 1)) / 2**n
    return {
        "won": won,
        "lost": lost,
        "p": min(1.0, 2 * tail),
        "difference": _difference(slice(None)),
        "interval": _bootstrap(users, _difference),
    }
