"""Prints the events of a Kafka topic, one a line, and goes on where its consumer group stopped last."""

import os
import signal
import sys

if sys.stderr is None:  # It was closed, by 2>&-, and print() would take standard output instead.
    sys.stderr = open(os.devnull, "w")
# While the packages load nothing is at stake: a signal ends the program, without a stack trace.
signal.signal(signal.SIGINT, lambda *_: os._exit(0))
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

import argparse
import contextlib
import logging
import math
import re
import threading
import time
from datetime import datetime, timezone

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

DEFAULTS = {
    "bootstrap.servers": "localhost:9092",
    "group.id": "python-consumer",
    # Where a group begins that has read nothing yet; the library's default, the end, would show nothing at first.
    "auto.offset.reset": "earliest",
    # With so many events waiting the library stops fetching, and looks again after so many milliseconds. Its defaults,
    # 100000 and 1000, let a program run out of events that prints them faster.
    "queued.min.messages": "10000",
    "fetch.queue.backoff.ms": "10",
    # A consumer that was killed keeps its partitions for so long, and its successor waits for them.
    "session.timeout.ms": "10000",
}
# Trying again does not help against these. Everything else may be a broker that is just starting.
HOPELESS = [KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError._FATAL, KafkaError.TOPIC_EXCEPTION]
HOPELESS += [KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED]
HINT = (
    "Is it running (docker compose up -d --wait)? With TLS or a password: are security.protocol, ssl.ca.location"
    " and the host name right?"
)

# What could break the line or steer the terminal: control characters, line separators, changes of direction.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def tell(text):
    # Standard output is for the events alone, so that other programs can read them from a pipe.
    with contextlib.suppress(OSError):  # What standard error can't take is no reason to stop.
        print(text, file=sys.stderr)


