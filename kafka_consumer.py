"""Prints the events of a Kafka topic, one a line, and resumes from its consumer group's last committed offset.

  python kafka_consumer.py                                     what the group has not read yet, and then what comes
  python kafka_consumer.py --from-offset -5 --exit --verbose   the last five events, without the group

exit status: 0 done, also by Ctrl-C; 1 something failed; 2 wrong call
"""

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
import time
from datetime import datetime, timezone

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

# Properties of librdkafka, the library inside confluent-kafka. A --config file can change them and add others.
DEFAULTS = {
    "bootstrap.servers": "localhost:9092",
    "group.id": "python-consumer",
    "auto.offset.reset": "earliest",  # A group that has no offsets yet begins with the oldest event.
    # The library commits the stored offsets every 5 seconds, and close() does. It would store an offset as soon as it
    # has handed over the event; we do it when the event is printed, so that none is ever skipped: at-least-once.
    "enable.auto.offset.store": "false",
    "enable.partition.eof": "true",  # Tell when a partition is read to its end, for --exit.
    "queued.min.messages": "10000",  # Fetch until so many events wait in memory (100000 would take 50 MB more),
    "fetch.queue.backoff.ms": "10",  # and again after 10 ms, not 1000: printing is fast.
}
# The library logs each failed attempt to connect, though it goes on trying.
LIBRARY_LOG = logging.Logger("librdkafka")
LIBRARY_LOG.addHandler(logging.StreamHandler())
LIBRARY_LOG.addFilter(lambda record: record.args[0] not in ("CONFWARN", "FAIL"))
# What could break a line or steer a terminal: control characters, line separators, changes of direction.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(data):
    r"""Returns bytes as text of one line, with \n, \x1b and the like for what is unsafe or not UTF-8; None as null."""
    text = "null" if data is None else data.decode(errors="backslashreplace")
    return text if text.isprintable() else UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def event_line(message, verbose):
    """Returns the line to print for an event."""
    if not verbose:
        return f"{printable(message.value())}\n"
    when = datetime.fromtimestamp(min(message.timestamp()[1] / 1000, 253402300799), timezone.utc)  # The year 9999.
    place = f"partition={message.partition()} offset={message.offset()} time={when.isoformat(timespec='milliseconds')}"
    return f"{place} key={printable(message.key())} {printable(message.value())}\n"


class Reporter:
    """Takes what the library and the system report by callbacks, and counts the printed events."""

    def __init__(self, servers):
        self.servers, self.printed, self.stopped = servers, 0, False
        self.reason, self.silent_until = f"{servers}: connection closed", 0

    def on_assign(self, _, partitions):
        """Takes the partitions that this consumer gets whenever the group divides them among its members."""
        numbers = ", ".join(str(partition.partition) for partition in partitions)
        print(f"Got partitions: {numbers or 'none, other consumers of the group have them'}", file=sys.stderr)

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

    def on_signal(self, *_):
        """Ends the reading; after this a second Ctrl-C or SIGTERM ends the program, whatever it waits for."""
        self.stopped = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def wait_for_broker(consumer):
    """Returns {name: TopicMetadata} of all topics; ends the program after 30 s without an answer."""
    for seconds in (1, 2, 4, 8, 15):
        try:
            return consumer.list_topics(timeout=seconds).topics
        except KafkaException:
            consumer.poll(0)  # Calls on_error.
    sys.exit("kafka_consumer.py: no answer for 30 seconds")


