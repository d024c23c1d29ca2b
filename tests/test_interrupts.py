"""Ctrl-C at random moments of both scripts' work."""

import re
import signal
import time

import pytest
from conftest import create_topic, read_topic
from faults import random_moments

TIMES = [8, pytest.param(50, marks=[pytest.mark.long, pytest.mark.timeout(600)])]


def interrupt(script, moments):
    """Sends Ctrl-C at a random moment after the first event; returns the exit status and the seconds it took."""
    script.wait_for_lines(2)
    # No condition to wait for: the point is that it may be any moment.
    moment = moments.uniform(0, 1)
    time.sleep(moment)
    begin = time.monotonic()
    script.process.send_signal(signal.SIGINT)
    status = script.wait(10)
    took = time.monotonic() - begin
    print(f"{script.name}: Ctrl-C {moment:.3f} s after an event: status {status} in {took:.2f} s")
    return status, took


@pytest.mark.parametrize("times", TIMES)
def test_ctrl_c_of_the_producer(scripts, cluster, topic, times):
    moments = random_moments("producer")
    delivered = []
    for _ in range(times):
        interval = moments.choice([0, 0.001, 0.1])
        scripts.log.unlink(missing_ok=True)
        producer = scripts.producer("-t", topic, "-c", 0, "-i", interval)
        status, took = interrupt(producer, moments)
        assert status == 130
        assert took < 2
        assert producer.stderr == ""
        lines = [line.split(" ", 2)[2] for line in scripts.log.read_text().splitlines()]
        assert producer.lines[1:-1] == lines
        assert producer.lines[-1] == f"Delivered {len(lines)} events to topic {topic}, 0 failed."
        delivered += lines
    print(f"{len(delivered)} events delivered")
    place = re.compile(r".* with value of (.*), partition 0, offset (\d+)")
    said = {int(found[2]): found[1] for found in map(place.fullmatch, delivered)}
    assert len(said) == len(delivered) > 0
    assert said == {record.offset: record.value.decode() for record in read_topic(cluster, topic)}


@pytest.mark.parametrize("times", TIMES)
def test_ctrl_c_of_the_consumer(scripts, cluster, topic, group, times):
    """Events come all the while; each is printed exactly once in the end, by one run or another."""
    moments = random_moments("consumer")
    create_topic(cluster, topic)
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.001, "-q")
    printed = []
    for _ in range(times):
        consumer = scripts.consumer("-t", topic, "-G", group)
        status, took = interrupt(consumer, moments)
        assert status == 0, consumer.stderr
        assert took < 2
        assert consumer.stdout.endswith("\n")
        printed += consumer.lines
    assert producer.end() == 130
    rest = scripts.consumer("-t", topic, "-G", group, "--exit")
    assert rest.wait() == 0
    values = [record.value.decode() for record in read_topic(cluster, topic)]
    print(f"{len(printed)} of {len(values)} events printed till then")
    assert printed
    assert printed + rest.lines == values
