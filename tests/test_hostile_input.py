"""Whatever a topic, a topic's name, a configuration or an option holds: a result or a clear error."""

import contextlib
import random
import re
import signal
import string

import pytest
from conftest import LOOK_FIRST, assert_wrong_call, create_topic, last_error, produce, read_topic, wait_until
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

# What could break a line or steer a terminal: control characters of one byte and of two, line separators, and what
# changes the direction of writing.
STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def some(count):
    """So many examples, the same each time; one that fails is printed."""
    fixtures_are_shared = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=fixtures_are_shared)


def safe_lines(script):
    """The lines on standard output, after a check of every byte of both outputs."""
    text = script.stdout_file.read_bytes().decode()
    lines = text.split("\n")
    assert lines.pop() == ""
    for line in [*lines, *script.stderr_file.read_bytes().decode().split("\n")]:
        assert not STEERING.search(line), repr(line)
    return lines


def random_event(random, number):
    """An event that begins with its number, with a key and headers that are no text."""
    return {
        "value": b"%d:" % number + random.randbytes(random.choice([0, 1, 10, 100, 1000])),
        "key": random.choice([None, b"", random.randbytes(20)]),
        "headers": [("header", random.randbytes(20)), ("\x1b[2J", None)],
    }


@pytest.mark.parametrize("options", [[], ["-v"]], ids=["", "verbose"])
def test_random_bytes(scripts, cluster, topic, group, options):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    events = [random_event(random.Random(seed + number), number) for number in range(500)]
    create_topic(cluster, topic)
    produce(cluster, topic, events)
    consumer = scripts.consumer("-t", topic, "-G", group, "-e", *options)
    assert consumer.wait() == 0
    lines = safe_lines(consumer)
    assert len(lines) == 500
    # With -v the value comes last; a line has no other number before a colon that is the event's own.
    start = r"(^|^partition=0 offset={0} timestamp=\d+ key=.*? ){0}:"
    assert all(re.search(start.format(n), line) for n, line in enumerate(lines))


def test_a_megabyte_does_not_stop_the_next_one(scripts, cluster, topic, group):
    """Text, line feeds, and bytes that become four characters each."""
    size = 1_000_000
    create_topic(cluster, topic)
    values = [b"x" * size, b"\n" * size, b"\xff" * size, b"", None, b"last"]
    produce(cluster, topic, values, **{"message.max.bytes": 1_048_000, "batch.size": 1_048_000})
    consumer = scripts.consumer("-t", topic, "-G", group, "-e")
    assert consumer.wait() == 0
    assert safe_lines(consumer) == ["x" * size, "\\n" * size, "\\xff" * size, "", "null", "last"]


def test_times_beyond_the_calendar(scripts, cluster, topic):
    """Producers can set any number; it is shown as it is."""
    times = [1, 253_402_300_800_000, 2**62, -62_135_596_800_001]
    create_topic(cluster, topic)
    produce(cluster, topic, [{"value": b"{}", "timestamp": time} for time in times])
    consumer = scripts.consumer("-t", topic, "-e", "-v", "--from-offset", "beginning")
    assert consumer.wait() == 0
    assert [line.split()[2] for line in safe_lines(consumer)] == [f"timestamp={time}" for time in times]


@pytest.mark.parametrize("quiet", [False, True], ids=["", "quiet"])
def test_events_larger_than_the_broker_takes(scripts, cluster, topic, quiet):
    """The first of them ends the sending, and is told; those that were on their way are logged and counted too."""
    create_topic(cluster, topic, **{"max.message.bytes": "100"})
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.001, *(["-q"] if quiet else []))
    assert producer.wait() == 1
    log = scripts.log.read_text().splitlines()
    failure = rf"Failed to deliver to topic {topic}: Broker: Message size too large\. Value: {{.*}}"
    assert len(log) >= 1
    assert all(re.fullmatch(r"\S+ \S+ " + failure, line) for line in log)
    assert producer.stderr.splitlines() == [log[0][len("2000-01-01 00:00:00 ") :], LOOK_FIRST]
    assert producer.lines[-1] == f"Delivered 0 events to topic {topic}, {len(log)} failed."
    assert read_topic(cluster, topic) == []


