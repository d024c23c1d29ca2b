"""The scripts as they are on Kafka 4, which has no ZooKeeper and a second protocol for consumer groups."""

import re

import pytest
import yaml
from conftest import KAFKA_4, committed, copy_with_free_ports, create_topic, last_error, read_topic, wait_until
from faults import SAME_PEOPLE, assert_all_there_once, bring_back, order_of_people, random_moments
from local_cluster import COMPOSE_FILE, Cluster, broker_properties

pytestmark = pytest.mark.breaks_cluster(KAFKA_4)

EVERY_PARTITION = {0, 1, 2, 3}


@pytest.fixture
def consumer(scripts):
    """Starts a consumer with a protocol for groups, "classic" or "consumer": consumer(protocol, *options)."""

    def start(protocol, *options):
        config = scripts.folder / protocol
        config.write_text(f"group.protocol={protocol}\n")
        return scripts.consumer("-F", config, *options)

    return start


def told(consumer):
    """The partitions that the consumer has, by what it says."""
    has = set()
    for what, partitions in re.findall(r"^(Got|Gave up) partitions: (.*)$", consumer.stderr, re.MULTILINE):
        numbers = {int(number) for number in partitions.split(", ")}
        has = has | numbers if what == "Got" else has - numbers
    return has


def places(lines):
    """The (partition, offset) of lines that a consumer with -v printed."""
    return [tuple(map(int, re.match(r"partition=(\d+) offset=(\d+) ", line).groups())) for line in lines]


def read_now(consumer, count=60):
    """The partitions of the next events that the consumer prints; so many that each of its partitions is among them."""
    start = len(consumer.lines)
    return {partition for partition, _ in places(consumer.wait_for_lines(start + count)[start:])}


def test_two_terminals_and_the_log(scripts, cluster, topic, group):
    producer = scripts.producer("-t", topic, "-i", 0.1)
    consumer = scripts.consumer("-t", topic, "-G", group)
    assert producer.wait() == 0
    shown = consumer.wait_for_lines(10)
    assert told(consumer) == {0}
    assert consumer.end() == 0
    assert shown == [record.value.decode() for record in read_topic(cluster, topic)]
    events = [
        f"Produced message on topic {topic} with value of {value}, partition 0, offset {offset}"
        for offset, value in enumerate(shown)
    ]
    assert producer.lines[1:] == [*events, f"Delivered 10 events to topic {topic}, 0 failed."]
    assert [line[20:] for line in scripts.log.read_text().splitlines()] == events
    assert producer.stderr == ""
    assert committed(cluster, topic, group) == 10


@pytest.mark.parametrize("protocol", [pytest.param("classic", marks=pytest.mark.long), "consumer"])
def test_another_consumer_joins_and_leaves_in_mid_run(scripts, consumer, cluster, topic, group, protocol):
    """All events are printed, by one or the other, and what they say of their partitions is true."""
    create_topic(cluster, topic, partitions=4)
    options = ("-t", topic, "-G", group, "-v")
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.005, "-q")
    first = consumer(protocol, *options)
    wait_until(lambda: read_now(first) == EVERY_PARTITION, "events of all partitions")
    assert told(first) == EVERY_PARTITION

    second = consumer(protocol, *options)
    second.wait_for_lines(1)  # The first one has given up what the second one has.
    wait_until(lambda: len(told(second)) == 2 and read_now(second) == told(second), "events of two partitions")
    wait_until(lambda: read_now(first) == EVERY_PARTITION - told(second), "the first one to have the others")
    wait_until(lambda: told(first) == EVERY_PARTITION - told(second), ["the first one to say so", first])

    assert second.end() == 0
    wait_until(lambda: read_now(first) == EVERY_PARTITION, "all partitions to be back")
    assert told(first) == EVERY_PARTITION
    assert not re.search(r"partitions: *$", first.stderr, re.MULTILINE)

    assert producer.end() == 130
    stored = {(record.partition, record.offset) for record in read_topic(cluster, topic, partitions=4)}
    wait_until(lambda: {*places(first.lines), *places(second.lines)} == stored, "all events")
    assert first.end() == 0


@pytest.mark.long
def test_exit_when_the_other_consumer_has_all_partitions(consumer, cluster, topic, group):
    """With the new protocol the library does not say that there are none for us; so it gives up after a minute."""
    create_topic(cluster, topic)
    first = consumer("consumer", "-t", topic, "-G", group)
    first.wait_for_stderr("Got partitions: 0")
    second = consumer("consumer", "-t", topic, "-G", group, "--exit")
    assert second.wait(75) == 1
    assert last_error(second).startswith("kafka_consumer.py: no partitions for 60 seconds")
    assert first.end() == 0


@pytest.mark.long
def test_broker_killed_and_back_in_mid_run(scripts, consumer, cluster, topic, group, request):
    """The topic, the log, the terminal and consumers with either protocol have every event once."""
    moments = random_moments(request.node.name)
    order = order_of_people(4000)
    create_topic(cluster, topic)
    consumers = [consumer(protocol, "-t", topic, "-G", group + protocol) for protocol in ("classic", "consumer")]
    producer = scripts.producer("-t", topic, "-c", len(order), "-i", 0.0005, *SAME_PEOPLE)
    producer.wait_for_lines(moments.randint(100, 1500))
    cluster.brokers[0].kill()
    print(f"broker killed after {len(producer.lines) - 1} deliveries")
    assert len(producer.lines) - 1 < len(order), "killed too late"
    producer.wait_for_stderr("Can't connect", limit=5)
    bring_back(cluster)
    assert_all_there_once(scripts, producer, cluster, topic, order)
    values = [record.value.decode() for record in read_topic(cluster, topic)]
    for reader in consumers:
        assert reader.wait_for_lines(len(values)) == values
        assert reader.end() == 0


def test_its_file_differs_only_in_what_kafka_4_needs():
    before, after = (yaml.safe_load(file.read_text())["services"]["broker"] for file in (COMPOSE_FILE, KAFKA_4))
    same = ("ports", "volumes", "tmpfs", "restart", "stop_grace_period")
    assert [before[key] for key in same] == [after[key] for key in same]
    assert after["healthcheck"] == {**before["healthcheck"], "test": after["healthcheck"]["test"]}
    before, after = broker_properties(before["environment"]), broker_properties(after["environment"])
    gone = {"broker.id", "zookeeper.connect", "zookeeper.session.timeout.ms", "cub.zk.timeout"}
    assert before.keys() - after.keys() == gone
    changed = {key for key in before.keys() & after.keys() if before[key] != after[key]}
    assert changed == {"listener.security.protocol.map"}
    new = {"process.roles", "node.id", "controller.quorum.voters", "controller.listener.names", "listeners"}
    assert after.keys() - before.keys() == new


def test_the_local_cluster_changes_only_addresses(tmp_path):
    cluster = Cluster(copy_with_free_ports(KAFKA_4, tmp_path), tmp_path)
    cluster.configure()
    (broker,) = cluster.brokers
    asked, written = broker_properties(broker.environment), broker.properties
    assert {key for key in written if written[key] != asked.get(key)} == {
        "log.dirs",
        "listeners",
        "advertised.listeners",
        "controller.quorum.voters",
    }
    host, containers, controller = written["listeners"].split(",")
    assert host == f"HOST://127.0.0.1:{broker.port}"
    assert written["advertised.listeners"] == f"{host},{containers}".replace("127.0.0.1", "localhost")
    assert controller == f"CONTROLLER://{written['controller.quorum.voters'].removeprefix('1@')}"
