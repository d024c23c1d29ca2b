"""Standard output, standard error and the log file when they take nothing, or part of it, or have two writers."""

import os
import re
import shlex

import pytest
from conftest import committed, create_topic, numbered, numbers, produce, read_topic

# What a shell does with each before it starts the script.
BROKEN = {"closed": ">&-", "full": ">/dev/full"}


def logged_values(scripts, topic):
    """The values in producer.log, each of whose lines must be a whole one, in the order of their offsets."""
    pattern = rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d Produced message on topic {topic} with value of (\{{.*\}}), "
    pattern += r"partition 0, offset (\d+)"
    text = scripts.log.read_text()
    assert text.endswith("\n")
    found = [re.fullmatch(pattern, line) for line in text.split("\n")[:-1]]
    assert all(found)
    entries = sorted((int(match[2]), match[1]) for match in found)
    assert [offset for offset, _ in entries] == list(range(len(entries)))
    return [value for _, value in entries]


def topic_values(cluster, topic):
    return [record.value.decode() for record in read_topic(cluster, topic)]


# Row 12: the log file.


def test_log_on_a_full_disk(scripts, cluster, topic):
    """It ends by itself, though it was to go on for ever, and has told of all that it delivered."""
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.01, "--log-file", "/dev/full")
    assert producer.wait() == 1
    assert producer.stderr.splitlines()[-1] == "kafka_producer.py: can't write to /dev/full: No space left on device"
    stored = topic_values(cluster, topic)
    assert len(stored) > 0
    assert producer.lines[-1] == f"Delivered {len(stored)} events to topic {topic}, 0 failed."
    assert sum(line.startswith("Produced message") for line in producer.lines) == len(stored)


def test_a_disk_that_becomes_full(scripts, cluster, topic):
    """The log has what did fit, to the last byte, and the closing line all that was delivered."""
    # ulimit counts 512 bytes, or 1024 in some shells.
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.001, "-q", shell='ulimit -f 20; exec "$@"')
    assert producer.wait() == 1
    assert producer.stderr.splitlines()[-1] == "kafka_producer.py: can't write to producer.log: File too large"
    assert scripts.log.stat().st_size in (20 * 512, 20 * 1024)
    stored = topic_values(cluster, topic)
    assert producer.lines[-1] == f"Delivered {len(stored)} events to topic {topic}, 0 failed."
    whole = scripts.log.read_text().split("\n")[:-1]
    assert 20 < len(whole) < len(stored)
    assert all(value in line for value, line in zip(stored, whole, strict=False))


def test_log_without_permission(scripts, cluster, topic):
    """Root may write everywhere but to the system's own files."""
    create_topic(cluster, topic)
    path = scripts.folder / "old.log"
    path.write_text("an older line\n")
    path.chmod(0o444)
    if os.geteuid() == 0:
        path = "/sys/producer.log"
        if not os.path.isdir("/sys"):
            pytest.skip("root may write everywhere here")
    producer = scripts.producer("-t", topic, "--log-file", path)
    assert producer.wait() == 1
    (line,) = producer.stderr.splitlines()
    assert re.fullmatch(
        f"kafka_producer.py: can't open the log file {path}: (Permission denied|Read-only file system)", line
    )
    assert producer.stdout == ""
    assert read_topic(cluster, topic) == []


def test_two_producers_with_one_log(scripts, cluster, topic):
    """Every line is whole, and there is one for each event of both."""
    create_topic(cluster, topic)
    pair = [scripts.producer("-t", topic, "-c", 5_000, "-i", 0, "-q") for _ in range(2)]
    for producer in pair:
        assert producer.wait(60) == 0
    stored = topic_values(cluster, topic)
    assert len(stored) == 10_000
    assert logged_values(scripts, topic) == stored


# Row 13: standard output and standard error.


@pytest.mark.parametrize("quiet", [False, True], ids=["", "quiet"])
def test_producer_with_stdout_closed(scripts, cluster, topic, quiet):
    """Nobody wants to read it; the log has all."""
    create_topic(cluster, topic)
    producer = scripts.producer("-t", topic, "-i", 0, *(["-q"] if quiet else []), shell='exec "$@" >&-')
    assert producer.wait() == 0
    assert producer.stderr == ""
    stored = topic_values(cluster, topic)
    assert len(stored) == 10
    assert logged_values(scripts, topic) == stored


def test_producer_with_stdout_full(scripts, cluster, topic):
    """It sends nothing that it can't tell of."""
    create_topic(cluster, topic)
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0, shell='exec "$@" >/dev/full')
    assert producer.wait() == 1
    expected = "kafka_producer.py: can't write to standard output: No space left on device"
    assert producer.stderr.splitlines()[-1] == expected
    assert read_topic(cluster, topic) == []
    assert scripts.log.read_text() == ""


