"""Prints the events of a Kafka topic, one per line, and goes on where its consumer group left off.

Read down to the line "End of the lesson". Below it are error messages and the options of the command line.
"""

import argparse
import contextlib
import io
import logging
import math
import os
import re
import signal
import sys
import threading
import time

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

# A broker is a Kafka server. It stores events in topics: logs to which events are appended. Reading removes nothing;
# Kafka deletes events when they are older than a set time.
# A partition is a part of a topic, and keeps its events in order. An offset is an event's position in its partition.
# A consumer group is one or more consumers that share the partitions of a topic: each event goes to one of them. Every
# group gets all events.
# A rebalance redistributes the partitions when a consumer joins the group or leaves it.
# A committed offset says where in a partition the group goes on after a rebalance or a restart. Kafka keeps it.

# Properties of librdkafka, the library inside confluent-kafka. A --config file can change them and add others.
SETTINGS = {
    "bootstrap.servers": "localhost:9092",  # The brokers to ask first; they name the rest.
    "group.id": "python-consumer",
    "auto.offset.reset": "earliest",  # With no committed offset, or if that event is gone, start at the oldest one.
}  # MORE_SETTINGS, below the lesson, holds the settings for networks and for speed.
# 1. poll() returns event 6. 2. We process it. 3. store_offsets() notes in memory that we go on at offset 7. 4. The
# library commits 7, that is, sends it to Kafka: within five seconds, before a rebalance takes the partition away, and
# in close(). So the committed offset is never ahead of our work, and no event is skipped.
# --config can't change these two settings; --from-offset switches commits off.
FIXED = {
    "enable.auto.offset.store": False,  # By default poll() does step 3, before the event is processed.
    "enable.auto.commit": True,
}


def main():
    args = parse_arguments()
    partitions = Partitions()
    trouble = Trouble()  # Reports what goes wrong with connections, commits and settings.
    hooks = {"error_cb": trouble.on_error, "on_commit": trouble.on_commit, "logger": trouble}
    try:
        consumer = Consumer(args.settings | hooks)  # args.settings: those above and those of --config.
    except Exception as error:  # A setting is refused, by a KafkaException, TypeError, AttributeError or others.
        wrong_call(error)
    tell("Kafka Consumer has been initiated...")
    must_exist = args.exit or args.from_offset is not None  # Otherwise we wait until somebody makes the topic.
    topics = available_topics(consumer, args.topic, must_exist)
    tell(f"Available topics to consume: {', '.join(topics) or 'none yet'}")

    done = {}  # For each partition the last event that is processed, but not yet stored.
    printed = 0
    failed = False
    try:
        if args.from_offset is None:
            # Joins the group. poll() calls on_assign when a rebalance gives us partitions, and on_revoke before
            # it takes them away. Then we store our progress, so that the next owner begins after our last event.
            consumer.subscribe(
                [args.topic],
                on_assign=partitions.on_assign,
                on_revoke=lambda *_: store_progress(consumer, done),
            )
        else:
            # Takes all partitions, whatever the group does. parse_arguments() has switched commits off.
            consumer.assign(first_offsets(consumer, args.topic, args.from_offset))
        stop = stop_on_signals()
        stored_at = time.monotonic()
        while printed < args.max_messages and not stop.is_set():
            # A thread of the library reads events ahead. poll() returns the next, or None if none comes in that time.
            message = consumer.poll(0 if done else 0.5)  # Wait only when all is stored.
            if message is None:
                store_progress(consumer, done)
                if args.exit and partitions.are_read(consumer):
                    break
            elif message.error():  # Not an event, but a problem, or with --exit the end of a partition.
                handle_error(message, partitions)
            else:
                process(message, args.verbose)
                done[message.partition()] = message
                printed += 1
                if time.monotonic() > stored_at + 1:  # There is much to read. After each event would be slow.
                    store_progress(consumer, done)
                    stored_at = time.monotonic()
        store_progress(consumer, done)
        tell(f"Printed {printed} events. Closing.")
    except KafkaException as error:
        tell(f"kafka_consumer.py: can't read topic {args.topic}: {error.args[0].str()}")
        failed = True
    finally:
        done.clear()  # After a failure these may not be written out. close() calls on_revoke, which would store them.
        handle_signals(signal.SIG_DFL)  # From now on Ctrl-C ends the program at once.
        timer = exit_after(8)  # Otherwise close() would wait 45 seconds or more for a broker that is away.
        consumer.close()  # Commits what is stored, and leaves the group.
        timer.cancel()
    sys.exit(1 if failed or trouble.commit_failed else 0)


def process(message, verbose):
    """Handles one event: prints it. To do something else with events, replace this function.

    It must return within five minutes (max.poll.interval.ms), or the group gives the partition to another consumer.
    If it raises an exception, the program ends, and close() commits what was stored before: in the next run events of
    the last second come again, and then this one. After kill -9 or a power cut, those since the last commit come again.
    So each event is processed at least once.
    """
    line = printable(message.value())
    if verbose:
        place = f"partition={message.partition()} offset={message.offset()} timestamp={message.timestamp()[1]}"
        line = f"{place} key={printable(message.key())} {line}"
    print(line)