class PrintingConsumer:
    """Prints the events of a topic, as a member of a consumer group, or those of a stretch of offsets.

    printed: how many events were written to standard output.
    ending: None, or why no more are read: "" when that is all, or what went wrong.
    """

    def __init__(self, config, args):
        """Takes librdkafka properties as text; raises KafkaException and others if it can't use them."""
        self.servers, self.topic, self.args = config["bootstrap.servers"], args.topic, args
        # The library's own log lines are dropped, but for debug=broker or the like in a --config file.
        logger = None if "debug" in config else logging.Logger("librdkafka", level=logging.CRITICAL + 1)
        self.consumer = Consumer({**config, "error_cb": self.on_error, "logger": logger})
        self.printed = 0
        # {partition: offset after the last event printed}, and the partitions that are to be read to an end.
        self.next_offsets, self.unread = {}, None
        self.ending = self.last_error = None
        self.all_down = self.told_lost = False

    def metadata(self, topic=None):
        """Returns {name: TopicMetadata} of one topic or all; ends the program after 30 s without an answer."""
        start, told = time.monotonic(), False
        while True:
            try:
                return self.consumer.list_topics(topic, timeout=1).topics
            except KafkaException as exception:
                self.consumer.poll(0)  # Calls on_error, which hears more than the exception says.
                error = self.last_error or exception.args[0]
            problem = f"{self.explain(error)}\n{HINT}"
            seconds = time.monotonic() - start
            if error.code() in HOPELESS or seconds > 28:  # The start took up to one second, and so does a try.
                sys.exit(f"kafka_consumer.py: {problem}")
            if seconds > 1.5 and not told:
                told = True
                tell(f"Trying for 30 s: {problem}")

    def find_topic(self):
        """Returns the numbers of the topic's partitions, as soon as there is such a topic."""
        tell(f"Available topics to consume: {', '.join(sorted(self.metadata())) or 'none yet'}")
        told = False
        while True:
            topic = self.metadata(self.topic)[self.topic]
            if topic.error is None:
                return sorted(topic.partitions)
            soon = topic.error.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.LEADER_NOT_AVAILABLE)
            if not soon or self.args.exit:
                sys.exit(f"kafka_consumer.py: {self.explain(topic.error)}")
            if not told:
                told = True
                tell(f"Waiting for topic {self.topic}, which does not exist yet.")
            time.sleep(0.2)

    def join_group(self):
        """Becomes a member of the group, among whose members the broker divides the partitions."""
        self.consumer.subscribe([self.topic], on_assign=self.on_assign)

    def on_assign(self, consumer, partitions):
        """Takes the partitions that the group has for this consumer, at first and after each change of members."""
        numbers = {partition.partition for partition in partitions}
        tell(f"Got partitions of {self.topic}: {', '.join(map(str, sorted(numbers))) or 'none, others have them all'}")
        if self.args.exit:
            self.unread = numbers
        if self.next_offsets:
            # After an outage the group may know less than was printed here: commits did not get through.
            with contextlib.suppress(KafkaException):
                partitions = consumer.committed(partitions, timeout=10)
                for place in partitions:
                    place.offset = max(place.offset, self.next_offsets.get(place.partition, place.offset))
                consumer.assign(partitions)

    def take_stretch(self, partitions):
        """Takes the partitions at the offsets asked for; a group has no part in it."""
        stretch = []
        for partition in partitions:
            low, high = self.consumer.get_watermark_offsets(TopicPartition(self.topic, partition), timeout=10)
            wanted = {None: low, "beginning": low, "end": high}.get(self.args.from_offset, self.args.from_offset)
            # -N is N before the end. What is not there yet is waited for.
            start = min(max(wanted if wanted >= 0 else high + wanted, low), high)
            tell(f"Partition {partition} of {self.topic} ends before offset {high}. Reading from offset {start}.")
            stretch.append(TopicPartition(self.topic, partition, start))
        self.consumer.assign(stretch)
        self.unread = {part.partition for part in stretch if part.offset <= self.args.to_offset}

    def run(self):
        """Prints events until there is a reason to end."""
        while self.ending is None:
            room = min(self.args.max_messages - self.printed, 1000)
            if room == 0 or self.unread == set():
                self.ending = ""
                break
            # Waits for one event, and then takes all that are there: faster than one by one.
            message = self.consumer.poll(0.5)
            if message is not None:
                self.handle([message, *self.consumer.consume(room - 1, 0)])
            elif self.all_down:
                self.tell_outage()

    def handle(self, messages):
        """Prints a batch of events, and only then stores their offsets, which the library commits every 5 seconds."""
        lines, last = [], {}
        for message in messages:
            partition, offset, error = message.partition(), message.offset(), message.error()
            if error and error.code() != KafkaError._PARTITION_EOF:
                self.handle_error(error)
                continue
            if error:  # At the end of a partition this has the offset of the event to come.
                offset -= 1
            elif self.args.first_offset <= offset <= self.args.to_offset:
                lines.append(self.line(message))
                last[partition] = message
            if self.unread and (offset >= self.args.to_offset or (error and self.args.exit)):
                self.unread.discard(partition)
        try:
            data = "".join(lines).encode()
            while data:
                data = data[os.write(sys.stdout.fileno(), data) :]
        except OSError as error:
            # It is no error when the program that reads our output has had enough, as head has.
            broken_pipe = isinstance(error, BrokenPipeError)
            self.ending = "" if broken_pipe else f"can't write to standard output: {error.strerror}"
            return
        self.printed += len(lines)
        for partition, message in last.items():
            self.next_offsets[partition] = message.offset() + 1
            # Fails when another consumer of the group has got the partition meanwhile; it prints these events again.
            with contextlib.suppress(KafkaException):
                self.consumer.store_offsets(message=message)

    def handle_error(self, error):
        if error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED and self.args.stretch:
            return  # The library asks for the group without need.
        if error.code() in HOPELESS:
            self.ending = self.explain(error)
        else:
            tell(f"Waiting: {words(error)}")

    def explain(self, error):
        return f"can't read topic {self.topic} at {self.servers}: {words(error)}"

    def on_error(self, error):
        """Takes what librdkafka says of its connections."""
        # That all brokers are down follows from what was said of each, and may be over already.
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self.all_down = True
        else:
            self.last_error = error

    def tell_outage(self):
        """Says once that no broker answers, and once that they do again."""
        try:
            self.consumer.list_topics(self.topic, timeout=0.3)
        except KafkaException:
            if not self.told_lost:
                self.told_lost = True
                reason = f" ({words(self.last_error)})" if self.last_error else ""
                tell(f"No answer from {self.servers}{reason}. Waiting for it.")
        else:
            if self.told_lost:
                tell(f"{self.servers} answers again.")
            self.all_down = self.told_lost = False

    def on_signal(self, *_):
        self.ending = self.ending or ""
        self.end_within(1.5)

    def end_within(self, seconds):
        """Ends the program by force after so long: without an answer from the broker, closing takes minutes."""

        def end():
            time.sleep(seconds)
            tell("kafka_consumer.py: couldn't commit the last offsets; the next run may print some events again")
            os._exit(1)

        threading.Thread(target=end, daemon=True).start()

    def line(self, message):
        value = printable(message.value())
        if not self.args.verbose:
            return value + "\n"
        place = f"partition={message.partition()} offset={message.offset()} time={readable_time(message)}"
        return f"{place} key={printable(message.key())} {value}\n"


def words(error):
    """Returns what a KafkaError says, without how long it took and how often it was seen."""
    return error.str().partition(" (after ")[0]