def test_one_event_that_is_too_large_in_mid_run(scripts, cluster, topic):
    """Each event before and behind it is either in the topic and logged as delivered, or logged as failed."""
    # One event each; those of the seed are 225 to 290 bytes with what Kafka adds.
    config = scripts.folder / "client.properties"
    config.write_text("batch.num.messages=1\n")
    create_topic(cluster, topic, **{"max.message.bytes": "270"})
    producer = scripts.producer("-t", topic, "-c", 30, "-i", 0.02, "--seed", 1, "-F", config)
    assert producer.wait() == 1
    stored = [record.value.decode() for record in read_topic(cluster, topic)]
    log = scripts.log.read_text().splitlines()
    delivered = [line for line in log if " Produced message " in line]
    failed = [line for line in log if " Failed to deliver " in line]
    assert 0 < len(stored) < 30
    assert failed
    assert len(delivered) + len(failed) == len(log)
    assert all(f" {value}, partition" in line for value, line in zip(stored, delivered, strict=True))
    assert producer.lines[-1] == f"Delivered {len(stored)} events to topic {topic}, {len(failed)} failed."


def test_an_event_that_the_library_refuses(scripts, cluster, topic):
    """With message.max.bytes, at least 1000, no registration would be too large."""
    config = scripts.folder / "client.properties"
    # Who uses these has to begin a transaction first.
    config.write_text("transactional.id=test\ntransaction.timeout.ms=200000\n")
    create_topic(cluster, topic)
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0, "-F", config)
    assert producer.wait() == 1
    assert producer.lines[-1] == f"Delivered 0 events to topic {topic}, 1 failed."
    error, hint = producer.stderr.splitlines()
    assert hint == LOOK_FIRST
    failure = rf"Failed to deliver to topic {topic}: .*Erroneous state\. Value: {{\"user_id\": \d+, .*}}"
    assert re.fullmatch(failure, error)
    (line,) = scripts.log.read_text().splitlines()
    assert re.fullmatch(rf"\S+ \S+ {re.escape(error)}", line)
    assert read_topic(cluster, topic) == []


def test_a_name_that_only_the_broker_refuses(scripts):
    """Two dots: the rule of the rest, up to 249 letters, digits, dots, underscores and hyphens, allows them."""
    for script in (scripts.producer("-t", ".."), scripts.consumer("-t", "..", "--exit")):
        assert script.wait() == 1
        assert script.stderr.splitlines()[-1].startswith(f"kafka_{script.name}.py: can't ")
        assert "topic .." in script.stderr.splitlines()[-1]


def test_a_consumer_that_is_replaced_ends(scripts, cluster, topic, group):
    """Another one of the same group.instance.id makes librdkafka give up for good, in the middle of reading."""
    create_topic(cluster, topic)
    scripts.producer("-t", topic, "-c", 0, "-i", 0.001, "-q")
    config = scripts.folder / "client.properties"
    config.write_text("group.instance.id=one\nheartbeat.interval.ms=200\n")
    first = scripts.consumer("-t", topic, "-G", group, "-F", config)
    first.wait_for_stderr("Got partitions")
    second = scripts.consumer("-t", topic, "-G", group, "-F", config)
    assert first.wait() == 1
    assert re.match(rf"kafka_consumer.py: can't read topic {topic}: .*fenced", last_error(first))
    second.wait_for_stderr("Got partitions")
    assert second.end() == 0


# Properties that do not make a broker unreachable, which takes 30 seconds to tell.
PROPERTIES = ["acks", "auto.offset.reset", "batch.size", "client.id", "client.rack", "compression.type", "debug"]
PROPERTIES += ["default.topic.config", "delivery.timeout.ms", "enable.auto.commit", "enable.idempotence"]
PROPERTIES += ["enable.partition.eof", "error_cb", "fetch.min.bytes", "group.protocol", "heartbeat.interval.ms"]
PROPERTIES += ["isolation.level", "key.serializer", "linger.ms", "log_level", "logger", "on_delivery", "partitioner"]
PROPERTIES += ["partition.assignment.strategy", "plugin.library.paths", "queue.buffering.max.messages", "retries"]
PROPERTIES += ["sasl.mechanism", "sasl.password", "session.timeout.ms", "ssl.ca.location", "ssl.key.password"]
PROPERTIES += ["ssl.key.pem", "statistics.interval.ms", "stats_cb"]
values = st.one_of(st.text(), st.integers().map(str), st.sampled_from(["true", "false", "all", "0", "1", "5000"]))
lines = st.one_of(
    st.text(),
    st.tuples(st.sampled_from(PROPERTIES), st.sampled_from(["=", " = ", " ", ":"]), values).map("".join),
    st.tuples(st.text(string.ascii_lowercase + "._"), st.just("="), values).map("".join),
    st.sampled_from(["# comment", "", "acks=all", "client.id=x", "\ufeff", "=", "=x", "x="]),
)
one_property = st.tuples(st.sampled_from(PROPERTIES), st.just("="), values).map("".join)
configurations = st.one_of(
    one_property.map(str.encode),
    st.lists(lines, max_size=5).map("\n".join).map(str.encode),
    st.binary(max_size=50),
)


