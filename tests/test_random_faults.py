"""Faults of all kinds at random, and rolling restarts; then all is mended, and every event is counted.

    FAULT_SECONDS=240 FAULT_SEED=7 python -m pytest -m long -n 0 -s tests/test_random_faults.py

Without FAULT_SECONDS they have 120 and 100 seconds of faults. They print what they do, and when. pytest keeps
the folder of a failed test, which is printed too: logs of producers and cluster, and all that the scripts have printed.
"""

import itertools
import os
import re
import shutil
import time
from collections import Counter, defaultdict
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
from conftest import EXTERNAL, THREE_BROKERS, create_topic, new_cluster, wait_until
from faults import SEED, bring_back, order_of_people, person, random_moments, reports, stored
from local_cluster import is_taken

pytestmark = [
    pytest.mark.skipif(bool(EXTERNAL), reason="these tests break their cluster"),
    pytest.mark.long,
    pytest.mark.timeout(900),
]
FAULT_SECONDS = os.environ.get("FAULT_SECONDS")
PARTITIONS = 12
ROUND = 20  # Seconds of faults at random, until all is mended.
INTERVAL = 0.01  # Seconds from one event of a producer to the next.


@pytest.fixture
def cluster(tmp_path):
    with new_cluster(THREE_BROKERS) as cluster:
        yield cluster
        for service in cluster.services:
            shutil.copy(service.log, tmp_path)


@pytest.fixture
def tell(tmp_path):
    """tell(what): prints what is done, and when."""
    start = time.monotonic()
    print(f"0 s is {time.strftime('%H:%M:%S')}; logs and output are in {tmp_path}")
    return lambda what: print(f"{time.monotonic() - start:6.1f} s: {what}", flush=True)


@pytest.fixture
def clients(scripts, cluster, topic, group):
    create_topic(cluster, topic, PARTITIONS, replicas=3)
    return Clients(scripts, topic, group)


class Clients:
    """Endless producers and consumers of one topic: Scripts that also have `signum`, the signal that has ended them.

    A producer has a log of its own, `log`, and a `seed` of its own.
    """

    def __init__(self, scripts, topic, group):
        self.scripts, self.topic, self.group = scripts, topic, group
        self.producers, self.consumers = [], []

    def start_producer(self):
        number = len(self.producers)
        log, seed = f"producer-{number}.log", SEED + 1_000_000 * (number + 1)
        options = ("-t", self.topic, "-c", 0, "-i", INTERVAL, "-q", "--log-file", log, "--seed", seed)
        producer = self.scripts.producer(*options)
        producer.log, producer.seed = self.scripts.folder / log, seed
        producer.started, producer.signum = time.monotonic(), None
        self.producers.append(producer)

    def start_consumer(self):
        consumer = self.scripts.consumer("-t", self.topic, "-G", self.group)
        consumer.signum = None
        self.consumers.append(consumer)

    def running(self):
        """Those that were sent no signal."""
        return [client for client in (*self.producers, *self.consumers) if client.signum is None]

    def end(self, client, signum):
        """Sends a signal, and does not wait for the end: with a broker that hangs that takes long."""
        client.process.send_signal(signum)
        client.signum, client.ended = signum, time.monotonic()

    def wait_for_ends(self):
        for client in (*self.producers, *self.consumers):
            if client.signum:
                wait_until(lambda it=client: it.process.poll() is not None, f"the end of {client!r}", limit=120)


def is_at_work(client):
    """Has it said so? Until then a signal ends it at once."""
    return "initiated" in client.stdout if client.name == "producer" else "Got partitions" in client.stderr


def stop(service):
    """Begins to end a service cleanly; without ZooKeeper or the other brokers that takes long."""
    for processes in service.processes():
        service.send(SIGTERM, processes)


def mend(service):
    service.resume()
    if not service.is_running():
        service.kill()  # It may still be stopping.
        service.start()


