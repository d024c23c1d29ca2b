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
# Kafka keeps it, for a week after the last consumer of the group has left. After that the group begins as a new one.
# A rebalance redistributes the partitions when a consumer joins the group or leaves it.

# What happens to an event, for example the one at offset 6:
# 1. Poll: the library hands it to us. A thread of the library has fetched it ahead.
# 2. Process: we do with it what we are here for. process() prints it.
# 3. Store: we tell the library that the event is done. In its memory it notes 7, the offset to go on at.
# 4. Commit: a thread of the library sends the 7 to Kafka every five seconds, even while process() runs, but never more
#    than what is stored. It does so too before a rebalance takes the partition away, and in close(). We never call
#    commit() ourselves.
# If the program is killed, what was processed since the last commit comes again: better twice than never.
# So the core of this program is:
#     consumer.subscribe([topic])
#     while True:
#         message = consumer.poll(0.5)         # Step 1.
#         if message is not None and not message.error():
#             process(message)                 # Step 2.
#             consumer.store_offsets(message)  # Step 3. Step 4 happens by itself.
# The rest is about errors, Ctrl-C and options.

# Properties of librdkafka, the library inside confluent-kafka. A --config file can change most of them and add others.
SETTINGS = {
    "bootstrap.servers": "localhost:9092",  # The brokers to ask first; they name the rest.
    "group.id": "python-consumer",  # The name of our group: consumers with the same name share the partitions.
    "auto.offset.reset": "earliest",  # Without a committed offset, or if its event is deleted, begin at the oldest.
    # Who does step 3, and when?
    # True, the default: the library, in poll(), so before we process. It may commit the 7 while we still process 6. If
    #     we are killed then, the next run begins at 7, and 6 is lost.
    # False: we do it, after process(). If we are killed in process(), the next run begins at 6. Nothing is lost.
    "enable.auto.offset.store": False,
    "enable.auto.commit": True,  # Who does step 4? The library.
}  # MORE_SETTINGS, below the lesson, are for networks and for speed.


def main():
    args = parse_arguments()
    run = Run(args)  # Knows whether to stop: after Ctrl-C, or with --exit when all is read.
    trouble = Trouble()  # Tells when the connection is bad.
    settings = SETTINGS | MORE_SETTINGS | args.config  # Of two values for one setting the later one wins.
    if args.from_offset is not None:
        settings["enable.auto.commit"] = False  # No step 4: we only look, and change nothing for the group.
    if args.exit:
        settings["enable.partition.eof"] = True  # poll() then also tells when a partition is read to its end.
    try:
        consumer = Consumer(
            settings,
            # What the library calls while we are in poll() or close():
            error_cb=trouble.on_connection_error,  # When a connection has failed.
            on_commit=run.on_commit,  # After each commit, also if it has failed.
            logger=trouble,  # An object, not a function: its method log() gets each line that the library logs.
        )
    except Exception as error:  # The library refuses a setting.
        fail(error, status=2)
    tell("Kafka Consumer has been initiated...")
    wait_for_kafka(consumer, run)  # Prints which topics there are. Ends the program if there is no answer.

    processed = 0
    try:
        if args.from_offset is None:
            # The usual way: we join the group, and Kafka decides which partitions we get. That can change when other
            # consumers come or go (a rebalance). The library tells us in poll(): on_assign() when we get partitions,
            # on_revoke() when we give them up, on_lost() when they were taken from us because we seemed dead.
            consumer.subscribe([args.topic], on_assign=run.on_assign, on_revoke=run.on_revoke, on_lost=run.on_lost)
        else:
            assign_partitions(consumer, args.topic, args.from_offset)  # We take all partitions, and join no group.
        handle_signals(run.on_signal)  # From here on Ctrl-C and SIGTERM only set run.stopped.
        while processed < args.max_messages and not run.stopped:
            message = consumer.poll(0.5)  # Step 1. Returns as soon as there is something: one of these three.
            if message is None:  # Nothing has come for half a second.
                run.progress.check(consumer)  # Tells if we have no partitions. With --exit: is all read?
            elif message.error():  # No event, but a problem or, only with --exit, the news of a partition's end.
                run.handle_error(consumer, message)  # Ends the program if waiting can't help.
            else:  # An event.
                try:
                    process(message, run)  # Step 2.
                except Exception:  # Step 3 is left out, so close() commits what came before; this event comes again.
                    tell(f"Can't process the event at partition {message.partition()}, offset {message.offset()}.")
                    raise
                processed += 1
                consumer.store_offsets(message)  # Step 3: its offset plus 1.
    finally:  # However the loop has ended.
        handle_signals(signal.SIG_DFL)  # From here on Ctrl-C ends the program at once.
        tell(f"Processed {processed} events. Closing.")
        with ends_within(8):  # Without a broker close() may take minutes. Then the program ends after 8 seconds.
            consumer.close()  # Commits what was stored (step 4), and leaves the group.
    sys.exit(1 if run.commit_failed else run.exit_status)


