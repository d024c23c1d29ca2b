"""Prints the events of a Kafka topic, one per line, and resumes from its consumer group's last committed offset.

  python kafka_consumer.py                                     what the group has not read yet, and then what comes
  python kafka_consumer.py --from-offset -5 --exit --verbose   the last five of each partition, without the group

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
    "bootstrap.servers": "localhost:9092",  # Brokers to ask first; they tell the addresses of all others.
    "group.id": "python-consumer",  # Consumers of one group share the partitions; Kafka keeps the group's offsets.
    "auto.offset.reset": "earliest",  # A group without committed offsets begins with the oldest event.
    # Every 5 s and in close() the library commits (saves in Kafka) the offsets that are stored. By default it stores an
    # offset when it hands over the event; we do so after printing: no event is skipped, but a crash may repeat some.
    "enable.auto.offset.store": "false",  # The one property that --config can't change.
    "enable.partition.eof": "true",  # Let poll() return a _PARTITION_EOF "error" at the end of a partition.
    "queued.min.messages": "10000",  # Read ahead this many events per partition: fewer than usual, to save memory.
    "fetch.queue.backoff.ms": "10",  # When so many are there, look again after 10 ms; 1000, the default, is too slow.
}
# Leave out what the library logs when it tries again, what it reports too, and properties that are for producers.
LIBRARY_LOG = logging.Logger("librdkafka")
LIBRARY_LOG.addHandler(logging.StreamHandler())
LIBRARY_LOG.addFilter(lambda record: record.args[0] not in ("FAIL", "FATAL", "MAXPOLL", "PARTCNT", "CONFWARN"))
# What could break a line or steer a terminal: control characters, line separators, changes of text direction.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(data):
    r"""Returns bytes as one line of text, with \n, \x1b and the like for what is unsafe or not UTF-8; None as null."""
    text = "null" if data is None else data.decode(errors="backslashreplace")
    return text if text.isprintable() else UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def event_line(message, verbose):
    """Returns the line to print for an event."""
    if not verbose:
        return f"{printable(message.value())}\n"
    when = datetime.fromtimestamp(max(0, min(message.timestamp()[1] / 1000, 253402300799)), timezone.utc)  # To 9999.
    place = f"partition={message.partition()} offset={message.offset()} time={when.isoformat(timespec='milliseconds')}"
    return f"{place} key={printable(message.key())} {printable(message.value())}\n"


class Reporter:
    """Its on_... methods are called by the library, from poll() and close(), and by the system for signals."""

    def __init__(self, servers):
        self.servers, self.printed, self.stopped = servers, 0, False
        self.reason, self.silent_until = f"{servers}: connection closed", 0

    def on_assign(self, _, partitions):
        """Called with the partitions that are new to this consumer, when the group divides them anew (rebalances)."""
        numbers = ", ".join(str(number) for number in sorted(partition.partition for partition in partitions))
        print(f"Got partitions: {numbers or 'none; other members of the group have the rest'}", file=sys.stderr)

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

    def on_signal(self, *_):
        """Ends the reading; a second Ctrl-C or SIGTERM then ends the program at once."""
        self.stopped = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def print_events(consumer, reporter, args):
    """Prints events until a signal comes, or all that were asked for are printed."""
    finished = set()  # The partitions that need no more reading.
    while not reporter.stopped and reporter.printed < args.max_messages:
        assigned = {partition.partition for partition in consumer.assignment()}
        if assigned and assigned <= finished:
            break
        message = consumer.poll(0.5)  # Also calls on_assign and on_error; short, so that Ctrl-C is noticed.
        if message is None:  # Nothing there yet.
            continue
        # The others that have arrived, without waiting: one by one would be slower.
        batch, events = [message, *consumer.consume(min(args.max_messages - reporter.printed, 1000) - 1, 0)], []
        for message in batch:
            error, offset = message.error(), message.offset()
            if error is None:
                if args.first_offset <= offset <= args.to_offset:
                    events.append(message)
            elif error.code() != KafkaError._PARTITION_EOF:
                if args.exit or re.search("FATAL|AUTHORIZATION", error.name()):
                    raise KafkaException(error)
                print(error.str(), file=sys.stderr)  # The library tries again by itself.
                continue
            if (args.exit and error) or offset + (error is None) > args.to_offset:
                finished.add(message.partition())
        print("".join(event_line(message, args.verbose) for message in events), end="", flush=True)
        reporter.printed += len(events)
        # Only now are they done. Stores the offset after the last one of each partition: there the group goes on.
        for message in () if args.without_group else {message.partition(): message for message in events}.values():
            with contextlib.suppress(KafkaException):  # Another consumer has the partition now, and repeats them.
                consumer.store_offsets(message)


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # There is nothing to save yet: Ctrl-C ends the program at once.
    args = parse_arguments()
    sys.stdout = open(sys.stdout.fileno(), "w", encoding="utf-8", closefd=False)  # UTF-8 and buffered, always.
    reporter = Reporter(args.config["bootstrap.servers"])
    try:
        consumer = Consumer(args.config | {"error_cb": reporter.on_error, "logger": LIBRARY_LOG})
    except Exception as error:  # The library has many ways to refuse a property.
        reason = error.args[0].str().strip() if isinstance(error, KafkaException) else error
        print(f"kafka_consumer.py: can't use the properties of --config: {reason}", file=sys.stderr)
        sys.exit(2)
    print("Kafka Consumer has been initiated...", file=sys.stderr)
    print(f"Available topics to consume: {', '.join(available_topics(consumer)) or 'none yet'}", file=sys.stderr)
    signal.signal(signal.SIGINT, reporter.on_signal)
    signal.signal(signal.SIGTERM, reporter.on_signal)
    try:
        topic = consumer.list_topics(args.topic, timeout=30).topics[args.topic]  # Also has the library look out for it.
        if args.without_group:
            assign_range(consumer, args, topic)
        else:
            consumer.subscribe([args.topic], on_assign=reporter.on_assign)
        print_events(consumer, reporter, args)
        print(f"Printed {reporter.printed} events. Closing.", file=sys.stderr)
    except KafkaException as error:
        sys.exit(f"kafka_consumer.py: can't read topic {args.topic}: {error.args[0].str()}")
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would write the rest in the end.
        sys.exit(f"kafka_consumer.py: can't write to standard output: {error.strerror}")
    finally:
        consumer.close()  # Commits the stored offsets and leaves the group.


def available_topics(consumer):
    """Returns the names of all topics as soon as a broker answers; ends the program after 30 s without an answer."""
    for seconds in (1, 2, 4, 8, 15):  # Enough for the one answer about the many topics of a large cluster.
        try:
            return sorted(consumer.list_topics(timeout=seconds).topics)
        except KafkaException:
            consumer.poll(0)  # Calls on_error.
    sys.exit("kafka_consumer.py: no answer from Kafka for 30 seconds")


def assign_range(consumer, args, topic):
    """Begins to read a TopicMetadata's partitions at args.from_offset, without the group."""
    if topic.error:
        raise KafkaException(topic.error)
    start = []
    for number in sorted(topic.partitions) if args.partition is None else [args.partition]:
        # The oldest offset, and the one that the next event will get.
        low, high = consumer.get_watermark_offsets(TopicPartition(args.topic, number), timeout=10)
        wanted = {None: low, "beginning": low, "end": high}.get(args.from_offset, args.from_offset)
        offset = min(max(wanted if wanted >= 0 else high + wanted, low), high)
        held = f"holds offsets {low} to {high - 1}" if low < high else "is empty"
        print(f"Partition {number} {held}. Reading from offset {offset}.", file=sys.stderr)
        start.append(TopicPartition(args.topic, number, offset))
    consumer.assign(start)


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