def break_and_mend(cluster, clients, moments, seconds, tell):
    """Breaks or mends a service, or ends a client and starts another one, every second or two."""
    end = time.monotonic() + seconds
    broken = {}  # {service: when it is to be mended}
    while time.monotonic() < end:
        time.sleep(moments.uniform(0.5, 2))
        for service in [service for service, when in broken.items() if when < time.monotonic()]:
            mend(service)
            del broken[service]
            tell(f"{service.name} is back")
        # All are drawn each time, so that a seed gives the same ones, whichever are used.
        service, fault = moments.choice(cluster.services), moments.choice(("kill", "stop", "pause"))
        away, chance = moments.uniform(0.5, 8), moments.random()
        client, signum = moments.choice(clients.running()), moments.choice((SIGINT, SIGTERM, SIGKILL))
        if chance < 0.7 and service not in broken:
            {"kill": service.kill, "stop": lambda it=service: stop(it), "pause": service.pause}[fault]()
            broken[service] = time.monotonic() + away
            tell(f"{service.name}: {fault}, for {away:.1f} s")
        elif chance >= 0.7 and is_at_work(client):
            clients.end(client, signum)
            clients.start_producer() if client.name == "producer" else clients.start_consumer()
            tell(f"{client.stderr_file.stem}: {signum.name}, and another {client.name} started")
    for service in broken:
        mend(service)
    wait_for_health(cluster, clients, tell)


def restart_in_turn(cluster, moments, seconds, tell):
    """Stops one broker after the other and starts it again at once; the next one's turn is when its port is open.

    It then knows of no topic yet, and that is what it may answer.
    """
    end = time.monotonic() + seconds
    for broker in itertools.cycle(cluster.brokers):
        if time.monotonic() > end:
            return
        broker.stop()
        broker.start()
        tell(f"{broker.name} was stopped and is started")
        wait_until(lambda it=broker: is_taken(it.port), f"the port of {broker.name}", limit=60)
        time.sleep(moments.uniform(0, 2))


def wait_for_health(cluster, clients, tell):
    """Returns when all brokers answer, and each producer delivers."""
    bring_back(cluster)
    tell("all brokers answer")
    for client in clients.running():
        if client.name == "producer":
            size = size_of(client.log)
            # A broker that hung keeps it waiting for socket.timeout.ms; and some end by themselves, as finish() tells.
            wait_until(
                lambda it=client, old=size: size_of(it.log) > old or it.process.poll() is not None,
                f"an event of {client!r}",
                limit=120,
            )
    tell("all producers deliver")


def finish(cluster, clients, tell):
    """Lets all clients come to an end; returns what is wrong, {what: how often}."""
    for client in clients.running():
        if client.name == "producer":
            clients.end(client, SIGINT)
    clients.wait_for_ends()
    events = stored(cluster, clients.topic, PARTITIONS)
    tell(f"{len(events)} events in the topic")
    wrong = wrong_events(clients, events)
    values = set(events.values())
    wait_until(lambda: values <= printed(clients) or wrong, f"all events printed by {clients.consumers}", limit=120)
    for client in clients.running():
        wait_until(lambda it=client: is_at_work(it) or it.process.poll() is not None, f"{client!r}", limit=120)
        clients.end(client, SIGINT)
    clients.wait_for_ends()
    wrong += wrong_lines(clients, events) + wrong_ends(clients)
    for text in wrong[:100]:
        print(text)
    return Counter(text.split(":")[0] for text in wrong)


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def printed(clients):
    return {line for consumer in clients.consumers for line in consumer.lines}


def wrong_events(clients, events):
    """Compares what the producers say with what is in the topic."""
    wrong, delivered, failed, makers = [], {}, set(), {}
    places = {value: place for place, value in events.items()}
    for producer in clients.producers:
        for value, partition, offset in reports(producer.log):
            if partition is None:
                failed.add(value)
                continue
            if value in delivered:
                wrong.append(f"reported twice: {delivered[value]}, {(partition, offset)} {value}")
            delivered[value] = partition, offset
        # It makes an event every INTERVAL seconds, and the first one without waiting.
        most = int((producer.ended - producer.started) / INTERVAL) + 1
        order = order_of_people(most, producer.seed)
        makers |= {made: (producer, number) for made, number in order.items()}
    unplaced = sum(offset is None for _, offset in delivered.values())
    print(f"{len(delivered)} events reported as delivered ({unplaced} without an offset), {len(failed)} as failed")

    for value, (partition, offset) in delivered.items():
        place = places.get(value, (None, None))
        if place[0] != partition if offset is None else events.get((partition, offset)) != value:
            wrong.append(f"lost: {(partition, offset)} {value}, found at {place}")
    last = {}  # {(producer, partition): number of its last event there}
    for place, value in sorted(events.items()):
        producer, number = makers.get(person(value), (None, 0))
        if places[value] != place:
            wrong.append(f"doubled: {place} and {places[value]}, reported as {delivered.get(value)} {value}")
        elif number < last.get((producer, place[0]), 0):
            wrong.append(f"out of order: {place} {value}")
        # A producer that is killed takes the reports of what it has just sent with it.
        elif value not in delivered and value not in failed and (producer is None or producer.signum != SIGKILL):
            wrong.append(f"never reported: {place} {value}")
        last[producer, place[0]] = number
    return wrong