def print_events(consumer, reporter, args):
    """Prints events until a signal comes, or all that were asked for are printed."""
    finished = set()  # The partitions that are read as far as they are to be read.
    while not reporter.stopped and reporter.printed < args.max_messages:
        if set() < {partition.partition for partition in consumer.assignment()} <= finished:
            break
        first, lines, last = consumer.poll(0.5), [], {}  # poll() calls on_assign and on_error.
        if first is None:
            continue
        # All others that have arrived come in one go, which is faster than a poll() for each.
        for message in [first, *consumer.consume(min(args.max_messages - reporter.printed, 1000) - 1, 0)]:
            error, partition, offset = message.error(), message.partition(), message.offset()
            if error is None:
                if args.first_offset <= offset <= args.to_offset:
                    lines.append(event_line(message, args.verbose))
                    last[partition] = message
                if offset >= args.to_offset:
                    finished.add(partition)
            elif error.code() == KafkaError._PARTITION_EOF:
                if args.exit or offset > args.to_offset:
                    finished.add(partition)
            elif args.exit or error.fatal() or "AUTHORIZATION" in error.name():
                raise KafkaException(error)
            else:
                print(error.str(), file=sys.stderr)
        print("".join(lines), end="", flush=True)
        reporter.printed += len(lines)
        for message in last.values():
            with contextlib.suppress(KafkaException):  # Another consumer has got the partition, and prints them again.
                consumer.store_offsets(message)


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Nothing is at stake yet: Ctrl-C ends the program at once.
    sys.stdout.reconfigure(encoding="utf-8")
    args = parse_arguments()
    reporter = Reporter(args.config["bootstrap.servers"])
    try:
        consumer = Consumer(args.config | {"error_cb": reporter.on_error, "logger": LIBRARY_LOG})
    except Exception as error:  # The library has many ways to refuse a property.
        reason = error.args[0].str().strip() if isinstance(error, KafkaException) else error
        print(f"kafka_consumer.py: can't use the properties of --config: {reason}", file=sys.stderr)
        sys.exit(2)
    print("Kafka Consumer has been initiated...", file=sys.stderr)
    topics = wait_for_broker(consumer)
    print(f"Available topics to consume: {', '.join(sorted(topics))}", file=sys.stderr)
    signal.signal(signal.SIGINT, reporter.on_signal)
    signal.signal(signal.SIGTERM, reporter.on_signal)
    try:
        if args.without_group:
            assign_range(consumer, args)
        else:
            consumer.subscribe([args.topic], on_assign=reporter.on_assign)
        print_events(consumer, reporter, args)
        print(f"Printed {reporter.printed} events.", file=sys.stderr)
    except KafkaException as error:
        sys.exit(f"kafka_consumer.py: can't read topic {args.topic}: {error.args[0].str()}")
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes in the end what is left.
        sys.exit(f"kafka_consumer.py: can't write to standard output: {error.strerror}")
    finally:
        consumer.close()  # Commits the offsets that are stored, and leaves the group.


def assign_range(consumer, args):
    """Begins to read at args.from_offset, without the group."""
    topic = consumer.list_topics(args.topic, timeout=30).topics[args.topic]
    if topic.error:
        raise KafkaException(topic.error)
    start = []
    for number in sorted(topic.partitions) if args.partition is None else [args.partition]:
        low, high = consumer.get_watermark_offsets(TopicPartition(args.topic, number), timeout=10)
        wanted = {None: low, "beginning": low, "end": high}.get(args.from_offset, args.from_offset)
        # -5 is 5 before the end. What is not there yet is waited for.
        offset = min(max(wanted if wanted >= 0 else high + wanted, low), high)
        print(f"Partition {number} holds offsets {low} to {high - 1}. Reading from {offset}.", file=sys.stderr)
        start.append(TopicPartition(args.topic, number, offset))
    consumer.assign(start)


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


def offset(text):
    return text if text in ("beginning", "end") else int(text)


def parse_arguments():
    """Returns the options, with all properties in `config`; ends the program with status 2 for a wrong call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-b", "--bootstrap-servers", metavar="HOST:PORT,...", help="brokers to ask first (default: localhost:9092)")
    add("-t", "--topic", default="user-tracker", help="topic to read (default: %(default)s)")
    add("-G", "--group", help="consumer group to read as (default: python-consumer)")
    add("-F", "--config", type=properties, default={}, metavar="FILE", help="librdkafka properties, key=value lines")
    add("-p", "--partition", type=int, help="only this one, without the group (default: all)")
    add("--from-offset", type=offset, metavar="N", help="begin here, not where the group is: N, -N, beginning or end")
    add("--to-offset", type=int, default=sys.maxsize, help="end after this offset, without the group")
    add("-c", "--max-messages", type=int, default=sys.maxsize, metavar="N", help="end after so many events")
    add("-e", "--exit", action="store_true", help="end when everything is read (default: wait for more)")
    add("-v", "--verbose", action="store_true", help="partition, offset, time and key before each event")
    args = parser.parse_args()
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", args.topic):
        parser.error(f"{args.topic!r} is no topic: names have up to 249 letters, digits, dots, underscores, hyphens")
    args.without_group = args.partition is not None or args.from_offset is not None or args.to_offset < sys.maxsize
    args.first_offset = args.from_offset if isinstance(args.from_offset, int) else 0
    if args.first_offset > args.to_offset or min(args.to_offset, args.max_messages, args.partition or 0) < 0:
        parser.error("--to-offset is before --from-offset, or a number is negative that can't be")
    given = {"bootstrap.servers": args.bootstrap_servers, "group.id": args.group}
    args.config = DEFAULTS | args.config | {name: value for name, value in given.items() if value}
    return args


if __name__ == "__main__":
    main()
