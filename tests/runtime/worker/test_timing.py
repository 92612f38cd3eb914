from __future__ import annotations

from distroml.runtime.worker.timing import SLOWEST_OF, StepClock


def test_the_parts_of_a_step_add_up() -> None:
    clock = StepClock()
    assert clock.timing() is None
    clock.add(1.0, data_s=0.2, waited_s=0.5, least_waited_s=0.1)
    timing = clock.timing()
    assert timing is not None
    assert (timing.step_s, timing.data_s, timing.compute_s) == (1.0, 0.2, 0.3)
    assert (timing.communication_s, timing.idle_s) == (0.1, 0.4)


def test_the_means_follow_and_the_slowest_is_remembered_for_a_while() -> None:
    clock = StepClock()
    clock.add(5.0, 0.0, 0.0, 0.0)
    clock.saw_pause(2.0)
    for _ in range(SLOWEST_OF - 1):
        clock.add(1.0, 0.0, 0.0, 0.0)
    timing = clock.timing()
    assert timing is not None
    assert timing.slowest_s == 7.0
    assert 1.0 < timing.step_s < 1.1
    clock.add(1.0, 0.0, 0.0, 0.0)
    after = clock.timing()
    assert after is not None
    assert after.slowest_s == 1.0
