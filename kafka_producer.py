"""Writes fake user registrations to a Kafka topic, and reports each one that the broker has confirmed.

  python kafka_producer.py                                       ten registrations, one a second
  python kafka_producer.py --count 100000 --interval 0 --quiet   many, as fast as possible

exit status: 0 all delivered, 1 something failed, 2 wrong call, 130 interrupted
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
    "bootstrap.servers": "localhost:9092",
    "acks": "all",  # The broker confirms an event only when all in-sync replicas have it.
    "enable.idempotence": "true",  # An event sent again because its confirmation got lost is stored once, in its place.
    "linger.ms": "20",  # Wait up to 20 ms to send several events in one request.
    "delivery.timeout.ms": "120000",  # An event that is not confirmed within two minutes has failed,
    "topic.metadata.propagation.max.ms": "5000",  # and so has one whose topic is still unknown after 5 seconds.
    "partitioner": "murmur2_random",  # Send a key to the same partition as Java's producers do.
}
# The library logs each attempt to connect that failed, and to get a producer ID, though it goes on trying.
LIBRARY_LOG = logging.Logger("librdkafka")
LIBRARY_LOG.addHandler(logging.StreamHandler())
LIBRARY_LOG.addFilter(lambda record: record.args[0] not in ("CONFWARN", "FAIL", "GETPID"))


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
    """Takes what the library and the system report: its methods are callbacks.

    delivered, failed: how many events the broker has confirmed, and how many it has not.
    exit_status: None, or why no more events are sent: 1 for a failed event, 128 + its number for a signal.
    """

    def __init__(self, servers, log, quiet):
        self.servers, self.log, self.quiet = servers, log, quiet
        self.delivered = self.failed = 0
        self.exit_status, self.give_up_at = None, math.inf
        self.reason, self.silent_until = f"{servers}: connection closed", 0

    def on_delivery(self, error, message):
        """Takes the delivery report of one event: why it failed, or where the broker has stored it."""
        event = f"topic {message.topic()} with value of {message.value().decode()}"
        if error:
            # After a timeout the event may be in the topic all the same: only the confirmation is missing.
            line = f"Failed to deliver to {event}: {error.str()}"
            self.failed += 1
            self.exit_status = self.exit_status or 1
        else:
            line = f"Produced message on {event}, partition {message.partition()}, offset {message.offset()}"
            self.delivered += 1
        self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        if not self.quiet or (error and self.failed == 1):
            print(line, file=sys.stderr if error else sys.stdout)
        elif sys.stderr.isatty():
            print(f"{self.delivered} delivered", end="\r", file=sys.stderr)

    def on_error(self, error):
        """Takes what the library says of its connections, which it goes on trying to make."""
        if error.code() != KafkaError._ALL_BROKERS_DOWN:
            self.reason = error.str().partition(" (after ")[0]
        elif time.monotonic() > self.silent_until:
            self.silent_until = time.monotonic() + 10
            hint = "Is Kafka running (docker compose up -d --wait)? Are the properties for TLS and passwords right?"
            if not any(server in self.reason for server in self.servers.split(",")):
                hint = f"{self.servers} gave this address itself (advertised.listeners); it can't be reached from here."
            print(f"Can't connect: {self.reason}\n{hint}", file=sys.stderr)

    def on_signal(self, number, _):
        """Ends the sending; after this a second Ctrl-C or SIGTERM ends the program, whatever it waits for."""
        self.exit_status, self.give_up_at = 128 + number, time.monotonic() + 5
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def wait_for_broker(producer, topic):
    """Returns when a broker answers; ends the program after 30 s without an answer."""
    for _ in range(30):
        try:
            # Asking for a topic makes the broker create it, if it is set to do that.
            return producer.list_topics(topic, timeout=1)
        except KafkaException:
            producer.poll(0)  # Calls on_error.
    sys.exit("kafka_producer.py: no answer for 30 seconds")


def send_events(producer, reporter, fake, args):
    """Hands args.count events to the library, one every args.interval seconds, unless something ends it before."""
    start, number, event = time.monotonic(), 0, registration(fake)
    while reporter.exit_status is None and (number < args.count or args.count == 0):
        # Counted from the start, so that the time that an event takes does not delay the next ones.
        seconds = start + number * args.interval - time.monotonic()
        producer.poll(min(max(seconds, 0), 0.5))  # Calls on_delivery and on_error.
        reporter.log.flush()
        sys.stdout.flush()
        if seconds > 0:
            continue
        try:
            # Events of one key go to one partition, and so keep their order.
            key, value = str(event["user_id"]), json.dumps(event, ensure_ascii=False)
            producer.produce(args.topic, key=key, value=value, on_delivery=reporter.on_delivery)
            number, event = number + 1, registration(fake)
        except BufferError:  # The library's queue is full; every delivery report makes room in it.
            producer.poll(0.1)
        except KafkaException as error:
            sys.exit(f"kafka_producer.py: can't write to topic {args.topic}: {error.args[0].str()}")


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Nothing is at stake yet: Ctrl-C ends the program at once.
    sys.stdout.reconfigure(encoding="utf-8")
    args = parse_arguments()
    log = open(args.log_file, "a", buffering=1 << 20, encoding="utf-8")
    reporter = Reporter(args.config["bootstrap.servers"], log, args.quiet)
    try:
        # Faker would choose common names more often, at three times the cost; [0] is its generator for the one locale.
        fake = Faker(args.locale, use_weighting=False).factories[0]
        producer = Producer(args.config | {"error_cb": reporter.on_error, "logger": LIBRARY_LOG})
    except Exception as error:  # Faker and the library have many ways to refuse what they can't use.
        reason = error.args[0].str().strip() if isinstance(error, KafkaException) else error
        print(f"kafka_producer.py: can't use --locale or the properties of --config: {reason}", file=sys.stderr)
        sys.exit(2)
    fake.seed_instance(args.seed)
    wait_for_broker(producer, args.topic)
    print("Kafka Producer has been initiated...", flush=True)
    signal.signal(signal.SIGINT, reporter.on_signal)
    signal.signal(signal.SIGTERM, reporter.on_signal)
    send_events(producer, reporter, fake, args)
    while producer.flush(0.5):  # Sends what waits, and returns how many events are not reported after 0.5 s.
        if time.monotonic() > reporter.give_up_at:
            producer.purge()  # Reports them as failed.
    log.flush()
    print(f"Delivered {reporter.delivered} events to topic {args.topic}, {reporter.failed} failed.", flush=True)
    sys.exit(reporter.exit_status)


def properties(path):
    """Returns the key=value lines of a file as a dict; raises ArgumentTypeError if it has others but # comments."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            matches = [re.fullmatch(r"\s*(?:([\w.]+)\s*=\s*(.*?)|#.*)?\s*", line) for line in file]
    except OSError as error:
        raise argparse.ArgumentTypeError(error) from None
    if None in matches:  # The line is not shown, since it may hold a password.
        raise argparse.ArgumentTypeError(f"{path}: line {matches.index(None) + 1} is not key=value")
    return dict(match.groups() for match in matches if match[1])