@pytest.mark.parametrize("redirection", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("quiet", [False, True], ids=["", "quiet"])
def test_producer_without_stderr(scripts, cluster, topic, redirection, quiet):
    producer = scripts.producer("-t", topic, "-i", 0, *(["-q"] if quiet else []), shell=f'exec "$@" 2{redirection}')
    assert producer.wait() == 0
    stored = topic_values(cluster, topic)
    assert len(stored) == 10
    assert logged_values(scripts, topic) == stored
    assert producer.lines[0] == "Kafka Producer has been initiated..."
    assert producer.lines[-1] == f"Delivered 10 events to topic {topic}, 0 failed."
    assert len(producer.lines) == (2 if quiet else 12)


@pytest.mark.parametrize("redirection", BROKEN.values(), ids=BROKEN)
def test_failures_of_the_producer_stay_off_stdout(scripts, cluster, topic, redirection):
    """Each of ten events is too large for the topic, and each is in the log."""
    create_topic(cluster, topic, **{"max.message.bytes": "100"})
    producer = scripts.producer("-t", topic, "-i", 0, shell=f'exec "$@" 2{redirection}')
    assert producer.wait() != 0
    assert producer.lines == [
        "Kafka Producer has been initiated...",
        f"Delivered 0 events to topic {topic}, 10 failed.",
    ]
    log = scripts.log.read_text().splitlines()
    assert len(log) == 10
    assert all("Failed to deliver" in line for line in log)


@pytest.mark.parametrize("redirection", BROKEN.values(), ids=BROKEN)
def test_consumer_without_stdout(scripts, cluster, filled, group, redirection):
    """No offset is stored for what it could not write, and the next run writes it."""
    consumer = scripts.consumer("-t", filled, "-G", group, shell=f'exec "$@" {redirection}')
    assert consumer.wait() == 1
    assert consumer.stderr.splitlines()[-1].startswith("kafka_consumer.py: ")
    assert "standard output" in consumer.stderr.splitlines()[-1]
    assert not committed(cluster, filled, group)
    again = scripts.consumer("-t", filled, "-G", group, "-e")
    assert again.wait() == 0
    assert numbers(again.lines) == list(range(10))


def test_consumer_whose_stdout_becomes_full(scripts, cluster, topic, group):
    """It has stored at most what is in the file, and the next run goes on from there."""
    create_topic(cluster, topic)
    produce(cluster, topic, numbered(20_000))
    out = scripts.folder / "events"
    # 100 KB (or 200, where ulimit counts 1024 bytes) of 320 KB.
    shell = f'ulimit -f 200; exec "$@" > {shlex.quote(str(out))}'
    consumer = scripts.consumer("-t", topic, "-G", group, "-e", shell=shell)
    assert consumer.wait() == 1
    assert consumer.stderr.splitlines()[-1] == "kafka_consumer.py: can't write to standard output: File too large"
    written = numbers(out.read_text().split("\n")[:-1])
    assert 1000 < len(written) < 20_000
    assert written == list(range(len(written)))
    place = committed(cluster, topic, group) or 0
    assert place <= len(written)
    again = scripts.consumer("-t", topic, "-G", group, "-e")
    assert again.wait() == 0
    assert numbers(again.lines) == list(range(place, 20_000))


@pytest.mark.parametrize("redirection", BROKEN.values(), ids=BROKEN)
def test_consumer_without_stderr(scripts, cluster, filled, group, redirection):
    consumer = scripts.consumer("-t", filled, "-G", group, "-e", shell=f'exec "$@" 2{redirection}')
    assert consumer.wait() == 0
    assert numbers(consumer.lines) == list(range(10))
    assert committed(cluster, filled, group) == 10


@pytest.mark.parametrize("redirection", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("options", [["--wrong"], ["-t", "not legal"], ["-p", "7"]], ids=["call", "topic", "partition"])
def test_errors_stay_off_stdout(scripts, filled, redirection, options):
    """Both scripts, and the producer with the errors that it knows."""
    calls = [scripts.consumer] if options == ["-p", "7"] else [scripts.consumer, scripts.producer]
    for start in calls:
        script = start("-t", filled, *options, shell=f'exec "$@" 2{redirection}')
        assert script.wait() == (2 if options == ["--wrong"] else 1)
        assert script.stdout == ""


@pytest.mark.parametrize("redirection", BROKEN.values(), ids=BROKEN)
def test_neither_stdout_nor_stderr(scripts, cluster, filled, group, redirection):
    consumer = scripts.consumer("-t", filled, "-G", group, shell=f'exec "$@" {redirection} 2{redirection}')
    producer = scripts.producer("-t", filled, "-i", 0, shell=f'exec "$@" {redirection} 2{redirection}')
    assert consumer.wait() == 1
    assert producer.wait() == (0 if redirection == ">&-" else 1)
    assert not committed(cluster, filled, group)
    values = topic_values(cluster, filled)[10:]
    assert len(values) == (10 if redirection == ">&-" else 0)
    assert not values or all(value in scripts.log.read_text() for value in values)
