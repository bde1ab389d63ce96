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

import numpy as np

# ------------------------------------------------------------------------------------- labels

# LaMP's labels, in the order of the official scorer
CITATIONS = ("[1]", "[2]")
MOVIE_TAGS = tuple(
    """\
sci-fi
based on a book
comedy
action
twist ending
dystopia
dark comedy
classic
psychology
fantasy
romance
thought-provoking
social commentary
violence
true story""".splitlines()
)
NEWS_CATEGORIES = tuple(
    """\
food & drink
sports
education
parents
religion
travel
business
crime
science & technology
culture & arts
entertainment
politics
women
style & beauty
healthy living""".splitlines()
)
RATINGS = tuple("12345")


# --------------------------------------------------------------------------- answers to labels

# A sentence ends here: 'comedy. It ..', '[1] because ..; ..'
SENTENCE = r"[.!;](?=\s|$)(?!\s*or\b)|(?<=\?)|\n"
# It speaks about the answer: 'the tag is', 'score:', 'I would choose'. (.*) is what follows.
CUE = r"""(?x)\b(?:answer|tags?|genre|category|score|rating|rated?|stars:|reference|option|paper
    |label|prediction|give|choose|pick|cite|relate[sd]?|described\ as|think\ it'?s|boxed)(?!\w)
    (.*)"""
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
ENDED = r"""(?x:[\s"')\]}>★⭐]*(?:(?:-?stars?|points?|tag)\b[\s"')\]}>]*)?
    (?:$|[,:(\[{"-]|(?:is|as|fits)\b))"""
NUMBER = r"\d+(?:\.\d+)?"
NUMBER_WORDS = "one two three four five"
# '/5', ' out of five stars', ' on a scale of 1 to 5'
SCALE = r"""(?x)(?<!\s)\s*(?:/|\bout\ of\b|(?<=[\ds★⭐]\ )of\b)\s*5(?:\.0+)?\b(?!\.\d)(?:\ stars?)?
    |\b(?:on\ )?(?:a\ )?scale\ (?:of|from)\ 1\s*(?:to|-)\s*5\b,?|\b1\s*(?:to|-)\s*5\b"""
# Characters as others that mean the same; emphasis and invisible ones go.
PLAIN = str.maketrans(
    "\u2010\u2011\u2012\u2013\u2014\u201c\u201d\u2018\u2019_", "-----\"\"'' ", "*`\u200b\ufeff\\$"
)


def _clean(text):
    """'**Dark_Comedy**' -> 'dark comedy': one case, plain quotes and dashes, no emphasis."""
    # A character's number of so many digits would raise ValueError.
    text = re.sub(r"(?i)&#\d{99,}|</?(?:answer|score|tag|label|category)>", "", str(text))
    return unicodedata.normalize("NFKC", html.unescape(text)).lower().translate(PLAIN)


def _find(text, label, read):
    """The one answer of a clean text, or None. label: the pattern of one; read: text -> answer.

    Looked at in turn: lines that are a label and nothing else; in sentences that speak about the
    answer and deny nothing, the quoted labels, then all; sentences that begin with a label."""
    lines = re.findall(rf"(?m)^[^\w\n]*(?<!-)({label})[^\w\n]*$", text)
    mention = re.compile(rf"(?<![\w-])(?<!\d[./])(?:{label})(?!\w|-(?!stars?\b)\w|[./]\d)")
    # What begins with '[' is an answer whatever follows: '[1] and so on'.
    leads = rf"[^\w[-]*(\[[^\w-]*)?(?:an? )?(?:{label})(?(1)|{ENDED})"
    cued = []
    leading = []
    for sentence in re.split(SENTENCE, text):
        said = re.sub(EXPLAINS, "", sentence)
        if DENIES.search(re.sub(QUOTED, "", said)):
            continue
        for after in re.findall(CUE, said):
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
    drink', 'sci-fi' and '[2]'. labels: in lower case, of letters, digits, blanks, '&' and '-'."""
    names = {_key(label): label for label in labels}
    any_name = "|".join(sorted(names, reverse=True))  # a longer name before one that it begins with
    pattern = any_name.replace(" ", r"(?:[^\S\n]|[&-]|and\b){1,5}")
    return names.get(_find(_clean(text), pattern, _key))


