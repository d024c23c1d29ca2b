"""What the tests share: a real cluster, topics of their own, scripts as processes, and another client to read back."""

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import kafka
import psutil
import pytest
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient, NewTopic
from local_cluster import COMPOSE_FILE, DATA, KAFKA_VERSIONS, Cluster, class_path, free_port
from xdist.scheduler import LoadScopeScheduling

# In the background of a shell script Ctrl-C is ignored, also by all programs that are started there.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
THREE_BROKERS = ROOT / "tests" / "three-brokers.yaml"
KAFKA_4 = ROOT / "tests" / "kafka-4.yaml"
# A cluster that is in use, for the tests that leave it as it is.
EXTERNAL = os.environ.get("KAFKA_BOOTSTRAP_SERVERS")
# The topics and groups of this test process begin with it.
MARK = f"test-{uuid.uuid4().hex[:8]}"

# Seconds after which a test gives up waiting, on a machine however busy; where less is promised, a test says so.
LIMIT = 60
INTERVAL = 0.05  # Seconds from one look to the next.
# The files whose tests start clusters of their own, those that take longest first: whichever came last would keep one
# worker busy after all others.
OWN_CLUSTERS = ["test_absent_broker", "test_faults", "test_readme", "test_security", "test_consumer_faults"]
OWN_CLUSTERS += ["test_kafka_4", "test_local_cluster", "test_brokers"]
# The files whose tests run while Kafka is being downloaded and started.
WITHOUT_KAFKA = ["test_without_kafka", "test_compose"]
# A test that waits for a minute: so it comes before all others that need Kafka.
IDLE = "test_exit_when_others_of_the_group_have_all_partitions"


def pytest_collection_modifyitems(items):
    """Called by pytest with the tests in the order in which they are to run."""

    def place(item):
        files = [*OWN_CLUSTERS, item.path.stem]
        return item.path.stem not in WITHOUT_KAFKA, item.originalname != IDLE, files.index(item.path.stem)

    items.sort(key=place)


def pytest_assertrepr_compare(op, left, right):
    """Called by pytest when a comparison fails: says where long lists differ, since in CI pytest shows them whole."""
    if op != "==" or not isinstance(left, list) or not isinstance(right, list) or len(left) + len(right) < 100:
        return None
    pairs = itertools.zip_longest(left, right)
    place = next(place for place, (ours, theirs) in enumerate(pairs) if ours != theirs)
    sizes = " and ".join(f"{len(items)} items, {len(set(map(str, items)))} of them distinct" for items in (left, right))
    return [
        f"equal lists ({sizes})",
        f"from item {place} on: {left[place : place + 2]} and {right[place : place + 2]}",
        f"at the end: {left[-2:]} and {right[-2:]}",
    ]


class Distribution(LoadScopeScheduling):
    """One xdist worker runs all tests of each of these files, and any worker any other test.

    xdist's own loadgroup does not find its groups with pytest 9.2.
    """

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0]
        return file if Path(file).stem in OWN_CLUSTERS else nodeid


def pytest_xdist_make_scheduler(config, log):
    """Called by xdist."""
    return Distribution(config, log)


def pytest_configure_node(node):
    """Called by xdist before it starts a worker: one cluster serves the tests of all that leave it as it is."""
    if not EXTERNAL:
        node.workerinput["shared_cluster"] = str(cluster_of_all_workers(node.config))


