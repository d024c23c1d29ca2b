"""Both scripts without a broker: when it is not there yet, goes away, or never comes."""

import json
import signal

import pytest
from conftest import EXTERNAL, numbered, produce, read_topic, wait_until
from local_cluster import free_port

pytestmark = pytest.mark.skipif(bool(EXTERNAL), reason="these tests stop their cluster")


@pytest.fixture
def cluster(own_cluster):
    return own_cluster


def test_nobody_there(scripts):
    """One message within 3 seconds, and the end after 30."""
    address = f"localhost:{free_port()}"
    pair = scripts.producer(servers=address), scripts.consumer(servers=address)
    for script in pair:
        # 3 seconds, and the start of Python on a busy machine.
        script.wait_for_stderr("Trying for 30 s", limit=4)
        trying, hint = script.stderr.splitlines()[-2:]
        assert address in trying
        assert "refused" in trying
        assert "docker compose up" in hint
    for script in pair:
        assert script.wait(32) == 1
        failed, hint = script.stderr.splitlines()[-2:]
        assert failed.startswith(f"kafka_{script.name}.py: can't ")
        assert address in failed
        assert "docker compose up" in hint
        assert len(script.stderr.splitlines()) == (4 if script.name == "producer" else 5)
        assert script.stdout == ""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_nobody_is_there(scripts, signum):
    address = f"localhost:{free_port()}"
    producer, consumer = scripts.producer(servers=address), scripts.consumer(servers=address)
    for script in (producer, consumer):
        script.wait_for_stderr("Trying for 30 s")
    assert producer.end(signum, limit=2) == (130 if signum == signal.SIGINT else -signum)
    assert consumer.end(signum, limit=2) == 0


def test_started_before_the_broker(scripts, cluster, topic, group):
    broker = cluster.brokers[0]
    broker.stop()
    producer = scripts.producer("-t", topic, "-i", 0)
    consumer = scripts.consumer("-t", topic, "-G", group)
    for script in (producer, consumer):
        script.wait_for_stderr("Trying for 30 s")
    broker.start()
    assert producer.wait() == 0
    assert consumer.wait_for_lines(10) == [record.value.decode() for record in read_topic(cluster, topic)]
    assert consumer.end() == 0


def test_a_broker_that_is_killed_and_comes_back(scripts, cluster, topic, group):
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.05)
    consumer = scripts.consumer("-t", topic, "-G", group)
    consumer.wait_for_lines(20)
    cluster.brokers[0].kill()
    producer.wait_for_stderr("Waiting for")
    consumer.wait_for_stderr("No answer from")
    cluster.brokers[0].start()
    producer.wait_for_stderr("Delivering again.")
    consumer.wait_for_stderr("answers again.")
    before = len(consumer.lines)
    consumer.wait_for_lines(before + 20)
    assert producer.end() == 130
    values = [record.value.decode() for record in read_topic(cluster, topic)]
    consumer.wait_for_lines(len(values))
    assert consumer.end() == 0
    assert consumer.lines == values
    assert len(producer.lines) - 2 == len(values)
    assert (producer.stderr + consumer.stderr).count("again.") == 2


def test_ctrl_c_while_the_broker_is_away(scripts, cluster, topic, group):
    """The consumer can't commit, and says so; the producer waits for its deliveries until it is told again."""
    produce(cluster, topic, numbered(10))
    consumer = scripts.consumer("-t", topic, "-G", group)
    consumer.wait_for_lines(10)
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.01)
    producer.wait_for_lines(10)
    cluster.brokers[0].kill()
    try:
        producer.wait_for_stderr("Waiting for")
        consumer.process.send_signal(signal.SIGINT)
        assert consumer.wait(2) in (0, 1)
        producer.process.send_signal(signal.SIGINT)
        producer.wait_for_stderr("Ctrl-C", limit=2)
        assert producer.end(limit=2) == 130
        count, failed = producer.lines[-1].split()[1], producer.lines[-1].split()[-2]
        log = scripts.log.read_text().splitlines()
        assert sum(" Produced message " in line for line in log) == int(count) > 0
        assert sum(" Failed to deliver " in line for line in log) == int(failed) > 0
        assert all(json.loads("{" + line.split("{", 1)[1].rsplit("}", 1)[0] + "}") for line in log)
    finally:
        cluster.brokers[0].start()
        wait_until(lambda: cluster.wait_until_ready() is None, "the broker")
