"""Answers to labels, and LaMP's metrics against its official rule, computed here a second time in plain Python.

What the tests do not do: run the official scorer itself.
"""
import math
import random

import pytest

import metrics
from metrics import accuracy, macro_f1, mae, parse, parse_label, parse_rating, rmse, score

REFERENCES = ("[1]", "[2]")
TAGS = ("sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic",
        "psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story")
CATEGORIES = ("food & drink", "sports", "education", "parents", "religion", "travel", "business", "crime",
              "science & technology", "culture & arts", "entertainment", "politics", "women", "style & beauty",
              "healthy living")
RATINGS = ("1", "2", "3", "4", "5")
LABELS = [(label, labels) for labels in (REFERENCES, TAGS, CATEGORIES, RATINGS) for label in labels]
METRICS = {"accuracy": lambda gold, pred: accuracy(gold, pred, RATINGS),
           "macro_f1": lambda gold, pred: macro_f1(gold, pred, RATINGS), "mae": mae, "rmse": rmse}


# ----------------------------------------------------------------------------------- the official rule, in plain Python

def position(text, labels):
    """Blanks round a text are dropped, then it must be equal to a label; anything else is -1."""
    text = str(text).strip()
    return labels.index(text) if text in labels else -1


def rule_accuracy(gold, pred, labels):
    return sum(position(g, labels) == position(p, labels) for g, p in zip(gold, pred)) / len(gold)


def rule_macro_f1(gold, pred, labels):
    """Precision and recall of each label, 0 where nothing is there to count; their F1 averaged over ALL labels."""
    gold, pred, total = [position(g, labels) for g in gold], [position(p, labels) for p in pred], 0.0
    for label in range(len(labels)):
        hits = sum(g == p == label for g, p in zip(gold, pred))
        precision = hits / pred.count(label) if label in pred else 0.0
        recall = hits / gold.count(label) if label in gold else 0.0
        total += 2 * precision * recall / (precision + recall) if hits else 0.0
    return total / len(labels)


def rule_errors(gold, pred):
    """An answer that is no finite number is the end of the scale that is farther from the gold."""
    errors = []
    for g, p in zip(map(float, gold), pred):
        far_end = 1.0 if abs(1 - g) > abs(5 - g) else 5.0
        try:
            value = float(p)
        except (TypeError, ValueError):
            value = far_end
        errors.append((far_end if value in (math.inf, -math.inf) or value != value else value) - g)
    return errors


def labelled_cases(labels):
    """Random golds and answers: few or all labels, blanks, upper case, decoration, texts that are no label."""
    for seed in range(300):
        rng = random.Random(seed)
        some = rng.sample(labels, rng.randint(1, len(labels)))
        ugly = [f" {some[0]}\n", f"\t{some[-1]}", some[0].upper(), f"{some[0]}.", f"**{some[0]}**", "no label", "", " ",
                "-1", "0", None]
        golds = some + (["no label", f"{some[0]} ", "western"] if rng.random() < 0.5 else [])
        n = rng.randint(1, 40)
        yield rng.choices(golds, k=n), rng.choices(some * rng.randint(1, 5) + ugly, k=n)


def rated_cases():
    """Random golds and answers: numbers on and off the scale, texts that are no number, or look like none."""
    answers = [*RATINGS, *RATINGS, "7", "4.5", "-3", "", " ", None, "four", "nan", "inf", "-inf", "1e1", " 2 ", "+3",
               "4/5", "5 stars"]
    for seed in range(300):
        rng = random.Random(seed)
        n = rng.randint(1, 40)
        yield rng.choices([*RATINGS, " 4", "2.5"], k=n), rng.choices(answers, k=n)


@pytest.mark.parametrize("labels", [REFERENCES, TAGS, CATEGORIES], ids=["references", "tags", "categories"])
def test_accuracy_equals_the_official_rule(labels):
    for gold, pred in labelled_cases(labels):
        assert accuracy(gold, pred, labels) == rule_accuracy(gold, pred, labels), (gold, pred)