def process(message, run):
    """Prints one event as a line.

    For your own use replace this function. message.value() is bytes, or None for an event without a value. With
    import json, json.loads(message.value()) gives the dict that was sent.

    How it ends decides what becomes of the event:
    - It returns: done, the event does not come again. So first make your result safe, in a database for example.
      print() is not enough, since it may keep the event in a buffer; see write_out().
    - It raises an exception: not done. The program ends, and the next run begins with this event. That is right if a
      database is away.
    - It catches the exception and returns: skipped for good. That is right for a bad event, on which every run would
      end otherwise.

    Be ready for an event that comes twice:
    - After a crash it has the same topic, partition and offset as before; these three are its unique id, until the
      topic is deleted and made again.
    - If the producer has sent it twice, the offset differs. Then only an id in the event itself helps.

    Be quick: after five minutes (max.poll.interval.ms) another consumer gets our partitions, and these events too.
    """
    line = text(message.value())
    if run.args.verbose:
        _, timestamp = message.timestamp()  # In milliseconds since 1970, UTC.
        place = f"partition={message.partition()} offset={message.offset()} timestamp={timestamp}"
        line = f"{place} key={text(message.key())} {line}"
    write_out(line)


def text(data):
    r"""Returns bytes as text, with \xff and the like for what is not UTF-8; None as null."""
    return "null" if data is None else data.decode(errors="backslashreplace")


# We hear of trouble in three ways:
# - A broker can't be reached: error_cb, or the logger. The library connects again by itself; we only tell.
# - poll() returns one of these errors. It may pass by itself, so we tell, and go on.
# - poll() returns any other error, such as a missing permission. Waiting seldom helps, so we end the program.
PASSING_ERRORS = {
    KafkaError.UNKNOWN_TOPIC_OR_PART,  # The topic does not exist yet.
    KafkaError._MAX_POLL_EXCEEDED,  # process() took longer than five minutes. The library joins the group again.
}


class Run:
    """Tells what the library and the system report, and knows when to stop."""

    def __init__(self, args):
        self.args = args
        self.progress = Progress(self)  # For --exit: which partitions are read to their end.
        self.stopped = False
        self.commit_failed = False
        self.exit_status = 0

    def handle_error(self, consumer, message):
        """poll() has returned something that is no event. Ends the program if waiting can't help."""
        error = message.error()
        if error.code() == KafkaError._PARTITION_EOF:  # Not a problem: the end of a partition. Only with --exit.
            self.progress.reached_end(consumer, message)
        elif error.code() in PASSING_ERRORS:
            tell(error.str())
        else:
            fail(f"can't read topic {self.args.topic}: {error.str()}")

    # The next four methods only tell what has happened: the library itself assigns, revokes and commits. Its thread
    # may commit while process() runs; but it calls these methods only while we are in poll() or close().

    def on_assign(self, consumer, partitions):
        """A rebalance gives us partitions, perhaps none. The library begins at their committed offsets."""
        tell_partitions("Got partitions", partitions)
        self.progress.forget(partitions)
        # If a commit has failed before: everybody begins at the last one that has succeeded, so nothing is left to do.
        self.commit_failed = False

    def on_revoke(self, consumer, partitions):
        """A rebalance, or close(), takes partitions away. When this returns, the library commits: step 4."""
        tell_partitions("Gave up partitions", partitions)
        self.progress.forget(partitions)

    def on_lost(self, consumer, partitions):
        """Called instead of on_revoke() when Kafka took the partitions without asking, because we seemed to be dead.

        The usual reasons:
        - It has not heard from us for 45 seconds. A thread of the library sends a heartbeat every few seconds, unless
          the computer was asleep, for example.
        - We have not called poll() for five minutes.
        Others may be reading these partitions already, so it is too late to commit.
        """
        tell("Lost the partitions. Events since the last commit may come again.")
        self.progress.forget(partitions)

    def on_commit(self, error, partitions):
        """Called after each commit. If one fails, the next makes up for it. If the last one fails, we exit with 1."""
        if error and not self.commit_failed:  # Told once, until a commit succeeds.
            tell(f"Can't commit offsets, so these events may come again: {error.str()}")
        self.commit_failed = error is not None

    def on_signal(self, number, frame):
        """Called on Ctrl-C and SIGTERM. A second one ends the program at once."""
        handle_signals(signal.SIG_DFL)
        self.stopped = True
        # Without these two options Ctrl-C is the usual end, so the status stays 0.
        if self.args.exit or self.args.max_messages < sys.maxsize:
            self.exit_status = 128 + number