@functools.cache
def cluster_of_all_workers(config):
    """Starts a cluster while the workers start; returns the path of the file that will tell its bootstrap servers.

    The file is empty if there is none: a thread can't end the tests, but each worker can.
    """
    clusters = contextlib.ExitStack()
    config.add_cleanup(clusters.close)
    DATA.mkdir(exist_ok=True)
    file = Path(clusters.enter_context(tempfile.TemporaryDirectory(dir=DATA))) / "shared_cluster"

    def start():
        servers = ""
        try:
            first, *others = KAFKA_VERSIONS.values()
            class_path(first)
            with ThreadPoolExecutor() as executor:
                downloads = executor.map(class_path, others)
                learn_classes()
            list(downloads)  # Raises what they raised.
            servers = clusters.enter_context(new_cluster()).bootstrap_servers
        finally:
            file.with_suffix(".new").write_text(servers)
            file.with_suffix(".new").rename(file)

    thread = threading.Thread(target=start)
    clusters.callback(thread.join)
    thread.start()
    return file


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Called by pytest around each test, and around its timeout: a download can take longer than a test may."""
    worker = getattr(item.config, "workerinput", None)
    if worker and not EXTERNAL and item.path.stem not in WITHOUT_KAFKA:
        file = Path(worker["shared_cluster"])
        wait_until(file.exists, "the shared cluster", limit=600)
        if not file.read_text():
            pytest.exit("there is no cluster", returncode=1)
    return (yield)


def learn_classes():
    """Starts and stops a cluster, unless that is done: its broker leaves behind what makes later ones faster.

    ZooKeeper does not: to save its classes takes four seconds, more than all its starts would gain.
    """
    with tempfile.TemporaryDirectory(dir=DATA) as name:
        folder = Path(name)
        cluster = Cluster(copy_with_free_ports(COMPOSE_FILE, folder), folder, learns=True)
        (broker,) = cluster.brokers
        if not broker.cache.exists():
            cluster.up()
            broker.stop()
            cluster.zookeeper.kill()


def wait_until(condition, what, limit=LIMIT):
    """Returns the first true value of condition(), or fails after `limit` seconds and says what it waited for.

    what: any object, shown as it is then. A busy machine delays this loop too, and so gives more time.
    """
    for _ in range(round(limit / INTERVAL) + 1):
        value = condition()
        if value:
            return value
        time.sleep(INTERVAL)
    pytest.fail(f"waited {limit} s for {what}")


class Script:
    """kafka_producer.py or kafka_consumer.py as a process in a folder of its own, its output in files.

    shell: what a shell does to start it, 'exec "$@" >/dev/full' for example.
    """

    def __init__(self, folder, name, options, stdout=None, stdin=subprocess.DEVNULL, shell=None):
        self.name = name
        self.folder = folder
        number = len(list(folder.glob("*.err")))
        self.stdout_file = folder / f"{name}-{number}.out"
        self.stderr_file = folder / f"{name}-{number}.err"
        command = [sys.executable, ROOT / f"kafka_{name}.py", *map(str, options)]
        with self.stdout_file.open("wb") as out, self.stderr_file.open("wb") as err:
            self.process = subprocess.Popen(
                ["sh", "-c", shell, "sh", *command] if shell else command,
                cwd=folder,
                stdin=stdin,
                stdout=stdout or out,
                stderr=err,
            )

    @property
    def stdout(self):
        return self.stdout_file.read_text()

    @property
    def stderr(self):
        return self.stderr_file.read_text()

    @property
    def lines(self):
        """The whole lines on standard output so far."""
        return self.stdout.split("\n")[:-1]

    def wait(self, limit=LIMIT):
        """Returns the exit status."""
        wait_until(lambda: self.process.poll() is not None, ["the end of", self], limit)
        assert "Traceback" not in self.stderr, self.stderr
        return self.process.returncode

    def end(self, signum=signal.SIGINT, limit=10):
        """Sends a signal and returns the exit status."""
        self.process.send_signal(signum)
        return self.wait(limit)

    def wait_for_lines(self, count, limit=LIMIT):
        # Only counted, since to take all lines apart again and again would keep a core busy.
        wait_until(lambda: self.stdout_file.read_bytes().count(b"\n") >= count, [f"{count} lines of", self], limit)
        return self.lines

    def wait_for_library(self):
        """Waits until it begins to connect, or has ended: the start of Python takes long on a busy machine."""
        wait_until(
            lambda: self.process.poll() is not None or psutil.Process(self.process.pid).num_threads() > 1,
            ["librdkafka's threads in", self],
        )

    def wait_for_stderr(self, text, limit=LIMIT):
        wait_until(lambda: text in self.stderr, [text, "on stderr of", self], limit)

    def __repr__(self):
        return f"{self.name} (stderr so far: {self.stderr!r})"


@pytest.fixture
def scripts(tmp_path, cluster):
    """Starts scripts: scripts.producer("-t", topic), scripts.consumer(...); ends them after the test.

    They are given the address of the cluster, unless the options have one.
    """
    started = []

    def start(name, *options, servers=cluster.bootstrap_servers, **popen):
        options = ["-b", servers, *options] if servers else options
        started.append(Script(tmp_path, name, options, **popen))
        return started[-1]

    yield SimpleNamespace(
        producer=lambda *options, **more: start("producer", *options, **more),
        consumer=lambda *options, **more: start("consumer", *options, **more),
        folder=tmp_path,
        log=tmp_path / "producer.log",
    )
    for script in started:
        if script.process.poll() is None:
            script.process.kill()
            script.process.wait()


def delete_topics_and_groups(cluster, mark):
    """Deletes the topics and groups whose names begin with the mark, and waits until they are gone."""
    admin = AdminClient(cluster.client_config)

    def ours(names):
        return [name for name in names if name.startswith(mark)]

    def delete():
        topics = ours(admin.list_topics(timeout=10).topics)
        groups = ours(group.group_id for group in admin.list_consumer_groups().result(10).valid)
        wishes = admin.delete_topics(topics) if topics else {}
        wishes |= admin.delete_consumer_groups(groups) if groups else {}
        for wish in wishes.values():
            wish.exception(10)  # Refused while a consumer that was killed still counts as a member, up to 45 seconds.
        return wishes

    wait_until(lambda: not delete(), f"the end of topics and groups {mark}...")


def copy_with_free_ports(compose_file, folder):
    """Copies a compose file with other ports of this machine, so that it can run beside a cluster in use."""
    text = compose_file.read_text()
    for port in re.findall(r"127\.0\.0\.1:(\d+):", text):
        text = re.sub(rf"\b{port}\b", str(free_port()), text)
    copy = folder / compose_file.name
    copy.write_text(text)
    return copy


@contextlib.contextmanager
def new_cluster(compose_file=COMPOSE_FILE, tick_time=None, settings=None, **options):
    """A cluster in a folder of its own, which is deleted afterwards: `with new_cluster(settings={...}) as cluster:`.

    tick_time: ZooKeeper's, in milliseconds, if it is to differ from the compose file's.
    options: those of Cluster.
    """
    folder = DATA / f"test-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    # Instead of fifty, which a broker looks through at each start.
    settings = {"offsets.topic.num.partitions": "1", **(settings or {})}
    cluster = Cluster(copy_with_free_ports(compose_file, folder), folder, settings, **options)
    if tick_time and cluster.zookeeper:
        cluster.zookeeper.environment["ZOOKEEPER_TICK_TIME"] = tick_time
    try:
        cluster.up()
        yield cluster
    finally:
        # The data is not wanted any more: no need to wait for a clean end.
        for service in cluster.services:
            service.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_cluster(pytestconfig):
    """The cluster of the tests that leave it as it is: its bootstrap_servers and client_config."""
    worker = getattr(pytestconfig, "workerinput", None)
    if worker is None and not EXTERNAL:
        with new_cluster() as cluster:
            yield cluster
        return
    servers = EXTERNAL or Path(worker["shared_cluster"]).read_text()
    cluster = SimpleNamespace(bootstrap_servers=servers, client_config={"bootstrap.servers": servers, "log_level": 0})
    yield cluster
    if EXTERNAL:
        delete_topics_and_groups(cluster, MARK)


@pytest.fixture(scope="module")
def breakable_cluster():
    """breakable_cluster(compose_file): the one that a file's tests marked with breaks_cluster share."""
    settings = {
        # A killed broker can't start again as long as its session with ZooKeeper lives, which is two ticks at least.
        "zookeeper.session.timeout.ms": "2000",
        # With Kafka 4's group protocol a consumer hears of changes when it asks, every five seconds by default.
        "group.consumer.min.heartbeat.interval.ms": "200",
        "group.consumer.heartbeat.interval.ms": "200",
    }
    with contextlib.ExitStack() as clusters:

        @functools.cache
        def start(*compose_file):
            return clusters.enter_context(new_cluster(*compose_file, tick_time=1000, settings=settings))

        yield start


