"""Three brokers with a copy of each event on all: they die one by one, and both scripts go on."""

import time

import pytest
from confluent_kafka.admin import AdminClient
from conftest import EXTERNAL, create_topic, new_cluster, wait_until
from faults import QUICK_RETURN, SAME_PEOPLE, assert_all_there_once, logged, order_of_people, random_moments, stored

pytestmark = pytest.mark.skipif(bool(EXTERNAL), reason="these tests break their cluster")

SETTINGS = {
    "default.replication.factor": "3",
    "min.insync.replicas": "2",
    "offsets.topic.replication.factor": "3",
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
    **QUICK_RETURN,
}


@pytest.fixture
def cluster():
    with new_cluster(brokers=3, settings=SETTINGS) as cluster:
        yield cluster


def test_each_broker_killed_in_turn(scripts, cluster, topic, group):
    """First the leader, in the middle of 5,000 events; then the others, each when the one before has caught up."""
    moments = random_moments("each")
    create_topic(cluster, topic, replicas=3)
    admin = AdminClient(cluster.client_config)

    def partition(name):
        return admin.list_topics(name, timeout=10).topics[name].partitions[0]

    def complete():
        return all(len(partition(name).isrs) == 3 for name in (topic, "__consumer_offsets"))

    consumer = scripts.consumer("-t", topic, "-G", group)
    consumer.wait_for_stderr("Got partitions")
    wait_until(complete, "three copies of everything")
    order = order_of_people(scripts, cluster, f"{topic}-calm", 5000)
    leader = partition(topic).leader - 1
    # Small batches, so that they arrive one by one at a leader that has done little yet.
    scripts.folder.joinpath("small").write_text("batch.num.messages=100\n")
    producer = scripts.producer("-t", topic, "-c", 5000, "-i", 0, "-F", "small", *SAME_PEOPLE)
    producer.wait_for_lines(2)
    time.sleep(moments.uniform(0, 0.15))
    print(f"{cluster.brokers[leader].name}, the leader, killed after {len(producer.lines) - 1} deliveries")
    cluster.brokers[leader].kill()
    cluster.brokers[leader].start_again()
    assert_all_there_once(scripts, producer, cluster, topic, order)
    # Otherwise all events had been delivered before.
    assert "Waiting for" in producer.stderr
    assert "Delivering again." in producer.stderr

    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.005)
    for broker in (cluster.brokers[leader - 1], cluster.brokers[leader - 2]):
        wait_until(complete, "three copies of everything", limit=40)
        leads = cluster.brokers[partition(topic).leader - 1].name
        print(f"{broker.name} killed after {len(producer.lines) - 1} deliveries, led by {leads}")
        broker.kill()
        broker.start_again()
        # More than were on their way to the screen: the two that are left have agreed to go on.
        before = len(consumer.lines)
        consumer.wait_for_lines(before + 400, limit=40)
    assert producer.end() == 130
    produced, failed = logged(scripts)
    assert failed == []
    assert produced == stored(cluster, topic)
    assert len(set(produced.values())) == len(produced)
    consumer.wait_for_lines(len(produced))
    assert consumer.end() == 0
    assert consumer.lines == [produced[place] for place in sorted(produced)]
    print(f"{len(produced)} events")
