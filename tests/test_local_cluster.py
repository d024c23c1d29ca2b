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
    THREE_BROKERS,
    copy_with_free_ports,
    create_topic,
    new_cluster,
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


@pytest.fixture
def compose_file(tmp_path):
    copy = copy_with_free_ports(COMPOSE_FILE, tmp_path)
    yield copy
    run(copy, "down", "-v")


def data_of(compose_file):
    return DATA / os.path.relpath(compose_file, ROOT).replace("/", "_")


def run(compose_file, *command):
    """Runs the program for a compose file and returns (exit status, stdout, stderr)."""
    words = [sys.executable, PROGRAM, "-f", str(compose_file), *command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_up_status_logs_down(compose_file, topic):
    folder = data_of(compose_file)
    assert run(compose_file, "status") == (1, "zookeeper  not running\nbroker     not running\n", "")
    cluster = Cluster(compose_file, folder)
    status, out, _ = run(compose_file, "up")
    assert status == 0
    assert out.endswith(f"Kafka answers at {cluster.bootstrap_servers}.\n")
    create_topic(cluster, topic)
    produce(cluster, topic, numbered(5))
    status, out, _ = run(compose_file, "status")
    assert status == 0
    assert re.fullmatch(r"zookeeper  running, pid \d+\nbroker     running, pid \d+\n", out)
    running = processes_of(folder)
    assert run(compose_file, "up")[0] == 0
    assert processes_of(folder) == running  # It was up already.

    # All that it listens on is loopback.
    for process in running:
        for connection in process.net_connections("inet"):
            assert connection.status != "LISTEN" or connection.laddr.ip in ("127.0.0.1", "::ffff:127.0.0.1")

    status, out, _ = run(compose_file, "logs")
    assert "zookeeper | " in out
    assert "broker    | " in out

    assert run(compose_file, "down")[:2] == (0, "Stopped; topics and offsets are kept.\n")
    assert processes_of(folder) == []
    assert "shut down completed" in (folder / "broker.log").read_text()
    assert run(compose_file, "up")[0] == 0
    assert len(read_topic(cluster, topic)) == 5
    assert run(compose_file, "down", "-v")[:2] == (0, "Stopped; topics and offsets are deleted.\n")
    assert not folder.exists()
    assert processes_of(folder) == []


def test_up_asks_also_when_the_processes_are_there(compose_file):
    assert run(compose_file, "up")[0] == 0
    (broker,) = Cluster(compose_file, data_of(compose_file)).brokers
    broker.pause()
    try:
        with subprocess.Popen([sys.executable, PROGRAM, "-f", compose_file, "up"], stdout=subprocess.PIPE) as up:
            with pytest.raises(subprocess.TimeoutExpired):
                up.wait(3)
            broker.resume()
            assert up.stdout.read().startswith(b"Kafka answers at ")
    finally:
        broker.resume()


def test_stop_and_start_one_of_three(tmp_path, topic):
    compose_file = copy_with_free_ports(THREE_BROKERS, tmp_path)
    cluster = Cluster(compose_file, data_of(compose_file))
    try:
        assert run(compose_file, "up")[1] == f"Kafka answers at {cluster.bootstrap_servers}.\n"
        create_topic(cluster, topic, replicas=3)
        _, before, _ = run(compose_file, "status")
        assert run(compose_file, "stop", "broker-2")[:2] == (0, "broker-2 is stopped.\n")
        produce(cluster, topic, numbered(10), acks="all")
        status, out, _ = run(compose_file, "status")
        assert status == 1
        assert out == re.sub("broker-2   .*", "broker-2   not running", before)
        assert run(compose_file, "start", "broker-2")[:2] == (0, "broker-2 answers.\n")
        assert run(compose_file, "status")[0] == 0
        assert run(compose_file, "stop", "broker-3")[0] == run(compose_file, "stop", "zookeeper")[0] == 0
        assert run(compose_file, "start", "zookeeper")[:2] == (0, "zookeeper answers.\n")
        # As `docker compose up` it starts what is missing, and leaves alone what is there.
        assert run(compose_file, "up")[0] == 0
        _, out, _ = run(compose_file, "status")
        assert out.splitlines()[1] == before.splitlines()[1]
        assert "not running" not in out
        assert run(compose_file, "stop", "broker-9") == (
            1,
            "",
            f"local_cluster.py: no service broker-9 in {compose_file}, only zookeeper, broker, broker-2, broker-3\n",
        )
    finally:
        run(compose_file, "down", "-v")
    status, out, err = run(compose_file, "start", "broker")
    assert (status, out) == (1, "")
    assert err == "local_cluster.py: broker was not part of the last `up`. Run `down`, then `up`.\n"
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


def test_a_taken_port(compose_file):
    (port,) = Cluster(compose_file, data_of(compose_file)).ports
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        status, out, err = run(compose_file, "up")
    assert status == 1
    assert "Kafka answers" not in out
    assert err.startswith(f"local_cluster.py: port {port} is taken")


def test_ctrl_c_during_up_leaves_nothing(compose_file):
    command = [sys.executable, PROGRAM, "-f", compose_file, "up"]
    up = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(processes_of(data_of(compose_file))) >= 3, "processes of the cluster")
    up.send_signal(signal.SIGINT)
    _, err = up.communicate(timeout=20)
    assert up.returncode == 130
    assert err == "local_cluster.py: interrupted\n"
    assert processes_of(data_of(compose_file)) == []


