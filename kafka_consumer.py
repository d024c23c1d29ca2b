"""Prints the events of a Kafka topic, one per line, and goes on where its consumer group left off.

Read down to the line "End of the lesson". Below it are error messages and the options of the command line.
"""

import argparse
import contextlib
import logging
import os
import pathlib
import re
import signal
import sys
import threading
import time
import traceback

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

# A broker is a Kafka server. It keeps events in topics: logs to which events are appended. Reading removes nothing;
# Kafka deletes events when they are older than a set time. The library calls an event a message.
# A partition is a part of a topic, and keeps its events in order. An offset is an event's position in its partition.
# A consumer is a program that reads events, such as this one. A consumer group is one or more of them that share the
# partitions of a topic: within the group each partition, and so each event, goes to one of them. Every group gets all
# events, independently of other groups.
# A committed offset says where in a partition the group goes on after a restart, or when another consumer takes over.
# Kafka keeps it, for a week after the last consumer of the group has left.
# A rebalance redistributes the partitions when a consumer joins the group or leaves it.

# What happens to an event, for example the one at offset 6:
# 1. Poll: the library hands it to us. A thread of the library has fetched it ahead.
# 2. Process: we do with it what we are here for. process() prints it.
# 3. Store: we tell the library that the event is done. In its memory it notes 7, the offset to go on at.
# 4. Commit: a thread of the library sends the 7 to Kafka every five seconds, even while process() runs. It does so too
#    before a rebalance takes the partition away, and in close(). We never call commit() ourselves.
# If the program is killed, what was processed since the last commit comes again: better twice than never.

# Properties of librdkafka, the library inside confluent-kafka. A --config file can change most of them and add others.
SETTINGS = {
    "bootstrap.servers": "localhost:9092",  # The brokers to ask first; they name the rest.
    "group.id": "python-consumer",  # The name of our group: consumers with the same name share the partitions.
    "auto.offset.reset": "earliest",  # Without a committed offset, or if the event there is gone: start at the oldest.
    # False: we do step 3 ourselves, after process(). With True (the default) poll() does it when it hands us event 6,
    # so before process(). If the thread then commits 7, and we are killed before process() has ended, 6 is lost.
    # (Step 4 has a setting of its own, enable.auto.commit. It stays True.)
    "enable.auto.offset.store": False,
}  # MORE_SETTINGS, below the lesson, are for networks and for speed.


def main():
    args = parse_arguments()
    trouble = Trouble()  # Prints problems that may pass. trouble.commit_failed: whether the last commit has failed.
    callbacks = {  # What the library calls while we are in poll() or close().
        "error_cb": trouble.on_error,  # When a connection has failed.
        "on_commit": trouble.on_commit,  # After each commit, also if it has failed.
        "logger": trouble,  # An object, not a function: the library calls its method log() for each line that it logs.
    }
    with refusals_told():  # If the library refuses a setting, that ends the program.
        # args.settings: MORE_SETTINGS, --config and other options. Of two values for one setting the later one wins.
        consumer = Consumer(SETTINGS | args.settings | callbacks)
    tell("Kafka Consumer has been initiated...")
    wait_for_kafka(consumer, args)  # Prints which topics there are. Ends the program if there is no answer.

    end = End(consumer, args.exit)  # end.has_come is true after Ctrl-C, or with --exit when all is read.
    printed = 0
    try:
        if args.from_offset is None:
            # The usual way: asks to join the group. Partitions come later, in a rebalance: poll() then calls
            # end.on_assign(), and on_revoke() or on_lost() when they go. All three print a line.
            consumer.subscribe([args.topic], on_assign=end.on_assign, on_revoke=on_revoke, on_lost=on_lost)
        else:
            # --from-offset: takes all partitions, from the given offset on, and joins no group. Nothing is committed,
            # since parse_arguments() has set enable.auto.commit to False, so step 3 has no effect.
            assign_partitions(consumer, args.topic, args.from_offset)
        handle_signals(end.on_signal)  # From here on Ctrl-C and SIGTERM only end the loop.
        while printed < args.max_messages and not end.has_come:
            message = consumer.poll(0.5)  # Step 1. Returns one of three things:
            if message is None:  # Nothing, for half a second.
                end.look()  # Do we have partitions? With --exit: is all read?
            elif message.error():  # A problem or, only with --exit, the news that a partition is read to its end.
                handle_error(message, args.topic, end)  # Ends the program if waiting can't help.
            else:  # An event.
                process(message, args.verbose)  # Step 2.
                printed += 1
                consumer.store_offsets(message)  # Step 3. Stores its offset plus 1.
    finally:  # However the loop has ended: as usual, by an exception, or by sys.exit().
        handle_signals(signal.SIG_DFL)  # From here on Ctrl-C ends the program at once.
        tell(f"Printed {printed} events. Closing.")
        with ends_within(8):  # Without a broker close() may take long. Docker, for example, kills a program after ten.
            consumer.close()  # Commits once more (step 4), and leaves the group.
    sys.exit(1 if trouble.commit_failed else 0)


