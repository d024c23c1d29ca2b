"""What the fault tests share: random moments, what the log and the topic say, and whether they agree."""

import json
import os
import random
import re
from argparse import Namespace

from conftest import read_topic

from kafka_producer import registrations

# Which moments are taken; a failed test shows it, and FAULT_SEED=... takes the same ones again.
SEED = int(os.environ.get("FAULT_SEED", random.randrange(1_000_000)))

# A producer with these options makes the people of order_of_people().
SAME_PEOPLE = ("--seed", SEED)


def random_moments(name):
    """Returns the random numbers of the test of this name, as random.Random; prints how to get them again."""
    print(f"FAULT_SEED={SEED}")
    return random.Random(f"{SEED} {name}")


def bring_back(cluster):
    """Starts what is down, and returns when all brokers answer."""
    for service in cluster.services:
        if not service.is_running():
            service.start()
    # A broker that was killed dies more often if ZooKeeper was away too, and counts its session from its own start.
    cluster.wait_until_ready(starts=30)


def reports(log):
    """What a log says, (value, partition, offset) by line: partition is None for what failed.

    offset is None where the log gives none: a broker that finds that it has an event already may not know its place.
    """
    for line in log.read_text().split("\n")[:-1]:  # A producer that was killed may leave half a line.
        produced = re.fullmatch(
            r"\S+ \S+ Produced message on topic \S+ with value of (.*), partition (\d+), offset (?:(\d+)|\w+)", line
        )
        if produced:
            value, partition, offset = produced.groups()
            yield value, int(partition), offset and int(offset)
        else:
            failed = re.fullmatch(r"\S+ \S+ Failed to deliver to topic \S+: [^{}]+\. Value: (\{.*\})", line)
            yield failed[1], None, None


def logged(scripts):
    """What the log says was delivered, {(partition, offset): value}, and what failed, [value, ...]."""
    produced, failed = {}, []
    for value, partition, offset in reports(scripts.log):
        if partition is None:
            failed.append(value)
        else:
            assert (partition, offset) not in produced, f"logged twice: {partition}, {offset}"
            produced[partition, offset] = value
    return produced, failed


def stored(cluster, topic, partitions=1):
    """What is in a topic: {(partition, offset): value}; asserts that the events of a key are in one partition."""
    records = read_topic(cluster, topic, partitions)
    homes = {}
    for record in records:
        assert homes.setdefault(record.key, record.partition) == record.partition, f"{record.key} in two partitions"
    return {(record.partition, record.offset): record.value.decode() for record in records}


def person(value):
    """The part of an event that depends on the seed alone."""
    return value.partition(', "signup_at"')[0]


def order_of_people(count, seed=SEED):
    """Makes the same people as a producer with this seed; returns {person: number}."""
    made = map(json.dumps, registrations(Namespace(seed=seed, count=count, interval=0)))
    order = {person(value): number for number, value in enumerate(made)}
    assert len(order) == count
    return order


def assert_all_there_once(scripts, producer, cluster, topic, order, partitions=1):
    """Fails unless the topic has all events once, each partition in order, and the log and the terminal the same ones.

    order: what order_of_people returned; the producer has the options SAME_PEOPLE.
    """
    assert producer.wait(60) == 0
    events = stored(cluster, topic, partitions)
    count = len(order)
    assert len(events) == len(set(events.values())) == count
    assert logged(scripts) == (events, [])
    *lines, end = producer.lines[1:]
    assert sorted(lines) == sorted(line.split(" ", 2)[2] for line in scripts.log.read_text().splitlines())
    assert end == f"Delivered {count} events to topic {topic}, 0 failed."
    for partition in range(partitions):
        made = [order[person(value)] for place, value in sorted(events.items()) if place[0] == partition]
        assert made == sorted(made), f"out of order in partition {partition}"
