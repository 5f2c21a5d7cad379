"""The device thread: order, errors, and what is left when an engine fails."""

import threading

import pytest

from lightning_jax.sampler.device_thread import DeviceThread


@pytest.fixture
def device():
    thread = DeviceThread()
    yield thread
    thread.close()


class FailingEngine:
    """An engine whose device is gone."""

    def __init__(self):
        self.failed_with = None

    def step(self) -> bool:
        raise RuntimeError("device lost")

    def fail_all(self, error: str) -> None:
        self.failed_with = error


def test_commands_run_in_order_on_one_thread(device):
    seen = []
    futures = [device.run(lambda i=i: seen.append((i, threading.current_thread().name))) for i in range(50)]
    for future in futures:
        future.result(timeout=10)
    assert seen == [(i, "device") for i in range(50)]


def test_a_command_that_fails_ends_nothing_else(device):
    failing = device.run(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(timeout=10)
    assert device.run(lambda: 7).result(timeout=10) == 7
    assert device.error is None


def test_a_cancelled_command_does_not_run(device):
    release, ran = threading.Event(), []
    device.run(release.wait)
    waiting = device.run(ran.append, 1)
    assert waiting.cancel()
    release.set()
    device.run(lambda: None).result(timeout=10)
    assert ran == []


def test_an_engine_that_fails_fails_its_requests_and_all_later_commands(device):
    engine = FailingEngine()
    device.add_engine(engine)
    device.wake()
    device._thread.join(timeout=10)
    with pytest.raises(RuntimeError, match="device thread has ended"):
        device.run(lambda: 7).result(timeout=10)
    assert engine.failed_with == "device lost"
    assert "device lost" in str(device.error)


def test_closing_ends_what_is_in_flight():
    device, engine = DeviceThread(), FailingEngine()
    engine.step = lambda: False
    device.add_engine(engine)
    device.close()
    assert engine.failed_with == "closed" and device.error is None


def test_a_long_command_lets_the_engines_work_in_between(device):
    class CountingEngine(FailingEngine):
        rounds = 0

        def step(self) -> bool:
            self.rounds += 1
            return False

    engine = CountingEngine()
    device.add_engine(engine)

    def command():
        before = engine.rounds
        device.rounds()
        device.rounds()
        return engine.rounds - before

    assert device.run(command).result(timeout=10) == 2


def test_an_engine_that_fails_within_a_command_ends_the_thread_as_well(device):
    engine = FailingEngine()

    def command():
        device._engines.append(engine)
        device.rounds()

    with pytest.raises(RuntimeError, match="device lost"):
        device.run(command).result(timeout=10)
    device._thread.join(timeout=10)
    assert engine.failed_with == "device lost" and str(device.error) == "device lost"
