"""Intervals, paired comparison and floors: against hand-checked figures and the metrics themselves."""
import random

import pytest

from metrics import MOVIE_TAGS, RATINGS, floors, intervals, paired, score

TAGS = MOVIE_TAGS[:5]


def answers(n, labels, seed, right=0.5):
    """(users, gold, pred) of n queries, three a user; predictions may be None or no label."""
    rng = random.Random(seed)
    gold = [rng.choice(labels) for _ in range(n)]
    pred = [g if rng.random() < right else rng.choice([*labels, None, "7"]) for g in gold]
    return [i // 3 for i in range(n)], gold, pred


@pytest.mark.parametrize("labels", [TAGS, RATINGS])
@pytest.mark.parametrize("seed", range(20))
def test_difference_of_two_methods_is_the_difference_of_their_metrics(labels, seed):
    users, gold, first = answers(60, labels, seed)
    second = answers(60, labels, seed + 100)[2]
    difference = paired(users, gold, first, second, labels)["difference"]
    one, two = score(gold, first, labels), score(gold, second, labels)
    assert {k: v[0] for k, v in difference.items()} == pytest.approx({k: one[k] - two[k] for k in one}, abs=1e-12)


@pytest.mark.parametrize("labels", [TAGS, RATINGS])
def test_interval_holds_the_metric_and_is_the_same_for_the_same_seed(labels):
    users, gold, pred = answers(120, labels, 1)
    found, point = intervals(users, gold, pred, labels), score(gold, pred, labels)
    assert all(low < point[name] < high for name, (low, high) in found.items()) and set(found) == set(point)
    assert found == intervals(users, gold, pred, labels) != intervals(users, gold, pred, labels, seed=1)


def test_no_interval_below_ten_users():
    users, gold, pred = answers(27, TAGS, 1)
    assert intervals(users, gold, pred, TAGS) == {}
    assert [len(v) for v in paired(users, gold, pred, pred, TAGS)["difference"].values()] == [1, 1]


def test_interval_is_wider_where_a_users_answers_go_together():
    gold, pred = ["comedy"] * 120, (["comedy"] * 3 + ["action"] * 3) * 20
    together, apart = (intervals(users, gold, pred, TAGS) for users in ([i // 3 for i in range(120)], range(120)))
    width, narrow = (found["accuracy"][1] - found["accuracy"][0] for found in (together, apart))
    assert width > 1.5 * narrow


@pytest.mark.parametrize("wins, losses, p", [(8, 1, 2 * 10 / 512), (1, 8, 2 * 10 / 512), (0, 0, 1.0), (3, 3, 1.0), (5, 0, 2 / 32)])
def test_mcnemar_is_exact(wins, losses, p):
    gold = ["comedy"] * (wins + losses + 4)
    first = ["comedy"] * wins + ["action"] * losses + ["comedy"] * 2 + [None] * 2
    second = ["action"] * wins + ["comedy"] * losses + ["comedy"] * 2 + ["fantasy"] * 2
    found = paired(range(len(gold)), gold, first, second, TAGS)
    assert (found["wins"], found["losses"], found["ties"], found["p"]) == (wins, losses, 4, p)


def test_ratings_win_by_the_smaller_error_and_have_no_mcnemar():
    found = paired([1, 2, 3], ["5", "3", "1"], ["4", "3", None], ["3", "4", "5"], RATINGS)
    assert (found["wins"], found["losses"], found["ties"], found["p"]) == (2, 0, 1, None)


def test_method_against_itself_differs_by_nothing():
    users, gold, pred = answers(90, TAGS, 3)
    found = paired(users, gold, pred, pred, TAGS)
    assert found["difference"] == {"accuracy": [0, 0, 0], "macro-F1": [0, 0, 0]} and found["p"] == 1


def test_floors_are_what_the_best_constant_answer_reaches():
    assert floors(["comedy", "comedy", "sci-fi"], ("sci-fi", "comedy")) == {"accuracy": 2 / 3, "macro-F1": pytest.approx(0.4)}
    assert floors(["5", "5", "4", "2"], RATINGS) == {"MAE": 1.0, "RMSE": pytest.approx(1.5 ** 0.5)}  # 5 or 4; always 4