def parse_rating(text: str) -> str | None:
    """The one rating from 1 to 5 that an answer text gives, or None: '4/5', 'four stars' -> '4'.

    '4.5' stays '4.5', as LaMP's scorer takes any number. '7', '-3' and '3 or 4' give None."""
    text = re.sub("([★⭐]{2,})☆*", lambda m: f" {len(m[1])} stars", _clean(text))
    for word, digit in zip(NUMBER_WORDS.split(), RATINGS):
        text = re.sub(rf"\b{word}\b", digit, text)
    rating = _find(re.sub(SCALE, "", text), NUMBER, float)
    return f"{rating:g}" if rating and 1 <= rating <= 5 else None


# ------------------------------------------------------------------------------------- metrics

# Every metric is made of sums over the answers; a row of `terms` is what one answer adds to them.


def _label_terms(gold, pred, labels):
    """A row per answer, (n, 2 + 2 * labels): 1, wrong, right_1 .. right_L, present_1 .. present_L.

    present: in how many (0 to 2) of gold and answer the label is.

    What is outside `labels` counts as one more label (official rule: strip, then exact)."""
    rows = []
    for pair in zip(gold, pred, strict=True):
        stripped = [str(text).strip() for text in pair]
        present = [stripped.count(label) for label in labels]
        right = [count == 2 for count in present]
        rows.append([1, 1 in present, *right, *present])
    return np.reshape(rows, (-1, 2 + 2 * len(labels)))


def _rating_terms(gold, pred):
    """(n, 3) of n answers: 1, the error of the rating and its square.

    An answer that is no number is taken as the end of the scale farther from the gold (official
    rule); so is nan or inf, which would stop the scorer."""
    rows = []
    for truth, answer in zip(map(float, gold), pred, strict=True):
        try:
            error = abs(float(answer) - truth)
        except (TypeError, ValueError):
            error = math.nan
        if not math.isfinite(error):
            error = max(truth - 1, 5 - truth)
        rows.append([1, error, error * error])
    return np.reshape(rows, (-1, 3))


def _terms(gold, pred, labels):
    if tuple(labels) == RATINGS:
        return _rating_terms(gold, pred)
    return _label_terms(gold, pred, labels)


def _scores(terms):
    """{metric: value} of the terms of answers, three of a rating and more of a label, or of users'
    sums of them; nan of none."""
    total = terms.sum(axis=0)
    if not len(terms):
        total += math.nan
    n, error, *others = total.tolist()
    if len(others) == 1:
        return {"MAE": error / n, "RMSE": math.sqrt(others[0] / n)}
    right, present = np.reshape(others, (2, -1))
    f1 = 2 * right / np.maximum(present, 1)
    return {"accuracy": (n - error) / n, "macro-F1": float(f1.mean())}


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


def _bootstrap(users, terms, statistic):
    """{metric: [low, high]} of statistic(terms), 95% percentile intervals over samples of whole
    users, whose queries are not independent; {} below 10 users, where that tells nothing."""
    names, owner = np.unique(list(map(str, users)), return_inverse=True)
    n = len(names)
    if n < 10:
        return {}
    sums = np.zeros_like(terms[:n])  # a row for each user
    np.add.at(sums, owner, terms)
    draws = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    values = [statistic(sums[draw]) for draw in draws]
    return {
        name: np.percentile([value[name] for value in values], [2.5, 97.5]).tolist()
        for name in values[0]
    }


def interval(users: Iterable, gold: Iterable, pred: Iterable, labels: Sequence) -> dict:
    """{metric: [low, high]}: 95% intervals by bootstrap over users; {} below 10 users.

    users: the user of each query."""
    return _bootstrap(users, _terms(gold, pred, labels), _scores)


def _difference(both):
    """{metric: difference} of two methods whose terms stand side by side."""
    first, second = map(_scores, np.hsplit(both, 2))
    return {name: first[name] - second[name] for name in first}


def compare(
    users: Iterable, gold: Sequence, first: Sequence, second: Sequence, labels: Sequence
) -> dict:
    """Two methods on the same queries: 'won' and 'lost' by the first, 'p' of the exact sign test
    (for labels McNemar's), which takes queries as independent, and {metric: first minus second}
    as 'difference', with its 'interval', {} below 10 users."""
    ours = _terms(gold, first, labels)
    theirs = _terms(gold, second, labels)
    gain = (theirs - ours)[:, 1]
    won = int(np.sum(gain > 0))
    lost = int(np.sum(gain < 0))
    n = won + lost
    tail = sum(math.comb(n, i) for i in range(min(won, lost) + 1)) / 2**n
    both = np.hstack([ours, theirs])
    return {
        "won": won,
        "lost": lost,
        "p": min(1.0, 2 * tail),
        "difference": _difference(both),
        "interval": _bootstrap(users, both, _difference),
    }
