"""The tutorial as people do it: the producer in one terminal, the consumer in a second, the log in a third."""

import json
import re

from conftest import committed, read_topic

LINE = re.compile(r"Produced message on topic (\S+) with value of (\{.*\}), partition (\d+), offset (\d+)")


def test_two_terminals_and_the_log(scripts, cluster, topic, group):
    producer = scripts.producer("-t", topic)
    consumer = scripts.consumer("-t", topic, "-G", group)
    assert producer.wait() == 0
    shown = consumer.wait_for_lines(10)
    assert consumer.end() == 0

    stored = read_topic(cluster, topic)
    values = [record.value.decode() for record in stored]
    assert len(values) == 10
    assert shown == values

    first, *events, last = producer.lines
    assert first == "Kafka Producer has been initiated..."
    assert [LINE.fullmatch(line).groups() for line in events] == [
        (topic, value, "0", str(offset)) for offset, value in enumerate(values)
    ]
    assert last == f"Delivered 10 events to topic {topic}, 0 failed."
    assert producer.stderr == ""

    log = scripts.log.read_text().splitlines()
    assert [line[20:] for line in log] == events
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in log)

    # One a second, without drift: the tenth is due 9 s after the first.
    times = [record.timestamp for record in stored]
    assert 8900 <= times[-1] - times[0] <= 9900

    assert "Kafka Consumer has been initiated..." in consumer.stderr
    assert "Got partitions: 0" in consumer.stderr
    assert "Processed 10 events." in consumer.stderr
    assert committed(cluster, topic, group) == 10


def test_the_second_run_adds_to_topic_and_log(scripts, cluster, topic, group):
    for _ in range(2):
        assert scripts.producer("-t", topic, "-i", 0).wait() == 0
        consumer = scripts.consumer("-t", topic, "-G", group, "--exit")
        assert consumer.wait() == 0
        assert len(consumer.lines) == 10
    assert len(scripts.log.read_text().splitlines()) == 20
    assert len(read_topic(cluster, topic)) == 20


def test_an_event_is_a_registration(scripts, cluster, topic):
    assert scripts.producer("-t", topic, "-i", 0, "-c", 100).wait() == 0
    records = read_topic(cluster, topic)
    assert len(records) == 100
    for record in records:
        event = json.loads(record.value)
        assert list(event) == ["user_id", "user_name", "user_address", "platform", "signup_at"]
        assert 20000 <= event["user_id"] <= 100000
        assert record.key == str(event["user_id"]).encode()
        assert re.fullmatch(r".+ \| .+ \| [A-Z]{2}", event["user_address"])
        assert event["platform"] in ("Mobile", "Laptop", "Tablet")
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", event["signup_at"])


def test_consumer_first_then_the_topic(scripts, topic, group):
    consumer = scripts.consumer("-t", topic, "-G", group)
    consumer.wait_for_stderr(f"Subscribed topic not available: {topic}")
    producer = scripts.producer("-t", topic, "-c", 1)
    producer.wait_for_lines(2)
    # The library looks for new topics every few seconds.
    assert len(consumer.wait_for_lines(1, limit=10)) == 1
    assert consumer.end() == 0
    assert consumer.stderr.count("not available") == 1
