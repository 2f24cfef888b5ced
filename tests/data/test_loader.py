import json

import numpy as np
import pytest

from nemo_rl_lora.config.data import DatasetConfig
from nemo_rl_lora.data.loader import RowLoader, epoch_order, held_out

ROWS = [list(range(20))]
MIXTURE = [[f"a{i}" for i in range(30)], [f"b{i}" for i in range(500)], [f"c{i}" for i in range(70)]]
RATES = [1.0, 2.0, 5.0]


def loader_of(sets=ROWS, n=6, **options):
    return RowLoader(sets, n, **{"key": "policy.train_global_batch_size", "seed": 3, "shuffle": True, **options})


def mixed(n=8, **options):
    return loader_of(MIXTURE, n, **{"rates": RATES, **options})


def test_epoch_order_is_a_permutation_that_depends_on_its_arguments_alone():
    order = epoch_order(3, 1, 50, True)
    assert sorted(order.tolist()) == list(range(50))
    np.random.seed(0)
    assert epoch_order(3, 1, 50, True).tolist() == order.tolist()
    for other in ((3, 2, 50, True), (4, 1, 50, True), (3, 1, 50, True, 1)):
        assert epoch_order(*other).tolist() != order.tolist()
    assert epoch_order(3, 1, 5, False).tolist() == [0, 1, 2, 3, 4]


def test_no_row_comes_twice_in_an_epoch_and_the_loader_stops_after_the_epochs():
    loader = loader_of(num_epochs=2)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [6] * 6
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert len(set(first)) == len(set(second)) == 18
    assert first != second
    assert first == epoch_order(3, 0, 20, True)[:18].tolist()
    assert second == epoch_order(3, 1, 20, True)[:18].tolist()
    assert list(loader) == []
    assert loader_of().num_batches_per_epoch == 3
    assert next(loader_of(shuffle=False)) == [0, 1, 2, 3, 4, 5]


def test_end_of_epoch_is_where_no_whole_batch_is_left():
    loader = loader_of()
    ends = []
    for _ in range(7):
        next(loader)
        ends.append((loader.epoch, loader.is_at_end_of_epoch))
    assert ends == [(0, False), (0, False), (0, True), (1, False), (1, False), (1, True), (2, False)]


@pytest.mark.parametrize("make", [loader_of, mixed])
@pytest.mark.parametrize("num_taken", [0, 2, 3, 4, 80])
def test_restored_loader_continues_as_the_uninterrupted_one(make, num_taken):
    uninterrupted = make()
    for _ in range(num_taken):
        next(uninterrupted)
    restored = make()
    restored.from_state(json.loads(json.dumps(uninterrupted.state())))
    for _ in range(90):
        assert next(restored) == next(uninterrupted)
        assert (restored.epoch, restored.offset) == (uninterrupted.epoch, uninterrupted.offset)


def test_restoring_looks_at_no_row():
    class Untouched(list):
        def __getitem__(self, index):
            raise AssertionError(index)

    far = {**mixed().state(), "epoch": 10**9, "num_taken": [10**12, 2 * 10**12, 5 * 10**12]}
    loader = RowLoader([Untouched(rows) for rows in MIXTURE], 8, key="k", seed=3, shuffle=True, rates=RATES)
    loader.from_state(far)
    with pytest.raises(AssertionError):
        next(loader)


def test_mixture_draws_by_the_rates_and_by_the_seed():
    draws = sum((next(mixed_loader) for mixed_loader in [mixed()] * 1500), [])
    counts = [sum(row[0] == letter for row in draws) for letter in "abc"]
    for count, share in zip(counts, (1 / 8, 2 / 8, 5 / 8), strict=True):
        deviation = (len(draws) * share * (1 - share)) ** 0.5
        assert abs(count - len(draws) * share) < 4 * deviation
    again, other = mixed(), mixed(seed=4)
    assert draws[:80] == sum((next(again) for _ in range(10)), [])
    assert [row[0] for row in draws[:80]] != [row[0] for _ in range(10) for row in next(other)]


