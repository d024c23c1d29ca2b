"""The cluster of three-brokers.yaml, a copy of each event on all: brokers die, and both scripts go on."""

import time

import pytest
from confluent_kafka.admin import AdminClient
from conftest import THREE_BROKERS, create_topic, numbered, numbers, produce, wait_until
from faults import SAME_PEOPLE, assert_all_there_once, logged, order_of_people, random_moments, stored

pytestmark = [pytest.mark.breaks_cluster(THREE_BROKERS), pytest.mark.long]


@pytest.fixture
def partitions(cluster):
    """partitions(topic): what the cluster says of a topic's partitions, as confluent_kafka's PartitionMetadata."""
    admin = AdminClient(cluster.client_config)
    return lambda topic: list(admin.list_topics(topic, timeout=10).topics[topic].partitions.values())


def wait_for_copies(partitions, *topics):
    wait_until(
        lambda: all(len(partition.isrs) == 3 for topic in topics for partition in partitions(topic)),
        f"three copies of {topics}",
    )


def assert_all_printed(scripts, consumer, cluster, topic):
    """Fails unless the consumer prints what the log says and the topic has, each once and in order."""
    produced, failed = logged(scripts)
    assert failed == []
    assert produced == stored(cluster, topic)
    assert len(set(produced.values())) == len(produced)
    consumer.wait_for_lines(len(produced))
    assert consumer.end() == 0
    assert consumer.lines == [produced[place] for place in sorted(produced)]


def test_topics_have_three_copies(scripts, topic, group, partitions):
    """Those that are made by themselves, and Kafka's own."""
    assert scripts.producer("-t", topic, "-c", 1).wait() == 0
    assert scripts.consumer("-t", topic, "-G", group, "--exit").wait() == 0
    for name in (topic, "__consumer_offsets"):
        assert {len(partition.replicas) for partition in partitions(name)} == {3}


def test_exit_when_a_partition_has_no_leader(scripts, cluster, topic, group, partitions):
    """The library waits for one without a word."""
    create_topic(cluster, topic)
    # Makes __consumer_offsets, for which all three are needed.
    assert scripts.consumer("-t", topic, "-G", group, "--exit").wait() == 0
    produce(cluster, topic, numbered(1))
    leader = cluster.brokers[partitions(topic)[0].leader - 1]
    leader.kill()
    wait_until(lambda: partitions(topic)[0].leader == -1, f"the others to know that {leader.name} is away")
    consumer = scripts.consumer("-t", topic, "-G", group, "--exit")
    try:
        consumer.wait_for_stderr("Waiting for the end of these partitions, which are slow or have no leader: 0\n")
    finally:
        leader.start()
    assert consumer.wait() == 0
    assert numbers(consumer.lines) == [0]


def test_leader_killed_in_the_middle(scripts, cluster, topic, group, partitions):
    """It is told, and stays away until the two others have all 8,000 events, and all are printed."""
    moments = random_moments("leader")
    create_topic(cluster, topic, replicas=3)
    consumer = scripts.consumer("-t", topic, "-G", group)
    consumer.wait_for_stderr("Got partitions")
    order = order_of_people(8_000)
    wait_for_copies(partitions, topic, "__consumer_offsets")
    leader = cluster.brokers[partitions(topic)[0].leader - 1]
    producer = scripts.producer("-t", topic, "-c", 8_000, "-i", 0, *SAME_PEOPLE)
    producer.wait_for_lines(moments.randint(500, 3_000))
    leader.kill()
    delivered = len(producer.lines) - 1
    print(f"{leader.name}, the leader, killed after {delivered} deliveries")
    assert delivered < 8_000
    producer.wait_for_stderr(f"Can't connect: localhost:{leader.port}/", limit=10)
    assert_all_there_once(scripts, producer, cluster, topic, order)
    assert_all_printed(scripts, consumer, cluster, topic)
    assert not leader.is_running()
    print(f"producer: {producer.stderr!r}, consumer: {consumer.stderr!r}")


def test_each_broker_killed_in_turn(scripts, cluster, topic, group, partitions):
    """The leader first, which is told though the others serve on."""
    create_topic(cluster, topic, replicas=3)
    consumer = scripts.consumer("-t", topic, "-G", group)
    consumer.wait_for_stderr("Got partitions")
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.005)
    producer.wait_for_lines(100)
    leader = cluster.brokers[partitions(topic)[0].leader - 1]
    for broker in sorted(cluster.brokers, key=lambda each: each is not leader):
        wait_for_copies(partitions, topic, "__consumer_offsets")
        print(f"{broker.name} killed after {len(producer.lines) - 1} deliveries")
        broker.kill()
        if broker is leader:
            producer.wait_for_stderr(f"Can't connect: localhost:{leader.port}/", limit=10)
        # More than were on their way to the screen: the two that are left have agreed to go on.
        consumer.wait_for_lines(len(consumer.lines) + 400)
        broker.start()
    assert producer.end() == 130
    assert_all_printed(scripts, consumer, cluster, topic)


def test_two_brokers_stopped(scripts, cluster, topic, group, partitions):
    """The third takes no events alone; when another one is back, the producer goes on."""
    create_topic(cluster, topic, replicas=3)
    consumer = scripts.consumer("-t", topic, "-G", group)
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.005)
    consumer.wait_for_lines(100)
    wait_for_copies(partitions, topic, "__consumer_offsets")
    first, second, _ = cluster.brokers
    first.stop()
    consumer.wait_for_lines(len(consumer.lines) + 400)
    second.stop()
    wait_until(lambda: len(partitions(topic)[0].isrs) == 1, "the end of two copies")
    delivered = len(producer.lines)
    start = time.monotonic()
    wait_until(lambda: time.monotonic() > start + 3, "600 more events to be made")
    assert len(producer.lines) == delivered
    assert producer.process.poll() is None
    first.start()
    consumer.wait_for_lines(delivered + 1000)
    assert producer.end() == 130
    assert_all_printed(scripts, consumer, cluster, topic)
