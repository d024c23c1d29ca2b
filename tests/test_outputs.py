"""Standard output and the log file when they take nothing, or part of it, or have two writers."""

import os
import re
import shlex
import signal
import subprocess
import time

import pytest
from conftest import (
    committed,
    create_topic,
    last_error,
    numbered,
    numbers,
    press_again,
    produce,
    read_topic,
    wait_until,
)


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


# The log file.


def test_log_on_a_full_disk(scripts, cluster, topic):
    """It ends by itself, though it was to go on for ever, and has told of all that it delivered."""
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.01, "--log-file", "/dev/full")
    assert producer.wait() == 1
    assert producer.stderr == "kafka_producer.py: can't write to /dev/full: No space left on device\n"
    stored = topic_values(cluster, topic)
    assert len(stored) > 0
    assert producer.lines[-1] == f"Delivered {len(stored)} events to topic {topic}, 0 failed."
    assert sum(line.startswith("Produced message") for line in producer.lines) == len(stored)


def test_a_disk_that_becomes_full(scripts, cluster, topic):
    """The log has what did fit, to the last byte."""
    # ulimit counts 512 bytes, or 1024 in some shells.
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.001, "-q", shell='ulimit -f 20; exec "$@"')
    assert producer.wait() == 1
    (error,) = producer.stderr.splitlines()
    assert error == "kafka_producer.py: can't write to producer.log: File too large"
    assert scripts.log.stat().st_size in (20 * 512, 20 * 1024)
    whole = scripts.log.read_text().split("\n")[:-1]
    stored = topic_values(cluster, topic)
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
    assert producer.wait() == 2
    (line,) = producer.stderr.splitlines()
    assert re.fullmatch(rf"kafka_producer.py: .*(Permission denied|Read-only file system): '{path}'", line)
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


# Standard output.


def test_producer_with_stdout_full(scripts, cluster, topic):
    """It sends one event at most, and the log has it."""
    create_topic(cluster, topic)
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0, shell='exec "$@" >/dev/full')
    assert producer.wait() == 1
    (error,) = producer.stderr.splitlines()
    assert error == "kafka_producer.py: can't write to standard output: No space left on device"
    stored = topic_values(cluster, topic)
    assert len(stored) <= 1
    assert logged_values(scripts, topic) == stored


def test_producer_whose_reader_pauses(scripts, topic):
    """That is no sign of a broker that does not answer, though the library's statistics then come all at once."""
    producer = scripts.producer("-t", topic, "-c", 3_000, "-i", 0, stdout=subprocess.PIPE)
    with producer.process.stdout as stdout:
        assert stdout.readline() == b"Kafka Producer has been initiated...\n"
        time.sleep(17)  # Three times the statistics.
        assert stdout.read().splitlines()[-1].decode() == f"Delivered 3000 events to topic {topic}, 0 failed."
    assert producer.wait() == 0
    assert producer.stderr == ""


def test_producer_whose_reader_goes_away(scripts, cluster, topic):
    """At full speed: whatever was on its way then is waited for, and in the log."""
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0, stdout=subprocess.PIPE)
    assert producer.process.stdout.readline() == b"Kafka Producer has been initiated...\n"
    producer.process.stdout.close()
    assert producer.wait() == 1
    assert producer.stderr == "kafka_producer.py: can't write to standard output: Broken pipe\n"
    stored = topic_values(cluster, topic)
    assert len(stored) > 0
    assert logged_values(scripts, topic) == stored


def test_consumer_with_stdout_full(scripts, cluster, filled, group):
    """No offset is stored for what it could not write, and the next run writes it."""
    consumer = scripts.consumer("-t", filled, "-G", group, shell='exec "$@" >/dev/full')
    assert consumer.wait() == 1
    assert consumer.stderr.splitlines()[-3:] == [
        "kafka_consumer.py: can't write to standard output: No space left on device",
        "Processed 0 events. Closing.",
        "Gave up partitions: 0",
    ]
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
    assert last_error(consumer) == "kafka_consumer.py: can't write to standard output: File too large"
    written = numbers(out.read_text().split("\n")[:-1])
    assert 1000 < len(written) < 20_000
    assert written == list(range(len(written)))
    place = committed(cluster, topic, group) or 0
    assert place <= len(written)
    again = scripts.consumer("-t", topic, "-G", group, "-e")
    assert again.wait() == 0
    assert numbers(again.lines) == list(range(place, 20_000))


def test_consumer_whose_reader_goes_away(scripts, cluster, topic, group):
    """What was not written is not lost: its offsets are not committed, and the next run prints it."""
    create_topic(cluster, topic)
    produce(cluster, topic, numbered(20_000))
    consumer = scripts.consumer("-t", topic, "-G", group, stdout=subprocess.PIPE)
    assert numbers([consumer.process.stdout.readline()]) == [0]
    consumer.process.stdout.close()
    assert consumer.wait() == 1
    assert last_error(consumer) == "kafka_consumer.py: can't write to standard output: Broken pipe"
    place = committed(cluster, topic, group) or 0
    assert place < 20_000
    again = scripts.consumer("-t", topic, "-G", group, "-e")
    assert again.wait() == 0
    assert numbers(again.lines) == list(range(place, 20_000))


@pytest.mark.parametrize("closed", [1, 2])
def test_an_output_of_the_consumer_that_is_closed(scripts, filled, closed):
    """No event is taken for printed, and no message is printed among the events."""
    consumer = scripts.consumer("-t", filled, shell=f'exec "$@" {closed}>&-')
    assert consumer.wait() == 1
    told = "kafka_consumer.py: standard output or standard error is closed\n"
    assert (consumer.stdout, consumer.stderr) == ("", told if closed == 1 else "")


@pytest.mark.parametrize("closed", [1, 2])
def test_an_output_of_the_producer_that_is_closed(scripts, cluster, topic, closed):
    """Whatever the system opens in its place is left alone, and the log has each event."""
    create_topic(cluster, topic)
    producer = scripts.producer("-t", topic, "-i", 0, shell=f'exec "$@" {closed}>&-')
    assert producer.wait() == 0
    assert producer.stderr == ""
    assert len(producer.lines) == (0 if closed == 1 else 12)
    values = [record.value.decode() for record in read_topic(cluster, topic)]
    log = scripts.log.read_text().splitlines()
    assert len(values) == len(log) == 10
    assert all(f"with value of {value}, partition 0" in line for value, line in zip(values, log, strict=True))


@pytest.mark.parametrize("name", ["producer", "consumer"])
def test_a_second_signal_ends_it_when_nobody_reads(scripts, cluster, topic, name):
    """Its output is a pipe that is full."""
    create_topic(cluster, topic)
    options = {"producer": ["-c", 0, "-i", 0], "consumer": ["--from-offset", "beginning"]}[name]
    produce(cluster, topic, [b"x" * 500_000])  # More than a pipe holds.
    script = getattr(scripts, name)("-t", topic, *options, stdout=subprocess.PIPE)
    assert script.process.stdout.read(1)
    if name == "producer":
        # Nearly all that a pipe holds; a line of the log is written before that on the terminal, and is longer.
        wait_until(lambda: scripts.log.stat().st_size > 68_000, "a full pipe")
    assert press_again(script, signal.SIGTERM) == -signal.SIGTERM
    script.process.stdout.close()