def store_progress(consumer, done):
    """Stores for each partition where to go on. done: {number of the partition: last processed Message}; is emptied."""
    sys.stdout.flush()  # First the events must be out.
    for message in done.values():
        consumer.store_offsets(message)  # Stores its offset plus 1.
    done.clear()


def handle_error(message, partitions):
    """Handles what poll() returns besides events. Raises KafkaException for a problem that retrying can't solve."""
    error = message.error()
    if error.code() == KafkaError._PARTITION_EOF:  # Not a problem: the end of a partition. Only with --exit.
        partitions.at_end.add(message.partition())
    elif error.code() in LASTING_ERRORS:
        raise KafkaException(error)
    else:
        tell(error.str())  # The library tries again.


# End of the lesson. ---------------------------------------------------------------------------------------------------

MORE_SETTINGS = {
    "broker.address.family": "v4",  # localhost may be an IPv6 address too, but Docker publishes the broker on IPv4.
    "fetch.queue.backoff.ms": 10,  # When 100,000 events are read ahead, pause for 10 ms. The usual second is slow.
}
HINT = (
    "Is Kafka running (docker compose up -d --wait)? If this is not the address that you gave, "
    "check advertised.listeners; with TLS, check the host name."
)


class Partitions:
    """What the library calls in a rebalance; and, for --exit, which of our partitions are read to the end.

    at_end: the numbers of the partitions that are read to the end.
    nothing_since: when a rebalance left us without partitions, in the time of time.monotonic(), or infinity.
    """

    def __init__(self):
        self.at_end = set()
        self.nothing_since = math.inf

    def on_assign(self, consumer, partitions):
        """A rebalance gives us partitions, perhaps none. The library reads each from its committed offset on."""
        new = numbers(partitions)
        have = new | numbers(consumer.assignment())  # By some protocols we keep others.
        self.at_end -= new
        self.nothing_since = math.inf if have else time.monotonic()
        names = ", ".join(str(number) for number in sorted(have))
        tell(f"Got partitions: {names or 'none; other members of the group have the rest'}")

    def are_read(self, consumer):
        """Returns True if each is read to the end. If we have none, we wait ten seconds for another rebalance."""
        have = numbers(consumer.assignment())
        if not have:
            return time.monotonic() > self.nothing_since + 10
        return have.issubset(self.at_end)


def numbers(partitions):
    """Returns the numbers of a list of TopicPartitions as a set."""
    return {partition.partition for partition in partitions}


class Trouble:
    """Prints what goes wrong and is no reason to stop. The library calls the methods in poll() and close().

    commit_failed: whether the last commit failed.
    """

    def __init__(self):
        self.commit_failed = False
        self.silent_until = 0

    def on_error(self, error):
        """A connection has failed. The library tries again. Printed at most every ten seconds."""
        if time.monotonic() > self.silent_until:
            self.silent_until = time.monotonic() + 10
            tell(f"Can't connect: {error.str().split(' (after ')[0]}\n{HINT}")

    def on_commit(self, error, partitions):
        """Offsets were committed, or could not be."""
        error = error or next((partition.error for partition in partitions if partition.error), None)
        self.commit_failed = error is not None
        if error:
            tell(f"Can't commit offsets, so these events may come again: {error.str()}")

    def log(self, level, template, facility, client, text):
        """The library logs something. Most is also reported elsewhere, but not that unread events were deleted."""
        if level == logging.DEBUG:
            tell(template % (facility, client, text))
        elif facility == "OFFSET" or (facility == "CONFWARN" and "will be ignored" not in text):
            tell(text.partition("]: ")[2])  # Without the name of the thread.


LASTING_ERRORS = {KafkaError._FATAL, KafkaError._AUTO_OFFSET_RESET}
LASTING_ERRORS |= {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED}


def tell(line):
    """Writes a line about the run to standard error. Standard output is for events alone."""
    with contextlib.suppress(OSError):  # Nobody reads it any more.
        print(line, file=sys.stderr)


