"""What the scripts do without Kafka: wrong calls, help, and an address at which nobody answers."""

import re
import signal
import socket
from types import SimpleNamespace

import pytest
from conftest import assert_wrong_call
from local_cluster import free_port


@pytest.fixture
def cluster():
    """Instead of the one that all tests share: an address that no script may connect to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield SimpleNamespace(bootstrap_servers=f"localhost:{server.getsockname()[1]}")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


# Options, and what the error names.
WRONG_CALLS_OF_BOTH = {
    "unknown option": (["--wrong"], "--wrong"),
    "no broker": (["-b", ""], "--bootstrap-servers"),
    "no topic": (["-t", ""], "'' is no topic"),
    "a topic with a slash": (["-t", "a/b"], "'a/b' is no topic"),
    "a topic of 250 characters": (["-t", "x" * 250], "x' is no topic"),
    "a topic with an accent": (["-t", "é"], "'é' is no topic"),
    # How Python shows bytes that are not UTF-8.
    "a topic that is no text": (["-t", b"b\xff\xfe".decode(errors="surrogateescape")], r"'b\udcff\udcfe' is no topic"),
    "no file": (["-F", "missing"], "No such file"),
    "unknown property": (["-F", "unknown"], "no.such.property"),
    "empty value": (["-F", "empty"], "line 1"),
    "a line without =": (["-F", "line"], "line 2"),
    "a file that is no text": (["-F", "bytes"], "bytes"),
}
WRONG_CALLS = {
    "producer": {
        **WRONG_CALLS_OF_BOTH,
        "count is no number": (["-c", "ten"], "ten"),
        "negative count": (["-c", "-1"], "--count -1"),
        "negative interval": (["-i", "-1"], "--interval -1"),
        "endless interval": (["-i", "inf"], "inf"),
        "no interval": (["-i", "nan"], "nan"),
        "bad value": (["-F", "value"], "acks"),
        "contradiction": (["-F", "contradiction"], "acks"),
        "a setting that the script needs": (["-F", "reports"], "delivery.report.only.error"),
        "a queue with too little room": (["-F", "queue"], "queue.buffering.max.messages"),
        "a folder as log file": (["--log-file", "."], "'.'"),
        "a log file in no folder": (["--log-file", "no-such-folder/producer.log"], "no-such-folder/producer.log"),
    },
    "consumer": {
        **WRONG_CALLS_OF_BOTH,
        "offset is no number": (["--from-offset", "x"], "x"),
        "negative number": (["-c", "-1"], "--max-messages"),
        "no number": (["-c", "many"], "many"),
        "a group of a variable that is not set": (["-G", ""], "--group"),
        "a setting that the script needs": (["-F", "commit"], "enable.auto.commit"),
    },
}
FILES = {
    "unknown": b"no.such.property=1",
    "empty": b"client.id=",
    "line": b"client.id=x\nsasl.password secret",
    "bytes": b"\xff\xfe=1",
    "value": b"acks=some",
    "contradiction": b"acks=0",
    "reports": b"delivery.report.only.error=true",
    "queue": b"queue.buffering.max.messages=10",
    "commit": b"enable.auto.commit=false",
}


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        pytest.param(name, *call, id=f"{name}, {what}")
        for name, calls in WRONG_CALLS.items()
        for what, call in calls.items()
    ],
)
def test_wrong_calls(scripts, topic, name, options, named):
    for file, content in FILES.items():
        scripts.folder.joinpath(file).write_bytes(content)
    script = getattr(scripts, name)("-t", topic, *options)
    assert script.wait() == 2
    assert_wrong_call(script)
    assert named in script.stderr.splitlines()[-1]
    assert "secret" not in script.stderr


HELP = {
    "producer": (
        "-b -t -c -i -F -q --log-file --seed",
        ("localhost:9092", "user-tracker", "10", "1", "producer.log"),
        "Exit status: 0 all delivered",
    ),
    "consumer": (
        "-b -t -F -G -o -c -e -v --from-offset",
        ("localhost:9092", "user-tracker", "python-consumer"),
        "Exit status: 0 done",
    ),
}


@pytest.mark.parametrize("name", HELP)
def test_help(scripts, name):
    options, defaults, statuses = HELP[name]
    script = getattr(scripts, name)("--help")
    assert script.wait() == 0
    for option in options.split():
        assert option in script.stdout
    for default in defaults:
        assert f"default: {default}" in " ".join(script.stdout.split())
    assert statuses in script.stdout


@pytest.mark.parametrize("name", ["producer", "consumer"])
def test_an_address_that_is_none(scripts, name):
    script = getattr(scripts, name)(servers="http://localhost:9092")
    script.wait_for_stderr('unsupported protocol "HTTP"', limit=3)
    script.process.kill()


def test_nobody_there(scripts):
    """The first of at most four messages within 3 seconds, and the end after 30."""
    address = f"localhost:{free_port()}"
    pair = scripts.producer(servers=address), scripts.consumer(servers=address)
    for script in pair:
        script.wait_for_library()
        script.wait_for_stderr("docker compose up", limit=3)
        problem, hint = script.stderr.splitlines()[-2:]
        assert problem.startswith(f"Can't connect: {address}/")
        assert re.search(r"Connection refused \(after \d+ms in state CONNECT\)$", problem)
        assert hint.startswith("Is Kafka running")
    for script in pair:
        assert script.wait(33) == 1
        assert script.stderr.splitlines()[-1] == f"kafka_{script.name}.py: no answer from Kafka for 30 seconds"
        assert 1 <= script.stderr.count("Can't connect") <= 4
        assert script.stdout == ""


def test_somebody_who_does_not_answer(scripts):
    """The address is told, though the library only logs it, as a warning."""
    config = scripts.folder / "client.properties"
    config.write_text("socket.connection.setup.timeout.ms=1000\n")  # The least. The default is 30 seconds.
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        pair = [start("-F", config, servers=address) for start in (scripts.producer, scripts.consumer)]
        for script in pair:
            script.wait_for_stderr("docker compose up")
            problem, hint = script.stderr.splitlines()[-2:]
            assert re.match(rf"Can't connect: {address}/bootstrap: Connection setup timed out in state", problem)
            assert hint.startswith("Is Kafka running")
            assert script.end(limit=2) == -signal.SIGINT


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_nobody_is_there(scripts, signum):
    """Nothing is at stake: they end as the system ends programs, which is status 130 or 143 in a shell."""
    address = f"localhost:{free_port()}"
    pair = scripts.producer(servers=address), scripts.consumer(servers=address)
    for script in pair:
        script.wait_for_stderr("Can't connect")
    for script in pair:
        assert script.end(signum, limit=2) == -signum
