"""Writes fake user registrations to a Kafka topic, and reports what became of each one.

Read down to the line "End of the lesson". Below it are error messages and the options of the command line.
"""

import argparse
import itertools
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

# An event has a value, which is its content, and perhaps a key; both are bytes. The library calls it a message.
# A broker is a Kafka server. It stores events. One or more brokers are a cluster.
# A topic is a named log of events: new ones are appended, and reading does not remove them.
# A partition is a part of a topic, and keeps its events in order. The key of an event determines its partition: events
# with the same key go to the same one, as long as the topic keeps its number of partitions.
# An offset is the position of an event in its partition: 0, 1, 2 and so on.

# What happens to an event:
# 1. produce() puts it into a queue in memory, and returns at once. The library now has two minutes for it.
# 2. A thread of the library sends it to the broker that has its partition, together with others. It keeps the event in
#    the queue: if no answer comes, or a temporary error, it sends the event again, until the two minutes are over.
# 3. The thread makes a delivery report, one of two:
#    - Delivered: the broker has confirmed the event.
#    - Failed: the broker has refused the event; or no confirmation has come in two minutes, and nobody knows whether
#      the event is stored.
# 4. We call poll(). For each report that is ready it calls on_delivery(), and removes the event from the queue.
# Without poll() the queue fills up. So the core of this program is:
#     for event in events:
#         producer.produce(topic, value=..., on_delivery=...)   # Step 1.
#         producer.poll(0)                                      # Step 4 for earlier events.
#     producer.flush()                                          # Step 4, until the queue is empty.
# The rest is about waiting for the next event, a queue that is full, Ctrl-C and errors.

# Properties of librdkafka, the library inside confluent-kafka. A --config file can change most of them and add others.
SETTINGS = {
    "bootstrap.servers": "localhost:9092",  # The brokers to ask first; they name the rest.
    # Kafka can keep copies of a partition on several brokers, its replicas. With "all", an event is confirmed when each
    # replica that is up to date has it.
    "acks": "all",
    # If an event is stored, and only its confirmation is lost, the library sends it again. With True it numbers its
    # events, so that the broker recognizes the copy and drops it. (Idempotent: twice has the same effect as once.)
    "enable.idempotence": True,
    # How many requests, each with many events, may be on the way to one broker at once. With more than one, events may
    # fail or be stored twice when another broker takes a partition over: a bug of the library (librdkafka issue 4953).
    "max.in.flight.requests.per.connection": 1,
    "delivery.timeout.ms": 120_000,  # The two minutes.
    "partitioner": "murmur2_random",  # Java programs find the same partition for a key. Without a key it takes any.
}  # MORE_SETTINGS, below the lesson, are for networks, and for brokers that have just started.
# When this many events are in the queue, we wait. If we are killed, they may be lost. If the brokers are far away, a
# higher number is faster. (The library's own limit is 100,000 events or 1 GB; beyond it produce() raises BufferError.)
MAX_UNCONFIRMED = 1_000


