"""Both scripts without a broker: when it is not there yet, goes away, never comes, or is somewhere else."""

import contextlib
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType
from conftest import (
    LIMIT,
    committed,
    consumer_with,
    create_topic,
    last_error,
    numbered,
    numbers,
    press_again,
    produce,
    read_topic,
    wait_until,
)
from faults import logged
from local_cluster import free_port

import kafka_consumer
import kafka_producer

pytestmark = pytest.mark.breaks_cluster


def test_started_before_the_broker(scripts, cluster, topic, group):
    """Also to read to the end, though the broker may not know its topics yet when it begins to answer."""
    old = f"{topic}-old"
    produce(cluster, old, numbered(10))
    broker = cluster.brokers[0]
    broker.stop()
    producer = scripts.producer("-t", topic, "-i", 0)
    consumer = scripts.consumer("-t", topic, "-G", group)
    to_the_end = scripts.consumer("-t", old, "-G", f"{group}-old", "--exit")
    for script in (producer, consumer, to_the_end):
        script.wait_for_stderr("Can't connect")
    broker.start()
    assert producer.wait() == 0
    assert consumer.wait_for_lines(10) == [record.value.decode() for record in read_topic(cluster, topic)]
    assert consumer.end() == 0
    assert to_the_end.wait() == 0
    assert numbers(to_the_end.lines) == list(range(10))


@pytest.mark.parametrize("take_away", ["kill", "pause"])
def test_ctrl_c_of_a_consumer_without_its_broker(scripts, cluster, topic, group, take_away):
    """It says that it could not commit, and what process() raised; so the next run begins with the same events."""
    produce(cluster, topic, numbered(10))
    mine = consumer_with(scripts.folder, "    tell('event')\n    assert input() == 'no'\n")
    command = [sys.executable, mine, "-b", cluster.bootstrap_servers, "-t", topic, "-G", f"{group}-mine"]
    failing = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in failing.stderr:
        if line == "event\n":
            break
    scripts.folder.joinpath("late").write_text("auto.commit.interval.ms=60000\n")
    consumer = scripts.consumer("-t", topic, "-G", group, "-F", "late")
    consumer.wait_for_lines(10)
    broker = cluster.brokers[0]
    getattr(broker, take_away)()
    failing.stdin.write("yes\n")
    failing.stdin.flush()
    assert consumer.end(limit=10) == 1
    assert "Events since the last commit may come again" in consumer.stderr.splitlines()[-1]
    assert "AssertionError" in failing.communicate(timeout=LIMIT)[1]
    assert failing.returncode == 1
    if take_away == "pause":
        broker.resume()
    else:
        # A broker that hangs may find the commit in the old connection when it goes on.
        broker.start()
        cluster.wait_until_ready()
        assert committed(cluster, topic, group) is None


def test_a_signal_ends_a_consumer_that_closes(scripts, cluster, topic, group):
    """The broker hangs, and close() waits for it."""
    create_topic(cluster, topic)
    # One batch, so that all is read ahead when the first event is seen; more than a pipe holds.
    produce(cluster, topic, [b"x" * 100] * 3_000, **{"linger.ms": 1000, "batch.size": 900_000})
    consumer = scripts.consumer("-t", topic, "-G", group, "-c", 3_000, stdout=subprocess.PIPE)
    consumer.process.stdout.readline()
    cluster.brokers[0].pause()
    try:
        for _ in range(2_999):
            consumer.process.stdout.readline()
        consumer.wait_for_stderr("Processed 3000 events. Closing.")
        assert press_again(consumer, signal.SIGTERM) == -signal.SIGTERM
    finally:
        cluster.brokers[0].resume()
        consumer.process.stdout.close()


def test_localhost_with_two_addresses(scripts, cluster, topic):
    """Where it is ::1 too, at which the broker does not answer, nobody is told of trouble."""
    hosts = scripts.folder / "hosts"
    hosts.write_text("::1 localhost\n127.0.0.1 localhost\n")
    # Hosts of its own for each script, where the system and its rights allow that.
    own_hosts = f'mount --bind {hosts} /etc/hosts && exec "$@"'
    can = subprocess.run(["unshare", "--mount", "sh", "-c", f"mount --bind {hosts} /etc/hosts"], check=False)
    shell = f"exec unshare --mount sh -c '{own_hosts}' sh \"$@\"" if can.returncode == 0 else None
    producers = [scripts.producer("-t", topic, "-c", 1, shell=shell) for _ in range(6)]
    for producer in producers:
        assert producer.wait() == 0
        assert producer.stderr == ""
    for settings in (kafka_producer.MORE_SETTINGS, kafka_consumer.MORE_SETTINGS):
        assert settings["broker.address.family"] == "v4"


