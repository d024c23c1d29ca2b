"""Writes fake user registrations to a Kafka topic, and reports what became of each one.

Exit status: 0 all delivered, 1 something failed, 2 wrong call, 130 or 143 ended by Ctrl-C or SIGTERM.
"""

import argparse
import json
import logging
import math
import os
import re
import signal
import sys
import time

from confluent_kafka import KafkaError, KafkaException, Producer
from faker import Faker

# Properties of librdkafka, the library inside confluent-kafka. A --config file can change them and add others.
DEFAULTS = {
    "bootstrap.servers": "localhost:9092",  # Brokers to ask first; they tell the addresses of all others.
    "acks": "all",  # The broker confirms an event only when all in-sync replicas have it.
    "enable.idempotence": "true",  # If a confirmation is lost the event is sent again, but stored once and in order.
    "linger.ms": "20",  # Wait up to 20 ms to send several events in one request.
    "delivery.timeout.ms": "120000",  # Give up on an event that is not confirmed within two minutes.
    "topic.metadata.propagation.max.ms": "15000",  # Give up on a topic that is still unknown after 15 seconds.
    "partitioner": "murmur2_random",  # Send a key to the same partition as Java's producers do.
}
# Leave out what the library logs when it tries again, what it reports too, and properties that are for consumers.
LIBRARY_LOG = logging.Logger("librdkafka")
LIBRARY_LOG.addHandler(logging.StreamHandler())
LIBRARY_LOG.addFilter(lambda record: record.args[0] not in ("FAIL", "FATAL", "GETPID", "CONFWARN"))


def registration(fake):
    """Returns a made-up user registration as a dict of JSON values."""
    return {
        "user_id": fake.random_int(20000, 100000),
        "user_name": fake.name(),
        "user_address": f"{fake.street_address()} | {fake.city()} | {fake.country_code()}",
        "platform": fake.random_element(("Mobile", "Laptop", "Tablet")),
        "signup_at": str(fake.date_time_this_month()),
    }


class Reporter:
    """Its on_... methods are called by the library, from poll() and flush(), and by the system for signals.

    delivered, failed: how many events the broker has confirmed, and how many it has not.
    exit_status: None, or what sys.exit() takes when no more events are sent: a message, 1, 128 + the signal's number.
    """

    def __init__(self, args, log):
        self.servers, self.log = args.config["bootstrap.servers"], log
        self.quiet, self.on_terminal = args.quiet, sys.stderr.isatty()
        self.delivered, self.failed, self.exit_status, self.give_up_at = 0, 0, None, math.inf
        self.reason, self.silent_until = f"{self.servers}: connection closed", 0

    def on_delivery(self, error, message):
        """Called with the delivery report of one event: why it failed, or where the broker has stored it."""
        event = f"topic {message.topic()} with value of {message.value().decode()}"
        if error is not None:
            # A timeout does not prove that the event is absent: perhaps only its confirmation was lost.
            line = f"Failed to deliver to {event}: {error.str()}"
            self.failed += 1
            self.exit_status = self.exit_status or 1
        else:
            line = f"Produced message on {event}, partition {message.partition()}, offset {message.offset()}"
            self.delivered += 1
        self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        if not self.quiet or (error and self.failed == 1):
            print(line, file=sys.stderr if error else sys.stdout)
        elif self.on_terminal:
            print(f"{self.delivered} delivered", end="\r", file=sys.stderr)

    def on_error(self, error):
        """Called with what goes wrong with connections, which the library keeps trying to make."""
        if error.code() != KafkaError._ALL_BROKERS_DOWN:
            self.reason = error.str().split(" (after ")[0]
        elif time.monotonic() > self.silent_until:
            self.silent_until = time.monotonic() + 10
            hint = "Is Kafka running (docker compose up -d --wait)? With TLS: security.protocol and host name right?"
            if not any(server.strip() in self.reason for server in self.servers.split(",")):
                hint = f"{self.servers} gave this address itself (advertised.listeners); it can't be reached from here."
            print(f"Can't connect: {self.reason}\n{hint}", file=sys.stderr)

    def on_signal(self, number, _):
        """Ends the sending; a second Ctrl-C or SIGTERM then ends the program at once."""
        self.exit_status, self.give_up_at = 128 + number, time.monotonic() + 5
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def flush(self):
        """Writes the lines of the reports to the log file and to standard output; returns exit_status."""
        for file, name in ((self.log, self.log.name), (sys.stdout, "standard output")):
            try:
                file.flush()
            except OSError as error:
                self.exit_status = self.exit_status or f"kafka_producer.py: can't write to {name}: {error.strerror}"
                os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # The rest goes nowhere.
        return self.exit_status