# End of the lesson. ---------------------------------------------------------------------------------------------------


class Progress:
    """Knows which partitions are read to their end, for --exit, and tells if we wait for something but events."""

    def __init__(self, run):
        self.run = run
        self.at_end = set()  # TopicPartitions. Two are equal if topic and partition are.
        self.empty_polls = 0  # How often poll() had nothing since anything changed here; 20 take ten seconds.

    def forget(self, partitions):
        """These partitions came or went. If they come again, we may have to read events of them once more."""
        self.at_end -= set(partitions)
        self.empty_polls = 0

    def reached_end(self, consumer, message):
        """A partition is read to its end."""
        self.at_end.add(TopicPartition(message.topic(), message.partition()))
        self.empty_polls = 0
        self.stop_if_done(set(consumer.assignment()))

    def stop_if_done(self, ours):
        """Stops if all of our partitions, a set of TopicPartitions, are read to their end. Only with --exit any is."""
        if ours and ours <= self.at_end:
            self.run.stopped = True

    def check(self, consumer):
        """poll() had nothing for half a second. Tells if we wait for something but events."""
        ours = set(consumer.assignment())
        self.stop_if_done(ours)
        self.empty_polls += 1
        if not ours and self.empty_polls == 20:
            tell("Waiting for partitions. Other members of the group may have them all, or there is no topic yet.")
            tell("If a member was killed, Kafka waits up to 45 seconds for it.")
        if not ours and self.empty_polls == 120 and self.run.args.exit:
            fail("no partitions for 60 seconds; other members of the group may have them all")
        if self.run.args.exit and self.empty_polls % 20 == 0:  # The library waits for a leader without a word.
            unread = ours - self.at_end
            tell_partitions("Waiting for the end of these partitions, which are slow or have no leader", unread)


class Trouble:
    """Tells when the connection is bad, and what the library logs."""

    def __init__(self):
        self.silent_until = 0

    def on_connection_error(self, error):
        hint = "" if error.code() == KafkaError._AUTHENTICATION else HINT
        self.no_connection(f"Can't connect: {error.str()}{hint}")

    def no_connection(self, line):
        """Tells, at most every ten seconds, that a connection has failed. The library tries again all the time."""
        if time.monotonic() > self.silent_until:
            self.silent_until = time.monotonic() + 10
            tell(line)

    def log(self, level, template, facility, client, entry):
        """The library logs something, as if to a logging.Logger. Most of it is also reported elsewhere.

        FAIL, REQTMOUT: a broker does not answer, or (APIVERSION) does not understand us. BROKER: an address is none.
        OFFSET: unread events were deleted. SESSTMOUT: why partitions were lost. CONFWARN: about settings; those that
        "will be ignored" are for producers, in a --config file for both.
        """
        line = entry.split("]: ", 1)[-1]  # Without the name of the thread.
        if level == logging.DEBUG:  # With debug=... in a --config file.
            tell(template % (facility, client, entry))
        elif facility == "REQTMOUT":
            self.no_connection(f"No answer: {line}")
        elif facility == "FAIL" and (level == logging.WARNING or "in state APIVERSION" in line):
            self.no_connection(f"Can't connect: {line}{HINT}")
        elif facility == "CONFWARN" and "will be ignored" in line:
            return
        elif facility in ("BROKER", "OFFSET", "SESSTMOUT", "CONFWARN"):
            tell(line)


MORE_SETTINGS = {
    "broker.address.family": "v4",  # localhost may be an IPv6 address too, but Docker publishes the broker on IPv4.
    "socket.connection.setup.timeout.ms": 10_000,  # If a broker does not let us in for so long, say so and try again.
    "socket.timeout.ms": 30_000,  # If a broker does not answer for 30 seconds, connect anew and ask again.
    "fetch.queue.backoff.ms": 10,  # With 100,000 events or 64 MB read ahead, pause for 10 ms. The usual second is slow.
}
FIXED = {"enable.auto.offset.store", "enable.auto.commit", "enable.partition.eof"}  # What --config can't change.
NAME = os.path.basename(sys.argv[0])  # Errors begin with it.
HINT = (
    "\nIs Kafka running (docker compose up -d --wait)? "
    "If so, check advertised.listeners, security.protocol and, with TLS, the host name."
)
# What could break a line or steer a terminal: control characters, line separators, changes of text direction.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def tell(line):
    """Writes a line about the run to standard error. Standard output is for events alone."""
    with contextlib.suppress(OSError):  # Nobody reads it any more.
        print(line, file=sys.stderr)


