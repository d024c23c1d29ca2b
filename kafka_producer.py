"""Writes fake user registrations to a Kafka topic, and reports what became of each one.

Read down to the line "End of the lesson". Below it are error messages and the options of the command line.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import pathlib
import re
import signal
import sys
import time

from confluent_kafka import KafkaError, KafkaException, Producer
from faker import Factory

# A broker is a Kafka server, and a cluster is one or more of them. Brokers store events and hand them out.
# The library calls an event a message.
# A topic is a named log of events: new ones are appended, and reading does not remove them.
# A partition is a part of a topic, and keeps its events in order. Several brokers may have copies of it, its replicas.
# One of these is the leader: it takes the events, and the others copy them from it. If the leader's broker fails,
# another replica becomes the leader.
# An offset is the position of an event in its partition: 0, 1, 2 and so on.
# A key determines the partition: events with the same key go to the same one, as long as the topic keeps its number of
# partitions, and so they stay in order.

# What happens to an event:
# 1. produce() puts it into a queue in memory, and returns at once. It stays there until step 4, even after it is sent.
# 2. A thread of the library sends it to the leader, together with others. If no answer comes, or a temporary error, it
#    sends the event again, for up to two minutes.
# 3. The thread makes a delivery report, one of two:
#    - Delivered: the leader has confirmed the event.
#    - Failed: the leader has refused it, or has not answered. Without an answer nobody knows whether it is stored.
# 4. We call poll(). For each report that is ready it calls on_delivery(), and removes the event from the queue.
# Without poll() the queue fills up. So we call it after each produce(), and wait in it, not in sleep(). At the end
# flush() does the same until the queue is empty.

# Properties of librdkafka, the library inside confluent-kafka. A --config file can change most of them and add others.
SETTINGS = {
    "bootstrap.servers": "localhost:9092",  # The brokers to ask first; they name the rest.
    "acks": "all",  # The leader confirms an event when all replicas that are up to date have it.
    # An event may be stored, and its confirmation lost. Then the library sends the event again. With True it numbers
    # its events, so that the leader recognizes the copy and drops it. (Idempotent: twice has the same effect as once.)
    "enable.idempotence": True,
    # How many requests may wait for an answer from each broker. A request carries many events, so one is nearly always
    # fast enough. With more, a bug makes some events fail when the leader changes (librdkafka issue 4953).
    "max.in.flight.requests.per.connection": 1,
    "delivery.timeout.ms": 120_000,  # An event that is not confirmed within two minutes has failed.
    "partitioner": "murmur2_random",  # Chooses the partition by the key, as Java programs do; without a key, at random.
}  # MORE_SETTINGS, below the lesson, are for networks.
# When this many events are in the queue (len(producer)), we wait for reports before we make more. If the program is
# killed, they may be lost. (The queue also has room for 1 GB at most. Beyond that produce() raises BufferError.)
MAX_UNCONFIRMED = 1_000


def main():
    args = parse_arguments()
    run = Run(args.log_file)  # Our output, a count of deliveries, and run.stopped: true after a failure or Ctrl-C.
    trouble = Trouble(run)  # Prints problems that may pass, such as a lost connection.
    callbacks = {  # What the library calls while we are in poll() or flush().
        "error_cb": trouble.on_error,  # When a connection has failed.
        "stats_cb": trouble.on_statistics,  # Every five seconds, with statistics. It tells if nothing gets through.
        "logger": trouble,  # An object, not a function: the library calls its method log() for each line that it logs.
    }
    with refusals_told():  # If the library refuses a setting, that ends the program.
        # args.settings: MORE_SETTINGS, --config and other options. Of two values for one setting the later one wins.
        producer = Producer(SETTINGS | args.settings | callbacks)
    find_topic(producer, args.topic)  # Waits until it exists, or ends the program.
    stop_on_signals(run)  # From here on Ctrl-C only ends the loop.
    run.write("Kafka Producer has been initiated...", sys.stdout)

    fake = Factory.create(use_weighting=False)  # Four times as fast as Faker().
    fake.seed_instance(args.seed)  # With --seed it makes the same people each time.
    report = Report(run, args.quiet)  # report.on_delivery() gets the delivery reports.
    start = time.monotonic()
    made = 0
    # Three things can fail, and each sets run.stopped:
    # - produce() raises: it has refused this event (too large, for example), and no report will come.
    # - poll() raises: a fatal error, after which the library sends nothing more.
    # - on_delivery() gets a report of failure.
    try:
        while made < args.count:  # With --count 0 that is infinite.
            wait_for_turn(producer, run, start + made * args.interval)  # Waits in poll(): step 4.
            if run.stopped:
                break
            event = registration(fake)
            if event is None:  # There are no more.
                break
            key = str(event["user_id"])
            value = json.dumps(event)  # Text, which produce() encodes in UTF-8.
            made += 1  # Before produce(), so that an event that it refuses is counted too.
            try:
                producer.produce(args.topic, key=key, value=value, on_delivery=report.on_delivery)  # Step 1.
            except (KafkaException, BufferError) as error:
                run.fail(error, args.topic, value)
                break
            producer.poll(0)  # Step 4, without waiting. (wait_for_turn() calls poll() only if it has to wait.)
    except KafkaException as error:  # From poll().
        run.fail(error, args.topic)
    finally:
        flush_all(producer, run, args.topic)  # Events that still have no report could be lost if we ended now.
        failed = made - run.delivered
        run.write(f"Delivered {run.delivered} events to topic {args.topic}, {failed} failed.", sys.stdout)
    sys.exit(run.exit_status)


def wait_for_turn(producer, run, due):
    """Waits until it is time for the next event, and there is room for it in the queue; or until a failure or Ctrl-C.

    due: when it is time, on the clock of time.monotonic().
    """
    left = due - time.monotonic()
    while left > 0 and not run.stopped:
        producer.poll(min(left, 0.1))  # Waits for reports, but for 100 ms at most, so that we notice Ctrl-C.
        left = due - time.monotonic()
    while len(producer) >= MAX_UNCONFIRMED and not run.stopped:
        producer.poll(0.1)  # Reports make room.


def registration(fake):
    """Returns one event as a dict, or None if there are no more.

    For data of your own replace this function, and if they have no user_id, also the line "key = ..." in main(). For
    events without a key remove that line, and key=key from the call of produce(); they go to random partitions.
    With --count 0 and --interval 0 it is called without limit and pause, until it returns None.
    While it waits for data, no reports are passed on, and Ctrl-C has to wait too. So it should never wait for long.
    """
    return {
        "user_id": fake.random_int(20000, 100000),
        "user_name": fake.name(),
        "user_address": f"{fake.street_address()} | {fake.city()} | {fake.country_code()}",
        "platform": fake.random_element(("Mobile", "Laptop", "Tablet")),
        "signup_at": str(fake.date_time_this_month()),
    }


class Report:
    """What became of the events."""

    def __init__(self, run, quiet):
        self.run = run
        self.quiet = quiet
        self.has_failed = False

    def on_delivery(self, error, message):
        """Called in poll() with the delivery report of an event: where it is stored, or why it failed."""
        value = message.value() or b""  # None in an event without a value.
        what = f"topic {message.topic()} with value of {value.decode(errors='backslashreplace')}"
        if error is None:
            self.run.delivered += 1
            # The offset is None if the leader only says that it already has the event (see enable.idempotence).
            place = f"partition {message.partition()}, offset {message.offset()}"
            line = f"Produced message on {what}, {place}"
            self.run.log(line)
            if not self.quiet:
                self.run.write(line, sys.stdout)
        else:
            # Perhaps it is stored. If you passed it to produce() again, it would be a new event for Kafka, and could be
            # there twice. Look into the topic first.
            line = f"Failed to deliver to {what}: {error.str()}"
            self.run.log(line)
            if not self.has_failed:  # On the terminal the first one is enough.
                self.has_failed = True
                self.run.write(line, sys.stderr)
            # Ends the loop in main(), since the next events would most likely fail too. The library still sends those
            # in the queue.
            self.run.stop(exit_status=1)


def flush_all(producer, run, topic):
    """Waits until each event has its delivery report: two minutes at most (delivery.timeout.ms).

    After Ctrl-C we wait for five seconds: run.give_up_at, which is infinite before.
    """
    while len(producer) > 0:  # Some reports have not been passed on.
        if time.monotonic() > run.give_up_at:
            producer.purge()  # Gives up: each event left gets a report of failure, though it may be stored.
        try:
            producer.flush(0.1)  # Passes reports on, for 100 ms at most, so that we notice Ctrl-C.
        except KafkaException as error:  # A fatal error: nothing more is sent, but reports still come.
            run.fail(error, topic)


# End of the lesson. ---------------------------------------------------------------------------------------------------

MORE_SETTINGS = {
    "broker.address.family": "v4",  # localhost may be an IPv6 address too, but Docker publishes the broker on IPv4.
    "statistics.interval.ms": 5_000,  # How often Trouble.on_statistics() is called.
    "socket.connection.setup.timeout.ms": 10_000,  # If a broker does not let us in for so long, say so and try again.
    # If a broker does not answer for 40 seconds, connect anew and ask again. If replicas are slow, it answers after 30.
    "socket.timeout.ms": 40_000,
    # A broker that has just started may deny that a topic exists (librdkafka issue 4401). For 33 minutes this makes the
    # library ignore that; later, such an answer makes events fail. From 36 minutes on, its arithmetic overflows.
    "topic.metadata.propagation.max.ms": 2_000_000,
}
# What --config can't change. With the last one on_delivery() would not hear of what is delivered.
FIXED = {
    "queue.buffering.max.messages",
    "queue.buffering.max.kbytes",
    "statistics.interval.ms",
    "delivery.report.only.error",
}
NAME = os.path.basename(sys.argv[0])  # Errors begin with it.
HINT = (
    "Is Kafka running (docker compose up -d --wait)? If this is not the address that you gave, "
    "check advertised.listeners; with TLS, check the host name."
)


class Run:
    """Writes to the log file and to the terminal, and knows whether to go on.

    delivered: how many events the broker has confirmed.
    exit_status: 0, until something ends the sending.
    give_up_at: when to wait no longer for delivery reports, in the time of time.monotonic().
    """

    def __init__(self, log_file):
        with refusals_told():
            self.log_file = open(log_file, "ab")
        self.broken = set()  # Files that could not be written to. They are left alone from then on.
        self.delivered = 0
        self.exit_status = 0
        self.give_up_at = math.inf

    @property
    def stopped(self):
        return self.exit_status != 0

    def stop(self, exit_status):
        """Ends the sending. Of several exit statuses the first one counts."""
        self.exit_status = self.exit_status or exit_status

    def fail(self, error, topic, value=None):
        """Ends the sending because of an exception of the library. value: that of the event that it has refused."""
        self.stop(exit_status=1)
        line = f"{NAME}: can't write to topic {topic}: {reason(error)}"
        self.log(line if value is None else f"{line}, with value of {value}")
        self.write(line, sys.stderr)

    def log(self, line):
        """Writes a line with date and time to the log file."""
        self.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", self.log_file)

    def write(self, line, file):
        """Writes a line at once, in UTF-8. If that is not possible, it is told on stderr and ends the sending."""
        if file in self.broken:
            return
        rest = f"{line}\n".encode(errors="backslashreplace")
        try:
            while rest:
                written = os.write(file.fileno(), rest)  # Faster than print(flush=True), but may write only a part.
                rest = rest[written:]
        except OSError as error:
            self.broken.add(file)
            self.stop(exit_status=1)
            name = "standard output" if file is sys.stdout else file.name
            self.write(f"{NAME}: can't write to {name}: {error.strerror}", sys.stderr)


class Trouble:
    """Prints what goes wrong and is no reason to stop."""

    def __init__(self, run):
        self.run = run
        self.silent_until = 0
        self.has_waited = False
        self.delivered_before = 0

    def on_error(self, error):
        """A connection has failed. The library tries again."""
        hint = "" if error.code() == KafkaError._AUTHENTICATION else f"\n{HINT}"
        self.no_connection(f"{error.str()}{hint}")

    def no_connection(self, why):
        """Printed at most every ten seconds."""
        if time.monotonic() > self.silent_until:
            self.silent_until = time.monotonic() + 10
            self.run.write(f"Can't connect: {why}", sys.stderr)

    def on_statistics(self, text):
        """Tells if events waited last time, wait now, and none was confirmed in between."""
        unconfirmed = json.loads(text)["msg_cnt"]
        if unconfirmed and self.has_waited and self.run.delivered == self.delivered_before:
            why = "perhaps no broker answers, or too few replicas are up to date"
            self.run.write(f"Waiting for the delivery reports of {unconfirmed} events: {why}.", sys.stderr)
        self.has_waited = unconfirmed > 0
        self.delivered_before = self.run.delivered

    def log(self, level, template, facility, client, entry):
        """The library logs something, as if to a logging.Logger. Most of it is also reported elsewhere.

        Settings that "will be ignored" are those for consumers, in a --config file for both scripts.
        """
        line = entry.split("]: ", 1)[-1]  # Without the name of the thread.
        if level == logging.DEBUG:
            self.run.write(template % (facility, client, entry), sys.stderr)
        elif level == logging.WARNING and facility in ("FAIL", "REQTMOUT"):  # A broker does not answer.
            self.no_connection(f"{line}\n{HINT}")
        elif facility == "CONFWARN" and "will be ignored" not in entry:
            self.run.write(line, sys.stderr)


def reason(error):
    """Returns in words why an exception was raised."""
    return error.args[0].str().strip() if isinstance(error, KafkaException) else str(error)


@contextlib.contextmanager
def refusals_told():
    """Ends the program if the log file or a setting is refused in the with block."""
    try:
        yield
    except Exception as error:  # For settings the library has four types of exceptions.
        print(f"{NAME}: {reason(error)}", file=sys.stderr)
        sys.exit(2)


def find_topic(producer, topic):
    """Returns when the topic is there; many clusters create it on request. Otherwise ends the program."""
    for seconds in (1, 2, 4, 8, 15):  # Some clusters need more time. The first tries are short, to tell errors soon.
        try:
            producer.poll(0)  # Calls error_cb if there was an error.
            error = producer.list_topics(topic, timeout=seconds).topics[topic].error
            if error is None:
                return
            problem = f"can't write to topic {topic}: {error.str()}"
            time.sleep(2)  # The topic may be about to be created.
        except KafkaException as error:
            problem = "no answer from Kafka for 30 seconds"
            if error.args[0].fatal():  # For example, the right to be an idempotent producer is missing.
                problem = f"can't write to topic {topic}: {reason(error)}"
                break
    sys.exit(f"{NAME}: {problem}")


def stop_on_signals(run):
    """Makes Ctrl-C and SIGTERM end the sending. A second one ends the program at once."""

    def on_signal(number, _):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        run.stop(exit_status=128 + number)
        run.give_up_at = time.monotonic() + 5

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


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


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Writes fake user registrations to a Kafka topic, and reports what became of each one.",
        epilog="Exit status: 0 all delivered, 1 something failed, 2 wrong call, 130 or 143 ended by Ctrl-C or SIGTERM.",
    )
    add = parser.add_argument
    add("-b", "--bootstrap-servers", metavar="HOST:PORT,...", help="brokers to ask first (default: localhost:9092)")
    add("-t", "--topic", default="user-tracker", help="topic to write to (default: %(default)s)")
    add("-c", "--count", type=int, default=10, help="how many events; 0: without end (default: %(default)s)")
    add("-i", "--interval", type=float, default=1, help="average seconds from event to event (default: %(default)s)")
    add("-F", "--config", type=properties, default={}, metavar="FILE", help="librdkafka properties, key=value lines")
    add("--log-file", default="producer.log", metavar="FILE", help="file to append to (default: %(default)s)")
    add("--seed", type=int, help="make the same people each time (default: others each time)")
    add("-q", "--quiet", action="store_true", help="don't print each event; the log file still has them")
    args = parser.parse_args()
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", args.topic):
        parser.error(f"{args.topic!r} is no topic: names have up to 249 letters, digits, dots, underscores, hyphens")
    if args.bootstrap_servers == "":
        parser.error("--bootstrap-servers may not be empty")
    if args.count < 0 or not 0 <= args.interval < math.inf:
        parser.error(f"neither --count {args.count} nor --interval {args.interval} may be negative or infinite")
    args.count = args.count or math.inf
    for key in FIXED & args.config.keys():
        parser.error(f"--config can't change {key}")
    args.settings = MORE_SETTINGS | args.config
    if args.bootstrap_servers:
        args.settings.pop("metadata.broker.list", None)  # Another name for the same.
        args.settings["bootstrap.servers"] = args.bootstrap_servers
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # While there is nothing to lose, Ctrl-C ends the program at once.
    if None in (sys.stdout, sys.stderr):
        sys.exit(f"{NAME}: standard output or standard error is closed")
    main()