class Output(io.FileIO):
    """A file that ends the program when nothing can be written to it."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # For the rest, which Python writes at its end.
            sys.exit(f"kafka_consumer.py: can't write to standard output: {error.strerror}")


def wrong_call(error):
    """Ends the program because a setting was refused."""
    tell(f"kafka_consumer.py: {error.args[0].str().strip() if isinstance(error, KafkaException) else error}")
    sys.exit(2)


def available_topics(consumer, topic, must_exist):
    """Returns the names of all topics. Ends the program if no answer comes, or if the topic must exist and does not."""
    for seconds in (1, 1, 2, 2, 4, 4, 8, 8):
        try:
            consumer.poll(0)  # Calls error_cb if there was an error.
            names = sorted(consumer.list_topics(timeout=seconds).topics)
            # This also makes the library watch for a topic that does not exist yet.
            error = consumer.list_topics(topic, timeout=seconds).topics[topic].error
            if error is None or not must_exist:
                return names
            problem = f"can't read topic {topic}: {error.str()}"
            time.sleep(seconds / 3)  # A broker that has just started may not know it yet.
        except KafkaException:
            problem = "no answer from Kafka for 30 seconds"
    sys.exit(f"kafka_consumer.py: {problem}")


def first_offsets(consumer, topic, wanted):
    """Returns for each partition a TopicPartition with the offset to begin at. wanted: N, or -N: N before the end."""
    starts = []
    for number in consumer.list_topics(topic, timeout=10).topics[topic].partitions:
        # The offset of the oldest event that is left, and the one that the next event will get.
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=10)
        start = wanted if wanted >= 0 else high + wanted
        start = min(max(start, low), high)
        tell(f"Partition {number}: reading from offset {start} on; the next new event will be {high}.")
        starts.append(TopicPartition(topic, number, start))
    return starts


def stop_on_signals():
    """Returns a threading.Event that Ctrl-C and SIGTERM set. A second signal ends the program at once."""
    stop = threading.Event()

    def on_signal(*_):
        handle_signals(signal.SIG_DFL)
        stop.set()

    handle_signals(on_signal)
    return stop


def handle_signals(handler):
    """Sets what Ctrl-C and SIGTERM do. signal.SIG_DFL: end the program at once."""
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


def exit_after(seconds):
    """Ends the program after that time if the returned timer is not cancelled."""

    def give_up():
        tell("kafka_consumer.py: no answer from Kafka at the end. Events since the last commit may come again.")
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    return timer


# What could break a line or steer a terminal: control characters, line separators, changes of text direction.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(data):
    r"""Returns bytes as one line of text, with \n, \x1b and the like for what is unsafe or not UTF-8; None as null."""
    text = "null" if data is None else data.decode(errors="backslashreplace")
    if text.isprintable():  # Faster.
        return text
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def properties(path):
    """Returns the key=value lines of a file as a dict; raises ArgumentTypeError for lines other than # comments."""
    found = {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except OSError as error:
        raise argparse.ArgumentTypeError(error) from None
    for number, line in enumerate(lines, 1):
        key, _, value = (part.strip() for part in line.partition("="))
        if not line or line.startswith("#"):
            continue
        if not value or not re.fullmatch(r"[\w.]+", key):  # The line is not shown, since it may hold a password.
            raise argparse.ArgumentTypeError(f"{path}: line {number} is not key=value")
        found[key] = value
    return found


def start_offset(text):
    """Returns what first_offsets() takes; raises ValueError for anything else."""
    if text == "beginning":
        return 0
    if text == "end":
        return sys.maxsize
    return int(text)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Prints the events of a Kafka topic, one per line, and goes on where its consumer group left off.",
        epilog="Exit status: 0 done, also by Ctrl-C; 1 something failed; 2 wrong call.",
    )
    add = parser.add_argument
    add("-b", "--bootstrap-servers", metavar="HOST:PORT,...", help="brokers to ask first (default: localhost:9092)")
    add("-t", "--topic", default="user-tracker", help="topic to read (default: %(default)s)")
    add("-G", "--group", help="consumer group to read as (default: python-consumer)")
    add("-F", "--config", type=properties, default={}, metavar="FILE", help="librdkafka properties, key=value lines")
    add("-o", "--from-offset", type=start_offset, help="begin at N, -N (from the end), beginning, end; no commits")
    add("-c", "--max-messages", type=int, default=sys.maxsize, metavar="N", help="end after so many events")
    add("-e", "--exit", action="store_true", help="end when everything is read (default: wait for more)")
    add("-v", "--verbose", action="store_true", help="partition, offset, timestamp and key before each event")
    args = parser.parse_args()
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", args.topic):
        parser.error(f"{args.topic!r} is no topic: names have up to 249 letters, digits, dots, underscores, hyphens")
    if args.max_messages < 0:
        parser.error(f"--max-messages {args.max_messages} is negative")
    args.settings = SETTINGS | MORE_SETTINGS | args.config | FIXED
    if args.bootstrap_servers:
        args.settings["bootstrap.servers"] = args.bootstrap_servers
    if args.group:
        args.settings["group.id"] = args.group
    if args.from_offset is not None:
        args.settings["enable.auto.commit"] = False
    args.settings["enable.partition.eof"] = args.exit  # poll() then returns the end of a partition as an error.
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # While there is nothing to lose, Ctrl-C ends the program at once.
    # Buffered, also with PYTHONUNBUFFERED, and in UTF-8, whatever the terminal is set to.
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(Output(sys.stdout.fileno(), "w", closefd=False)), encoding="utf-8")
    main()
