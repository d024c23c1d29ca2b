"""The consumer's options, its place in the group, its output and its exit statuses."""

import json
import re
import signal
import subprocess
import sys

import pytest
from confluent_kafka import Producer
from conftest import LIMIT, committed, consumer_with, create_topic, last_error, numbered, numbers, produce, wait_until


def test_the_next_run_goes_on_where_this_one_ended(scripts, cluster, filled, group):
    for expected in ([0, 1, 2], [3, 4, 5], [6, 7, 8, 9], []):
        consumer = scripts.consumer("-t", filled, "-G", group, "-c", 3 if expected[:1] != [6] else 100, "--exit")
        assert consumer.wait() == 0
        assert numbers(consumer.lines) == expected
        assert f"Processed {len(expected)} events. Closing." in consumer.stderr
    assert committed(cluster, filled, group) == 10


def test_an_event_that_cannot_be_processed_comes_again(scripts, cluster, filled, group):
    """What was processed before it is done with, though the library had read on."""
    mine = consumer_with(scripts.folder, "    assert message.offset() < 5\n")
    command = [sys.executable, mine, "-b", cluster.bootstrap_servers, "-t", filled, "-G", group]
    done = subprocess.run(command, cwd=scripts.folder, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 1
    assert "Can't process the event at partition 0, offset 5.\n" in done.stderr
    assert done.stderr.endswith("AssertionError\n")
    assert numbers(done.stdout.splitlines()) == [0, 1, 2, 3, 4]
    again = scripts.consumer("-t", filled, "-G", group, "--exit")
    assert again.wait() == 0
    assert numbers(again.lines) == [5, 6, 7, 8, 9]


def test_events_that_process_skips(scripts, cluster, filled, group):
    mine = consumer_with(scripts.folder, "    if message.offset() < 5 or message.offset() == 9:\n        return\n")
    command = [sys.executable, mine, "-b", cluster.bootstrap_servers, "-t", filled, "-G", group, "--exit"]
    shown = subprocess.check_output(command, cwd=scripts.folder, text=True, timeout=LIMIT)
    assert numbers(shown.splitlines()) == [5, 6, 7, 8]
    assert committed(cluster, filled, group) == 10


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_commit_and_end(scripts, cluster, filled, group, signum):
    consumer = scripts.consumer("-t", filled, "-G", group)
    consumer.wait_for_lines(10)
    assert consumer.end(signum, limit=2) == 0
    assert committed(cluster, filled, group) == 10
    produce(cluster, filled, [b"{}"])
    again = scripts.consumer("-t", filled, "-G", group)
    assert again.wait_for_lines(1) == ["{}"]
    assert again.end(signum, limit=2) == 0
    assert again.lines == ["{}"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [["--exit"], ["--max-messages", 100_000]], ids=["exit", "max-messages"])
def test_a_signal_before_it_is_done(scripts, cluster, topic, group, options, signum):
    """What follows after && must not take a part for the whole. What was printed is done with all the same."""
    produce(cluster, topic, numbered(20_000))
    consumer = scripts.consumer("-t", topic, "-G", group, *options, stdout=subprocess.PIPE)
    with consumer.process.stdout as stdout:  # A pipe holds less than all events, so it can't be done yet.
        part = stdout.read(1)
        consumer.process.send_signal(signum)
        part += stdout.read()
    assert consumer.wait() == 128 + signum
    assert 0 < committed(cluster, topic, group) == len(part.splitlines()) < 20_000


def test_partitions_that_are_lost(scripts, cluster, filled, group):
    """A consumer that was silent for too long says so, and the next one repeats what was not committed."""
    short = "session.timeout.ms=6000\nheartbeat.interval.ms=1000\nauto.commit.interval.ms=60000\n"
    (scripts.folder / "short").write_text(short)
    first = scripts.consumer("-t", filled, "-G", group, "-F", "short")
    first.wait_for_lines(10)
    first.process.send_signal(signal.SIGSTOP)
    second = scripts.consumer("-t", filled, "-G", group, "-F", "short")
    second.wait_for_lines(10)
    first.process.send_signal(signal.SIGCONT)
    first.wait_for_stderr("Lost the partitions. Events since the last commit may come again.\n")
    assert first.end() == 0
    assert second.end() == 0
    assert first.lines == second.lines


def test_two_consumers_share_four_partitions(scripts, cluster, topic, group):
    create_topic(cluster, topic, partitions=4)
    first = scripts.consumer("-t", topic, "-G", group)
    first.wait_for_stderr("Got partitions: 0, 1, 2, 3")
    second = scripts.consumer("-t", topic, "-G", group)
    got = "Got partitions: "
    for consumer in (first, second):
        wait_until(lambda it=consumer: it.stderr.split(got)[-1].count(",") == 1, f"two partitions for {consumer}")
    produce(cluster, topic, [{"value": event, "partition": n % 4} for n, event in enumerate(numbered(40))])
    wait_until(lambda: len(first.lines) + len(second.lines) == 40, "40 lines in all")
    assert sorted(numbers(first.lines + second.lines)) == list(range(40))
    assert first.end() == second.end() == 0


STRETCHES = {
    "three from": (["--from-offset", 3, "-c", 3], [3, 4, 5]),
    "from": (["--from-offset", 7, "-e"], [7, 8, 9]),
    "the last two": (["--from-offset", -2, "-e"], [8, 9]),
    "more than there are": (["--from-offset", -200, "-e"], list(range(10))),
    "beginning": (["--from-offset", "beginning", "-e"], list(range(10))),
    "end": (["--from-offset", "end", "-e"], []),
    "beginning, not to the end": (["--from-offset", "beginning", "-c", 2], [0, 1]),
    "the one that is yet to come": (["--from-offset", 10, "-e"], []),
    "more than an offset can be": (["--from-offset", "9" * 30, "-e"], []),
    "nothing": (["-c", 0], []),
}


def test_stretches_leave_the_group_alone(scripts, cluster, filled, group):
    assert scripts.consumer("-t", filled, "-G", group, "-c", 2).wait() == 0
    for name, (options, expected) in STRETCHES.items():
        stretch = scripts.consumer("-t", filled, "-G", group, *options)
        assert stretch.wait() == 0, name
        assert numbers(stretch.lines) == expected, name
    assert committed(cluster, filled, group) == 2


def test_an_offset_that_is_not_there(scripts, filled):
    consumer = scripts.consumer("-t", filled, "--from-offset", 50, "--exit")
    assert consumer.wait() == 0
    assert "Partition 0: reading from offset 10 on; the next new event will be 10." in consumer.stderr
    assert consumer.lines == []


def test_a_stretch_of_several_partitions(scripts, cluster, topic):
    create_topic(cluster, topic, partitions=3)
    produce(cluster, topic, [{"value": event, "partition": n % 3} for n, event in enumerate(numbered(30))])
    consumer = scripts.consumer("-t", topic, "--from-offset", 7, "--exit")
    assert consumer.wait() == 0
    assert sorted(numbers(consumer.lines)) == list(range(21, 30))
    consumer = scripts.consumer("-t", topic, "--from-offset", -3, "--exit")
    assert consumer.wait() == 0
    assert sorted(numbers(consumer.lines)) == list(range(21, 30))


def test_deleted_events_are_passed_over(scripts, cluster, topic):
    """In a compacted or aborted stretch there are offsets without events; the end of it has none here."""
    create_topic(cluster, topic)
    producer = Producer({**cluster.client_config, "transactional.id": topic})
    producer.init_transactions(20)
    for abort in (False, True):
        producer.begin_transaction()
        producer.produce(topic, b'{"number": %d}' % abort)
        producer.flush(10)
        producer.abort_transaction() if abort else producer.commit_transaction()
    # Offsets: 0 an event, 1 its commit marker, 2 an aborted event, 3 its marker.
    consumer = scripts.consumer("-t", topic, "--from-offset", "beginning", "--exit")
    assert consumer.wait() == 0
    assert numbers(consumer.lines) == [0]


def test_verbose(scripts, cluster, topic):
    produce(cluster, topic, [{"value": "{}", "key": "k", "timestamp": 1_600_000_000_123}, {"value": "[]"}])
    consumer = scripts.consumer("-t", topic, "-e", "-v", "--from-offset", "beginning")
    assert consumer.wait() == 0
    first, second = consumer.lines
    assert first == "partition=0 offset=0 timestamp=1600000000123 key=k {}"
    assert re.fullmatch(r"partition=0 offset=1 timestamp=\d{13} key=null \[\]", second)


PAYLOADS = {
    b"plain": "plain",
    "Zoë 東京 🎈".encode(): "Zoë 東京 🎈",
    b"": "",
    None: "null",
    b"two\nlines\r\n": "two\\nlines\\r\\n",
    b"\x1b[2Jclear\x07\x00": "\\x1b[2Jclear\\x07\\x00",
    b"\xff\xfe broken \xc3": "\\xff\\xfe broken \\xc3",
    "c1 \x9b31m next\x85line \u2028 \u202eevil".encode(): "c1 \\x9b31m next\\x85line \\u2028 \\u202eevil",
    b'{"path": "C:\\\\x"}': '{"path": "C:\\\\x"}',
}


def test_one_line_for_each_event_whatever_it_holds(scripts, cluster, topic, group):
    produce(cluster, topic, [{"value": value, "key": value} for value in PAYLOADS])
    consumer = scripts.consumer("-t", topic, "-G", group, "-e")
    assert consumer.wait() == 0
    assert consumer.lines == list(PAYLOADS.values())
    verbose = scripts.consumer("-t", topic, "-v", "-e", "--from-offset", "beginning")
    assert verbose.wait() == 0
    assert [line.split("key=", 1)[1] for line in verbose.lines] == [f"{text} {text}" for text in PAYLOADS.values()]


def test_events_reach_a_pipe_at_once(scripts, cluster, filled, group):
    consumer = scripts.consumer("-t", filled, "-G", group, stdout=subprocess.PIPE)
    assert [json.loads(consumer.process.stdout.readline())["number"] for _ in range(10)] == list(range(10))
    produce(cluster, filled, [b"late"])
    assert consumer.process.stdout.readline() == b"late\n"
    assert consumer.end() == 0
    consumer.process.stdout.close()


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(scripts, cluster, filled, group):
    config = scripts.folder / "client.properties"
    config.write_text(f"bootstrap.servers={cluster.bootstrap_servers}\ngroup.id={group}\n")
    consumer = scripts.consumer("-t", filled, "-F", config, "-c", 4, servers=None)
    assert consumer.wait() == 0
    assert committed(cluster, filled, group) == 4
    config.write_text(f"bootstrap.servers=localhost:1\ngroup.id=other-{group}\n")
    assert scripts.consumer("-t", filled, "-F", config, "-G", group, "-e").wait() == 0
    assert committed(cluster, filled, group) == 10


def test_exit_while_events_keep_coming(scripts, topic, group):
    """But not more than two a second: the library tells the end of a partition when there was nothing for 0.5 s."""
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.7)
    producer.wait_for_lines(2)
    assert scripts.consumer("-t", topic, "-G", group, "--exit").wait() == 0
    assert producer.end() == 130