def offset(text):
    return text if text in ("beginning", "end") else int(text)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-b", "--bootstrap-servers", metavar="HOST:PORT,...", help="brokers to ask first (default: localhost:9092)")
    add("-t", "--topic", default="user-tracker", help="topic to read (default: %(default)s)")
    add("-G", "--group", help="consumer group to read as (default: python-consumer)")
    add("-F", "--config", type=properties, default={}, metavar="FILE", help="librdkafka properties, key=value lines")
    add("-p", "--partition", type=int, help="only this one, without the group (default: all)")
    add("--from-offset", type=offset, help="begin here, without the group: N, -N (from the end), beginning, end")
    add("--to-offset", type=int, default=sys.maxsize, help="end after this offset, without the group")
    add("-c", "--max-messages", type=int, default=sys.maxsize, metavar="N", help="end after so many events")
    add("-e", "--exit", action="store_true", help="end when everything is read (default: wait for more)")
    add("-v", "--verbose", action="store_true", help="partition, offset, time and key before each event")
    args = parser.parse_args()
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", args.topic):
        parser.error(f"{args.topic!r} is no topic: names have up to 249 letters, digits, dots, underscores, hyphens")
    args.without_group = args.partition is not None or args.from_offset is not None or args.to_offset < sys.maxsize
    args.first_offset = args.from_offset if isinstance(args.from_offset, int) else 0
    if max(args.first_offset, 0) > args.to_offset or args.max_messages < 0 or (args.partition or 0) not in range(2**31):
        parser.error("--to-offset is before --from-offset or 0, or --max-messages or --partition out of range")
    given = {"bootstrap.servers": args.bootstrap_servers, "group.id": args.group, "enable.auto.offset.store": "false"}
    args.config = DEFAULTS | args.config | {name: value for name, value in given.items() if value}
    return args


if __name__ == "__main__":
    main()
