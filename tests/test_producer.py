"""The producer's options, messages and exit statuses."""

import json
import signal
import subprocess
import sys

from conftest import LIMIT, ROOT, read_topic


def delivered(producer):
    """The count in the producer's closing line."""
    return int(producer.lines[-1].split()[1])


def test_count_0_goes_on_until_ctrl_c(scripts, cluster, topic):
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0.01)
    producer.wait_for_lines(20)
    assert producer.end(signal.SIGINT) == 130
    assert delivered(producer) == len(read_topic(cluster, topic)) >= 19
    assert len(scripts.log.read_text().splitlines()) == delivered(producer)


def test_sigterm_ends_as_ctrl_c_does(scripts, cluster, topic):
    producer = scripts.producer("-t", topic, "-c", 0, "-i", 0)
    producer.wait_for_lines(1000)
    assert producer.end(signal.SIGTERM) == 143
    assert delivered(producer) == len(read_topic(cluster, topic)) == len(producer.lines) - 2


def test_ctrl_c_during_a_long_interval(scripts, topic):
    producer = scripts.producer("-t", topic, "--interval", 3600)
    producer.wait_for_lines(2)
    assert producer.end(limit=2) == 130


def test_log_file_and_quiet(scripts, cluster, topic):
    assert scripts.producer("-t", topic, "-c", 50, "-i", 0, "-q", "--log-file", "other.log").wait() == 0
    assert not scripts.log.exists()
    log = (scripts.folder / "other.log").read_text().splitlines()
    assert len(log) == 50
    assert scripts.folder.joinpath("producer-0.out").read_text().splitlines() == [
        "Kafka Producer has been initiated...",
        f"Delivered 50 events to topic {topic}, 0 failed.",
    ]
    assert all(record.value.decode() in line for record, line in zip(read_topic(cluster, topic), log, strict=True))


def test_a_seed_makes_the_same_people(scripts, cluster, topic):
    for _ in range(2):
        assert scripts.producer("-t", topic, "-c", 5, "-i", 0, "--seed", 7).wait() == 0
    people = [json.loads(record.value) for record in read_topic(cluster, topic)]
    for person in people:
        del person["signup_at"]  # It depends on the day.
    assert people[:5] == people[5:]
    assert people[0] != people[1]


def test_a_full_local_queue_is_waited_for(scripts, cluster, topic):
    config = scripts.folder / "slow.properties"
    config.write_text("# wait for three seconds\nlinger.ms = 3000\n\nbatch.num.messages=99999\nbatch.size=9999999\n")
    assert scripts.producer("-t", topic, "-c", 1_001, "-i", 0, "-F", config).wait() == 0
    assert len(read_topic(cluster, topic)) == 1_001


def test_a_mistake_in_on_delivery_of_a_copy(scripts, cluster, topic):
    """Each event that was made before still gets its report, and the mistake is told."""
    source = (ROOT / "kafka_producer.py").read_text()
    right = "            self.delivered += 1\n"
    assert source.count(right) == 1
    copy = scripts.folder / "my_producer.py"
    copy.write_text(source.replace(right, f"{right}            1 / 0\n"))
    command = [sys.executable, copy, "-b", cluster.bootstrap_servers, "-t", topic, "-i", "0", "-c", "5000"]
    done = subprocess.run(command, cwd=scripts.folder, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 1
    # confluent-kafka 2.16.1 raises a SystemError from poll(), but the right exception from flush().
    assert "my_producer.py: division by zero\n" in done.stderr
    count = len(read_topic(cluster, topic))
    assert count > 1
    assert done.stdout.splitlines()[-1] == f"Delivered {count} events to topic {topic}, 0 failed."


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(scripts, cluster, topic):
    config = scripts.folder / "client.properties"
    config.write_text(f"bootstrap.servers={cluster.bootstrap_servers}\ncompression.type=gzip\n")
    assert scripts.producer("-t", topic, "-c", 2, "-i", 0, "-F", config, servers=None).wait() == 0
    assert len(read_topic(cluster, topic)) == 2
    config.write_text("bootstrap.servers=localhost:1\n")
    assert scripts.producer("-t", topic, "-c", 1, "-i", 0, "-F", config).wait() == 0
    assert len(read_topic(cluster, topic)) == 3
