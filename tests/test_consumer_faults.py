"""Consumers die, stop, and lose their broker: everything is printed, and twice only what a killed one printed."""

import signal
import subprocess
import time

import pytest
from conftest import EXTERNAL, committed, create_topic, new_cluster, numbered, produce, read_topic, wait_until
from faults import QUICK_RETURN, bring_back, logged, random_moments, stored

pytestmark = pytest.mark.skipif(bool(EXTERNAL), reason="these tests break their cluster")


@pytest.fixture(scope="module")
def own_cluster():
    with new_cluster(settings=QUICK_RETURN) as cluster:
        yield cluster


@pytest.fixture
def cluster(own_cluster):
    yield own_cluster
    bring_back(own_cluster)


@pytest.fixture
def moments(request):
    return random_moments(request.node.name)


def test_consumer_killed_and_started_again(scripts, cluster, topic, group, moments):
    """The offsets are committed every 5 seconds, so that only what was printed since is printed again."""
    create_topic(cluster, topic)
    scripts.folder.joinpath("short").write_text("session.timeout.ms=6000\n")
    consumer = scripts.consumer("-t", topic, "-G", group, "-F", "short")
    # Seven seconds or more, so that there is a commit before the end.
    producer = scripts.producer("-t", topic, "-c", 20_000, "-i", 0.00035, "-q")
    consumer.wait_for_lines(moments.randint(16_000, 19_000))
    consumer.process.kill()
    killed = time.time()
    first = len(consumer.wait_for_lines(0))
    known = committed(cluster, topic, group)
    assert producer.wait() == 0
    records = read_topic(cluster, topic)
    values = [record.value.decode() for record in records]
    assert len(values) == 20_000

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


def test_consumer_stopped_ten_times(scripts, cluster, topic, group, moments):
    """By Ctrl-C and by SIGTERM in turn, while a program reads its output slowly."""
    values = numbered(100_000)
    produce(cluster, topic, values)
    output = b""
    for number in range(10):
        consumer = scripts.consumer("-t", topic, "-G", group, stdout=subprocess.PIPE)
        part = consumer.process.stdout.read(moments.randint(1, 60_000))
        signum = (signal.SIGINT, signal.SIGTERM)[number % 2]
        consumer.process.send_signal(signum)
        part += consumer.process.stdout.read()
        assert consumer.wait(2) == 0
        print(f"{signal.Signals(signum).name} after {len(part.splitlines())} events")
        output += part
    rest = scripts.consumer("-t", topic, "-G", group, "--exit")
    assert rest.wait() == 0
    assert rest.lines, "read to the end before the tenth stop"
    assert output.splitlines() + rest.stdout.encode().splitlines() == values


def test_broker_killed_and_back_while_consuming(scripts, cluster, topic, group, moments):
    """One consumer waits for events meanwhile, and another one reads."""
    topics = f"{topic}-waiting", f"{topic}-reading"
    for name in topics:
        create_topic(cluster, name)
    values = [event.decode() for event in numbered(100_000)]
    produce(cluster, topics[0], values[:100])
    produce(cluster, topics[1], values, **{"batch.size": 1000})
    # Small requests, so that reading takes a while, and a session that is over before the broker is back.
    scripts.folder.joinpath("small").write_text("fetch.message.max.bytes=1000\nsession.timeout.ms=6000\n")
    waiting, reading = (scripts.consumer("-t", name, "-G", f"{group}-{name}", "-F", "small") for name in topics)
    assert waiting.wait_for_lines(100) == values[:100]
    reading.wait_for_lines(moments.randint(500, 20_000))
    cluster.brokers[0].kill()
    print(f"broker killed after {len(reading.lines)} events")
    for consumer in (waiting, reading):
        consumer.wait_for_stderr("No answer from", limit=10)
    assert len(reading.lines) < len(values), "killed too late"
    bring_back(cluster)
    for consumer in (waiting, reading):
        consumer.wait_for_stderr("answers again", limit=10)
    produce(cluster, topics[0], values[100:200])
    waiting.wait_for_lines(200)
    reading.wait_for_lines(len(values))
    assert waiting.end() == reading.end() == 0
    assert waiting.lines == values[:200]
    assert reading.lines == values
    usual = ("Kafka Consumer", "Available topics", "Got partitions", "Printed")
    for consumer in (waiting, reading):
        told = [line for line in consumer.stderr.splitlines() if not line.startswith(usual)]
        assert [line.split(" ")[0] for line in told] == ["No", cluster.bootstrap_servers], told


def test_one_of_two_consumers_killed(scripts, cluster, topic, group, moments):
    """The other one has its partitions within the session time, and the 3 seconds until it asks the broker."""
    create_topic(cluster, topic, partitions=4)
    scripts.folder.joinpath("short").write_text("session.timeout.ms=6000\n")
    first, second = (scripts.consumer("-t", topic, "-G", group, "-F", "short") for _ in range(2))
    got = f"Got partitions of {topic}: "
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
