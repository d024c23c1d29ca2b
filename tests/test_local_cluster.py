"""tests/local_cluster.py as people use it, with ports of its own, and what it leaves behind: nothing."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import psutil
import pytest
from conftest import (
    EXTERNAL,
    copy_with_free_ports,
    create_topic,
    numbered,
    produce,
    read_topic,
    wait_until,
)
from local_cluster import COMPOSE_FILE, DATA, ROOT, Cluster, ClusterError

pytestmark = pytest.mark.skipif(bool(EXTERNAL), reason="another cluster is given")
PROGRAM = os.path.join(os.path.dirname(__file__), "local_cluster.py")


def processes_of(folder):
    """The processes that have a file of the folder in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(word.startswith(f"{folder}/") for word in words):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def compose_file(tmp_path_factory):
    """A cluster that the tests here start by the program, and stop in part or as a whole."""
    copy = copy_with_free_ports(COMPOSE_FILE, tmp_path_factory.mktemp("compose"))
    yield copy
    run(copy, "down", "-v")


@pytest.fixture
def cluster(compose_file):
    """The same one when it is up, as local_cluster.Cluster."""
    cluster = Cluster(compose_file, data_of(compose_file))
    assert run(compose_file, "up") == (0, f"Kafka answers at {cluster.bootstrap_servers}.\n", "")
    return cluster


def data_of(compose_file):
    return DATA / os.path.relpath(compose_file, ROOT).replace("/", "_")


def run(compose_file, *command):
    """Runs the program for a compose file and returns (exit status, stdout, stderr)."""
    words = [sys.executable, PROGRAM, "-f", str(compose_file), *command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.long
def test_up_status_logs(compose_file, cluster):
    status, out, _ = run(compose_file, "status")
    assert status == 0
    assert re.fullmatch(r"zookeeper  running, pid \d+\nbroker     running, pid \d+\n", out)
    running = processes_of(cluster.folder)
    assert run(compose_file, "up")[0] == 0
    assert processes_of(cluster.folder) == running  # It was up already.

    # All that it listens on is loopback.
    for process in running:
        for connection in process.net_connections("inet"):
            assert connection.status != "LISTEN" or connection.laddr.ip in ("127.0.0.1", "::ffff:127.0.0.1")

    status, out, _ = run(compose_file, "logs")
    assert "zookeeper | " in out
    assert "broker    | " in out


@pytest.mark.long
def test_up_asks_also_when_the_processes_are_there(compose_file, cluster):
    (broker,) = cluster.brokers
    broker.pause()
    try:
        with subprocess.Popen([sys.executable, PROGRAM, "-f", compose_file, "up"], stdout=subprocess.PIPE) as up:
            with pytest.raises(subprocess.TimeoutExpired):
                up.wait(3)
            broker.resume()
            assert up.stdout.read().startswith(b"Kafka answers at ")
    finally:
        broker.resume()


@pytest.mark.long
def test_stop_and_start_one(compose_file, cluster):
    _, before, _ = run(compose_file, "status")
    assert run(compose_file, "start", "broker")[:2] == (0, "broker answers.\n")  # As it did.
    assert run(compose_file, "stop", "broker")[:2] == (0, "broker is stopped.\n")
    zookeeper = before.splitlines()[0]
    assert run(compose_file, "status") == (1, f"{zookeeper}\nbroker     not running\n", "")
    assert run(compose_file, "stop", "zookeeper")[:2] == (0, "zookeeper is stopped.\n")
    assert run(compose_file, "start", "zookeeper")[:2] == (0, "zookeeper answers.\n")
    running = processes_of(cluster.folder)
    # As `docker compose up` it starts what is missing, and leaves alone what is there.
    assert run(compose_file, "up")[0] == 0
    assert len(processes_of(cluster.folder)) == 4
    assert set(running) < set(processes_of(cluster.folder))
    assert run(compose_file, "stop", "broker-9") == (
        1,
        "",
        f"local_cluster.py: no service broker-9 in {compose_file}, only zookeeper, broker\n",
    )


@pytest.mark.long
def test_a_killed_broker_is_started_again(cluster, topic):
    (broker,) = cluster.brokers
    create_topic(cluster, topic)
    produce(cluster, topic, numbered(3))
    (before,) = broker.processes()[1]
    before.kill()
    wait_until(lambda: not before.is_running(), "the death of the broker")
    cluster.wait_until_ready()
    assert broker.processes()[1] != [before]
    assert len(read_topic(cluster, topic)) == 3


@pytest.mark.long
def test_down_keeps_and_deletes(compose_file, cluster, topic):
    create_topic(cluster, topic)
    produce(cluster, topic, numbered(5))
    assert run(compose_file, "down")[:2] == (0, "Stopped; topics and offsets are kept.\n")
    assert processes_of(cluster.folder) == []
    assert "shut down completed" in (cluster.folder / "broker.log").read_text()
    assert run(compose_file, "status") == (1, "zookeeper  not running\nbroker     not running\n", "")
    told = "local_cluster.py: broker was not part of the last `up`. Run `down`, then `up`.\n"
    assert run(compose_file, "start", "broker") == (1, "", told)
    assert run(compose_file, "up")[0] == 0
    assert len(read_topic(cluster, topic)) == 5
    assert run(compose_file, "down", "-v")[:2] == (0, "Stopped; topics and offsets are deleted.\n")
    assert not cluster.folder.exists()
    assert processes_of(cluster.folder) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "is no compose file that can be used here: FileNotFoundError"),
        ("services: [", "is no compose file that can be used here: ParserError"),
        ("volumes: {}", "is no compose file that can be used here: KeyError"),
        ("services: {}", "needs brokers of confluentinc/cp-kafka that advertise localhost:PORT, and one"),
        (COMPOSE_FILE.read_text().replace(":7.9.", ":6.2."), "needs brokers of confluentinc/cp-kafka that advertise"),
    ],
)
def test_a_file_that_is_of_no_use(tmp_path, text, told):
    file = tmp_path / "wrong.yaml"
    if text:
        file.write_text(text)
    status, out, err = run(file, "status")
    assert (status, out) == (1, "")
    assert err.startswith(f"local_cluster.py: {file} {told}")