def parse_arguments():
    """Returns the options, with all properties in `config`; ends the program with status 2 for a wrong call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-b", "--bootstrap-servers", metavar="HOST:PORT,...", help="brokers to ask first (default: localhost:9092)")
    add("-t", "--topic", default="user-tracker", help="topic to write to (default: %(default)s)")
    add("-c", "--count", type=int, default=10, help="how many events; 0: until Ctrl-C (default: %(default)s)")
    add("-i", "--interval", type=float, default=1.0, metavar="SECONDS", help="pause between events (default: 1.0)")
    add("-F", "--config", type=properties, default={}, metavar="FILE", help="librdkafka properties, key=value lines")
    add("--log-file", default="producer.log", metavar="FILE", help="file to append to (default: %(default)s)")
    add("--locale", default="en_US", help="language and country of the people, like de_DE (default: %(default)s)")
    add("--seed", type=int, help="make the same people each time (default: others each time)")
    add("-q", "--quiet", action="store_true", help="no line per event here; the log file has them")
    args = parser.parse_args()
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", args.topic):
        parser.error(f"{args.topic!r} is no topic: names have up to 249 letters, digits, dots, underscores, hyphens")
    if args.count < 0 or not 0 <= args.interval < math.inf:
        parser.error("--count and --interval can't be negative, and --interval must be finite")
    args.config = DEFAULTS | args.config
    args.config["bootstrap.servers"] = args.bootstrap_servers or args.config["bootstrap.servers"]
    return args


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        name = error.filename or "the log file or standard output"
        print(f"kafka_producer.py: can't write to {name}: {error.strerror}", file=sys.stderr)
        os._exit(1)  # sys.exit() would try to write once more, and complain.
