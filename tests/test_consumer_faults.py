"""Consumers die and lose their broker: everything is printed, and twice only what a killed one printed."""

import re
import signal
import time

import pytest
from conftest import committed, create_topic, last_error, numbered, produce, read_topic, wait_until
from faults import bring_back, logged, random_moments, stored

pytestmark = pytest.mark.breaks_cluster


@pytest.fixture
def moments(request):
    return random_moments(request.node.name)


def test_consumer_killed_and_started_again(scripts, cluster, topic, group, moments):
    """The offsets are committed every 5 seconds, so that only what was printed since is printed again."""
    create_topic(cluster, topic)
    scripts.folder.joinpath("short").write_text("session.timeout.ms=6000\n")
    consumer = scripts.consumer("-t", topic, "-G", group, "-F", "short")
    # Seven seconds or more, so that there is a commit before the end.
    producer = scripts.producer("-t", topic, "-c", 5_000, "-i", 0.0014, "-q")
    consumer.wait_for_lines(moments.randint(4_000, 4_700))
    consumer.process.kill()
    killed = time.time()
    first = len(consumer.wait_for_lines(0))
    known = committed(cluster, topic, group)
    assert producer.wait() == 0
    records = read_topic(cluster, topic)
    values = [record.value.decode() for record in records]
    assert len(values) == 5_000

    again = scripts.consumer("-t", topic, "-G", group, "-F", "short")
    again.wait_for_lines(len(values) - first)
    wait_until(lambda: again.lines[-1] == values[-1], "the last event")
    assert again.end() == 0
    assert consumer.lines == values[:first]
    twice = len(again.lines) - (len(values) - first)
    age = killed - records[first - twice].timestamp / 1000
    print(f"killed after {first} events, {known} committed; {twice} printed twice, the oldest {age:.1f} s old")
    assert again.lines == values[known:]
    assert 0 <= twice == first - known
    assert twice == 0 or age < 5 + 1


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.long)])
def test_broker_killed_while_consuming(scripts, cluster, topic, group, moments, times):
    """At full speed, with the settings as they are: everything is printed, and nothing twice."""
    create_topic(cluster, topic)
    values = [event.decode() for event in numbered(30_000 * times)]
    produce(cluster, topic, values, **{"batch.size": 1000})
    # Small requests, so that reading takes a while.
    scripts.folder.joinpath("small").write_text("fetch.message.max.bytes=1000\nqueued.min.messages=100\n")
    consumer = scripts.consumer("-t", topic, "-G", group, "-F", "small")
    for _ in range(times):
        consumer.wait_for_lines(len(consumer.lines) + moments.randint(500, 20_000))
        cluster.brokers[0].kill()
        print(f"broker killed after {len(consumer.lines)} events")
        assert len(consumer.lines) < len(values), "killed too late"
        bring_back(cluster)
    consumer.wait_for_lines(len(values))
    assert consumer.end() == 0
    print(f"{len(consumer.lines) - len(values)} printed twice")
    assert consumer.lines == values


@pytest.mark.long
def test_an_outage_of_20_seconds(scripts, cluster, topic, group):
    """What comes after it is printed within three seconds."""
    create_topic(cluster, topic)
    values = [event.decode() for event in numbered(20)]
    produce(cluster, topic, values[:10])
    # On a busy machine the broker is away for longer, and would no longer know this member of the group.
    scripts.folder.joinpath("long").write_text("session.timeout.ms=120000\n")
    consumer = scripts.consumer("-t", topic, "-G", group, "-F", "long")
    consumer.wait_for_lines(10)
    cluster.brokers[0].kill()
    begin = time.monotonic()
    end = begin + 20
    consumer.wait_for_stderr("Can't connect", limit=5)
    wait_until(lambda: time.monotonic() > end, "the end of the outage", limit=21)
    bring_back(cluster)
    produce(cluster, topic, values[10:])
    consumer.wait_for_lines(20, limit=3)
    assert consumer.end() == 0
    assert consumer.lines == values
    # About one every ten seconds, and no word when it is over.
    assert 1 <= consumer.stderr.count("Can't connect") <= 2 + (time.monotonic() - begin) / 10
    usual = ("Kafka Consumer", "Available topics", "Got partitions", "Gave up partitions", "Processed")
    usual += ("Can't connect", "Is Kafka running")
    assert all(line.startswith(usual) for line in consumer.stderr.splitlines()), consumer.stderr