def process(message, verbose):
    """Prints one event as a line.

    For your own use replace this function. message.value() is bytes, or None for an event without a value. With
    import json, json.loads(message.value()) gives the dict that was sent.

    - Don't return before the event is safe: stored in a database, or written by write_out(). print() is not enough: it
      may keep the event in a buffer.
    - An event may come twice. So write it to a database under a unique id, such as its topic, partition and offset.
    - If this raises an exception, the program ends, and the next run begins with the same event. So catch what a bad
      event can cause, or every run will end there.
    - If it takes more than five minutes (max.poll.interval.ms), another consumer gets our partitions.
    """
    line = text(message.value())
    if verbose:
        _, timestamp = message.timestamp()  # In milliseconds since 1970, UTC.
        place = f"partition={message.partition()} offset={message.offset()} timestamp={timestamp}"
        line = f"{place} key={text(message.key())} {line}"
    write_out(line)


def text(data):
    r"""Returns bytes as text, with \xff and the like for what is not UTF-8; None as null."""
    return "null" if data is None else data.decode(errors="backslashreplace")


def on_revoke(consumer, partitions):
    """A rebalance, or close(), takes partitions away. When this returns, the library commits their stored offsets."""
    tell_partitions("Gave up partitions", partitions)


def on_lost(consumer, partitions):
    """Called instead of on_revoke() when Kafka took the partitions without asking, because we seemed to be dead.

    A thread of the library sends Kafka a sign of life, a heartbeat, every few seconds. Most often none has arrived for
    45 seconds (the program was suspended, for example), or process() took five minutes. Others may be reading these
    partitions already, so it is too late to commit.
    """
    tell("Lost the partitions. Events since the last commit may come again.")


# End of the lesson. ---------------------------------------------------------------------------------------------------

MORE_SETTINGS = {
    "broker.address.family": "v4",  # localhost may be an IPv6 address too, but Docker publishes the broker on IPv4.
    "socket.connection.setup.timeout.ms": 10_000,  # If a broker does not let us in for so long, say so and try again.
    "socket.timeout.ms": 30_000,  # If a broker does not answer for 30 seconds, connect anew and ask again.
    "fetch.queue.backoff.ms": 10,  # With 100,000 events or 64 MB read ahead, pause for 10 ms. The usual second is slow.
}
# What --config can't change.
FIXED = {"enable.auto.offset.store", "enable.auto.commit", "enable.partition.eof"}
NAME = os.path.basename(sys.argv[0])  # Errors begin with it.
HINT = (
    "Is Kafka running (docker compose up -d --wait)? If this is not the address that you gave, "
    "check advertised.listeners; with TLS, check the host name."
)