def test_exit_with_many_partitions(scripts, cluster, topic, group):
    """The end of each is no sign that it waits for the others."""
    create_topic(cluster, topic, partitions=25)
    consumer = scripts.consumer("-t", topic, "-G", group, "--exit")
    assert consumer.wait() == 0
    assert "Waiting" not in consumer.stderr


def test_exit_without_a_topic(scripts, topic):
    consumer = scripts.consumer("-t", topic, "--exit")
    assert consumer.wait() == 1
    assert consumer.stderr.splitlines()[-1].startswith(f"kafka_consumer.py: can't read topic {topic}: ")
    assert "Unknown topic" in consumer.stderr.splitlines()[-1]


def test_exit_when_others_of_the_group_have_all_partitions(scripts, filled, group):
    for name in ("first", "second"):
        # The partition is given to the first of these names, and to none of them anew when one begins to read.
        scripts.folder.joinpath(name).write_text(f"group.instance.id={name}\n")
    first = scripts.consumer("-t", filled, "-G", group, "-F", "first")
    first.wait_for_lines(10)
    second = scripts.consumer("-t", filled, "-G", group, "-F", "second", "--exit")
    assert second.wait(75) == 1
    assert "Got partitions" not in second.stderr
    assert "Waiting for partitions. Other members of the group may have them all" in second.stderr
    assert last_error(second).startswith("kafka_consumer.py: no partitions for 60 seconds")
    assert second.lines == []
    assert first.end() == 0


def test_available_topics(scripts, filled):
    consumer = scripts.consumer("-t", filled, "--exit", "--from-offset", "beginning")
    assert consumer.wait() == 0
    (line,) = [line for line in consumer.stderr.splitlines() if line.startswith("Available topics to consume: ")]
    assert filled in line.removeprefix("Available topics to consume: ").split(", ")
