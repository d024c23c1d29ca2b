"""Both scripts without a broker: when it is not there yet, goes away, never comes, or is somewhere else."""

import signal

import pytest
from conftest import numbered, press_again, produce, read_topic, wait_until
from faults import logged
from local_cluster import free_port

pytestmark = pytest.mark.breaks_cluster


def test_nobody_there(scripts):
    """The first of at most four messages within 3 seconds, and the end after 30."""
    address = f"localhost:{free_port()}"
    pair = scripts.producer(servers=address), scripts.consumer(servers=address)
    for script in pair:
        script.wait_for_library()
        script.wait_for_stderr("docker compose up", limit=3)
        problem, hint = script.stderr.splitlines()[-2:]
        assert problem.startswith(f"Can't connect: {address}/")
        assert problem.endswith("Connection refused")
        assert hint.startswith("Is Kafka running")
    for script in pair:
        assert script.wait(33) == 1
        assert script.stderr.splitlines()[-1] == f"kafka_{script.name}.py: no answer from Kafka for 30 seconds"
        assert 1 <= script.stderr.count("Can't connect") <= 4
        assert script.stdout == ""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_nobody_is_there(scripts, signum):
    """Nothing is at stake: they end as the system ends programs, which is status 130 or 143 in a shell."""
    address = f"localhost:{free_port()}"
    pair = scripts.producer(servers=address), scripts.consumer(servers=address)
    for script in pair:
        script.wait_for_stderr("Can't connect")
    for script in pair:
        assert script.end(signum, limit=2) == -signum


def test_started_before_the_broker(scripts, cluster, topic, group):
    broker = cluster.brokers[0]
    broker.stop()
    producer = scripts.producer("-t", topic, "-i", 0)
    consumer = scripts.consumer("-t", topic, "-G", group)
    for script in (producer, consumer):
        script.wait_for_stderr("Can't connect")
    broker.start()
    assert producer.wait() == 0
    assert consumer.wait_for_lines(10) == [record.value.decode() for record in read_topic(cluster, topic)]
    assert consumer.end() == 0


def test_ctrl_c_while_the_broker_is_away(scripts, cluster, topic, group):
    """The producer waits five seconds for its deliveries; the consumer can't commit, and a second Ctrl-C ends it."""
    produce(cluster, topic, numbered(10))
    consumer = scripts.consumer("-t", topic, "-G", group)
    consumer.wait_for_lines(10)
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.01)
    producer.wait_for_lines(10)
    cluster.brokers[0].kill()
    try:
        for script in (producer, consumer):
            script.wait_for_stderr("Can't connect")
            script.process.send_signal(signal.SIGINT)
        assert press_again(consumer, signal.SIGINT) == -signal.SIGINT
        assert producer.wait(7) == 130
        produced, failed = logged(scripts)
        assert produced
        assert failed
        assert producer.lines[-1] == f"Delivered {len(produced)} events to topic {topic}, {len(failed)} failed."
        assert producer.stderr.count("Failed to deliver") == len(failed)
    finally:
        cluster.brokers[0].start()
        cluster.wait_until_ready()


def test_a_second_signal_ends_both_while_the_broker_hangs(scripts, cluster, topic, group):
    produce(cluster, topic, numbered(10))
    pair = scripts.consumer("-t", topic, "-G", group), scripts.producer("-t", topic, "-c", 0, "-i", 0.01)
    for script in pair:
        script.wait_for_lines(10)
    cluster.brokers[0].pause()
    try:
        for script in pair:
            assert press_again(script, signal.SIGTERM) == -signal.SIGTERM
    finally:
        cluster.brokers[0].resume()


@pytest.mark.parametrize("host", ["localhost", "nowhere.invalid"], ids=["refused", "unknown"])
def test_an_address_that_cannot_be_reached_from_here(scripts, cluster, topic, host):
    """The most frequent trouble of beginners: advertised.listeners has an address that is right somewhere else."""
    broker, (port,) = cluster.brokers[0], cluster.ports
    right = broker.properties
    # One that is not part of the address that the scripts are given.
    wrong = f"{host}:{free_port()}"
    broker.stop()
    try:
        changed = right["advertised.listeners"].replace(f"localhost:{port}", wrong)
        broker.configure(right | {"advertised.listeners": changed})
        starts = broker.log.read_text().count("started")
        broker.start()
        wait_until(lambda: broker.log.read_text().count("started") > starts, "the broker with another address")
        given = f"127.0.0.1:{port}"
        pair = scripts.producer("-t", topic, servers=given), scripts.consumer("-t", topic, servers=given)
        for script in pair:
            script.wait_for_library()
            script.wait_for_stderr("advertised.listeners", limit=3)
            problem, hint = script.stderr[script.stderr.index("Can't connect") :].splitlines()[:2]
            assert problem.startswith(f"Can't connect: {wrong}/1: ")
            assert hint.startswith(f"{given} gave this address itself (advertised.listeners)")
            assert "Is Kafka running" not in script.stderr
        for script in pair:
            # The last one: while it has not heard of the topics, nothing is at stake.
            assert script.end(limit=10) in (130, 0, -signal.SIGINT)
    finally:
        broker.stop()
        broker.configure(right)
        broker.start()
        cluster.wait_until_ready()