def main():
    args = parse_arguments()
    try:
        run = Run(args)  # Knows what is delivered, and whether to stop.
        trouble = Trouble(run)  # Tells when the connection is bad.
        producer = Producer(
            SETTINGS | MORE_SETTINGS | args.config,  # Of two values for one setting the later one wins.
            # What the library calls in poll() and flush(), besides on_delivery(), which is given to produce():
            error_cb=trouble.on_connection_error,  # When a connection has failed.
            stats_cb=trouble.on_statistics,  # Every five seconds, to tell if nothing gets through.
            logger=trouble,  # An object, not a function: its method log() gets each line that the library logs.
        )
    except Exception as error:  # The log file can't be opened, or the library refuses a setting.
        print(f"{NAME}: {reason(error)}", file=sys.stderr)
        sys.exit(2)
    find_topic(producer, args.topic)  # Waits until it exists, or ends the program.
    signal.signal(signal.SIGINT, run.on_signal)  # From here on Ctrl-C and SIGTERM only set run.stopped.
    signal.signal(signal.SIGTERM, run.on_signal)
    write("Kafka Producer has been initiated...", sys.stdout, run)

    made = 0
    try:
        for event in registrations(args):
            if event is None:  # There is none yet.
                producer.poll(0.01)  # Step 4. Waits for a report, for 10 ms at most.
            else:
                key = str(event["user_id"])
                value = json.dumps(event)  # Text, which produce() encodes in UTF-8.
                made += 1
                try:
                    producer.produce(args.topic, key=key, value=value, on_delivery=run.on_delivery)  # Step 1.
                except (KafkaException, BufferError) as error:  # Too large, for example. No report will come.
                    run.note_failure(f"Failed to deliver to topic {args.topic}: {reason(error)}. Value: {value}")
                producer.poll(0)  # Step 4 for earlier events, without waiting.
                wait_for_room(producer, run)
            if run.stopped:  # By Ctrl-C, or by the first failure.
                break
    except KafkaException as error:  # From poll(): a fatal error, such as a missing permission. Nothing more is sent.
        run.note_failure(f"{NAME}: can't write to topic {args.topic}: {reason(error)}", always_print=True)
    finally:  # However the loop has ended, also if registrations() has raised an exception.
        flush_all(producer, run)  # Events that still have no report could be lost if we ended now.
        failed = made - run.delivered
        write(f"Delivered {run.delivered} events to topic {args.topic}, {failed} failed.", sys.stdout, run)
        if failed:
            hint = "If not refused, they may be in the topic all the same. Look there before you send them again."
            write(hint, sys.stderr, run)
    sys.exit(run.exit_status)


def registrations(args):
    """Yields events, each a dict, and None while there is none yet.

    For data of your own replace this function, and if they have no user_id, also the line "key = ..." in main(). Events
    without a key (key=None) go to random partitions.
    While this waits, no reports are passed on, and Ctrl-C has to wait too. So wait for data no longer than a tenth of a
    second, and then yield None. README.md shows how.
    """
    fake = Factory.create(use_weighting=False)  # Four times as fast as Faker().
    fake.seed_instance(args.seed)  # With --seed it makes the same people each time.
    start = time.monotonic()
    numbers = itertools.count() if args.count == 0 else range(args.count)
    for number in numbers:
        while time.monotonic() < start + number * args.interval:  # It is too early for this one.
            yield None  # main() polls for 10 ms, and asks again.
        yield {
            "user_id": fake.random_int(20000, 100000),
            "user_name": fake.name(),
            "user_address": f"{fake.street_address()} | {fake.city()} | {fake.country_code()}",
            "platform": fake.random_element(("Mobile", "Laptop", "Tablet")),
            "signup_at": str(fake.date_time_this_month()),
        }


def wait_for_room(producer, run):
    """Repeats step 4 while the queue is full. len(producer): how many events are in it."""
    while len(producer) >= MAX_UNCONFIRMED and not run.stopped:
        producer.poll(0.01)


