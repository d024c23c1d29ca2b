"""tests/local_cluster.py as people use it, on a port of its own, and what it leaves behind: nothing."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import psutil
import pytest
from conftest import EXTERNAL, create_topic, new_cluster, numbered, produce, read_topic, wait_until
from local_cluster import DATA, Cluster, ClusterError, free_port

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
def port():
    port = free_port()
    yield port
    run(port, "down", "-v")


def run(port, *command):
    """Runs the program for a port and returns (exit status, stdout, stderr)."""
    words = [sys.executable, PROGRAM, "--port", str(port), *command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_up_status_logs_down(port, topic):
    folder = DATA / str(port)
    assert run(port, "status") == (1, "zookeeper  not running\nbroker     not running\n", "")
    status, out, _ = run(port, "up")
    assert status == 0
    assert out.endswith(f"Kafka answers at localhost:{port}.\n")
    cluster = Cluster(folder, port=port)
    create_topic(cluster, topic)
    produce(cluster, topic, numbered(5))
    status, out, _ = run(port, "status")
    assert status == 0
    assert re.fullmatch(r"zookeeper  running, pid \d+\nbroker     running, pid \d+\n", out)
    running = processes_of(folder)
    assert run(port, "up")[0] == 0
    assert processes_of(folder) == running  # It was up already.

    # All that it listens on is loopback.
    for process in running:
        for connection in process.net_connections("inet"):
            assert connection.status != "LISTEN" or connection.laddr.ip in ("127.0.0.1", "::ffff:127.0.0.1")

    status, out, _ = run(port, "logs")
    assert "zookeeper | " in out
    assert "broker    | " in out

    assert run(port, "down")[:2] == (0, "Stopped; topics and offsets are kept.\n")
    assert processes_of(folder) == []
    assert "shut down completed" in (folder / "broker.log").read_text()
    assert run(port, "up")[0] == 0
    assert len(read_topic(cluster, topic)) == 5
    assert run(port, "down", "-v")[:2] == (0, "Stopped; topics and offsets are deleted.\n")
    assert not folder.exists()
    assert processes_of(folder) == []


def test_a_taken_port(port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        status, out, err = run(port, "up")
    assert status == 1
    assert "Kafka answers" not in out
    assert err.startswith(f"local_cluster.py: port {port} is taken")


def test_ctrl_c_during_up_leaves_nothing(port):
    up = subprocess.Popen([sys.executable, PROGRAM, "--port", str(port), "up"], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(processes_of(DATA / str(port))) >= 3, "processes of the cluster")
    up.send_signal(signal.SIGINT)
    _, err = up.communicate(timeout=20)
    assert up.returncode == 130
    assert err == "local_cluster.py: interrupted\n"
    assert processes_of(DATA / str(port)) == []


def test_a_broker_that_dies_at_its_start(tmp_path):
    cluster = Cluster(tmp_path, settings={"log.retention.hours": "no number"})
    with pytest.raises(ClusterError, match=r"(?s)broker dies at its start\. .*broker\.log ends:\n.*log\.retention"):
        cluster.up()
    assert processes_of(tmp_path) == []


def test_a_killed_broker_is_started_again(topic):
    with new_cluster() as cluster:
        create_topic(cluster, topic)
        produce(cluster, topic, numbered(3))
        (before,) = cluster.brokers[0].processes()[1]
        cluster.brokers[0].crash()
        wait_until(lambda: not before.is_running(), "the death of the broker")
        cluster.wait_until_ready()
        assert cluster.brokers[0].processes()[1] != [before]
        assert len(read_topic(cluster, topic)) == 3
        folder = cluster.folder
    assert processes_of(folder) == []


def test_three_brokers(topic):
    with new_cluster(brokers=3, settings={"min.insync.replicas": "2"}) as cluster:
        create_topic(cluster, topic, replicas=3)
        produce(cluster, topic, numbered(10), acks="all")
        cluster.brokers[1].kill()
        produce(cluster, topic, numbered(10), acks="all")
        assert len(read_topic(cluster, topic)) == 20


def test_nothing_is_left_when_the_program_that_uses_it_is_killed(tmp_path):
    code = f"from local_cluster import Cluster; Cluster({str(tmp_path)!r}).up(); print('up', flush=True); input()"
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