# Errors after which waiting does not help.
LASTING_ERRORS = {
    KafkaError._FATAL,
    KafkaError._AUTO_OFFSET_RESET,  # With auto.offset.reset=error: the committed offset is missing or out of range.
    # Events that are damaged (found with check.crcs=true) or in an unknown format. The library would skip some of them,
    # and fetch others again and again.
    KafkaError._BAD_MSG,
    KafkaError._BAD_COMPRESSION,
    KafkaError._NOT_IMPLEMENTED,
    KafkaError.TOPIC_EXCEPTION,  # No topic can have this name.
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
}


class End:
    """Knows when to stop: after Ctrl-C, or with --exit when all is read.

    reached: with --exit, a set of the TopicPartitions read to the end. Two are equal if topic and partition are.
    ours: the partitions that we had at the last look(), a set too.
    looks: how many looks they are the same. poll() waits half a second for each, so 20 take ten seconds.
    """

    def __init__(self, consumer, exit_when_all_is_read):
        self.consumer = consumer
        self.exit_when_all_is_read = exit_when_all_is_read
        self.has_come = False
        self.reached = set()
        self.ours = set()
        self.looks = 0

    def on_signal(self, *_):
        """Called on Ctrl-C and SIGTERM. A second one ends the program at once."""
        handle_signals(signal.SIG_DFL)
        self.has_come = True

    def on_assign(self, consumer, partitions):
        """A rebalance gives us partitions, perhaps none. The library begins at their committed offsets."""
        self.reached -= set(partitions)  # Others may have been at them, or what we read was not committed.
        tell_partitions("Got partitions", partitions)

    def partition_ends(self, message):
        """A partition is read to the end."""
        self.reached.add(TopicPartition(message.topic(), message.partition()))
        self.check_end(set(self.consumer.assignment()))

    def check_end(self, ours):
        """Ends the loop if all of our partitions are read. ours: a set of TopicPartitions."""
        self.reached &= ours  # Forgets those that a rebalance took away.
        if ours and self.reached == ours:
            self.has_come = True

    def look(self):
        """Looks what we are waiting for: poll() had nothing for half a second."""
        ours = set(self.consumer.assignment())
        self.check_end(ours)
        if ours != self.ours:
            self.ours = ours
            self.looks = 0
        self.looks += 1
        if self.looks == 20 and not ours:
            tell("Waiting for partitions. Other members of the group may have them all, or there is no topic yet.")
            tell("If a member was killed, Kafka waits up to 45 seconds for it.")
        if self.looks == 120 and not ours and self.exit_when_all_is_read:
            fail("no partitions for 60 seconds; other members of the group may have them all")
        if self.looks % 20 == 0 and self.exit_when_all_is_read:  # The library waits for a leader without a word.
            unread = ours - self.reached
            tell_partitions("Waiting for the end of these partitions, which are slow or have no leader", unread)


def handle_error(message, topic, end):
    """Handles what poll() returns besides events. Ends the program if the error is a lasting one."""
    error = message.error()
    # With one of these texts librdkafka 2.16 does not ask again, and would never begin to read (its issue 5586).
    no_start = re.match(r"Failed to fetch committed offset(s for \d| for group)", error.str())
    if error.code() == KafkaError._PARTITION_EOF:  # Not a problem: the end of a partition. Only with --exit.
        end.partition_ends(message)
    elif no_start or error.code() in LASTING_ERRORS:
        fail(f"can't read topic {topic}: {error.str()}")
    else:
        tell(error.str())  # The library tries again.