def send_events(producer, reporter, fake, args):
    """Sends args.count events, one every args.interval seconds, until a failure or a signal ends it."""
    start, sent, event = time.monotonic(), 0, registration(fake)
    while reporter.flush() is None and sent < (args.count or math.inf):
        wait = start + sent * args.interval - time.monotonic()  # From the start: a slow event delays no other.
        if wait <= 0:
            # Events with the same key go to the same partition, so they stay in order.
            key, value = str(event["user_id"]), json.dumps(event, ensure_ascii=False)
            try:  # Only puts the event into the library's queue; a background thread sends it.
                producer.produce(args.topic, key=key, value=value, on_delivery=reporter.on_delivery)
                sent, event = sent + 1, registration(fake)
            except BufferError:  # The queue is full. Reports make room in it; then the same event is tried again.
                wait = 0.1
        producer.poll(min(max(wait, 0), 0.5))  # Calls on_delivery and on_error; short, so that Ctrl-C is noticed.
    while producer.flush(0.5):  # Sends what is still queued; returns how many events are unreported after 0.5 s.
        reporter.flush()
        if time.monotonic() > reporter.give_up_at:
            producer.purge()  # Drops them; the next flush() reports them as failed.


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # There is nothing to save yet: Ctrl-C ends the program at once.
    args = parse_arguments()
    # Room for the lines of many reports, so that only flush() writes; UTF-8, whatever the terminal is set to.
    sys.stdout = open(sys.stdout.fileno(), "w", buffering=1 << 25, encoding="utf-8", closefd=False)
    try:
        reporter = Reporter(args, open(args.log_file, "a", buffering=1 << 25, encoding="utf-8"))
        producer = Producer(args.config | {"error_cb": reporter.on_error, "logger": LIBRARY_LOG})  # Connects already.
        fake = Faker(args.locale, use_weighting=args.locale == "es_CL").factories[0]  # It alone needs slow weights.
    except OSError as error:
        sys.exit(f"kafka_producer.py: can't write to {args.log_file}: {error.strerror}")
    except Exception as error:  # Faker and the library have many ways to refuse what they can't use.
        reason = error.args[0].str().strip() if isinstance(error, KafkaException) else error
        print(f"kafka_producer.py: can't use --locale or the properties of --config: {reason}", file=sys.stderr)
        sys.exit(2)
    fake.seed_instance(args.seed)
    wait_for_broker(producer, args.topic)
    print("Kafka Producer has been initiated...")
    signal.signal(signal.SIGINT, reporter.on_signal)
    signal.signal(signal.SIGTERM, reporter.on_signal)
    for _ in range(3):  # Once, if all goes well; after an error again, for the reports of what is on its way.
        try:
            send_events(producer, reporter, fake, args)
            break
        except (KafkaException, SystemError) as error:  # An event was refused, or the library gives up for good.
            reason = (error.__cause__ or error).args[0].str()  # SystemError: an exception that confluent-kafka hid.
            reporter.exit_status = f"kafka_producer.py: can't write to topic {args.topic}: {reason}"
    print(f"Delivered {reporter.delivered} events to topic {args.topic}, {reporter.failed} failed.")
    sys.exit(reporter.flush())


def wait_for_broker(producer, topic):
    """Returns when a broker answers; ends the program after 30 s without an answer."""
    for _ in range(30):
        try:
            return producer.list_topics(topic, timeout=1)  # Makes the broker create the topic, if it is set to do so.
        except KafkaException:
            producer.poll(0)  # Calls on_error.
    sys.exit("kafka_producer.py: no answer from Kafka for 30 seconds")


def properties(path):
    """Returns the key=value lines of a file as a dict; raises ArgumentTypeError for others, but for # comments."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            matches = [re.fullmatch(r"\s*(?:([\w.]+)\s*=\s*(.+?)|#.*)?\s*", line) for line in file]
    except OSError as error:
        raise argparse.ArgumentTypeError(error) from None
    if None in matches:  # The line is not shown, since it may hold a password.
        raise argparse.ArgumentTypeError(f"{path}: line {matches.index(None) + 1} is not key=value")
    return dict(match.groups() for match in matches if match[1])


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-b", "--bootstrap-servers", metavar="HOST:PORT,...", help="brokers to ask first (default: localhost:9092)")
    add("-t", "--topic", default="user-tracker", help="topic to write to (default: %(default)s)")
    add("-c", "--count", type=int, default=10, help="how many events; 0: until Ctrl-C (default: %(default)s)")
    add("-i", "--interval", type=float, default=1, help="seconds from one event to the next (default: %(default)s)")
    add("-F", "--config", type=properties, default={}, metavar="FILE", help="librdkafka properties, key=value lines")
    add("--log-file", default="producer.log", metavar="FILE", help="file to append to (default: %(default)s)")
    add("--locale", default="en_US", help="language and country of the people, like de_DE (default: %(default)s)")
    add("--seed", type=int, help="make the same people each time (default: others each time)")
    add("-q", "--quiet", action="store_true", help="don't print each event; the log file still has them")
    args = parser.parse_args()
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", args.topic):
        parser.error(f"{args.topic!r} is no topic: names have up to 249 letters, digits, dots, underscores, hyphens")
    if args.count < 0 or not 0 <= args.interval < math.inf:
        parser.error(f"neither --count {args.count} nor --interval {args.interval} may be negative or infinite")
    args.config = DEFAULTS | args.config
    args.config["bootstrap.servers"] = args.bootstrap_servers or args.config["bootstrap.servers"]
    return args


if __name__ == "__main__":
    main()