@pytest.fixture
def cluster(request):
    """The cluster of this test.

    Tests share one and leave it as it is, but for topics and groups of their own. Those that are marked with
    breaks_cluster, or breaks_cluster(compose_file), share another within their file, and may stop, kill and pause what
    they like; what is down after a test is started again.
    """
    breaks = request.node.get_closest_marker("breaks_cluster")
    if not breaks:
        yield request.getfixturevalue("shared_cluster")
    elif EXTERNAL:
        pytest.skip("it would break the cluster that is in use")
    else:
        cluster = request.getfixturevalue("breakable_cluster")(*breaks.args)
        yield cluster
        cluster.up()


@pytest.fixture
def topic():
    """A name for a topic that does not exist yet."""
    return f"{MARK}-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def group():
    return f"{MARK}-group-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def filled(cluster, topic):
    """A topic of one partition with the events 0 to 9."""
    create_topic(cluster, topic)
    produce(cluster, topic, numbered(10))
    return topic


def create_topic(cluster, topic, partitions=1, **config):
    """Creates a topic and waits for it; config: {"min.insync.replicas": "2"}."""
    admin = AdminClient(cluster.client_config)
    replicas = config.pop("replicas", 1)

    def is_there():
        # Refused while a broker that was paused finds out that ZooKeeper has given it up.
        with contextlib.suppress(KafkaException):
            admin.create_topics([NewTopic(topic, partitions, replicas, config=config)])[topic].result(LIMIT)
        return len(admin.list_topics(topic, timeout=5).topics[topic].partitions) == partitions

    wait_until(is_there, f"topic {topic}")