class Trouble:
    """Prints what goes wrong and is no reason to stop. commit_failed: whether the last commit failed."""

    def __init__(self):
        self.commit_failed = False
        self.silent_until = 0

    def on_error(self, error):
        """A connection has failed. The library tries again."""
        hint = "" if error.code() == KafkaError._AUTHENTICATION else f"\n{HINT}"
        self.no_connection(f"{error.str()}{hint}")

    def no_connection(self, why):
        """Printed at most every ten seconds."""
        if time.monotonic() > self.silent_until:
            self.silent_until = time.monotonic() + 10
            tell(f"Can't connect: {why}")

    def on_commit(self, error, partitions):
        """Offsets were committed, or could not be."""
        error = error or next((partition.error for partition in partitions if partition.error), None)
        if error and not self.commit_failed:  # Told once, until a commit succeeds.
            tell(f"Can't commit offsets, so these events may come again: {error.str()}")
        self.commit_failed = error is not None

    def log(self, level, template, facility, client, entry):
        """The library logs something, as if to a logging.Logger. Most of it is also reported elsewhere, but not that
        unread events were deleted (OFFSET), or why partitions were lost (SESSTMOUT).

        Settings that "will be ignored" are those for producers, in a --config file for both scripts.
        """
        line = entry.split("]: ", 1)[-1]  # Without the name of the thread.
        if level == logging.DEBUG:
            tell(template % (facility, client, entry))
        elif level == logging.WARNING and facility in ("FAIL", "REQTMOUT"):  # A broker does not answer.
            self.no_connection(f"{line}\n{HINT}")
        elif facility in ("OFFSET", "SESSTMOUT") or (facility == "CONFWARN" and "will be ignored" not in entry):
            tell(line)


def tell(line):
    """Writes a line about the run to standard error. Standard output is for events alone."""
    with contextlib.suppress(OSError):  # Nobody reads it any more.
        print(line, file=sys.stderr)


def fail(why):
    """Ends the program with status 1. Tells why at once, since the finally block in main() may take long."""
    tell(f"{NAME}: {why}")
    sys.exit(1)


def tell_partitions(what, partitions):
    if partitions:
        tell(f"{what}: {', '.join(str(each.partition) for each in partitions)}")


# What could break a line or steer a terminal: control characters, line separators, changes of text direction.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def write_out(line):
    r"""Writes text as one line to standard output, at once, in UTF-8, with \n, \x1b and the like for what is unsafe.

    If it can't be written, that ends the program.
    """
    if not line.isprintable():  # So that the usual line is not searched, which takes longer.
        line = UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), line)
    rest = f"{line}\n".encode(errors="backslashreplace")
    try:
        while rest:
            written = os.write(1, rest)  # Faster than print(flush=True), but may write only a part.
            rest = rest[written:]
    except OSError as error:
        fail(f"can't write to standard output: {error.strerror}")


@contextlib.contextmanager
def refusals_told():
    """Ends the program if a setting is refused in the with block."""
    try:
        yield
    except Exception as error:  # For settings the library has four types of exceptions.
        tell(f"{NAME}: {error.args[0].str().strip() if isinstance(error, KafkaException) else error}")
        sys.exit(2)


def wait_for_kafka(consumer, args):
    """Waits for Kafka, and prints which topics there are.

    Ends the program if there is no answer, or no topic where there must be one.
    """
    must_exist = args.exit or args.from_offset is not None  # Otherwise we wait until somebody makes it.
    for seconds in (1, 2, 4, 8, 15):  # Some clusters need more time. The first tries are short, to tell errors soon.
        message = consumer.poll(0)  # Calls error_cb if there was an error.
        if message is not None and message.error().code() in LASTING_ERRORS:
            fail(f"can't read topic {args.topic}: {message.error().str()}")
        try:
            names = sorted(consumer.list_topics(timeout=seconds).topics)
            # This also makes the library watch for a topic that does not exist yet.
            error = consumer.list_topics(args.topic, timeout=seconds).topics[args.topic].error
            if error is None or not must_exist:
                tell(f"Available topics to consume: {', '.join(names) or 'none yet'}")
                return
            problem = f"can't read topic {args.topic}: {error.str()}"
            time.sleep(2)  # A broker that has just started may not know the topic yet.
        except KafkaException:
            problem = "no answer from Kafka for 30 seconds"
    fail(problem)