@pytest.mark.parametrize("labels", [REFERENCES, TAGS, CATEGORIES], ids=["references", "tags", "categories"])
def test_macro_f1_equals_the_official_rule(labels):
    for gold, pred in labelled_cases(labels):
        assert abs(macro_f1(gold, pred, labels) - rule_macro_f1(gold, pred, labels)) <= 1e-12, (gold, pred)


def test_mae_equals_the_official_rule():
    for gold, pred in rated_cases():
        errors = rule_errors(gold, pred)
        assert abs(mae(gold, pred) - sum(map(abs, errors)) / len(errors)) <= 1e-12, (gold, pred)


def test_rmse_equals_the_official_rule():
    for gold, pred in rated_cases():
        errors = rule_errors(gold, pred)
        assert abs(rmse(gold, pred) - math.sqrt(sum(e * e for e in errors) / len(errors))) <= 1e-12, (gold, pred)


# ----------------------------------------------------------------------------------------------------- metrics, by hand

def test_the_labels_are_those_of_the_official_scorer_in_its_order():
    ours = (metrics.CITATIONS, metrics.MOVIE_TAGS, metrics.NEWS_CATEGORIES, metrics.RATINGS)
    assert ours == (REFERENCES, TAGS, CATEGORIES, RATINGS)


@pytest.mark.parametrize("labels, expected", [(TAGS, 0.1444), (TAGS[:3], 0.7222)], ids=["15 labels", "3 labels"])
def test_macro_f1_averages_over_all_labels(labels, expected):
    gold, pred = [0, 0, 1, 1, 2], [0, None, 1, 0, 2]
    value = macro_f1([TAGS[g] for g in gold], ["no label" if p is None else TAGS[p] for p in pred], labels)
    assert round(value, 4) == expected


def test_macro_f1_of_perfect_answers_is_one_only_where_every_label_occurs():
    assert macro_f1(TAGS, TAGS, TAGS) == 1.0
    assert abs(macro_f1(TAGS[:3], TAGS[:3], TAGS) - 3 / 15) <= 1e-12


def test_a_gold_and_an_answer_outside_the_labels_count_as_equal():
    assert accuracy(["western"], ["horror"], TAGS) == 1.0


def test_a_pair_outside_the_labels_adds_nothing_to_macro_f1():
    assert macro_f1(["western", *TAGS], ["horror", *TAGS], TAGS) == 1.0


def test_blanks_round_a_label_do_not_matter():
    assert accuracy(["comedy", "action "], [" comedy\n", "action"], TAGS) == 1.0


@pytest.mark.parametrize("answer", ["Comedy", "comedy.", "**comedy**", "the tag is comedy", ""])
def test_the_metrics_do_not_repair_an_answer(answer):
    assert accuracy(["comedy"], [answer], TAGS) == 0.0


@pytest.mark.parametrize("answer", ["", "four", None, "4/5", "nan", "inf", "-inf"])
def test_an_answer_that_is_no_number_counts_as_the_far_end(answer):
    for gold, error in zip(RATINGS, [4, 3, 2, 3, 4]):
        assert mae([gold], [answer]) == rmse([gold], [answer]) == error


@pytest.mark.parametrize("answer, error", [("7", 3), ("-3", 7), ("4.5", 0.5), (" 4 ", 0), ("0", 4)])
def test_a_number_off_the_scale_is_neither_clipped_nor_rounded(answer, error):
    assert mae(["4"], [answer]) == rmse(["4"], [answer]) == error


def test_rmse_weighs_a_large_error_more_than_mae():
    assert mae(["1", "5"], ["1", "1"]) == 2.0
    assert abs(rmse(["1", "5"], ["1", "1"]) - math.sqrt(8)) <= 1e-12


