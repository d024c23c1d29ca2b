"""Writes fake user registrations to a Kafka topic and tells of each one where it was stored."""

import os
import signal
import sys

if sys.stderr is None:  # It was closed, by 2>&-, and print() would take standard output instead.
    sys.stderr = open(os.devnull, "w")
# While the packages load nothing is at stake: Ctrl-C ends the program, without a stack trace.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import itertools
import json
import logging
import math
import time

from confluent_kafka import KafkaError, KafkaException, Producer
from faker import Faker

DEFAULTS = {
    "bootstrap.servers": "localhost:9092",
    # The broker confirms an event only when all in-sync replicas have it.
    "acks": "all",
    # An event that is sent again because its confirmation got lost is stored once, and in its place.
    "enable.idempotence": "true",
    # So many milliseconds an event waits for others to travel with; fewer requests are less work for both sides.
    "linger.ms": "20",
    # An event that could not be delivered for so long is reported as failed.
    "delivery.timeout.ms": "120000",
}
# Trying again does not help against these. Everything else may be a broker that is just starting.
HOPELESS = [KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError._MSG_TIMED_OUT]
HOPELESS += [KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.TOPIC_EXCEPTION]
HINT = (
    "Is it running (docker compose up -d --wait)? With TLS or a password: are security.protocol, ssl.ca.location"
    " and the host name right?"
)


def tell(text, end="\n"):
    with contextlib.suppress(OSError):  # What standard error can't take is no reason to stop.
        print(text, end=end, file=sys.stderr)