def test_draws_do_not_repeat():
    loader = mixed(512)
    letters = [row[0] for _ in range(24) for row in next(loader)]
    for length in (512, 4096):
        assert letters[:length] != letters[length : 2 * length]


def test_which_set_a_draw_is_from_does_not_depend_on_the_batch():
    by_eight, by_five = mixed(8), mixed(5)
    draws = sum((next(by_eight) for _ in range(50)), [])
    assert draws == sum((next(by_five) for _ in range(80)), [])


def test_every_row_of_a_set_comes_once_before_any_comes_again():
    loader = mixed()
    draws = sum((next(loader) for _ in range(300)), [])
    own = [int(row[1:]) for row in draws if row[0] == "c"]
    assert len(own) > 1000
    for epoch in range(len(own) // 70):
        assert own[70 * epoch : 70 * (epoch + 1)] == epoch_order(3, epoch, 70, True, 2).tolist()


def test_epoch_of_a_mixture_is_as_many_draws_as_there_are_rows():
    loader = mixed(num_epochs=2)
    assert loader.num_batches_per_epoch == 600 // 8
    assert len(list(loader)) == 150
    assert (mixed(7).num_batches_per_epoch, mixed(601 - 1).num_batches_per_epoch) == (85, 1)


def test_equal_rates_are_meant_where_none_are_given():
    loader = loader_of(MIXTURE, 600, rates=None)
    counts = [sum(row[0] == letter for row in next(loader) + next(loader)) for letter in "abc"]
    assert all(300 < count < 500 for count in counts)


def test_position_in_other_data_is_refused_by_name():
    state = loader_of().state()
    with pytest.raises(ValueError, match="seed=3, and now seed=4"):
        loader_of(seed=4).from_state(state)
    with pytest.raises(ValueError, match="shuffle=True, and now shuffle=False"):
        loader_of(shuffle=False).from_state(state)
    with pytest.raises(ValueError, match=r"rates=\[1.0, 2.0, 5.0\], and now rates=\[1.0, 2.0, 4.0\]"):
        mixed(rates=[1.0, 2.0, 4.0]).from_state(mixed().state())


def test_position_in_data_that_has_other_rows_now_stays_in_its_epoch_at_its_place():
    def moved(num_rows_before, num_rows_now, num_batches):
        before, now = (loader_of([list(range(num))], shuffle=False) for num in (num_rows_before, num_rows_now))
        for _ in range(num_batches):
            next(before)
        now.from_state(before.state())
        return [next(now) for _ in range(3)]

    num = len(next(loader_of()))
    same, grown = moved(20, 20, 2), moved(20, 40, 2)
    assert same[0] == grown[0] == list(range(2 * num, 3 * num))
    assert moved(20, num, 2)[0] == list(range(num))  # the place is beyond the end: the next epoch


def test_batch_of_more_rows_than_there_are_is_refused_by_its_key():
    message = r"^grpo.num_prompts_per_step=21: the training data has 20 rows. Give at most so many, or more data.$"
    with pytest.raises(ValueError, match=message):
        loader_of(n=21, key="grpo.num_prompts_per_step")
    with pytest.raises(ValueError, match="the training data has 600 rows"):
        mixed(601)


def test_held_out_share_is_drawn_from_the_seed():
    def drawn(**section):
        section = {"dataset_name": "generated_sums", "split_validation_size": 0.25, "seed": 5, **section}
        return held_out(20, DatasetConfig.model_validate(section), "data.train", "questions").tolist()

    assert sum(drawn()) == 5
    assert drawn() == drawn()
    assert drawn() != drawn(seed=6)
    assert sum(drawn(split_validation_size=0.0)) == 0
    with pytest.raises(ValueError, match=r"^data.train.split_validation_size=0.01: holds out 0 of 20 questions, and"):
        drawn(split_validation_size=0.01)