def test_ctrl_c_while_the_broker_is_away(scripts, cluster, topic, group):
    """The producer, whose queue is full, waits five seconds for its deliveries; the consumer can't commit, and a second
    Ctrl-C ends it.
    """
    produce(cluster, topic, numbered(10))
    consumer = scripts.consumer("-t", topic, "-G", group)
    consumer.wait_for_lines(10)
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0)
    producer.wait_for_lines(10)
    cluster.brokers[0].kill()
    try:
        for script in (producer, consumer):
            script.wait_for_stderr("Can't connect")
            script.process.send_signal(signal.SIGINT)
        assert press_again(consumer, signal.SIGINT) == -signal.SIGINT
        producer.wait_for_stderr("Failed to deliver", limit=7)
        assert producer.wait(3) == 1
        produced, failed = logged(scripts)
        assert produced
        assert failed
        assert producer.lines[-1] == f"Delivered {len(produced)} events to topic {topic}, {len(failed)} failed."
        assert producer.stderr.count("Failed to deliver") == 1
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
    (port,) = cluster.ports
    broker = cluster.brokers[0]
    advertised = broker.properties["advertised.listeners"]
    # One that is not part of the address that the scripts are given.
    wrong = f"{host}:{free_port()}"
    # The way in for other containers, where the address stays right.
    inner = re.search(r"CONTAINERS://([\w.:]+)", advertised)[1]
    admin = AdminClient({**cluster.client_config, "bootstrap.servers": inner})

    def advertise(listeners):
        entry = ConfigEntry("advertised.listeners", listeners, incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.BROKER, broker.properties["broker.id"], incremental_configs=[entry])

        def is_changed():
            # Refused while the broker, started again by the test before, and ZooKeeper find each other.
            with contextlib.suppress(KafkaException):
                admin.incremental_alter_configs([resource])[resource].result(20)
                return True

        wait_until(is_changed, f"{listeners} to be advertised")

    advertise(advertised.replace(f"localhost:{port}", wrong))
    try:
        given = f"127.0.0.1:{port}"
        pair = scripts.producer("-t", topic, servers=given), scripts.consumer("-t", topic, servers=given)
        for script in pair:
            script.wait_for_library()
            script.wait_for_stderr("advertised.listeners", limit=3)
            assert wrong in script.stderr
        for script in pair:
            # The last one: while it has not heard of the topics, nothing is at stake.
            assert script.end(limit=10) in ({"producer": 1, "consumer": 0}[script.name], -signal.SIGINT)
    finally:
        advertise(advertised)
        cluster.wait_until_ready()


class Refuses(socketserver.StreamRequestHandler):
    """Passes on which requests the broker knows (ApiVersions, 18), and hangs up at any other.

    https://kafka.apache.org/protocol: four bytes with the size of a request or response; then two with its kind.
    """

    def handle(self):
        with socket.create_connection(self.server.broker) as connection, connection.makefile("rb") as responses:
            while (request := message_from(self.rfile))[4:6] == b"\x00\x12":
                connection.sendall(request)
                self.wfile.write(message_from(responses))


def message_from(stream):
    size = stream.read(4)
    return size + stream.read(int.from_bytes(size, "big"))


def test_a_broker_that_hangs_up(scripts, cluster):
    """The library gives up each try at once then, but the scripts do so after thirty seconds, as they say."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refuses) as server:
        host, _, port = cluster.bootstrap_servers.partition(":")
        server.broker = (host, int(port))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever).start()
        try:
            address = f"localhost:{server.server_address[1]}"
            pair = scripts.producer(servers=address), scripts.consumer(servers=address)
            for script in pair:
                script.wait_for_library()
            begin = time.monotonic()
            for script in pair:
                assert script.wait(35) == 1
                assert time.monotonic() - begin > 25
                assert last_error(script) == f"kafka_{script.name}.py: no answer from Kafka for 30 seconds"
                assert "Can't connect: " in script.stderr
        finally:
            server.shutdown()
