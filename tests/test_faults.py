"""Brokers and ZooKeeper die, hang and come back while a producer runs: nothing is lost, and nothing doubled."""

import time

import pytest
from conftest import create_topic, wait_until
from faults import (
    SAME_PEOPLE,
    assert_all_there_once,
    bring_back,
    logged,
    order_of_people,
    random_moments,
    stored,
)

pytestmark = pytest.mark.breaks_cluster

# Seconds between events. A broker that has just started takes half a second to give a producer its number: without a
# pause most events would be made by then, and delivered all at once, before a test can break anything.
INTERVAL = 0.0005


@pytest.fixture
def moments(request):
    return random_moments(request.node.name)


def assert_only_outages(producer):
    """Fails unless all that the producer told is that the broker was away."""
    told = [line for line in producer.stderr.splitlines() if not line.startswith(("Waiting for", "Is Kafka running"))]
    assert told
    assert all(line.startswith(("Can't connect: ", "No answer: ")) for line in told), told


def kill_in_the_middle(scripts, cluster, topic, moments):
    """Returns the producer of 4,000 events, whose broker was killed on the way and started again."""
    producer = scripts.producer("-t", topic, "-c", 4000, "-i", INTERVAL, *SAME_PEOPLE)
    producer.wait_for_lines(2)
    time.sleep(moments.uniform(0, 0.15))
    print(f"broker killed after {len(producer.lines) - 1} deliveries")
    cluster.brokers[0].kill()
    assert len(producer.lines) - 1 < 4000, "killed too late"
    producer.wait_for_stderr("Can't connect", limit=5)
    cluster.brokers[0].start()
    return producer


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def test_broker_killed_and_back_while_producing(scripts, cluster, topic, moments, rounds):
    for number in range(rounds):
        name = f"{topic}-{number}"
        create_topic(cluster, name, partitions=4)
        scripts.log.unlink(missing_ok=True)
        print(f"round {number}: ", end="")
        order = order_of_people(4000)
        producer = kill_in_the_middle(scripts, cluster, name, moments)
        assert_all_there_once(scripts, producer, cluster, name, order, partitions=4)
        assert_only_outages(producer)
        bring_back(cluster)


def test_broker_killed_and_never_back(scripts, cluster, topic, moments):
    """The first event that fails ends the sending, and is told; what is on its way then is logged and counted too."""
    scripts.folder.joinpath("short").write_text("delivery.timeout.ms=6000\n")
    create_topic(cluster, topic)
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.001, "-F", "short")
    producer.wait_for_lines(moments.randint(100, 2000))
    cluster.brokers[0].kill()
    print(f"broker killed after {len(producer.lines) - 1} deliveries")
    start = time.monotonic()
    # Six seconds until the first fails, and as long for the last one; the library looks once a second.
    assert producer.wait(2 * (6 + 2)) == 1
    print(f"ended {time.monotonic() - start:.1f} s later")
    bring_back(cluster)
    produced, failed = logged(scripts)
    assert producer.lines[-1] == f"Delivered {len(produced)} events to topic {topic}, {len(failed)} failed."
    assert produced
    assert failed
    assert len({*produced.values(), *failed}) == len(produced) + len(failed)
    assert producer.stderr.count("Failed to deliver") == 1
    assert "Can't connect" in producer.stderr
    # What was on its way when the broker died may be stored, though nobody could say so.
    events = stored(cluster, topic)
    assert produced.items() <= events.items()
    assert set(events.values()) <= {*produced.values(), *failed}


def test_broker_hangs_for_20_seconds(scripts, cluster, topic, moments):
    create_topic(cluster, topic, partitions=4)
    order = order_of_people(4000)
    # The library notices after this time, and sends again what the broker then finds in the old connection too.
    scripts.folder.joinpath("short").write_text("socket.timeout.ms=5000\n")
    producer = scripts.producer("-t", topic, "-c", 4000, "-i", INTERVAL, "-F", "short", *SAME_PEOPLE)
    producer.wait_for_lines(2)
    time.sleep(moments.uniform(0, 0.15))
    cluster.brokers[0].pause()
    print(f"broker paused after {len(producer.lines) - 1} deliveries")
    try:
        end = time.monotonic() + 20
        producer.wait_for_stderr("Waiting for the delivery reports of ", limit=12)
        wait_until(lambda: time.monotonic() > end, "the end of the pause", limit=21)
        assert producer.process.poll() is None
    finally:
        cluster.brokers[0].resume()
    assert_all_there_once(scripts, producer, cluster, topic, order, partitions=4)
    assert_only_outages(producer)


def test_zookeeper_killed_and_back(scripts, cluster, topic, group):
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.005)
    consumer = scripts.consumer("-t", topic, "-G", group)
    consumer.wait_for_lines(200)
    cluster.zookeeper.kill()
    before = len(consumer.lines)
    # Six seconds: ZooKeeper's session with the broker is over then.
    consumer.wait_for_lines(before + 1200)
    cluster.zookeeper.start()
    # The broker needs ZooKeeper to create one.
    create_topic(cluster, f"{topic}-new")
    before = len(consumer.lines)
    consumer.wait_for_lines(before + 200)
    assert producer.end() == 130
    produced, failed = logged(scripts)
    assert produced == stored(cluster, topic)
    assert failed == []
    consumer.wait_for_lines(len(produced))
    assert consumer.end() == 0
    assert consumer.lines == list(produced.values())