def produce(cluster, topic, events, **config):
    """Writes events, each bytes or None or a dict of produce()'s arguments, and waits for their delivery."""
    # Room for all of them, even if the broker is slower than this loop.
    settings = {"linger.ms": 1, "queue.buffering.max.messages": 1_000_000}
    producer = Producer({**cluster.client_config, **settings, **config})
    errors = []
    for event in events:
        arguments = event if isinstance(event, dict) else {"value": event}
        producer.produce(topic, on_delivery=lambda error, _: error and errors.append(error), **arguments)
        producer.poll(0)
    assert producer.flush(LIMIT) == 0, f"not delivered within {LIMIT} s"
    assert not errors, errors


def end_offset(consumer, partition):
    """Returns the offset that the next event of a partition will get; asks again while its leader is changing."""
    found = []

    def asked():
        with contextlib.suppress(kafka.errors.KafkaTimeoutError):
            found.append(consumer.end_offsets([partition])[partition])
        return found

    return wait_until(asked, f"the end of {partition}", limit=90)[0]


def read_topic(cluster, topic, partitions=1, **config):
    """Returns all records of a topic, partition by partition, as kafka-python (another client) reads them."""
    # The broker checks the checksums too, and faster.
    config = {"check_crcs": False, "enable_auto_commit": False, **config}
    consumer = kafka.KafkaConsumer(bootstrap_servers=cluster.bootstrap_servers, **config)
    try:
        records = []
        for partition in (kafka.TopicPartition(topic, number) for number in range(partitions)):
            consumer.assign([partition])
            consumer.seek_to_beginning(partition)
            end = end_offset(consumer, partition)
            deadline = time.monotonic() + LIMIT
            while consumer.position(partition) < end:
                assert time.monotonic() < deadline, f"waited {LIMIT} s for {end} events of {topic}"
                records += consumer.poll(1000).get(partition, [])
        return records
    finally:
        consumer.close()


def committed(cluster, topic, group, partition=0):
    """Returns the offset that a group has committed, or None, as kafka-python sees it."""
    consumer = kafka.KafkaConsumer(
        bootstrap_servers=cluster.bootstrap_servers, group_id=group, enable_auto_commit=False
    )
    try:
        return consumer.committed(kafka.TopicPartition(topic, partition))
    finally:
        consumer.close()


def copy_with(folder, script, lines, before):
    """Writes mine.py, a copy of a script with more lines before one of its own; returns its path."""
    code = (ROOT / script).read_text()
    assert code.count(before) == 1
    path = folder / "mine.py"
    path.write_text(code.replace(before, f"{lines}{before}"))
    return path


def consumer_with(folder, lines):
    """Writes mine.py, a copy of kafka_consumer.py with more lines at the beginning of process(); returns its path."""
    return copy_with(folder, "kafka_consumer.py", lines, before="    line = text(message.value())\n")


def press_again(script, signum):
    """Sends a signal again and again, as impatient people do, for two seconds at most; returns the exit status."""

    def ended():
        if script.process.poll() is None:
            script.process.send_signal(signum)
        return script.process.poll() is not None

    wait_until(ended, ["the end of", script], limit=2)
    return script.process.returncode


def assert_wrong_call(script):
    """A line that says what is wrong; before it there may be how to call the script."""
    assert script.stdout == ""
    *usage, error = script.stderr.splitlines()
    assert error.startswith(f"kafka_{script.name}.py: ")
    assert not usage or usage[0].startswith("usage: ")
    assert all(line.startswith(" ") for line in usage[1:])


# What a producer says in the end if not all is delivered.
LOOK_FIRST = "If not refused, they may be in the topic all the same. Look there before you send them again."


def last_error(script):
    """Returns the last line on standard error, but for what the scripts say when they close."""
    closing = r"Processed \d+ events\. Closing\.|Gave up partitions: .*|" + re.escape(LOOK_FIRST)
    return [line for line in script.stderr.splitlines() if not re.fullmatch(closing, line)][-1]


def numbered(count):
    """Returns that many distinct JSON events as bytes."""
    return [json.dumps({"number": number}).encode() for number in range(count)]


def numbers(lines):
    """Returns the numbers in lines that numbered() made."""
    return [json.loads(line)["number"] for line in lines]