def test_a_score_of_labels_takes_none_as_a_wrong_answer():
    assert score(["comedy", "action"], ["comedy", None], TAGS) == {"accuracy": 0.5, "macro-F1": 1 / 15}


def test_a_score_of_ratings_takes_none_as_the_far_end():
    assert score(["5", "4"], [None, "3"], RATINGS) == {"MAE": 2.5, "RMSE": math.sqrt(8.5)}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_no_answers_give_nan(metric):
    assert math.isnan(metric([], []))


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("gold, pred", [(["1", "2"], ["1", "2", "3"]), (["1", "2", "3"], ["1", "2"]),
                                        (["1"], ["1", "2"]), (["1", "2"], ["1"]), ([], ["1"]), (["1"], [])])
def test_lists_of_unequal_length_are_an_error(metric, gold, pred):
    with pytest.raises(ValueError):
        metric(gold, pred)


# -------------------------------------------------------------------------------------------------------------- parsing

@pytest.mark.parametrize("text, labels, expected", [("**Comedy**", TAGS, "comedy"), ("four stars", RATINGS, "4"),
                                                    ("4.5", RATINGS, "4.5"), ("[2]", REFERENCES, "[2]")])
def test_parse_reads_a_rating_where_the_labels_are_ratings(text, labels, expected):
    assert parse(text, labels) == expected


@pytest.mark.parametrize("form", ["{}", " {}\n", "{}.", "\"{}\"", "'{}'", "({})", "**{}**", "`{}`", "_{}_", "- {}",
                                  "> {}", "# {}", "{}!", "The answer is {}.", "Answer: {}", "**Answer:** {}",
                                  "Final answer: **{}**", "The answer is:\n\n{}", "{}\n\nThis fits the user's history.",
                                  "{} because it fits", "{} - it fits", "{} — it fits"])
def test_every_label_is_read_in_every_usual_form(form):
    for label, labels in LABELS:
        for written in (label, label.upper(), label.capitalize()):
            assert parse_label(form.format(written), labels) == label, written


@pytest.mark.parametrize("form", ["{} or {}", "{} and {}", "{}, {}", "{}/{}", "{} & {}", "{}\n{}", "- {}\n- {}",
                                  "either {} or {}", "The answer is {} or {}.", "Answer: {}, {}", "**{}** or **{}**",
                                  "Answer: {}\nAnswer: {}"])
def test_two_labels_are_no_answer(form):
    for labels in (REFERENCES, TAGS, CATEGORIES, RATINGS):
        for one in labels:
            for other in set(labels) - {one}:
                assert parse_label(form.format(one, other), labels) is None, (one, other)


@pytest.mark.parametrize("form", ["not {}", "not a {}", "no {}", "non-{}", "anything but {}", "The answer is not {}.",
                                  "Answer: not {}", "The answer isn't {}", "{} is not the answer", "It is not {}",
                                  "neither {} nor another"])
def test_a_label_that_is_denied_is_no_answer(form):
    for label, labels in LABELS:
        assert parse_label(form.format(label), labels) is None, label


@pytest.mark.parametrize("text, expected", [
    ("**Dark comedy**", "dark comedy"),
    ("The tag is: **Comedy**", "comedy"),
    ("The best tag for this movie is dark comedy.", "dark comedy"),
    ("The tag that best fits this movie is comedy", "comedy"),
    ("The most appropriate tag from the list is: twist ending", "twist ending"),
    ("The most fitting tag is 'true story'.", "true story"),
    ("The correct tag would be \"thought-provoking\".", "thought-provoking"),
    ("Based on the user's history, the tag is social commentary.", "social commentary"),
    ("It is based on a book, so the tag is based on a book.", "based on a book"),
    ("The movie is a comedy with some romance. Answer: romance", "romance"),
    ("Among comedy and romance, the answer is romance", "romance"),
    ("The action tag is wrong; the answer is comedy.", "comedy"),
    ("The answer is not comedy. The answer is romance.", "romance"),
    ("comedy\n\nExplanation: the movie is funny and not a romance.", "comedy"),
    ("Tag: comedy\nReason: it is funny", "comedy"),
    ("comedy (because it is funny)", "comedy"),
    ("Romance: the story follows two lovers", "romance"),
    ("sci-fi - set in space", "sci-fi"),
    ("comedy. Comedy fits best.", "comedy"),
    ("{\"tag\": \"comedy\"}", "comedy"),
    ("ｃｏｍｅｄｙ", "comedy")])