class ReportingProducer:
    """Sends events to a topic, and writes what became of each to standard output and to a log file.

    delivered, failed: how many events the broker has confirmed, and how many it never will.
    ending: None, or why no more events are sent: "interrupted", or what went wrong.
    """

    def __init__(self, config, topic, quiet):
        """Takes librdkafka properties as text; quiet keeps the events, but not the totals, off standard output.

        Raises KafkaException and others for properties that can't be used.
        """
        self.servers, self.topic, self.quiet = config["bootstrap.servers"], topic, quiet
        # The library's own log lines are dropped, but for debug=broker or the like in a --config file.
        logger = None if "debug" in config else logging.Logger("librdkafka", level=logging.CRITICAL + 1)
        callbacks = {"on_delivery": self.on_delivery, "error_cb": self.on_error, "logger": logger}
        self.producer = Producer({**config, **callbacks})
        # Unbuffered, so that each batch of lines is written at once and whole.
        self.stdout = sys.stdout and open(sys.stdout.fileno(), "wb", buffering=0, closefd=False)
        self.log, self.lines = None, []
        self.delivered = self.failed = 0
        self.ending = self.last_error = None
        self.last_delivery, self.stalled = time.monotonic(), False

    def connect(self):
        """Returns when the broker answers and has the topic; ends the program after 30 s without that."""
        start, told = time.monotonic(), False
        while True:
            try:
                # This request also makes the broker create the topic, unless it is set not to.
                error = self.producer.list_topics(self.topic, timeout=1).topics[self.topic].error
                if error is None:
                    return
            except KafkaException as exception:
                self.producer.poll(0)  # Calls on_error, which hears more than the exception says.
                error = self.last_error or exception.args[0]
            problem = f"{self.explain(error)}\n{HINT}"
            seconds = time.monotonic() - start
            if error.code() in HOPELESS or seconds > 28:  # The start took up to one second, and so does a try.
                sys.exit(f"kafka_producer.py: {problem}")
            # A topic that is just being created has no leader for a moment.
            patience = 5 if error.code() == KafkaError.LEADER_NOT_AVAILABLE else 1.5
            if seconds > patience and not told:
                told = True
                tell(f"Trying for 30 s: {problem}")
            time.sleep(0.05)

    def send(self, key, value):
        """Hands an event, two texts, to librdkafka, which delivers it in the background."""
        while not self.ending:
            try:
                return self.producer.produce(self.topic, value.encode(), key.encode())
            except BufferError:  # The local queue is full, and deliveries make room in it.
                self.serve(time.monotonic() + 0.1)
            except KafkaException as exception:  # It was refused, and so will be all others.
                self.fail(value, exception.args[0])
                self.serve(time.monotonic() + 0.1)  # Hears the reason, if there is a better one.
                self.ending = self.ending or self.explain(exception.args[0])

    def serve(self, until):
        """Handles delivery reports until a time of time.monotonic(); if that is over, those that are there."""
        while True:
            now = time.monotonic()
            try:
                # Calls on_delivery and on_error; in short turns, since Ctrl-C is seen only between them.
                self.producer.poll(min(max(until - now, 0), 0.25))
            except KafkaException as exception:  # It is fatal: the library sends nothing any more.
                self.ending = self.ending or self.explain(exception.args[0])
            if self.lines:
                self.write_lines()
            if not len(self.producer):
                self.last_delivery = now
            elif now - self.last_delivery > 2 and not self.stalled:
                self.stalled = True
                reason = words(self.last_error) if self.last_error else "no answer"
                tell(f"Waiting for {self.servers} to confirm {len(self.producer)} events: {reason}")
            if now >= until or self.ending:
                return

    def finish(self):
        """Returns when every event is delivered or failed, which takes delivery.timeout.ms at most."""
        if self.ending and len(self.producer):
            tell(f"Ending: waiting for {len(self.producer)} deliveries. Ctrl-C gives them up.")
        while len(self.producer):
            self.serve(time.monotonic() + 0.02)  # In turns so short that the end is not late.
        self.write(self.stdout, f"Delivered {self.delivered} events to topic {self.topic}, {self.failed} failed.\n")

    def on_delivery(self, error, message):
        """Takes the delivery report of one event: its error, or the partition and offset where it was stored."""
        value = message.value().decode()
        if error:
            return self.fail(value, error)
        self.delivered += 1
        self.last_delivery = time.monotonic()
        if self.stalled:
            self.stalled = False
            tell("Delivering again.")
        place = f"partition {message.partition()}, offset {message.offset()}"
        self.lines.append(f"Produced message on topic {self.topic} with value of {value}, {place}\n")

    def fail(self, value, error):
        """Takes an event that will never be delivered."""
        self.failed += 1
        line = f"Failed to deliver to topic {self.topic}: {words(error)}: value of {value}"
        self.write(self.log, f"{timestamp()} {line}\n")
        if self.failed == 1 or not self.quiet:
            tell(line)
        if error.code() in HOPELESS:
            self.ending = self.ending or self.explain(error)

    def explain(self, error):
        return f"can't write to topic {self.topic} at {self.servers}: {words(error)}"

    def on_error(self, error):
        # That all brokers are down only follows from what was said of each.
        if error.code() != KafkaError._ALL_BROKERS_DOWN:
            self.last_error = error

    def on_interrupt(self, *_):
        if self.ending:
            self.producer.purge()  # Reports as failed what is not delivered.
        self.ending = self.ending or "interrupted"

    def write_lines(self):
        """Writes the lines of the deliveries since the last call, at once: at full speed that saves a tenth."""
        lines, self.lines = self.lines, []
        now = timestamp()
        self.write(self.log, "".join(f"{now} {line}" for line in lines))
        if not self.quiet:
            self.write(self.stdout, "".join(lines))
        elif sys.stderr.isatty():
            tell(f"{self.delivered} delivered", end="\r")

    def write(self, file, text):
        data = text.encode()
        try:
            while data and file:
                data = data[file.write(data) :]  # A disk that is nearly full takes a part.
        except OSError as error:
            self.ending = f"can't write to {'standard output' if file is self.stdout else file.name}: {error.strerror}"


def timestamp():
    return time.strftime("%Y-%m-%d %H:%M:%S")


def words(error):
    """Returns what a KafkaError says, without how long it took and how often it was seen."""
    return error.str().partition(" (after ")[0]


def registration(fake):
    """Returns a made-up user registration as a dict of JSON values."""
    return {
        "user_id": fake.random_int(20000, 100000),
        "user_name": fake.name(),
        "user_address": f"{fake.street_address()} | {fake.city()} | {fake.country_code()}",
        "platform": fake.random_element(("Mobile", "Laptop", "Tablet")),
        "signup_at": str(fake.date_time_this_month()),
    }