def assign_partitions(consumer, topic, wanted):
    """Begins to read all partitions at an offset. wanted: N, or -N: N before the end."""
    starts = []
    try:
        for number in consumer.list_topics(topic, timeout=10).topics[topic].partitions:
            # The offset of the oldest event that is left, and the one that the next event will get.
            low, high = consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=10)
            start = wanted if wanted >= 0 else high + wanted
            start = min(max(start, low), high)
            tell(f"Partition {number}: reading from offset {start} on; the next new event will be {high}.")
            starts.append(TopicPartition(topic, number, start))
    except KafkaException as error:
        fail(f"can't read topic {topic}: {error.args[0].str()}")
    consumer.assign(starts)


def handle_signals(handler):
    """Sets what Ctrl-C and SIGTERM do. signal.SIG_DFL: end the program at once."""
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def ends_within(seconds):
    """Ends the program if the with block takes longer. Then it also shows the exception that has led to the block."""
    exception = sys.exc_info()[1]

    def give_up():
        if isinstance(exception, Exception):
            traceback.print_exception(exception)
        tell(f"{NAME}: no answer from Kafka at the end. Events since the last commit may come again.")
        os._exit(1)  # sys.exit() would end this thread alone.

    timer = threading.Timer(seconds, give_up)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def properties(path):
    """Returns the key=value lines of a file as a dict. Skips empty lines and # comments.

    Raises ArgumentTypeError for any other line, and if the file can't be read.
    """
    found = {}
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"can't read {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        key, _, value = (part.strip() for part in line.partition("="))
        if value and re.fullmatch(r"[\w.]+", key):
            found[key] = value
        elif line.strip() and not key.startswith("#"):  # The line is not shown, since it may hold a password.
            raise argparse.ArgumentTypeError(f"{path}: line {number} is not key=value")
    return found


def offset(given):
    """Returns what assign_partitions() takes; raises ValueError for anything else."""
    if given == "beginning":
        return 0
    if given == "end":
        return sys.maxsize
    return int(given)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Prints the events of a Kafka topic, one per line, and goes on where its consumer group left off.",
        epilog="Exit status: 0 done, also by Ctrl-C; 1 something failed; 2 wrong call; 130 or 143 ended by Ctrl-C or "
        "SIGTERM before it had begun, or by a second one.",
    )
    add = parser.add_argument
    add("-b", "--bootstrap-servers", metavar="HOST:PORT,...", help="brokers to ask first (default: localhost:9092)")
    add("-t", "--topic", default="user-tracker", help="topic to read (default: %(default)s)")
    add("-G", "--group", help="consumer group to read as (default: python-consumer)")
    add("-F", "--config", type=properties, default={}, metavar="FILE", help="librdkafka properties, key=value lines")
    add("-o", "--from-offset", type=offset, help="for each partition: N, -N (before its end), beginning, end")
    add("-c", "--max-messages", type=int, default=sys.maxsize, metavar="N", help="end after so many events")
    add("-e", "--exit", action="store_true", help="end when everything is read (default: wait for more)")
    add("-v", "--verbose", action="store_true", help="partition, offset, timestamp and key before each event")
    args = parser.parse_args()
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", args.topic):
        parser.error(f"{args.topic!r} is no topic: names have up to 249 letters, digits, dots, underscores, hyphens")
    if "" in (args.bootstrap_servers, args.group):
        parser.error("--bootstrap-servers and --group may not be empty")
    if args.max_messages < 0:
        parser.error(f"--max-messages {args.max_messages} is negative")
    for key in FIXED & args.config.keys():
        parser.error(f"--config can't change {key}")
    args.settings = MORE_SETTINGS | args.config
    if args.bootstrap_servers:
        args.settings.pop("metadata.broker.list", None)  # Another name for the same.
        args.settings["bootstrap.servers"] = args.bootstrap_servers
    if args.group:
        args.settings["group.id"] = args.group
    if args.from_offset is not None:
        args.settings["enable.auto.commit"] = False
    args.settings["enable.partition.eof"] = args.exit  # poll() then returns the end of a partition as an error.
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # While there is nothing to lose, Ctrl-C ends the program at once.
    if None in (sys.stdout, sys.stderr):  # Otherwise os.write(1) could write into a connection.
        sys.exit(f"{NAME}: standard output or standard error is closed")
    main()