def test_a_tag_is_read(text, expected):
    assert parse_label(text, TAGS) == expected


@pytest.mark.parametrize("text", [
    "", "   ", "?", "None", "N/A", "none of the above", "I cannot answer that.", "horror", "comedies", "story",
    "romantic", "romantic comedy", "black comedy", "comedy-drama", "action-comedy", "action-packed", "violent",
    "dystopian", "a dark, violent comedy", "comedy or romance", "not a comedy", "comedy and romance", "comedy/romance",
    "comedy > romance", "comedy? or romance", "comedy, romance", "1. comedy\n2. romance", "Tags: comedy, romance",
    "[comedy, romance]", "[\"comedy\", \"romance\"]", "sci-fi, based on a book, comedy, action",
    "tags: [sci-fi, based on a book, comedy]", "The tag is \"comedy, romance\"",
    "The tag is neither comedy nor romance", "The tag might be comedy or romance", "If the tag is comedy, then",
    "Is the tag comedy?", "The story is based on a book.", "One tag is comedy. Another tag is romance.",
    "The options are: comedy", "The category is action-packed", "I will search the memory for comedy first"])
def test_no_tag_is_guessed(text):
    assert parse_label(text, TAGS) is None


@pytest.mark.parametrize("text, expected", [
    ("Food & Drink", "food & drink"), ("Category: Style & Beauty", "style & beauty"),
    ("The category of this article is **science & technology**.", "science & technology"), ("women", "women"),
    ("women's", None), ("drink", None), ("arts & culture", None), ("business, politics", None),
    ("business & politics", None), ("world politics", None)])
def test_a_category_is_read_or_not_guessed(text, expected):
    assert parse_label(text, CATEGORIES) == expected


@pytest.mark.parametrize("text, expected", [
    ("[1]", "[1]"), ("1", "[1]"), ("(2)", "[2]"), ("2.", "[2]"), ("2)", "[2]"), ("**[1]**", "[1]"), ("［１］", "[1]"),
    ("２", "[2]"), ("The answer is [2].", "[2]"), ("The answer is 2.", "[2]"), ("Answer [2]", "[2]"),
    ("option 2", "[2]"), ("Option [2]", "[2]"), ("Reference 1", "[1]"), ("Answer: reference 2", "[2]"),
    ("The answer is option [2].", "[2]"), ("The reference related to the paper is [1]", "[1]"),
    ("The more related reference is option [2]", "[2]"), ("The answer is not [1]; it is [2]", "[2]"),
    ("[1] or [2]: the answer is [2]", "[2]"), ("[1] because [2] is about auctions", "[1]"),
    ("[1]. [2] is about auctions", "[1]"), ("[1] (not [2])", "[1]"), ("[2]: \"Auctions with budget limits\"", "[2]"),
    ("[2] \"Auctions\"", "[2]"), ("2. Auctions", "[2]"), ("Reference [1] is not related. Reference [2] is.", "[2]"), ("[2]\n\"Auctions\"", "[2]"),
    ("[2]: \"Uncertainty Measure for Sampling.\"", "[2]"), ("[2]: \"Not a title\"", None),
    ("The paper \"X\" is related to [2] \"Cosmic ray intensities\".", "[2]")])
def test_a_reference_is_read(text, expected):
    assert parse_label(text, REFERENCES) == expected