def printable(data):
    r"""Returns bytes as text of one line that can't steer a terminal, and None as null.

    What is not UTF-8 becomes \xNN; a control character becomes \n, \t, \x1b ... as in Python.
    """
    if data is None:
        return "null"
    text = data.decode(errors="backslashreplace")
    # isprintable() is quick, and nearly always true.
    return text if text.isprintable() else UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def readable_time(message):
    """Returns when an event was created, or stored, as ISO 8601 in the local time zone."""
    milliseconds = message.timestamp()[1]
    try:
        return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).astimezone().isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return f"{milliseconds}ms"  # Producers can set any number, also one beyond the year 9999.


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


def offset(text):
    return text if text in ("beginning", "end") else int(text)


def refuse(text):
    """Ends the program, which was called wrongly."""
    tell(f"kafka_consumer.py: {text} (--help lists the options)")
    sys.exit(2)


def parse_arguments():
    """Returns the options; ends the program with status 2 for a wrong call."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python kafka_consumer.py                                     what the group has not read yet, and then what comes
  python kafka_consumer.py --from-offset -5 --exit --verbose   the last five events, without the group

exit status: 0 done, also by Ctrl-C; 1 something failed; 2 wrong call""",
    )
    parser.error = refuse
    add = parser.add_argument
    add("-b", "--bootstrap-servers", metavar="HOST:PORT,...", help="brokers to ask first (default: localhost:9092)")
    add("-t", "--topic", default="user-tracker", help="topic to read (default: %(default)s)")
    add("-G", "--group", metavar="NAME", help="consumer group to read as (default: python-consumer)")
    add("-F", "--config", metavar="FILE", help="librdkafka properties, one key=value a line (default: none)")
    add("-p", "--partition", type=int, metavar="N", help="only this one, without the group (default: all)")
    add("--from-offset", type=offset, metavar="N",
        help="begin here, without the group: an offset, -N for the last N, beginning or end")  # fmt: skip
    add("--to-offset", type=int, default=math.inf, metavar="N",
        help="end after this offset, without the group (default: no end)")  # fmt: skip
    add("-c", "--max-messages", type=int, default=math.inf, metavar="N",
        help="end after so many events (default: no end)")  # fmt: skip
    add("-e", "--exit", action="store_true", help="end when everything is read (default: wait for more)")
    add("-v", "--verbose", action="store_true", help="partition, offset, time and key before each event")
    args = parser.parse_args()
    for name in ("partition", "to_offset", "max_messages"):
        if (getattr(args, name) or 0) < 0:
            refuse(f"--{name.replace('_', '-')} {getattr(args, name)}: can't be negative")
    # Bytes that are not UTF-8, which librdkafka can't take, become \udcNN, which the broker refuses as a name.
    args.topic = args.topic.encode(errors="backslashreplace").decode()
    args.stretch = args.partition is not None or args.from_offset is not None or args.to_offset < math.inf
    args.first_offset = args.from_offset if isinstance(args.from_offset, int) else 0
    if args.first_offset > args.to_offset:
        refuse("--from-offset is after --to-offset")
    return args


def main():
    args = parse_arguments()
    try:
        config = DEFAULTS | (read_config(args.config) if args.config else {})
        config |= {"bootstrap.servers": args.bootstrap_servers or config["bootstrap.servers"]}
        config |= {"group.id": args.group or config["group.id"]}
        # What is printed counts, and not what the library has handed over: offsets are stored one by one, by handle().
        config |= {"enable.auto.offset.store": "false", "enable.partition.eof": "true"}
        if args.stretch:
            config["enable.auto.commit"] = "false"
        consumer = PrintingConsumer(config, args)
    except Exception as error:  # The library has many ways to refuse a property.
        reason = error.args[0].str().strip() if isinstance(error, KafkaException) else error
        refuse(f"can't use the configuration {args.config or ''}: {reason}")
    if sys.stdout is None:
        sys.exit("kafka_consumer.py: standard output is closed, and the events have nowhere to go")

    tell("Kafka Consumer has been initiated...")
    partitions = consumer.find_topic()
    signal.signal(signal.SIGINT, consumer.on_signal)
    signal.signal(signal.SIGTERM, consumer.on_signal)
    if args.partition not in [None, *partitions]:
        sys.exit(f"kafka_consumer.py: topic {args.topic} has partitions {partitions}, and not {args.partition}")
    try:
        if args.stretch:
            consumer.take_stretch(partitions if args.partition is None else [args.partition])
        else:
            consumer.join_group()
        consumer.run()
    except KafkaException as exception:  # No answer about the offsets, or a fatal error, which poll() raises.
        consumer.ending = consumer.explain(exception.args[0])
    consumer.end_within(10)
    consumer.consumer.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # One Ctrl-C more does not change how this ended.
    tell(f"Printed {consumer.printed} events.")
    if consumer.ending:
        sys.exit(f"kafka_consumer.py: {consumer.ending}")


if __name__ == "__main__":
    main()
