"""What no other test would notice in the compose files: the tests run on their settings, but without Docker."""

import re

import pytest
import yaml
from conftest import THREE_BROKERS, copy_with_free_ports
from local_cluster import COMPOSE_FILE, Cluster, ClusterError, broker_properties, zookeeper_properties

ONE = yaml.safe_load(COMPOSE_FILE.read_text())
THREE = yaml.safe_load(THREE_BROKERS.read_text())
ZOOKEEPER, BROKER = ONE["services"]["zookeeper"], ONE["services"]["broker"]
# What the Dockerfiles in confluentinc/kafka-images declare as VOLUME: `up` makes a new one of each that has no mount.
VOLUMES = {
    "confluentinc/cp-zookeeper": {"/var/lib/zookeeper/data", "/var/lib/zookeeper/log", "/etc/zookeeper/secrets"},
    "confluentinc/cp-kafka": {"/var/lib/kafka/data", "/etc/kafka/secrets"},
}

every_service = pytest.mark.parametrize(
    "service",
    [service for file in (ONE, THREE) for service in file["services"].values()],
    ids=[f"{len(file['services'])}-{name}" for file in (ONE, THREE) for name in file["services"]],
)


def seconds(text):
    return int(text.removesuffix("s"))


def test_the_images_belong_together():
    """Releases of ZooKeeper and Kafka of one version, and no `latest`."""
    images = {service["image"] for file in (ONE, THREE) for service in file["services"].values()}
    names, versions = zip(*(image.split(":") for image in images), strict=True)
    assert sorted(names) == sorted(VOLUMES)
    assert re.fullmatch(r"\d+\.\d+\.\d+", *set(versions))


def test_three_brokers_differ_only_in_what_three_brokers_need():
    assert THREE["services"]["zookeeper"] == ZOOKEEPER
    copies = {
        "default.replication.factor": "3",
        "offsets.topic.replication.factor": "3",
        "transaction.state.log.replication.factor": "3",
        "controlled.shutdown.max.retries": "1",
        "min.insync.replicas": "2",
        "transaction.state.log.min.isr": "2",
    }
    assert list(THREE["services"]) == ["zookeeper", "broker", "broker-2", "broker-3"]
    for number, name in enumerate(list(THREE["services"])[1:], start=1):
        service = THREE["services"][name]
        port = 9091 + number
        own = {"environment", "ports", "volumes", "healthcheck"}
        assert {key: service[key] for key in set(service) - own} == {key: BROKER[key] for key in set(BROKER) - own}
        assert service["healthcheck"] == {**BROKER["healthcheck"], "test": ["CMD", "nc", "-z", "localhost", "29092"]}
        assert broker_properties(service["environment"]) == {
            **broker_properties(BROKER["environment"]),
            **copies,
            "broker.id": str(number),
            "advertised.listeners": f"HOST://localhost:{port},CONTAINERS://{name}:29092",
        }
        assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
        assert service["volumes"] == [f"{name}-data:/var/lib/kafka/data"]
    assert set(THREE["volumes"]) == {*ONE["volumes"], "broker-2-data", "broker-3-data"}


@every_service
def test_only_brokers_are_published_and_only_on_loopback(service):
    assert service.keys().isdisjoint({"network_mode", "privileged"})
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:")
        assert "//localhost:" + port.rpartition(":")[2] in service["environment"]["KAFKA_ADVERTISED_LISTENERS"]


def test_other_containers_get_an_address_that_they_can_reach():
    """Brokers too."""
    properties = broker_properties(BROKER["environment"])
    listeners = dict(entry.split("://") for entry in properties["advertised.listeners"].split(","))
    assert listeners[properties["inter.broker.listener.name"]] == "broker:29092"


@every_service
def test_all_folders_that_the_images_declare_are_mounted(service):
    mounts = [entry.rpartition(":")[2] for entry in service["volumes"]]
    assert {*mounts, *service["tmpfs"]} == VOLUMES[service["image"].partition(":")[0]]
    # What is to be kept is.
    assert all(folder.startswith("/etc/") for folder in service["tmpfs"])


@every_service
def test_a_start_may_take_three_minutes(service):
    check = service["healthcheck"]
    # Compose 1.29 knows no start_interval.
    assert set(check) == {"test", "interval", "timeout", "retries"}
    assert seconds(check["interval"]) * check["retries"] > 180
    # The image's own wait for ZooKeeper is part of it.
    assert service["environment"].get("KAFKA_CUB_ZK_TIMEOUT", 240) > 180


@every_service
def test_it_stops_at_once_and_comes_back(service):
    assert service["init"] is True
    assert service["restart"] == "unless-stopped"
    # Without a limit Java takes a quarter of the machine's memory.
    assert re.fullmatch(r"-Xmx\d+m", service["environment"]["KAFKA_HEAP_OPTS"])


def test_a_killed_broker_comes_back_soon_and_has_time_to_stop():
    session = BROKER["environment"]["KAFKA_ZOOKEEPER_SESSION_TIMEOUT_MS"]
    # ZooKeeper does not grant less than two ticks; Kafka's default is 18 seconds.
    assert 2 * ZOOKEEPER["environment"]["ZOOKEEPER_TICK_TIME"] <= session < 18000
    assert seconds(BROKER["stop_grace_period"]) > 10


def test_names_become_properties_by_the_rule_of_the_images():
    environment = {"KAFKA_A_B": 1, "KAFKA_A__B": 2, "KAFKA_A___B": 3, "KAFKA_HEAP_OPTS": "-Xmx1g", "OTHER": 4}
    assert broker_properties(environment) == {"a.b": "1", "a_b": "2", "a-b": "3"}
    assert zookeeper_properties({"ZOOKEEPER_CLIENT_PORT": 2181, "KAFKA_HEAP_OPTS": ""}) == {"clientPort": "2181"}
    with pytest.raises(ClusterError, match="ZOOKEEPER_NEW"):
        zookeeper_properties({"ZOOKEEPER_NEW": 1})


@pytest.mark.parametrize("compose_file", [COMPOSE_FILE, THREE_BROKERS], ids=["one", "three"])
def test_the_local_cluster_changes_only_what_it_must(tmp_path, compose_file):
    """Every other setting of the compose file is passed on as it is."""
    cluster = Cluster(copy_with_free_ports(compose_file, tmp_path), tmp_path)
    cluster.configure()
    ports = {cluster.zookeeper.properties["clientPort"]}
    for broker in cluster.brokers:
        asked, written = broker_properties(broker.environment), broker.properties
        changed = {key for key, value in asked.items() if written[key] != value}
        assert changed == {"zookeeper.connect", "advertised.listeners"}
        assert set(written) - set(asked) == {"log.dirs", "listeners"}
        for_host, for_brokers = written["listeners"].split(",")
        assert for_host == f"HOST://127.0.0.1:{broker.port}"
        assert written["advertised.listeners"] == written["listeners"].replace("127.0.0.1", "localhost")
        assert for_brokers.startswith("CONTAINERS://127.0.0.1:")
        ports |= {address.rpartition(":")[2] for address in (for_host, for_brokers)}
    assert len(ports) == 1 + 2 * len(cluster.brokers)