def read_config(path):
    """Returns the librdkafka properties in a file of key=value lines and # comments, as a dict of texts.

    Raises OSError for a file that can't be read and ValueError for a line that is not key=value.
    """
    config = {}
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            key, equals, value = map(str.strip, line.partition("="))
            if equals and key.replace(".", "_").isidentifier():
                # metadata.broker.list is the older name, and must not win against --bootstrap-servers.
                config["bootstrap.servers" if key == "metadata.broker.list" else key] = value
            elif line.strip() and not key.startswith("#"):
                raise ValueError(f"line {number} is not key=value")  # Not shown: it may hold a password.
    return config


def refuse(text):
    """Ends the program, which was called wrongly."""
    tell(f"kafka_producer.py: {text} (--help lists the options)")
    sys.exit(2)


def parse_arguments():
    """Returns the options; ends the program with status 2 for a wrong call."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python kafka_producer.py                                       ten registrations, one a second
  python kafka_producer.py --count 100000 --interval 0 --quiet   many, as fast as possible

exit status: 0 all delivered, 1 something failed, 2 wrong call, 130 interrupted""",
    )
    parser.error = refuse
    add = parser.add_argument
    add("-b", "--bootstrap-servers", metavar="HOST:PORT,...", help="brokers to ask first (default: localhost:9092)")
    add("-t", "--topic", default="user-tracker", help="topic to write to (default: %(default)s)")
    add("-c", "--count", type=int, default=10, metavar="N",
        help="how many events; 0: until Ctrl-C (default: %(default)s)")  # fmt: skip
    add("-i", "--interval", type=float, default=1.0, metavar="SECONDS",
        help="from one event to the next; 0: as fast as possible (default: %(default)s)")  # fmt: skip
    add("-F", "--config", metavar="FILE", help="librdkafka properties, one key=value a line (default: none)")
    add("--log-file", default="producer.log", metavar="FILE", help="file to append to (default: %(default)s)")
    add("--locale", default="en_US", help="language and country of the people, like de_DE (default: %(default)s)")
    add("--seed", type=int, metavar="N", help="make the same people each time (default: others each time)")
    add("-q", "--quiet", action="store_true", help="no line per event here; the log file has them (default: off)")
    args = parser.parse_args()
    if args.count < 0 or not 0 <= args.interval < math.inf:
        refuse(f"--count {args.count} --interval {args.interval}: both must be finite, and not negative")
    # Bytes that are not UTF-8, which librdkafka can't take, become \udcNN, which the broker refuses as a name.
    args.topic = args.topic.encode(errors="backslashreplace").decode()
    return args


def main():
    args = parse_arguments()
    try:
        config = DEFAULTS | (read_config(args.config) if args.config else {})
        if args.bootstrap_servers:
            config["bootstrap.servers"] = args.bootstrap_servers
        producer = ReportingProducer(config, args.topic, args.quiet)
    except Exception as error:  # The library has many ways to refuse a property.
        reason = error.args[0].str().strip() if isinstance(error, KafkaException) else error
        refuse(f"can't use the configuration {args.config or ''}: {reason}")
    try:
        # Weighting picks common names more often, which takes three times as long; [0] is the one locale's own object.
        fake = Faker(args.locale, use_weighting=False).factories[0]
    except (AttributeError, ValueError):
        refuse(f"Faker knows no locale {args.locale!r}")
    if args.seed is not None:
        fake.seed_instance(args.seed)
    try:
        producer.log = open(args.log_file, "ab", buffering=0)
    except OSError as error:
        sys.exit(f"kafka_producer.py: can't open the log file {args.log_file}: {error.strerror}")

    producer.connect()
    producer.write(producer.stdout, "Kafka Producer has been initiated...\n")
    signal.signal(signal.SIGINT, producer.on_interrupt)
    signal.signal(signal.SIGTERM, producer.on_interrupt)
    start = time.monotonic()
    for number in range(args.count) if args.count else itertools.count():
        # Counted from the start, so that the time an event takes does not delay the next ones.
        producer.serve(start + number * args.interval)
        if producer.ending:
            break
        event = registration(fake)
        # Events of one key go to one partition, and so keep their order.
        producer.send(str(event["user_id"]), json.dumps(event, ensure_ascii=False))
    producer.finish()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # One Ctrl-C more does not change how this ended.
    if producer.ending == "interrupted":
        sys.exit(130)
    if producer.ending:
        sys.exit(f"kafka_producer.py: {producer.ending}")
    sys.exit(1 if producer.failed else 0)


if __name__ == "__main__":
    main()
