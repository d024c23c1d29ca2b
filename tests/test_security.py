"""TLS, passwords and rights, on a broker that asks for them; all that a client needs is in its --config file."""

import re
import subprocess
import sys
import time
import uuid

import psutil
import pytest
import trustme
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from conftest import (
    EXTERNAL,
    LOOK_FIRST,
    copy_with,
    create_topic,
    last_error,
    new_cluster,
    numbered,
    produce,
    read_topic,
    wait_until,
)
from cryptography.hazmat.primitives import serialization

pytestmark = pytest.mark.skipif(bool(EXTERNAL), reason="another cluster is given")

# Seconds within which each failure ends: half a minute, and the end of Python.
LIMIT = 32


def password():
    return f"secret-{uuid.uuid4().hex}"


PASSWORDS = {name: password() for name in ("admin", "alice", "walter", "reader", "nogroup", "nobody", "sam", "gina")}
WRONG_PASSWORD = password()
# User: [(name, right, kind)]. The admin may do everything.
RIGHTS = {
    "alice": [("*", AclOperation.ALL, ResourceType.TOPIC), ("*", AclOperation.ALL, ResourceType.GROUP)],
    "sam": [("*", AclOperation.ALL, ResourceType.TOPIC), ("*", AclOperation.ALL, ResourceType.GROUP)],
    # May write another topic, but only see the rest.
    "walter": [
        ("other", AclOperation.WRITE, ResourceType.TOPIC),
        ("*", AclOperation.DESCRIBE, ResourceType.TOPIC),
        ("*", AclOperation.ALL, ResourceType.GROUP),
    ],
    "reader": [("*", AclOperation.READ, ResourceType.TOPIC), ("*", AclOperation.ALL, ResourceType.GROUP)],
    # Loses the right to the group in a test.
    "gina": [("*", AclOperation.ALL, ResourceType.TOPIC), ("*", AclOperation.ALL, ResourceType.GROUP)],
    "nogroup": [("*", AclOperation.READ, ResourceType.TOPIC)],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with ca.pem, other-ca.pem and broker.pem, a key and a certificate for localhost."""
    folder = tmp_path_factory.mktemp("certificates")
    ca = trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    trustme.CA().cert_pem.write_to_path(folder / "other-ca.pem")
    certificate = ca.issue_cert("localhost")
    # Kafka wants the key as PKCS 8.
    key = serialization.load_pem_private_key(certificate.private_key_pem.bytes(), None).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "broker.pem").write_bytes(key + b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    return folder


def login(files, user, mechanism="PLAIN"):
    """The librdkafka properties with which a user is let in."""
    return {
        "security.protocol": "sasl_ssl",
        "ssl.ca.location": str(files / "ca.pem"),
        "sasl.mechanism": mechanism,
        "sasl.username": user,
        "sasl.password": PASSWORDS.get(user, WRONG_PASSWORD),
    }


@pytest.fixture(scope="module")
def cluster(files):
    """Instead of the one that all tests share: a cluster that asks for a password."""
    users = " ".join(f'user_{user}="{PASSWORDS[user]}"' for user in PASSWORDS if user != "sam")
    settings = {
        "listener.security.protocol.map": "HOST:SASL_SSL,CONTAINERS:PLAINTEXT",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": files / "broker.pem",
        "listener.name.host.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256",
        "listener.name.host.plain.sasl.jaas.config": (
            f"org.apache.kafka.common.security.plain.PlainLoginModule required {users};"
        ),
        "listener.name.host.scram-sha-256.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
        "authorizer.class.name": "kafka.security.authorizer.AclAuthorizer",
        # The broker itself comes in without a name.
        "super.users": "User:ANONYMOUS;User:admin",
        # As in many managed clusters.
        "auto.create.topics.enable": "false",
    }
    with new_cluster(settings=settings, client=login(files, "admin")) as cluster:
        admin = AdminClient(cluster.client_config)
        credential = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4096)
        upsertion = UserScramCredentialUpsertion("sam", credential, PASSWORDS["sam"].encode())
        bindings = [
            AclBinding(kind, name, ResourcePatternType.LITERAL, f"User:{user}", "*", right, AclPermissionType.ALLOW)
            for user, rights in RIGHTS.items()
            for name, right, kind in rights
        ]
        wishes = admin.alter_user_scram_credentials([upsertion]) | admin.create_acls(bindings)
        for wish in wishes.values():
            wish.result(20)
        wait_until(
            lambda: "sam" in admin.describe_user_scram_credentials().result(5), "the user sam, who is new to the broker"
        )
        create_topic(cluster, "other")
        yield cluster


def write(path, properties):
    path.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
    return path


def all_of(script):
    """All that a script has written, as bytes."""
    log = script.folder / "producer.log"
    return (
        script.stdout_file.read_bytes() + script.stderr_file.read_bytes() + (log.read_bytes() if log.exists() else b"")
    )


def assert_no_password(script):
    for secret in [*PASSWORDS.values(), WRONG_PASSWORD]:
        assert secret.encode() not in all_of(script)


def assert_failed(script, seconds, expected):
    """The script has ended with status 1 and a line that matches `expected`, and told no password."""
    assert script.wait() == 1
    assert "%" not in script.stderr, "a log line of librdkafka"
    print(f"{script.name} ended after {seconds:.1f} s: {script.stderr}")
    assert last_error(script).startswith((f"kafka_{script.name}.py: ", "Failed to deliver"))
    assert re.search(expected, script.stderr), script.stderr
    assert_no_password(script)


def seconds_until_end(script):
    script.wait_for_library()
    started = time.monotonic()
    wait_until(lambda: script.process.poll() is not None, ["the end of", script], LIMIT)
    return time.monotonic() - started


WRONG = {"sasl.password": WRONG_PASSWORD}
FAILURES = {
    "wrong password, PLAIN": (WRONG, "Authentication failed: Invalid username or password"),
    "wrong password, SCRAM": (
        {**WRONG, "sasl.mechanism": "SCRAM-SHA-256", "sasl.username": "sam"},
        "Authentication failed .* invalid credentials",
    ),
    "mechanism that is off": ({"sasl.mechanism": "SCRAM-SHA-512"}, "Unsupported SASL mechanism"),
    "wrong CA": ({"ssl.ca.location": "other-ca.pem"}, "certificate verify failed"),
    # The certificate is for localhost alone.
    "wrong host name": ({"bootstrap.servers": "127.0.0.1:{port}"}, r"certificate verify failed.*\n.* host name"),
    "plaintext to a port for TLS": (
        {"security.protocol": "plaintext"},
        # The library warns of the settings and connects at the same time.
        "(?s)(?=.*`security.protocol` is not configured for SASL)(?=.*closed by peer.*check .*security.protocol)",
    ),
}


@pytest.mark.parametrize(("user", "mechanism"), [("alice", "PLAIN"), ("sam", "SCRAM-SHA-256")])
def test_it_works(scripts, cluster, files, topic, group, user, mechanism):
    create_topic(cluster, topic)
    config = login(files, user, mechanism) | {"bootstrap.servers": cluster.bootstrap_servers}
    path = write(scripts.folder / "client.properties", config)
    producer = scripts.producer("-t", topic, "-c", 5, "-i", 0, "-F", path, servers=None)
    assert producer.wait() == 0
    consumer = scripts.consumer("-t", topic, "-G", group, "-F", path, servers=None)
    lines = consumer.wait_for_lines(5)
    process = psutil.Process(consumer.process.pid)
    assert PASSWORDS[user] not in " ".join(process.cmdline())
    assert PASSWORDS[user] not in str(process.environ())
    assert consumer.end() == 0
    login_of_kafka_python = {
        "security_protocol": "SASL_SSL",
        "ssl_cafile": str(files / "ca.pem"),
        "sasl_mechanism": "PLAIN",
        "sasl_plain_username": "admin",
        "sasl_plain_password": PASSWORDS["admin"],
    }
    values = [record.value.decode() for record in read_topic(cluster, topic, **login_of_kafka_python)]
    assert lines == values
    assert len(values) == 5
    for script in (producer, consumer):
        assert_no_password(script)


@pytest.mark.parametrize(("user", "mechanism"), [("alice", "PLAIN"), ("sam", "SCRAM-SHA-256")])
def test_even_the_library_s_own_log_has_no_password(scripts, cluster, files, topic, user, mechanism):
    create_topic(cluster, topic)
    config = login(files, user, mechanism) | {"debug": "all"}
    path = write(scripts.folder / "client.properties", config)
    producer = scripts.producer("-t", topic, "-c", 1, "-F", path)
    assert producer.wait() == 0
    assert "sasl.password = [redacted]" in producer.stderr
    assert_no_password(producer)


@pytest.mark.parametrize("to_the_end", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize(("changes", "expected"), FAILURES.values(), ids=FAILURES)
def test_who_is_not_let_in(scripts, cluster, files, topic, changes, expected, to_the_end):
    """They say why, and after half a minute they give up. Few are waited for so long: they keep the broker busy."""
    (port,) = cluster.ports
    config = login(files, "alice") | {"bootstrap.servers": cluster.bootstrap_servers} | changes
    config["ssl.ca.location"] = files / config["ssl.ca.location"]
    config["bootstrap.servers"] = config["bootstrap.servers"].format(port=port)
    path = write(scripts.folder / "client.properties", config)
    pair = [start("-t", topic, "-F", path, servers=None) for start in (scripts.producer, scripts.consumer)]
    for script in pair:
        wait_until(lambda it=script: re.search(expected, it.stderr), [expected, "on stderr of", script], limit=10)
        script.wait_for_stderr("Can't connect: ", limit=10)
        it_answers = re.search("SASL authentication error|mechanism handshake failed", script.stderr)
        assert ("Is Kafka running" in script.stderr) != bool(it_answers)
    if to_the_end or changes == WRONG:
        for script in pair:
            assert_failed(script, seconds_until_end(script), expected)
    for script in pair:
        script.process.kill()
        assert "%" not in script.stderr, "a log line of librdkafka"
        assert_no_password(script)
        assert script.stdout == ""
    assert topic not in AdminClient(cluster.client_config).list_topics(timeout=10).topics


def test_a_topic_that_nobody_makes(scripts, files, topic):
    path = write(scripts.folder / "client.properties", login(files, "alice"))
    producer = scripts.producer("-t", topic, "-F", path)
    seconds = seconds_until_end(producer)
    assert seconds < 20
    assert_failed(producer, seconds, "")
    error = f"kafka_producer.py: can't write to topic {topic}: Broker: Unknown topic or partition"
    assert producer.stderr.splitlines()[-1] == error
    assert producer.stdout == ""


DENIED = "Topic authorization failed"
NO_RIGHTS = {
    "write": ("producer", "walter", ["-c", 0], f"Failed to deliver to topic {{topic}}: .*{DENIED}"),
    "write any topic": ("producer", "reader", ["-c", 0], "can't write to topic {topic}: .* authorization failed"),
    "see, producer": ("producer", "nobody", [], "can't write to topic {topic}: .* authorization failed"),
    "see, consumer": ("consumer", "nobody", [], "can't read topic {topic}: .* authorization failed"),
    "read": ("consumer", "walter", [], f"can't read topic {{topic}}: .*{DENIED}"),
    "read a stretch": ("consumer", "walter", ["--from-offset", "beginning"], f"can't read topic {{topic}}: .*{DENIED}"),
    "use the group": ("consumer", "nogroup", [], "can't read topic {topic}: .*Group authorization failed"),
}


@pytest.mark.parametrize(("name", "user", "options", "expected"), NO_RIGHTS.values(), ids=NO_RIGHTS)
def test_no_right_to(scripts, cluster, files, topic, name, user, options, expected):
    create_topic(cluster, topic)
    produce(cluster, topic, numbered(3))
    path = write(scripts.folder / "client.properties", login(files, user))
    script = getattr(scripts, name)("-t", topic, "-F", path, *options)
    assert_failed(script, seconds_until_end(script), expected.format(topic=topic))
    assert "Produced message" not in script.stdout
    assert "number" not in script.stdout


def test_a_fatal_error_that_produce_meets_first(scripts, cluster, files, topic):
    """It says only that there is one; so the reason is told as well. In a copy that waits before it."""
    create_topic(cluster, topic)
    path = write(scripts.folder / "client.properties", login(files, "reader"))
    before = "            if event is None:  # There is none yet.\n"
    mine = copy_with(scripts.folder, "kafka_producer.py", "            time.sleep(2)\n", before)
    command = [sys.executable, mine, "-b", cluster.bootstrap_servers, "-t", topic, "-F", path]
    done = subprocess.run(command, cwd=scripts.folder, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 1
    refusal, error, hint = done.stderr.splitlines()
    assert re.fullmatch(rf"Failed to deliver to topic {topic}: .*Local: Fatal error\. Value: .*", refusal)
    assert re.fullmatch(rf"mine\.py: can't write to topic {topic}: .*Cluster authorization failed", error)
    assert hint == LOOK_FIRST
    assert done.stdout.splitlines()[-1] == f"Delivered 0 events to topic {topic}, 1 failed."
    log = scripts.log.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in log] == [refusal, error]


def test_a_commit_that_fails(scripts, cluster, files, topic, group):
    """It is told, also by the exit status, since the same events come again."""
    create_topic(cluster, topic)
    produce(cluster, topic, numbered(3))
    # So that the group's right is not needed before the end.
    late = {"auto.commit.interval.ms": 60_000, "session.timeout.ms": 45_000, "heartbeat.interval.ms": 40_000}
    path = write(scripts.folder / "client.properties", login(files, "gina") | late)
    consumer = scripts.consumer("-t", topic, "-G", group, "-F", path)
    consumer.wait_for_lines(3)
    admin = AdminClient(cluster.client_config)
    right = AclBindingFilter(
        ResourceType.GROUP,
        "*",
        ResourcePatternType.LITERAL,
        "User:gina",
        "*",
        AclOperation.ALL,
        AclPermissionType.ALLOW,
    )
    (deleted,) = admin.delete_acls([right]).values()
    assert deleted.result(20)
    wait_until(lambda: not admin.describe_acls(right).result(20), "the end of the right to the group")
    assert consumer.end() == 1
    assert "Can't commit offsets, so these events may come again: " in consumer.stderr
    assert "Group authorization failed" in consumer.stderr


def test_all_listen_on_loopback_only(scripts, cluster, files, topic, group):
    """The broker with TLS, ZooKeeper and both scripts."""
    create_topic(cluster, topic)
    path = write(scripts.folder / "client.properties", login(files, "alice"))
    producer = scripts.producer("-t", topic, "-F", path, "-c", 0, "-i", 0.1)
    consumer = scripts.consumer("-t", topic, "-F", path, "-G", group)
    consumer.wait_for_lines(1)
    javas = [java for service in cluster.services for java in service.processes()[1]]
    for process in [*javas, psutil.Process(producer.process.pid), psutil.Process(consumer.process.pid)]:
        connections = process.net_connections("inet")
        assert connections
        listening = {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}
        assert listening <= ({"127.0.0.1", "::ffff:127.0.0.1"} if process in javas else set())
        assert listening or process not in javas
    assert producer.end() == 130
    assert consumer.end() == 0


def test_a_line_with_a_password_that_is_not_understood_is_not_repeated(scripts, topic):
    """Each of these is a slip that people make; the second ends with = as many generated passwords do."""
    for line in (
        f"sasl.password {WRONG_PASSWORD}",
        f"sasl.password {WRONG_PASSWORD}=",
        f"sasl.password: {WRONG_PASSWORD}=",
    ):
        path = scripts.folder / "client.properties"
        path.write_text(f"client.id=x\n{line}\n")
        for script in (scripts.producer("-t", topic, "-F", path), scripts.consumer("-t", topic, "-F", path)):
            assert script.wait() == 2
            assert "line 2 is not key=value" in script.stderr
            assert_no_password(script)
