"""What docker-compose.yaml must say; that its settings work is shown by all other tests, which run on them."""

import re

import pytest
import yaml
from local_cluster import COMPOSE_FILE, Cluster, ClusterError, broker_properties, zookeeper_properties

COMPOSE = yaml.safe_load(COMPOSE_FILE.read_text())
ZOOKEEPER, BROKER = COMPOSE["services"]["zookeeper"], COMPOSE["services"]["broker"]


def test_two_services_with_pinned_images_of_one_version():
    assert set(COMPOSE) == {"services", "volumes"}  # `version:` is obsolete
    assert set(COMPOSE["services"]) == {"zookeeper", "broker"}
    assert {name: service["container_name"] for name, service in COMPOSE["services"].items()} == {
        "zookeeper": "zookeeper",
        "broker": "broker",
    }
    assert ZOOKEEPER["image"] == "confluentinc/cp-zookeeper:7.9.8"
    assert BROKER["image"] == "confluentinc/cp-kafka:7.9.8"


def test_only_the_broker_is_published_and_only_on_loopback():
    assert "ports" not in ZOOKEEPER
    assert BROKER["ports"] == ["127.0.0.1:9092:9092"]
    for service in COMPOSE["services"].values():
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
    assert [name for name, _ in mounts] == list(COMPOSE["volumes"])
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


def test_the_local_cluster_changes_only_what_it_must(tmp_path):
    """Every other setting of the compose file is passed on as it is."""
    cluster = Cluster(tmp_path)
    written = {}
    for service in cluster.services:
        service.start = lambda properties, _, name=service.name: written.update({name: properties})
    cluster.start(detached=False)
    asked = broker_properties(BROKER["environment"])
    changed = {key for key, value in asked.items() if str(written["broker"][key]) != value}
    assert changed == {"zookeeper.connect", "advertised.listeners"}
    assert set(written["broker"]) - set(asked) == {"log.dirs", "listeners"}
    assert "0.0.0.0" not in written["broker"]["listeners"]