@some(8)
@given(configurations, st.sampled_from(["producer", "consumer"]))
@example(b"default.topic.config=x", "producer")
@example(b"default.topic.config=x", "consumer")
@example(b"logger=x\nlog_level=7\ndebug=all", "producer")
@example(b"logger=x\nlog_level=7\ndebug=all", "consumer")
@example(b"acks=-2", "producer")
def test_any_configuration(scripts, topic, configuration, name):
    path = scripts.folder / "any.properties"
    path.write_bytes(configuration)
    options = {"producer": ["-c", 1], "consumer": ["--from-offset", "beginning", "-e"]}[name]
    script = getattr(scripts, name)("-t", topic, "-F", path, *options)
    status = script.wait()
    assert status in (0, 1, 2), script
    if status == 2:
        assert_wrong_call(script)
    elif status == 1:
        assert f"kafka_{name}.py: " in script.stderr or "Failed to deliver" in script.stderr


payloads = st.one_of(st.none(), st.binary(max_size=300), st.text(max_size=100).map(str.encode))
events = st.fixed_dictionaries(
    {"value": payloads, "key": payloads, "headers": st.lists(st.tuples(st.text(max_size=9), payloads), max_size=3)}
)


@some(5)
@given(st.lists(events, min_size=1, max_size=100))
def test_any_payload(scripts, cluster, topic, events):
    if not list(scripts.folder.iterdir()):
        create_topic(cluster, topic)
    produce(cluster, topic, events)
    consumer = scripts.consumer("-t", topic, "--from-offset", -len(events), "-e", "-v")
    assert consumer.wait() == 0
    lines = safe_lines(consumer)
    assert len(lines) == len(events)
    for line, event in zip(lines, events, strict=True):
        _, text = line.split(" key=", 1)
        key, value = (b"null" if event[name] is None else event[name] for name in ("key", "value"))
        with contextlib.suppress(UnicodeDecodeError):
            expected = f"{key.decode()} {value.decode()}"
            assert STEERING.search(expected) or text == expected


# Numbers, what is nearly a number, and what Python takes for one.
numbers = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.text("0123456789-+.eE_ inf", max_size=6),
    st.sampled_from(["1_000", "٣", "0x10", "1e999", "-0", " 7 ", "9" * 5000]),
)


@some(5)
@given(count=numbers, interval=numbers, seed=numbers)
def test_any_numbers_for_the_producer(scripts, topic, count, interval, seed):
    """Wrong ones are named; with the others it starts, and can be stopped if they mean that it goes on for long."""
    producer = scripts.producer("-t", topic, f"--count={count}", f"--interval={interval}", f"--seed={seed}")
    wait_until(lambda: producer.lines or producer.process.poll() is not None, f"a sign of {producer!r}")
    with contextlib.suppress(ProcessLookupError):
        producer.process.send_signal(signal.SIGINT)
    status = producer.wait()
    assert status in (0, 2, 130), producer
    if status == 2:
        assert_wrong_call(producer)
    else:
        assert re.fullmatch(rf"Delivered \d+ events to topic {topic}, 0 failed\.", producer.lines[-1])


@some(5)
@given(options=st.dictionaries(st.sampled_from(["from-offset", "max-messages"]), numbers, min_size=1))
def test_any_numbers_for_the_consumer(scripts, cluster, topic, options):
    if not list(scripts.folder.iterdir()):
        create_topic(cluster, topic)
        produce(cluster, topic, [b"{}"] * 5)
    consumer = scripts.consumer("-t", topic, "-e", *(f"--{name}={number}" for name, number in options.items()))
    status = consumer.wait()
    assert status in (0, 2), consumer
    if status == 2:
        assert_wrong_call(consumer)
    else:
        assert len(safe_lines(consumer)) <= 5