def fail(why, status=1):
    """Ends the program. Tells why (a text or an exception) at once, since the finally block in main() may take long."""
    if isinstance(why, KafkaException):
        why = why.args[0].str().strip()
    tell(f"{NAME}: {why}")
    sys.exit(status)


def tell_partitions(what, partitions):
    if partitions:
        tell(f"{what}: {', '.join(str(each.partition) for each in partitions)}")


def write_out(line):
    r"""Writes text as one line to standard output, at once, with \n, \x1b and the like for what is unsafe; or fails.

    That is safe if it is a terminal or a file. What is in a pipe is lost if the program that reads it ends.
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


def wait_for_kafka(consumer, run):
    """Prints which topics there are. Ends the program if there is no answer, or no topic where there must be one."""
    topic = run.args.topic
    must_exist = run.args.exit or run.args.from_offset is not None  # Otherwise we wait until somebody makes it.
    for seconds in (1, 2, 4, 8, 15):  # Some clusters need more time. The first tries are short, to tell errors soon.
        begun = time.monotonic()
        message = consumer.poll(0)  # Calls error_cb if there was an error.
        if message is not None:
            run.handle_error(consumer, message)
        with contextlib.suppress(KafkaException):  # No answer in time.
            for _ in range(10):  # A broker that has just started may not know the topic yet.
                names = sorted(consumer.list_topics(timeout=seconds).topics)
                # This also makes the library watch for a topic that does not exist yet.
                error = consumer.list_topics(topic, timeout=seconds).topics[topic].error
                if error is None or not must_exist:
                    tell(f"Available topics to consume: {', '.join(names) or 'none yet'}")
                    return
                time.sleep(1)
            fail(f"can't read topic {topic}: {error.str()}")
        time.sleep(max(0, begun + seconds - time.monotonic()))  # A try may also fail at once.
    fail("no answer from Kafka for 30 seconds")


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
    """Returns the key=value lines of a file as a dict. Skips empty lines and # comments."""
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
    """Returns what assign_partitions() takes."""
    words = {"beginning": 0, "end": sys.maxsize}
    return words[given] if given in words else int(given)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Prints the events of a Kafka topic, one per line, and goes on where its consumer group left off.",
        epilog="Exit status: 0 done, 1 failed, 2 wrong call, 130 or 143 ended by a signal before it was done.",
    )
    add = parser.add_argument
    add("-b", "--bootstrap-servers", metavar="HOST:PORT,...", help="brokers to ask first (default: localhost:9092)")
    add("-t", "--topic", default="user-tracker", help="topic to read (default: %(default)s)")
    add("-G", "--group", help=f"consumer group to read as (default: {SETTINGS['group.id']})")
    add("-F", "--config", type=properties, default={}, metavar="FILE", help="librdkafka properties, key=value lines")
    add("-o", "--from-offset", type=offset, help="for each partition: N, -N (before its end), beginning, end")
    add("-c", "--max-messages", type=int, default=sys.maxsize, metavar="N", help="end after so many events")
    add("-e", "--exit", action="store_true", help="end when everything is read (default: wait for more)")
    add("-v", "--verbose", action="store_true", help="partition, offset, timestamp and key before each event")
    args = parser.parse_args()
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", args.topic):
        parser.error(f"{args.topic!r} is no topic: names have up to 249 letters, digits, dots, underscores, hyphens")
    if "" in (args.bootstrap_servers, args.group) or args.max_messages < 0:
        parser.error("--bootstrap-servers and --group may not be empty, --max-messages not negative")
    for key in FIXED & args.config.keys():
        parser.error(f"--config can't change {key}")
    if args.bootstrap_servers:
        args.config.pop("metadata.broker.list", None)  # Another name for the same.
        args.config["bootstrap.servers"] = args.bootstrap_servers
    if args.group:
        args.config["group.id"] = args.group
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # While there is nothing to lose, Ctrl-C ends the program at once.
    if None in (sys.stdout, sys.stderr):  # Otherwise os.write(1) could write into a connection.
        sys.exit(f"{NAME}: standard output or standard error is closed")
    main()