class Run:
    """Knows what became of the events, and whether to go on."""

    def __init__(self, args):
        self.args = args
        self.log_file = open(args.log_file, "a", encoding="utf-8")
        self.delivered = 0  # How many events the brokers have confirmed.
        self.has_failed = False
        self.stopped = False
        self.interrupted = False
        self.exit_status = 0

    def on_delivery(self, error, message):
        """Called in poll() and flush() with the delivery report of an event: where it is stored, or why it failed."""
        topic = message.topic()
        value = (message.value() or b"").decode(errors="backslashreplace")  # None in an event without a value.
        if error is None:
            self.delivered += 1
            place = f"partition {message.partition()}, offset {message.offset()}"
            line = f"Produced message on topic {topic} with value of {value}, {place}"
            write_log(line, self)
            if not self.args.quiet:
                write(line, sys.stdout, self)
        else:
            # Perhaps it is stored. If you passed it to produce() again, it would be a new event for Kafka, and could be
            # there twice. Look into the topic first.
            self.note_failure(f"Failed to deliver to topic {topic}: {error.str()}. Value: {value}")

    def note_failure(self, line, always_print=False):
        """Ends the loop in main(), so that no new event is made. What is in the queue is still sent, if possible.

        Why not go on? What made this event fail would most likely make the next one fail too. And after a failure
        events may be stored twice, or in another order, so the fewer the better. README.md explains it, under "Producer
        and delivery report".
        """
        self.stopped = True
        self.exit_status = 1
        write_log(line, self)
        if always_print or not self.has_failed:  # On the terminal the first failure of an event is enough.
            self.has_failed = True
            write(line, sys.stderr, self)

    def on_signal(self, number, frame):
        """Called on Ctrl-C and SIGTERM. A second one ends the program at once."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.stopped = True
        self.interrupted = True
        if self.exit_status == 0:  # Not if there was a failure.
            self.exit_status = 128 + number


def flush_all(producer, run):
    """Waits until each event has its report, as producer.flush() does, but looks for Ctrl-C every 100 ms.

    Usually that is soon. Without a broker it takes two minutes at most (delivery.timeout.ms): then the library reports
    what is left as failed. After Ctrl-C we give up after five seconds.
    """
    give_up_at = None
    while len(producer) > 0:  # As long as events are in the queue.
        if run.interrupted and give_up_at is None:  # By Ctrl-C, before or just now.
            give_up_at = time.monotonic() + 5
        if give_up_at is not None and time.monotonic() > give_up_at:
            producer.purge()  # Empties the queue: each event gets a report of failure, though it may be stored.
        try:
            producer.flush(0.1)  # Step 4, for 100 ms.
        except Exception as error:  # A fatal error, or one raised in on_delivery(). The others still get their reports.
            run.note_failure(f"{NAME}: {reason(error)}")


# End of the lesson. ---------------------------------------------------------------------------------------------------

MORE_SETTINGS = {
    "broker.address.family": "v4",  # localhost may be an IPv6 address too, but Docker publishes the broker on IPv4.
    "statistics.interval.ms": 5_000,  # How often Trouble.on_statistics() is called.
    "socket.connection.setup.timeout.ms": 10_000,  # If a broker does not let us in for so long, say so and try again.
    # A broker that has just started may deny that a topic exists (librdkafka issue 4401). For 33 minutes this makes the
    # library ignore that; later, such an answer ends us, and a new start helps. From 36 minutes on, it would overflow.
    "topic.metadata.propagation.max.ms": 2_000_000,
}
# What --config can't change. With the first one on_delivery() would not hear of what is delivered; the last two have to
# have room for MAX_UNCONFIRMED events.
FIXED = {
    "delivery.report.only.error",
    "statistics.interval.ms",
    "queue.buffering.max.messages",
    "queue.buffering.max.kbytes",
}
NAME = os.path.basename(sys.argv[0])  # Errors begin with it.
HINT = (
    "\nIs Kafka running (docker compose up -d --wait)? "
    "If so, check advertised.listeners, security.protocol and, with TLS, the host name."
)


class Trouble:
    """Tells what goes wrong and may pass by itself."""

    def __init__(self, run):
        self.run = run
        self.silent_until = 0
        self.stuck_at = None

    def on_connection_error(self, error):
        hint = "" if error.code() == KafkaError._AUTHENTICATION else HINT
        self.no_connection(f"Can't connect: {error.str()}{hint}")

    def no_connection(self, line):
        """Tells, at most every ten seconds, that a connection has failed. The library tries again all the time."""
        if time.monotonic() > self.silent_until:
            self.silent_until = time.monotonic() + 10
            write(line, sys.stderr, self.run)

    def log(self, level, template, facility, client, entry):
        """The library logs something, as if to a logging.Logger. Most of it is also reported elsewhere.

        FAIL, REQTMOUT: a broker does not answer, or (APIVERSION) does not understand us. BROKER: an address is none.
        CONFWARN: about settings; those that "will be ignored" are for consumers, in a --config file for both.
        """
        line = entry.split("]: ", 1)[-1]  # Without the name of the thread.
        if level == logging.DEBUG:  # With debug=... in a --config file.
            write(template % (facility, client, entry), sys.stderr, self.run)
        elif facility == "REQTMOUT":
            self.no_connection(f"No answer: {line}")
        elif facility == "FAIL" and (level == logging.WARNING or "in state APIVERSION" in line):
            self.no_connection(f"Can't connect: {line}{HINT}")
        elif facility == "BROKER" or (facility == "CONFWARN" and "will be ignored" not in line):
            write(line, sys.stderr, self.run)

    def on_statistics(self, text):
        """Tells if events waited last time, wait now, and none was confirmed in between."""
        statistics = json.loads(text)
        if time.time() > statistics["time"] + 2:  # They are old: not the broker was slow, but we did not poll.
            return
        unconfirmed = statistics["msg_cnt"]
        if unconfirmed and self.stuck_at == self.run.delivered:
            why = "perhaps no broker answers, or too few replicas are up to date"
            write(f"Waiting for the delivery reports of {unconfirmed} events: {why}.", sys.stderr, self.run)
        self.stuck_at = self.run.delivered if unconfirmed else None


def write_log(line, run):
    """Writes a line with date and time to the log file."""
    write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", run.log_file, run)


def write(line, file, run):
    """Writes a line at once. If that fails, tells so, and ends the loop in main()."""
    try:
        print(line, file=file, flush=True)
    except OSError as error:
        silence(file)  # Python has kept the line, and would fail with it again.
        run.stopped = True
        run.exit_status = 1
        name = "standard output" if file is sys.stdout else file.name
        write(f"{NAME}: can't write to {name}: {error.strerror}", sys.stderr, run)


def silence(file):
    """Sends what is written to a file from now on to /dev/null."""
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), file.fileno())


def reason(error):
    """Returns in words why an exception was raised."""
    return error.args[0].str().strip() if isinstance(error, KafkaException) else str(error)


def find_topic(producer, topic):
    """Returns when the topic is there; many clusters create it on request. Otherwise ends the program."""
    for seconds in (1, 2, 4, 8, 15):  # Some clusters need more time. The first tries are short, to tell errors soon.
        begun = time.monotonic()
        try:
            producer.poll(0)  # Calls error_cb if there was an error.
            for _ in range(10):  # The topic may be about to be created.
                error = producer.list_topics(topic, timeout=seconds).topics[topic].error
                if error is None:
                    return
                time.sleep(1)
            sys.exit(f"{NAME}: can't write to topic {topic}: {error.str()}")
        except KafkaException as error:
            if error.args[0].fatal():  # For example, the right to be an idempotent producer is missing.
                sys.exit(f"{NAME}: can't write to topic {topic}: {reason(error)}")
        time.sleep(max(0, begun + seconds - time.monotonic()))  # A try may also fail at once.
    sys.exit(f"{NAME}: no answer from Kafka for 30 seconds")


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


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Writes fake user registrations to a Kafka topic, and reports what became of each one.",
        epilog="Exit status: 0 all delivered, 1 something failed, 2 wrong call, 130 or 143 ended by a signal.",
    )
    add = parser.add_argument
    add("-b", "--bootstrap-servers", metavar="HOST:PORT,...", help="brokers to ask first (default: localhost:9092)")
    add("-t", "--topic", default="user-tracker", help="topic to write to (default: %(default)s)")
    add("-c", "--count", type=int, default=10, help="how many events; 0: no limit (default: %(default)s)")
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
    for key in FIXED & args.config.keys():
        parser.error(f"--config can't change {key}")
    if args.bootstrap_servers:
        args.config.pop("metadata.broker.list", None)  # Another name for the same.
        args.config["bootstrap.servers"] = args.bootstrap_servers
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # While there is nothing to lose, Ctrl-C ends the program at once.
    main()
