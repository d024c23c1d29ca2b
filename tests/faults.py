"""What the fault tests share: random moments, what the log and the topic say, and whether they agree."""

import os
import random
import re

from conftest import read_topic

# Which moments are taken; a failed test shows it, and FAULT_SEED=... takes the same ones again.
SEED = int(os.environ.get("FAULT_SEED", random.randrange(1_000_000)))

# The shortest that ZooKeeper allows: a killed broker can't start again as long as its session lives.
QUICK_RETURN = {"zookeeper.session.timeout.ms": "4000"}


def random_moments(name):
    """Returns the random numbers of the test of this name, as random.Random; prints how to get them again."""
    print(f"FAULT_SEED={SEED}")
    return random.Random(f"{SEED} {name}")


def bring_back(cluster):
    """Starts what is down, and returns when all brokers answer."""
    for service in cluster.services:
        if not service.is_running():
            service.start_again()
    cluster.wait_until_ready()


def logged(scripts):
    """What the log says was delivered, {(partition, offset): value}, and what failed, [value, ...]."""
    produced, failed = {}, []
    for line in scripts.log.read_text().splitlines():
        found = re.fullmatch(
            r"\S+ \S+ Produced message on topic \S+ with value of (.*), partition (\d+), offset (.*)", line
        )
        if found:
            place = int(found[2]), int(found[3])
            assert place not in produced, f"logged twice: {place}"
            produced[place] = found[1]
        else:
            failed.append(re.fullmatch(r"\S+ \S+ Failed to deliver to topic \S+: .*: value of (\{.*\})", line)[1])
    return produced, failed


def stored(cluster, topic, partitions=1):
    """What is in a topic: {(partition, offset): value}; asserts that the events of a key are in order."""
    records = read_topic(cluster, topic, partitions)
    homes, latest = {}, {}
    for record in records:
        assert homes.setdefault(record.key, record.partition) == record.partition, f"{record.key} in two partitions"
        # When the producer made the event.
        assert latest.get(record.partition, 0) <= record.timestamp, f"out of order: {record}"
        latest[record.partition] = record.timestamp
    return {(record.partition, record.offset): record.value.decode() for record in records}


def assert_all_there_once(scripts, producer, cluster, topic, count, partitions=1):
    """Fails unless the topic has `count` different events in order, and the log and the terminal the same ones."""
    assert producer.wait(60) == 0
    events = stored(cluster, topic, partitions)
    assert len(events) == len(set(events.values())) == count
    assert logged(scripts) == (events, [])
    *lines, end = producer.lines[1:]
    assert sorted(lines) == sorted(line.split(" ", 2)[2] for line in scripts.log.read_text().splitlines())
    assert end == f"Delivered {count} events to topic {topic}, 0 failed."