def test_damaged_events(scripts, cluster, topic, group):
    """The library would tell, and go on behind them."""
    create_topic(cluster, topic)
    for number in range(3):
        produce(cluster, topic, [f"event {number}".encode()])
    (segment,) = (cluster.brokers[0].data / f"{topic}-0").glob("*.log")
    segment.write_bytes(segment.read_bytes().replace(b"event 1", b"EVENT 1"))
    scripts.folder.joinpath("check").write_text("check.crcs=true\n")
    for _ in range(2):
        consumer = scripts.consumer("-t", topic, "-G", group, "-F", "check", "--exit")
        assert consumer.wait() == 1
        assert last_error(consumer).startswith(f"kafka_consumer.py: can't read topic {topic}: MessageSet at offset 1 ")
        assert committed(cluster, topic, group) == 1
    assert consumer.lines == []


@pytest.mark.parametrize("strategy", ["range", pytest.param("cooperative-sticky", marks=pytest.mark.long)])
def test_another_consumer_joins_in_mid_run(scripts, cluster, topic, group, strategy):
    """All events are printed, by one or the other."""
    create_topic(cluster, topic, partitions=4)
    scripts.folder.joinpath("strategy").write_text(f"partition.assignment.strategy={strategy}\n")
    options = ("-t", topic, "-G", group, "-F", "strategy")
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.005)
    first = scripts.consumer(*options)
    first.wait_for_lines(100)
    second = scripts.consumer(*options)
    second.wait_for_lines(100)
    first.wait_for_lines(len(first.lines) + 100)
    assert producer.end() == 130
    values = [record.value.decode() for record in read_topic(cluster, topic, partitions=4)]
    wait_until(lambda: {*first.lines, *second.lines} >= set(values), "all events")
    assert first.end() == second.end() == 0
    print(f"{len(first.lines) + len(second.lines) - len(values)} of {len(values)} printed twice")
    # Nobody is told of none when a rebalance changes nothing for him.
    assert not re.search(r"partitions: *$", first.stderr, re.MULTILINE)
    assert {*first.lines, *second.lines} == set(values)


def test_one_of_two_consumers_killed(scripts, cluster, topic, group, moments):
    """The other one has its partitions within the session time, and the 3 seconds until it asks the broker."""
    create_topic(cluster, topic, partitions=4)
    scripts.folder.joinpath("short").write_text("session.timeout.ms=6000\n")
    first, second = (scripts.consumer("-t", topic, "-G", group, "-F", "short") for _ in range(2))
    got = "Got partitions: "
    for consumer in (first, second):
        wait_until(lambda it=consumer: it.stderr.split(got)[-1].count(",") == 1, f"two partitions for {consumer}")
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.002)
    victim, other = moments.sample((first, second), 2)
    victim.wait_for_lines(moments.randint(100, 500))
    victim.process.kill()
    start = time.monotonic()
    # Its last assignment: the one that came first had all four before.
    wait_until(lambda: other.stderr.split(got)[-1].startswith("0, 1, 2, 3"), f"the takeover by {other!r}", 6 + 3 + 2)
    print(f"taken over {time.monotonic() - start:.1f} s after {len(victim.lines)} events")
    assert producer.end() == 130
    events = stored(cluster, topic, partitions=4)
    assert logged(scripts) == (events, [])
    values = set(events.values())
    wait_until(lambda: {*victim.lines, *other.lines} >= values, "all events")
    assert other.end() == 0
    assert {*victim.lines, *other.lines} == values
    twice = len(victim.lines) + len(other.lines) - len(values)
    print(f"{twice} of {len(values)} events printed twice")
    assert len(other.lines) == len(set(other.lines))


def test_ctrl_c_while_kafka_waits_for_a_killed_member(scripts, cluster, topic, group):
    """Kafka does not answer who leaves then. That is no bad connection."""
    create_topic(cluster, topic)
    killed = scripts.consumer("-t", topic, "-G", group)
    killed.wait_for_stderr("Got partitions: 0")
    assert killed.end(signal.SIGKILL) == -signal.SIGKILL
    consumer = scripts.consumer("-t", topic, "-G", group)
    consumer.wait_for_stderr("Waiting for partitions.", limit=20)
    assert consumer.end() == 0
    print(consumer.stderr)
    assert "Can't connect" not in consumer.stderr
    assert "Is Kafka running" not in consumer.stderr
