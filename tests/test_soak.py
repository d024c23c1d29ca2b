"""A long run of both scripts, with the memory that they take."""

import hashlib
import re
import time

import kafka
import psutil
import pytest
from conftest import create_topic
from faults import bring_back

pytestmark = [pytest.mark.breaks_cluster, pytest.mark.long, pytest.mark.timeout(900)]
COUNT = 1_000_000


def newlines(file, start):
    """Returns how many lines a growing file has had since byte `start`, and where it ends now."""
    with file.open("rb") as lines:
        lines.seek(start)
        data = lines.read()
    return data.count(b"\n"), start + len(data)


def digest(value):
    # A million of them take less memory than the events.
    return hashlib.blake2b(value, digest_size=8).digest()


def test_a_million_events(scripts, cluster, topic, group):
    create_topic(cluster, topic)
    consumer = scripts.consumer("-t", topic, "-G", group)
    producer = scripts.producer("-t", topic, "-c", COUNT, "-i", 0, "-q")
    files = {consumer: consumer.stdout_file, producer: scripts.log}
    done, ends = dict.fromkeys(files, 0), dict.fromkeys(files, 0)
    memory = {script: [] for script in files}  # (events so far, bytes)
    restarts = [COUNT * 3 // 10, COUNT * 6 // 10]
    deadline = time.monotonic() + 600
    while min(done.values()) < COUNT:
        assert time.monotonic() < deadline, f"waited 600 s for {COUNT} events: {done.values()}, {producer!r}"
        for script, file in files.items():
            if script.process.poll() is None:
                memory[script].append((done[script], psutil.Process(script.process.pid).memory_info().rss))
            count, ends[script] = newlines(file, ends[script]) if file.exists() else (0, 0)
            done[script] += count
        if restarts and done[producer] >= restarts[0]:
            print(f"broker killed after {done[producer]} deliveries, {done[consumer]} printed")
            restarts.pop(0)
            cluster.brokers[0].kill()
            bring_back(cluster)
        time.sleep(0.1)
    assert producer.wait() == 0
    assert producer.lines[-1] == f"Delivered {COUNT} events to topic {topic}, 0 failed."
    assert not restarts
    assert consumer.end() == 0

    reader = kafka.KafkaConsumer(topic, bootstrap_servers=cluster.bootstrap_servers, auto_offset_reset="earliest",
        consumer_timeout_ms=5000)  # fmt: skip
    stored = [digest(record.value) for record in reader]
    reader.close()
    with consumer.stdout_file.open("rb") as lines:
        printed = [digest(line.rstrip(b"\n")) for line in lines]
    with scripts.log.open("rb") as lines:
        found = (re.search(rb" with value of (.*), partition 0, offset (\d+)\n", line) for line in lines)
        logged = {int(place[2]): digest(place[1]) for place in found}
    print(f"{len(stored)} stored, {len(set(stored))} different, {len(logged)} logged, {len(printed)} printed")
    assert len(stored) == len(set(stored)) == COUNT
    assert printed == stored
    assert [logged[offset] for offset in range(COUNT)] == stored
    grown = {}
    for script, samples in memory.items():
        first = max(size for events, size in samples if events < COUNT / 10) / 1e6
        last = max(size for events, size in samples if events >= COUNT * 9 / 10) / 1e6
        peak = max(size for _, size in samples) / 1e6
        print(f"{script.name}: {first:.0f} MB in the first tenth, {last:.0f} MB in the last, {peak:.0f} MB at most")
        grown[script.name] = last - first
    assert max(grown.values()) < 20, grown
    # Hundreds of megabytes, which pytest would keep.
    consumer.stdout_file.unlink()
    scripts.log.unlink()