@pytest.mark.parametrize("text", [
    "[1] and [2]", "[1] or [2]", "[1], [2]", "[1]/[2]", "[1][2]", "[1] [2]", "[1,2]", "1 or 2", "1/2", "1-2", "both",
    "neither", "[3]", "3", "12", "[12]", "0", "not [1]", "Both [1] and [2]", "neither [1] nor [2]", "[1] > [2]",
    "[1]+[2]", "1 of 2", "2 references", "12 stars", "[1]: \"A\" [2]: \"B\"", "[1]: \"A\"\n[2]: \"B\"",
    "[1]: No\n[2]: Yes", "Just answer with [1] or [2]", "The answer is [1] or [2]", "The answer is [1], [2]",
    "The related reference is not [1].", "Paper [1] cites [2]",
    "1. The first is about networks\n2. The second is about auctions"])
def test_no_reference_is_guessed(text):
    assert parse_label(text, REFERENCES) is None


@pytest.mark.parametrize("text, expected", [
    ("4", "4"), (" 4\n", "4"), ("4.", "4"), ("4!", "4"), ("**4**", "4"), ("\"4\"", "4"), ("(4)", "4"), ("４", "4"),
    ("The review is positive, with a score of 5.", "5"), ("a score of 4 of 5", "4"), ("four of five stars", "4"), ("Rating: 4-stars", "4"), ("The score is 4-star.", "4"),
    ("４／５", "4"), ("4/5", "4"), ("4 / 5", "4"), ("5/5", "5"), ("1/5", "1"), ("4 out of 5", "4"),
    ("four out of five", "4"), ("4 of 5 stars", "4"), ("4 stars", "4"), ("1 star", "1"), ("four stars", "4"),
    ("Five stars!", "5"), ("Two", "2"), ("One out of five", "1"), ("4 (four)", "4"), ("4.5", "4.5"), ("4.5/5", "4.5"),
    ("3.5 stars", "3.5"), ("4.5 out of 5", "4.5"), ("４．５", "4.5"), ("**4.5**", "4.5"), ("4.0", "4"), ("5.0", "5"),
    ("4.0/5", "4"), ("Score: 4", "4"), ("Score 4", "4"), ("score=4", "4"), ("Rating: 4 out of 5", "4"),
    ("**Score:** 4", "4"), ("Score (1-5): 4", "4"), ("Score (out of 5): 4", "4"), ("Score: four stars", "4"),
    ("Star rating: 4", "4"), ("The score is 4/5.", "4"), ("The score is 4 because it is good", "4"),
    ("The predicted score is **4**.", "4"), ("The score of the following review on a scale of 1 to 5 is 4.", "4"),
    ("On a scale of 1 to 5, the score is 4.", "4"), ("On a scale of 1-5: 4", "4"), ("(1-5) 4", "4"),
    ("4 on a scale of 1 to 5", "4"), ("4 (on a scale from 1 to 5)", "4"),
    ("Based on 3 similar reviews, the score is 4.", "4"), ("Although similar reviews got 5, the score is 4.", "4"),
    ("4 because one thing broke", "4"), ("4. It has 2 flaws.", "4"), ("5 - very positive", "5"),
    ("5 (very positive)", "5"), ("4\n\nNot 5 because it is slow.", "4"), ("Score: 5\nConfidence: 0.9", "5")])
def test_a_rating_is_read(text, expected):
    assert parse_rating(text) == expected


