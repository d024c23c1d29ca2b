"""Ctrl-C and SIGTERM at random moments of both scripts' work."""

import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import LIMIT, copy_with, numbered, produce, read_topic
from faults import random_moments

TIMES = [3, pytest.param(50, marks=[pytest.mark.long, pytest.mark.timeout(600)])]


@pytest.mark.parametrize("times", TIMES)
def test_ctrl_c_of_the_producer(scripts, cluster, topic, times):
    moments = random_moments("producer")
    delivered = []
    for _ in range(times):
        interval = moments.choice([0, 0.001, 0.1])
        scripts.log.unlink(missing_ok=True)
        producer = scripts.producer("-t", topic, "-c", 0, "-i", interval)
        producer.wait_for_lines(2)
        # No condition to wait for: the point is that it may be any moment.
        moment = moments.uniform(0, 1)
        time.sleep(moment)
        assert producer.end(limit=2) == 130
        print(f"Ctrl-C {moment:.3f} s after an event")
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


def test_ctrl_c_while_an_event_is_being_made(scripts, cluster, topic):
    """In a copy that takes longer for it than the five seconds for the reports: it is delivered all the same."""
    lines = "        print('making', flush=True)\n        time.sleep(6)\n"
    mine = copy_with(scripts.folder, "kafka_producer.py", lines, before="        yield {\n")
    command = [sys.executable, mine, "-b", cluster.bootstrap_servers, "-t", topic]
    with subprocess.Popen(command, cwd=scripts.folder, stdout=subprocess.PIPE, text=True) as producer:
        assert producer.stdout.readline() == "Kafka Producer has been initiated...\n"
        assert producer.stdout.readline() == "making\n"
        producer.send_signal(signal.SIGINT)
        output, _ = producer.communicate(timeout=LIMIT)
    assert producer.returncode == 130
    assert output.splitlines()[-1] == f"Delivered 1 events to topic {topic}, 0 failed."
    assert len(read_topic(cluster, topic)) == 1


@pytest.mark.parametrize("times", TIMES)
def test_the_consumer_while_its_output_is_read_slowly(scripts, cluster, topic, group, times):
    """Each event is printed exactly once in the end, by one run or another."""
    moments = random_moments("consumer")
    values = numbered(12_000 * times)  # More than is read before the last signal.
    produce(cluster, topic, values)
    output = b""
    for number in range(times):
        consumer = scripts.consumer("-t", topic, "-G", group, stdout=subprocess.PIPE)
        with consumer.process.stdout as stdout:
            part = stdout.read(moments.randint(1, 60_000))
            signum = (signal.SIGINT, signal.SIGTERM)[number % 2]
            consumer.process.send_signal(signum)
            part += stdout.read()
        assert consumer.wait(2) == 0
        print(f"{signum.name} after {len(part.splitlines())} events")
        output += part
    rest = scripts.consumer("-t", topic, "-G", group, "--exit")
    assert rest.wait() == 0
    assert rest.lines, "read to the end before the last signal"
    assert output.splitlines() + rest.stdout.encode().splitlines() == values
