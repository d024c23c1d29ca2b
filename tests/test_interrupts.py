"""Ctrl-C at random moments of both scripts' lives, and once more while the first is being obeyed."""

import re
import signal
import time
from pathlib import Path

import pytest
from conftest import EXTERNAL, create_topic, read_topic, wait_until
from faults import random_moments

pytestmark = [
    pytest.mark.skipif(bool(EXTERNAL), reason="these tests fill their cluster"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see who handles signals"),
]
TIMES = [8, pytest.param(50, marks=[pytest.mark.long, pytest.mark.timeout(600)])]


@pytest.fixture
def cluster(own_cluster):
    return own_cluster


def started(start, *options):
    """Returns a script that has begun: before, Python itself tells of a Ctrl-C with a stack trace.

    The script inherits that Ctrl-C is ignored, so that it can be seen when it takes care of it.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        script = start(*options)
    finally:
        signal.signal(signal.SIGINT, before)
    status = Path(f"/proc/{script.process.pid}/status")

    def handles_ctrl_c():
        caught = int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)
        return caught >> (signal.SIGINT - 1) & 1

    wait_until(handles_ctrl_c, f"the start of {script!r}")
    return script


def interrupt(script, moments, at_work):
    """Sends Ctrl-C at a random moment, half of the times twice; returns the exit status and the seconds it took.

    at_work: the moment is one after the first event, otherwise after the start.
    """
    if at_work:
        script.wait_for_lines(2)
    # No condition to wait for: the point is that it may be any moment.
    moment = moments.uniform(0, 1)
    time.sleep(moment)
    begin = time.monotonic()
    script.process.send_signal(signal.SIGINT)
    second = moments.choice([None, moments.uniform(0, 0.05)])
    if second:
        time.sleep(second)
        script.process.send_signal(signal.SIGINT)
    status = script.wait(10)
    took = time.monotonic() - begin
    begun = "an event" if at_work else "the start"
    print(f"{script.name}: Ctrl-C {moment:.3f} s after {begun}, again after {second}: status {status} in {took:.2f} s")
    return status, took


@pytest.mark.parametrize("times", TIMES)
def test_ctrl_c_of_the_producer(scripts, cluster, topic, times):
    moments = random_moments("producer")
    delivered, ended_early = [], 0
    for number in range(times):
        interval = moments.choice([0, 0.001, 0.1])
        scripts.log.unlink(missing_ok=True)
        producer = started(scripts.producer, "-t", topic, "-c", 0, "-i", interval)
        status, took = interrupt(producer, moments, at_work=number % 2)
        assert status == 130
        assert took < 2 or "waiting for" in producer.stderr
        told = [line for line in producer.stderr.splitlines() if not line.startswith("Failed to deliver")]
        assert all(line.startswith(("Ending: waiting for", "Waiting for", "Delivering again")) for line in told), told
        log = scripts.log.read_text().splitlines() if scripts.log.exists() else []
        lines = [line.split(" ", 2)[2] for line in log if " Produced message " in line]
        if not producer.lines:
            ended_early += 1
            assert not log
            continue
        assert producer.lines[1:-1] == lines
        assert producer.lines[-1].startswith(f"Delivered {len(lines)} events to topic {topic}, {len(log) - len(lines)}")
        delivered += lines
    print(f"{ended_early} of {times} before the first event, {len(delivered)} events delivered")
    place = re.compile(r".* with value of (.*), partition 0, offset (\d+)")
    said = {int(found[2]): found[1] for found in map(place.fullmatch, delivered)}
    stored = {record.offset: record.value.decode() for record in read_topic(cluster, topic)}
    assert len(said) == len(delivered) > 0
    assert said.items() <= stored.items()


@pytest.mark.parametrize("times", TIMES)
def test_ctrl_c_of_the_consumer(scripts, cluster, topic, group, times):
    """Events come all the while; each is printed exactly once in the end, by one run or another."""
    moments = random_moments("consumer")
    create_topic(cluster, topic)
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.001, "-q")
    printed, ended_early = [], 0
    for number in range(times):
        consumer = started(scripts.consumer, "-t", topic, "-G", group)
        status, took = interrupt(consumer, moments, at_work=number % 2)
        assert status == 0, consumer.stderr
        assert took < 2
        assert consumer.stdout.endswith("\n") or not consumer.stdout
        ended_early += not consumer.lines
        printed += consumer.lines
    assert producer.end() == 130
    rest = scripts.consumer("-t", topic, "-G", group, "--exit")
    assert rest.wait() == 0
    values = [record.value.decode() for record in read_topic(cluster, topic)]
    print(f"{ended_early} of {times} before the first event, {len(printed)} of {len(values)} events printed till then")
    assert printed
    assert printed + rest.lines == values