@pytest.mark.parametrize("text", [
    "", "   ", "?", "None", "good", "nan", "inf", "7", "0", "6", "10", "44", "2020", "0.5", "4/10", "8/10", "10/10",
    "0/5", "6/5", "80%", "Score: 7", "Score: 10", "Score: 8/10", "zero stars", "4th", "4x", "3 or 4", "3 to 4", "3/4",
    "3-4", "3, 4", "3 4", "2-3 stars", "two or three", "between 3 and 4", "3/5 to 4/5", "4/5 or 5/5", "4½",
    "four and a half", "not 4", "not a 4", "The score is not 4", "The score is 4 or 5", "The score is 4-5",
    "Score: 4 or 5", "at least 4", "more than 4", "The score is below 4", "1 to 5", "1-5", "on a scale of 1 to 5",
    "out of 5", "1, 2, 3, 4, or 5", "1\n2\n3\n4\n5", "5 reviews", "5 years ago", "Positive: 4, negative: 2",
    "I cannot rate this."])
def test_no_rating_is_guessed(text):
    assert parse_rating(text) is None


@pytest.mark.parametrize("text, expected", [
    ("\"comedy\" or \"romance\"", None), ("\"comedy\", \"romance\"", None),
    ("The answer is \"comedy\" or \"romance\"", None), ("(comedy) or (romance)", None), ("comedy; romance", None),
    ("comedy. Or romance.", None), ("comedy (or romance)", None), ("comedy - romance", None),
    ("comedy — romance", None), ("comedy as well as romance", None), ("comedy: or romance", None),
    ("comedy. romance", None), ("comedy (20%), romance (80%)", None), ("The tag should not be comedy.", None),
    ("The tag cannot be comedy.", None), ("The tag can't be comedy", None), ("The tag would never be comedy.", None),
    ("No tag is comedy.", None), ("I don't think the answer is comedy.", None),
    ("It is unlikely that the tag is comedy.", None), ("The wrong answer is comedy.", None),
    ("The user's most frequent tag is comedy. This movie is a romance.", None), ("“comedy”", "comedy"),
    ("The tag is “comedy”.", "comedy"), ("‘comedy’", "comedy"), ("sci\u2011fi", "sci-fi"),
    ("thought\u2011provoking", "thought-provoking"), ("sci\u2013fi", "sci-fi"), ("• comedy", "comedy"),
    ("Dark  comedy", "dark comedy"), ("based_on_a_book", "based on a book"), ("dark_comedy", "dark comedy"),
    ("comedy。", "comedy"), ("comedy\u200b", "comedy"), ("\ufeffcomedy", "comedy"), ("→ comedy", "comedy"),
    ("[comedy]", "comedy"), ("Tags: [comedy]", "comedy"), ("['comedy']", "comedy"), ("{'tag': 'comedy'}", "comedy"),
    ("$\\boxed{comedy}$", "comedy"), ("\\boxed{\\text{comedy}}", "comedy"), ("<answer>comedy</answer>", "comedy"),
    ("<comedy>", "comedy"), ("comedy, because it is funny", "comedy"), ("comedy, as the user prefers it", "comedy"),
    ("comedy, not romance", "comedy"), ("sci fi", "sci-fi"), ("thought provoking", "thought-provoking"),
    ("dark-comedy", "dark comedy"), ("true-story", "true story"), ("1. comedy", "comedy"), ("tags: comedy", "comedy"),
    ("Genre: comedy", "comedy"), ("The answer is likely comedy.", "comedy"),
    ("The answer is most likely dark comedy", "dark comedy"), ("The tag is probably comedy", "comedy"),
    ("comedy is the best tag", "comedy"), ("a comedy", "comedy"),
    ("I would tag this movie as dark comedy.", "dark comedy"), ("I would choose comedy.", "comedy"),
    ("Prediction: comedy", "comedy"), ('The movie "Lost" relates to the "comedy" tag among the given options.', "comedy"),
    ("The movie relates to the action tag among the given tags.", "action"),
    ("The movie relates to the action tag or the comedy tag among the given tags.", None),
    ("The movie does not relate to the action tag among the given tags.", None)])
def test_hard_tag_is_read_or_left_alone(text, expected):
    assert parse_label(text, TAGS) == expected