def test_a_broker_that_dies_at_its_start(tmp_path):
    cluster = Cluster(
        copy_with_free_ports(COMPOSE_FILE, tmp_path), tmp_path, settings={"log.retention.hours": "no number"}
    )
    with pytest.raises(ClusterError, match=r"(?s)broker dies at its start\. .*broker\.log ends:\n.*log\.retention"):
        cluster.up()
    assert processes_of(tmp_path) == []


def test_a_killed_broker_is_started_again(topic):
    with new_cluster() as cluster:
        create_topic(cluster, topic)
        produce(cluster, topic, numbered(3))
        (before,) = cluster.brokers[0].processes()[1]
        before.kill()
        wait_until(lambda: not before.is_running(), "the death of the broker")
        cluster.wait_until_ready()
        assert cluster.brokers[0].processes()[1] != [before]
        assert len(read_topic(cluster, topic)) == 3
        folder = cluster.folder
    assert processes_of(folder) == []


def test_shared_classes_help_and_are_no_must(tmp_path):
    cluster = Cluster(copy_with_free_ports(COMPOSE_FILE, tmp_path), tmp_path)
    broker, zookeeper = cluster.brokers[0], cluster.zookeeper
    broker.archive = tmp_path / "none-yet.jsa"
    zookeeper.archive = tmp_path / "useless.jsa"
    zookeeper.archive.write_text("no archive")
    try:
        cluster.up()
        # Another program may have been making one at that moment.
        wait_until(lambda: broker.share_classes() or broker.archive.exists(), "the archive", limit=60)
        broker.kill()
        broker.start()
        cluster.wait_until_ready()
        assert f"-XX:SharedArchiveFile={broker.archive}" in broker.processes()[1][0].cmdline()
    finally:
        for service in cluster.services:
            service.kill()


def test_nothing_is_left_when_the_program_that_uses_it_is_killed(tmp_path):
    copy_with_free_ports(COMPOSE_FILE, tmp_path)
    code = (
        f"from local_cluster import *; folder = Path({str(tmp_path)!r}); "
        "Cluster(folder / COMPOSE_FILE.name, folder).up(); print('up', flush=True); input()"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(PROGRAM),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert program.stdout.readline() == b"up\n"
    assert len(processes_of(tmp_path)) == 4
    program.kill()
    program.communicate()
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