def test_a_taken_port(tmp_path):
    compose_file = copy_with_free_ports(COMPOSE_FILE, tmp_path)
    (port,) = Cluster(compose_file, data_of(compose_file)).ports
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        status, out, err = run(compose_file, "up")
    assert status == 1
    assert "Kafka answers" not in out
    assert err.startswith(f"local_cluster.py: port {port} is taken")


def test_ctrl_c_during_up_leaves_nothing(tmp_path):
    compose_file = copy_with_free_ports(COMPOSE_FILE, tmp_path)
    command = [sys.executable, PROGRAM, "-f", compose_file, "up"]
    up = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(processes_of(data_of(compose_file))) >= 3, "processes of the cluster")
    up.send_signal(signal.SIGINT)
    _, err = up.communicate(timeout=20)
    assert up.returncode == 130
    assert err == "local_cluster.py: interrupted\n"
    assert processes_of(data_of(compose_file)) == []


def test_a_broker_that_dies_at_its_start(tmp_path):
    cluster = Cluster(copy_with_free_ports(COMPOSE_FILE, tmp_path), tmp_path)
    cluster.brokers[0].environment["KAFKA_HEAP_OPTS"] = "-Xmx1x"
    with pytest.raises(ClusterError, match=r"(?s)broker dies at its start\. .*broker\.log ends:\n.*heap size: -Xmx1x"):
        cluster.up()
    assert processes_of(tmp_path) == []


@pytest.mark.long
def test_what_an_earlier_start_has_learned_helps_and_is_no_must(tmp_path):
    cluster = Cluster(copy_with_free_ports(COMPOSE_FILE, tmp_path), tmp_path, learns=True)
    zookeeper = cluster.zookeeper
    cluster.services = [zookeeper]  # It has fewer classes than a broker.
    zookeeper.cache = tmp_path / "none-yet.aot"
    try:
        cluster.up()
        zookeeper.stop()
        assert zookeeper.cache.exists()
        zookeeper.learns = False
        for content in (None, "no cache"):
            zookeeper.kill()
            if content:
                zookeeper.cache.write_text(content)
            zookeeper.start()
            cluster.wait_until_ready()
            javas = wait_until(lambda: zookeeper.processes()[1], "ZooKeeper's Java")
            assert f"-XX:AOTCache={zookeeper.cache}" in javas[0].cmdline()
    finally:
        zookeeper.kill()


def test_nothing_is_left_when_the_program_that_uses_it_is_killed(tmp_path):
    copy_with_free_ports(COMPOSE_FILE, tmp_path)
    code = (
        f"from local_cluster import *; folder = Path({str(tmp_path)!r}); "
        "Cluster(folder / COMPOSE_FILE.name, folder).up(); input()"
    )
    folder = os.path.dirname(PROGRAM)
    with subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdin=subprocess.PIPE) as program:
        wait_until(lambda: len(processes_of(tmp_path)) == 4, "ZooKeeper, the broker and the keepers of both")
        program.kill()
    wait_until(lambda: processes_of(tmp_path) == [], "the end of its processes")


def test_a_missing_package_is_named(tmp_path):
    shutil.copy(PROGRAM, tmp_path)
    (tmp_path / "yaml.py").write_text("raise ImportError(\"No module named 'yaml'\")")
    copy = tmp_path / "local_cluster.py"
    done = subprocess.run([sys.executable, copy, "up"], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "local_cluster.py: No module named 'yaml'. Install the packages first: pip install -r tests/requirements.txt\n"
    )
