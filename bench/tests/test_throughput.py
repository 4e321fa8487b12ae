"""What turns of unequal speed say about a ratio."""

import random

from bench.engine_cost.throughput import Ratio


def test_a_machine_whose_speed_wanders_does_not_hide_a_ratio() -> None:
    rng = random.Random(1)
    speeds = [rng.uniform(0.5, 1.5) for _ in range(60)]
    ratios = [(speed * rng.gauss(0.95, 0.02)) / speed for speed in speeds]
    found = Ratio.of([ratios])
    assert 0.94 < found.low < found.median < found.high < 0.96


def test_a_few_disturbed_turns_do_not_move_the_median() -> None:
    found = Ratio.of([[1.0] * 25, [1.0] * 25 + [3.0] * 5])
    assert (found.low, found.median, found.high) == (1.0, 1.0, 1.0)


def test_boots_that_differ_widen_the_interval() -> None:
    found = Ratio.of([[0.9] * 10, [1.0] * 10, [1.1] * 10])
    assert found.low == 0.9
    assert found.high == 1.1
