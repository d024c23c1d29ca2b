"""What the compose files must say; that their settings work is shown by all other tests, which run on them."""

import re

import pytest
import yaml
from conftest import THREE_BROKERS, copy_with_free_ports
from local_cluster import COMPOSE_FILE, Cluster, ClusterError, broker_properties, zookeeper_properties

ONE = yaml.safe_load(COMPOSE_FILE.read_text())
THREE = yaml.safe_load(THREE_BROKERS.read_text())
ZOOKEEPER, BROKER = ONE["services"]["zookeeper"], ONE["services"]["broker"]
BROKERS_OF_THREE = {name: service for name, service in THREE["services"].items() if name != "zookeeper"}


def test_services_with_pinned_images_of_one_version():
    assert set(ONE) == {"services", "volumes"}  # `version:` is obsolete
    assert set(ONE["services"]) == {"zookeeper", "broker"}
    assert {name: service["container_name"] for name, service in ONE["services"].items()} == {
        "zookeeper": "zookeeper",
        "broker": "broker",
    }
    assert ZOOKEEPER["image"] == "confluentinc/cp-zookeeper:7.9.8"
    assert BROKER["image"] == "confluentinc/cp-kafka:7.9.8"
    assert list(THREE["services"]) == ["zookeeper", "broker", "broker-2", "broker-3"]


def test_three_brokers_differ_only_in_what_three_brokers_need():
    zookeeper = {key: value for key, value in ZOOKEEPER.items() if key != "container_name"}
    assert THREE["services"]["zookeeper"] == zookeeper
    copies = {
        "default.replication.factor": "3",
        "offsets.topic.replication.factor": "3",
        "transaction.state.log.replication.factor": "3",
        "min.insync.replicas": "2",
        "transaction.state.log.min.isr": "2",
    }
    for number, (name, service) in enumerate(BROKERS_OF_THREE.items(), start=1):
        port = 9091 + number
        own = {"environment", "ports", "volumes", "healthcheck"}
        assert {key: service[key] for key in set(service) - own} == {
            key: BROKER[key] for key in set(BROKER) - own - {"container_name"}
        }
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


def test_only_the_broker_is_published_and_only_on_loopback():
    assert "ports" not in ZOOKEEPER
    assert BROKER["ports"] == ["127.0.0.1:9092:9092"]
    for service in ONE["services"].values():
        assert "network_mode" not in service


def test_clients_on_the_host_and_in_containers_get_an_address_they_can_reach():
    properties = broker_properties(BROKER["environment"])
    listeners = dict(entry.split("://") for entry in properties["advertised.listeners"].split(","))
    assert set(listeners.values()) == {"localhost:9092", "broker:29092"}
    assert set(listeners) == {entry.split(":")[0] for entry in properties["listener.security.protocol.map"].split(",")}
    assert listeners[properties["inter.broker.listener.name"]] == "broker:29092"


def test_all_folders_that_the_images_declare_are_mounted():
    """They are the VOLUMEs of the Dockerfiles in confluentinc/kafka-images; `up` makes a new one of each left out."""
    mounts = [entry.split(":") for service in (ZOOKEEPER, BROKER) for entry in service["volumes"]]
    assert [folder for _, folder in mounts] == [
        "/var/lib/zookeeper/data",
        "/var/lib/zookeeper/log",
        "/var/lib/kafka/data",
    ]
    assert [name for name, _ in mounts] == list(ONE["volumes"])
    assert ZOOKEEPER["tmpfs"] == ["/etc/zookeeper/secrets"]
    assert BROKER["tmpfs"] == ["/etc/kafka/secrets"]


def test_health():
    assert "srvr" in ZOOKEEPER["healthcheck"]["test"][1]
    assert BROKER["healthcheck"]["test"] == ["CMD", "nc", "-z", "localhost", "9092"]
    # Compose 1.29 knows no start_interval.
    known = {"test", "interval", "timeout", "retries"}
    for service in (ZOOKEEPER, BROKER):
        check = service["healthcheck"]
        assert set(check) == known
        # A start may take three minutes, also if the image's own wait for ZooKeeper is part of it.
        assert int(check["interval"].removesuffix("s")) * check["retries"] > 180
    assert BROKER["environment"]["KAFKA_CUB_ZK_TIMEOUT"] > 180
    assert BROKER["depends_on"] == ["zookeeper"]


def test_a_killed_broker_comes_back_and_has_time_to_stop():
    properties = broker_properties(BROKER["environment"])
    for service in (ZOOKEEPER, BROKER):
        assert service["restart"] == "unless-stopped"
        assert re.fullmatch(r"-Xmx\d+m", service["environment"]["KAFKA_HEAP_OPTS"])
    assert int(properties["zookeeper.session.timeout.ms"]) < 18000
    # ZooKeeper does not grant less than two ticks.
    assert int(properties["zookeeper.session.timeout.ms"]) >= 2 * ZOOKEEPER["environment"]["ZOOKEEPER_TICK_TIME"]
    assert int(BROKER["stop_grace_period"].removesuffix("s")) > 10


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