@pytest.mark.parametrize("text, expected", [
    ("(1) or (2)", None), ("\"[1]\" or \"[2]\"", None), ("[1] as well as [2]", None), ("[1]; [2]", None),
    ("[1] (or [2])", None), ("[1] - [2]", None), ("1.5", None), ("Option 1: not related", None),
    ("[1]: not related", None), ("Reference 1: not related. Reference 2: related.", None),
    ("The related reference cannot be [1].", None), ("The unrelated reference is [1].", None), ("[1]\u200b", "[1]"),
    ("[[1]]", "[1]"), ("\\boxed{[1]}", "[1]"), ("\\[1\\]", "[1]"), ("[ 1 ]", "[1]"),
    ("[2], because [1] is about", "[2]"), ("[1], not [2]", "[1]"), ("The answer is [2], \"Auctions\"", "[2]"),
    ("[1] is related", "[1]"), ("[1] is the related reference.", "[1]"), ("Reference [2] is more related", "[2]"),
    ("[2] is the answer.", "[2]"), ("[2] is more related than [1]", "[2]"), ("I would choose [2].", "[2]"),
    ("Reference #2", "[2]"), ("Paper [1]", "[1]"), ("[2] Auctions with budget limits", "[2]")])
def test_hard_reference_is_read_or_left_alone(text, expected):
    assert parse_label(text, REFERENCES) == expected


@pytest.mark.parametrize("text, expected", [
    ("4 stars or 5 stars", None), ("4 stars to 5 stars", None), ("\"3\" or \"4\"", None), ("3 - 4", None),
    ("3\u20134", None), ("3; 4", None), ("3 (or 4)", None), ("4.5 or 3", None), ("3.5-4", None), ("4:5", None),
    ("4 stars, maybe 5", None), ("4 as well as 5", None), ("The score should not be 4.", None),
    ("The score can't be 4.", None), ("The user's usual rating is 5. This review is negative: 2", None),
    ("4 stars out of 10", None), ("5.5", None), ("5.5 stars", None), ("-3", None), ("4/5.5", None),
    ("Score: 4.5", "4.5"), ("Rating: 4.5/5", "4.5"), ("The score is 4.5.", "4.5"), ("Rating: 4.5 stars", "4.5"),
    ("4.5/5.0", "4.5"), ("The average rating is 4.2, so 4", None), ("[4]", "4"), ("4-star", "4"), ("five-star", "5"),
    ("4️⃣", "4"), ("4 😀", "4"), ("{4}", "4"), ("~4", "4"), ("“4”", "4"), ("\\boxed{4}", "4"),
    ("<score>4</score>", "4"), ("Score: [4]", "4"), ("{\"score\": 4}", "4"), ("{\"score\": \"4\"}", "4"),
    ("4, because", "4"), ("The score is 4, because", "4"), ("The score is a 4.", "4"), ("The score is likely 4", "4"),
    ("a score of 4", "4"), ("Rating of 4 out of 5", "4"), ("I would give it a 4 out of 5.", "4"),
    ("I'd give it 4 stars", "4"), ("I'd rate it 4/5", "4"), ("I would rate this review as a 4.", "4"),
    ("On a scale of 1 to 5, I would give it a 4.", "4"), ("★★★★☆", "4"), ("⭐⭐⭐⭐", "4"), ("5⭐", "5"), ("4 points", "4"),
    ("Stars: 4", "4"), ("4\nOne star off because it broke", "4"), ("4 stars.\n\nOne star off for delivery.", "4")])
def test_hard_rating_is_read_or_left_alone(text, expected):
    assert parse_rating(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("food and drink", "food & drink"), ("science and technology", "science & technology"),
    ("style and beauty", "style & beauty"), ("Food&Drink", "food & drink"), ("food &amp; drink", "food & drink")])
def test_hard_category_is_read_or_left_alone(text, expected):
    assert parse_label(text, CATEGORIES) == expected