def wrong_lines(clients, events):
    """Compares what the consumers have printed with what is in the topic."""
    places = defaultdict(list)
    for place, value in events.items():
        places[value].append(place)
    wrong = [f"never printed: {places[value]} {value}" for value in places.keys() - printed(clients)]
    for consumer in clients.consumers:
        begun, last = Counter(), {}
        for line in consumer.lines:
            if line not in places:
                wrong.append(f"printed, but not in the topic: {line}")
                continue
            # Of a doubled one, the place that is next.
            partition, offset = next(
                (place for place in places[line] if last.get(place[0]) == place[1] - 1), places[line][0]
            )
            if last.get(partition) != offset - 1:
                begun[partition] += 1
            last[partition] = offset
        # It reads on one by one, but for each time that it is given the partition: then from the group's offset.
        given = Counter(re.findall(r"\d+", " ".join(re.findall("Got partitions: (.*)", consumer.stderr))))
        wrong += [f"printed out of order: partition {it} by {consumer!r}" for it in begun if begun[it] > given[str(it)]]
    return wrong


def wrong_ends(clients):
    """Looks at exit statuses, and for what no user should see."""
    wrong = []
    no_start = r"no answer from Kafka for 30 seconds|can't write to topic \S+: Broker: Invalid replication factor\n$"
    for client in (*clients.producers, *clients.consumers):
        if not is_at_work(client) and re.search(no_start, client.stderr):
            continue  # By design, when no broker was there, or too few for a topic that one believed to be new.
        uncommitted = re.search("no answer from Kafka at the end|Can't commit offsets", client.stderr)
        if client.name == "consumer" and client.signum and client.process.returncode == 1 and uncommitted:
            continue  # By design: it has said that the group's offsets are behind what it has printed.
        orderly = 128 + client.signum if client.name == "producer" else 0
        if client.name == "producer" and client.signum and ": Local: Purged in " in client.stderr:
            orderly = 1  # By design: five seconds after the signal not all events were confirmed.
        if client.process.returncode != (-SIGKILL if client.signum == SIGKILL else orderly):
            wrong.append(f"ended by itself: status {client.process.returncode}, {client!r}")
        if re.search(r"Traceback|^%\d\|", client.stderr, re.MULTILINE):
            wrong.append(f"raw: {client!r}")
    return wrong


def start(clients, producers, consumers):
    for _ in range(producers):
        clients.start_producer()
    for _ in range(consumers):
        clients.start_consumer()
    for client in clients.running():
        wait_until(lambda it=client: is_at_work(it), f"the start of {client!r}", limit=60)


@pytest.mark.timeout(900)
def test_random_faults(cluster, clients, tell, request):
    start(clients, producers=4, consumers=2)
    moments = random_moments(request.node.name)
    # All is well in between: events that can't be delivered for delivery.timeout.ms, two minutes, fail by design.
    for _ in range(int(FAULT_SECONDS or 120) // ROUND):
        break_and_mend(cluster, clients, moments, ROUND, tell)
    assert not finish(cluster, clients, tell)


def test_rolling_restarts(cluster, clients, tell, request):
    """As in an update of the brokers: each one is away for some seconds, again and again."""
    start(clients, producers=4, consumers=1)
    restart_in_turn(cluster, random_moments(request.node.name), int(FAULT_SECONDS or 100), tell)
    wait_for_health(cluster, clients, tell)
    assert not finish(cluster, clients, tell)
