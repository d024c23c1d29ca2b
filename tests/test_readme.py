"""README.md as a person follows it: everything is typed in order, in the terminals as told, and shows what it says.

What the test obeys is what the reader sees. The paragraph before a block names its terminal; without one, commands
are for terminal 1, and a sample is what the terminal of the step before it shows. "Ctrl-C in terminal 2" in the text
is pressed there. A terminal in which something still runs takes no other command. Two words behind ```sh are not for
the reader: "docker" is only looked at, "tests" would run these tests.
"""

import csv
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from conftest import EXTERNAL, LIMIT, ROOT, committed, produce, read_topic, wait_until
from local_cluster import KAFKA_VERSIONS, class_path, free_port

README = (ROOT / "README.md").read_text()
# A block, with the language, the words behind it and the text; or the terminal in which to press Ctrl-C.
STEP = re.compile(r"^```(\w+) ?(.*)\n((?s:.*?))^```$|Ctrl-C\s+in\s+terminal\s+(\d)", re.MULTILINE)
# Of Kafka's own tools, which are in the image, the options that the README may use (--help of Kafka 3.9's tools).
TOOLS = {
    "kafka-topics": {"--bootstrap-server", "--describe", "--topic"},
    "kafka-consumer-groups": {"--bootstrap-server", "--describe", "--group"},
}


def blocks(language, words=""):
    return [step[3] for step in STEP.finditer(README) if (step[1], step[2]) == (language, words)]


class Terminal:
    """A shell in a terminal: what is typed, what is seen, and Ctrl-C.

    screen: all that was seen, a string. The prompt is a line with the status of the last command.
    """

    def __init__(self, number, folder, output):
        self.number, self.output, self.commands, self.interrupted = number, output, 0, False
        # A process of its own passes on what is typed and seen, so that nothing here has to read all the time.
        shell = "import pty; pty.spawn(['bash', '--norc', '--noediting', '-i'])"
        environment = {**os.environ, "PS1": "status $?\n", "PS2": "", "BASH_SILENCE_DEPRECATION_WARNING": "1"}
        # With this, pip finds that all is there. That it can be installed is shown by .ci/run.
        environment |= {"PYTHONPATH": sysconfig.get_path("purelib")}
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", shell], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=file
            )
        self.command("stty -echo")

    @property
    def screen(self):
        # A carriage return alone begins the same line again.
        return re.sub(r"\r+\n|\r", "\n", self.output.read_text(errors="replace"))

    def press(self, keys):
        self.process.stdin.write(keys.encode())
        self.process.stdin.flush()

    def statuses(self):
        return re.findall(r"status (\d+)\n", self.screen)

    def wait_for_prompt(self):
        """Fails if the last command does not end by itself or by Ctrl-C, or with another status than 0."""
        wait_until(lambda: len(self.statuses()) > self.commands, ["the prompt", self], limit=90)
        assert self.statuses()[-1] == "0" or self.interrupted, repr(self)

    def command(self, text):
        self.wait_for_prompt()
        self.press(text.rstrip("\n") + "\n")
        self.commands += 1
        self.interrupted = False

    def ctrl_c(self):
        assert len(self.statuses()) == self.commands, f"nothing runs in {self!r}"
        self.interrupted = True
        self.press("\x03")

    def __repr__(self):
        return f"terminal {self.number}, which shows:\n{self.screen[-3000:]}"


def masked(text):
    """Text without what is different in each run: registrations, keys, times, and who gets which partitions."""
    text = re.sub(r"\{.*\}", "{...}", text)
    text = re.sub(r"timestamp=\d+ key=\d+", "timestamp key", text)
    text = re.sub(r"partitions: (0, 1|2, 3)$", "partitions: two", text, flags=re.MULTILINE)
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "date", text)


def is_shown(sample, screen):
    """Is the sample on the screen, word for word? "..." in a line is any text; as a line, any lines."""
    lines = []
    for line in masked(sample).splitlines():
        words = (re.escape(part) for part in line.split("..."))
        lines.append("(.*\n)*?" if line == "..." else ".*".join(words) + "\n")
    return re.search("^" + "".join(lines), masked(screen), re.MULTILINE) is not None


def clone_with_free_ports(folder):
    """Copies this checkout with other ports in all files alike, so that it can run beside a cluster in use."""
    ports = {number: str(free_port()) for number in ("9092", "9093", "9094")}
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in names.stdout.decode().split():
        if (ROOT / name).exists():  # Not deleted a moment ago.
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            text = re.sub(r"\b909[234]\b", lambda found: ports[found[0]], (ROOT / name).read_text())
            (folder / name).write_text(text)
    for version in KAFKA_VERSIONS.values():
        jars = Path(class_path(version)).parent  # Not downloaded once more.
        shutil.copytree(jars, folder / "tests/.local_cluster" / jars.name)


# The chapters with clusters of their own, which take as long as all others.
MORE_CLUSTERS = re.compile(r"^### Three brokers$.*?(?=^## )", re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(bool(EXTERNAL), reason="it starts its own cluster")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)])
def test_every_step(tmp_path, whole):
    clone = tmp_path / "clone"
    clone_with_free_ports(clone)
    readme = (clone / "README.md").read_text()
    if not whole:
        readme, cut = MORE_CLUSTERS.subn("Press Ctrl-C in terminal 2.\n\n", readme)
        assert cut == 1
        # To install pip too would take as long as a chapter.
        readme = readme.replace("venv .venv", "venv --without-pip .venv").replace("pip inst", "python -m pip inst")
    terminals = {number: Terminal(number, clone, tmp_path / f"terminal-{number}") for number in "123"}
    seen = dict.fromkeys("123", 0)  # How much of each screen was there before the last step that changed something.
    terminal, position, begin = "1", 0, time.monotonic()
    try:
        for step in STEP.finditer(readme):
            language, words, text, interrupted = step.groups()
            told = readme[position : step.start()].rstrip().split("\n\n")[-1]
            named = re.findall(r"terminal\s+(\d)", told, re.IGNORECASE)
            position = step.end()
            if language == "text" and not words:
                terminal = named[-1] if named else terminal
                shows, start = terminals[terminal], seen[terminal]
                wait_until(lambda: is_shown(text, shows.screen[start:]), [text, shows], limit=180)  # noqa: B023
            elif interrupted:
                terminal = interrupted
                seen = {number: len(terminals[number].screen) for number in terminals}
                terminals[terminal].ctrl_c()
            elif language == "sh" and not words:
                terminal = named[-1] if named else "1"
                # As the README tells those who have no Docker.
                command = text.replace("docker compose", "python tests/local_cluster.py")
                print(f"after {time.monotonic() - begin:.0f} s, terminal {terminal}: {command}", end="")
                terminals[terminal].wait_for_prompt()
                seen = {number: len(terminals[number].screen) for number in terminals}
                terminals[terminal].command(command)
                if "local_cluster.py" in command and "kafka_" not in command:
                    terminals[terminal].wait_for_prompt()  # As everybody does who has stopped or started something.
        for each in terminals.values():
            each.wait_for_prompt()
    finally:
        for each in terminals.values():
            each.process.kill()
            each.process.wait()
        for compose_file in (clone / "docker-compose.yaml", *clone.glob("tests/*.yaml")):
            command = [sys.executable, clone / "tests/local_cluster.py", "-f", compose_file, "down", "-v"]
            subprocess.run(command, check=True, timeout=90)


def make_it_yours(name, word, *imports):
    """Returns a script in which README's example with this word takes the place of the function of this name.

    imports: the modules that the example needs.
    """
    (example,) = (block for block in blocks("python") if f"def {name}(" in block and word in block)
    script = {"registrations": "kafka_producer.py", "process": "kafka_consumer.py"}[name]
    code = (ROOT / script).read_text()
    before, _, after = re.split(rf"^(def {name}\(.*\n(?:(?:    .*)?\n)+)", code, flags=re.MULTILINE)
    for module in imports:
        assert f"import {module}" in README
    return "".join(f"import {module}\n" for module in imports) + f"{before}{example}\n\n{after}"


def test_make_the_producer_yours(scripts, cluster, topic):
    rows = [{"customer": f"Zoë {number % 3}", "note": "" if number % 2 else "a, b"} for number in range(100)]
    with (scripts.folder / "orders.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    indent, new = " " * 16, 'key = str(event["customer"])'
    old = f'{indent}key = str(event["user_id"])\n'
    assert f"`{new}`" in README
    code = make_it_yours("registrations", "csv", "csv")
    assert code.count(old) == 1
    code = code.replace(old, f"{indent}{new}\n")
    code, removed = re.subn(r'^    add\(.*"--(?:count|interval|seed)".*\n', "", code, flags=re.MULTILINE)
    assert removed == 3
    code, removed = re.subn(r"^    if args.count < 0 .*\n.*\n", "", code, flags=re.MULTILINE)
    assert removed == 1
    (scripts.folder / "mine.py").write_text(code)
    options = ["-b", cluster.bootstrap_servers, "-t", topic, "-q"]
    shown = subprocess.check_output([sys.executable, "mine.py", *options], cwd=scripts.folder, text=True, timeout=LIMIT)
    assert shown.splitlines()[-1] == f"Delivered 100 events to topic {topic}, 0 failed."
    stored = [(record.key.decode(), json.loads(record.value)) for record in read_topic(cluster, topic)]
    assert stored == [(row["customer"], row) for row in rows]


def test_make_the_producer_wait_for_lines(scripts, cluster, topic):
    """Each is sent soon after it has come, though no other comes, and at the end of the input the program ends."""
    values = [b'{"user_id": %d}' % number for number in range(3_000)]
    code = make_it_yours("registrations", "queue", "queue", "threading")
    (scripts.folder / "mine.py").write_text(code)
    command = [sys.executable, "mine.py", "-b", cluster.bootstrap_servers, "-t", topic]
    with subprocess.Popen(command, cwd=scripts.folder, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as producer:
        for part in (values[:2], values[2:]):
            producer.stdin.write(b"".join(value + b"\n" for value in part))
            producer.stdin.flush()
            last = f"{part[-1].decode()}, partition"
            wait_until(lambda it=last: scripts.log.exists() and it in scripts.log.read_text(), "the last report")
        producer.stdin.close()
        assert producer.wait(LIMIT) == 0
    assert [record.value for record in read_topic(cluster, topic)] == values


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_the_producer_waits_for_lines(scripts, cluster, topic, signum):
    (scripts.folder / "mine.py").write_text(make_it_yours("registrations", "queue", "queue", "threading"))
    command = [sys.executable, "mine.py", "-b", cluster.bootstrap_servers, "-t", topic]
    with subprocess.Popen(command, cwd=scripts.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as producer:
        assert producer.stdout.readline() == b"Kafka Producer has been initiated...\n"
        producer.send_signal(signum)
        assert producer.stdout.read().decode() == f"Delivered 0 events to topic {topic}, 0 failed.\n"
        assert producer.wait(LIMIT) == 128 + signum


BAD = [None, b"", b"\xff", b"[]", b"{}", b"[" * 100_000, rb'{"user_id": 1, "user_name": "\ud800"}']


def test_make_the_consumer_yours(scripts, cluster, topic, group):
    """Each event of the producer is in the database once, though it is processed twice, and bad ones are skipped."""
    assert scripts.producer("-t", topic, "-i", 0, "--seed", 1).wait() == 0
    produce(cluster, topic, BAD)
    assert scripts.producer("-t", topic, "-i", 0, "--seed", 1).wait() == 0
    records = read_topic(cluster, topic)
    names = {record.offset: json.loads(record.value)["user_name"] for record in (*records[:10], *records[-10:])}
    (scripts.folder / "mine.py").write_text(make_it_yours("process", "sqlite3", "json", "sqlite3"))
    command = [sys.executable, "mine.py", "-b", cluster.bootstrap_servers, "-t", topic, "-G", group, "--exit"]
    done = subprocess.run(command, cwd=scripts.folder, capture_output=True, text=True, timeout=LIMIT, check=True)
    subprocess.run([*command, "--from-offset", "beginning"], cwd=scripts.folder, timeout=LIMIT, check=True)
    skipped = re.findall("^Skipped partition 0, offset ([0-9]+): .", done.stderr, re.MULTILINE)
    assert skipped == [str(10 + number) for number in range(len(BAD))]
    database = sqlite3.connect(scripts.folder / "names.db")
    rows = database.execute("SELECT * FROM names ORDER BY offset").fetchall()
    database.close()
    assert rows == [(topic, 0, offset, name) for offset, name in names.items()]


def test_ctrl_c_while_the_consumer_tries_again(scripts, cluster, filled, group):
    """The event is not done, and those before it are."""
    code = make_it_yours("process", "save(")
    save = "def save(message):\n    print(message.offset(), flush=True)\n    return message.offset() < 5\n\n\n"
    (scripts.folder / "mine.py").write_text(code.replace("def process(", f"{save}def process("))
    command = [sys.executable, "mine.py", "-b", cluster.bootstrap_servers, "-t", filled, "-G", group, "--exit"]
    with subprocess.Popen(command, cwd=scripts.folder, stdout=subprocess.PIPE) as consumer:
        assert [consumer.stdout.readline() for _ in range(7)] == [b"%d\n" % number for number in (0, 1, 2, 3, 4, 5, 5)]
        consumer.send_signal(signal.SIGINT)
        assert set(consumer.stdout) <= {b"5\n"}
        assert consumer.wait(LIMIT) == 130
    assert committed(cluster, filled, group) == 5


def test_every_block_is_one_of_these():
    kinds = {(step[1], step[2]) for step in STEP.finditer(README) if step[1]}
    assert kinds == {
        ("mermaid", ""),
        ("properties", ""),
        ("python", ""),
        ("sh", ""),
        ("sh", "docker"),
        ("sh", "tests"),
        ("text", ""),
    }
    for step in STEP.finditer(README):
        if step[1] == "sh":
            subprocess.run(["bash", "-n", "-c", step[3]], check=True)


def test_docker_commands_exist():
    """There is no Docker where the tests run, so its commands are only compared with those known to be right."""
    known = {
        "docker-compose.yaml": "up -d --wait, down, down -v, stop broker, start broker, ps, logs broker",
        "tests/three-brokers.yaml": "up -d --wait, down -v, stop broker-2, stop broker-3, start broker-2",
        "tests/kafka-4.yaml": "up -d --wait, down -v",
    }
    commands = re.findall(r"docker compose (?:-f (\S+) )?((?:up|down|stop|start|ps|logs|exec)\b[^`\n&)]*)", README)
    for compose_file, command in commands:
        if command.startswith("exec"):
            tool, *words = command.removeprefix("exec broker ").split()
            assert {word for word in words if word.startswith("-")} <= TOOLS[tool], command
            # Not localhost:9092: in the cluster of three, the other brokers' localhost is not this container.
            assert "broker:29092" in words
        else:
            assert command.strip() in known[compose_file or "docker-compose.yaml"].split(", "), command
    assert len(commands) >= 10


def test_the_test_command_is_that_of_ci():
    (command,) = blocks("sh", "tests")
    assert command == "pip install -r tests/requirements.txt && python -m pytest\n"
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "python -m pytest"


@pytest.mark.parametrize("name", ["kafka_producer.py", "kafka_consumer.py"])
def test_every_option_is_explained(name):
    """In the README, or in --help by its default."""
    done = subprocess.run([sys.executable, ROOT / name, "--help"], capture_output=True, text=True, check=True)
    options = re.split(r"^  (?=-)", done.stdout, flags=re.MULTILINE)[1:]
    assert len(options) >= 9
    names = [re.search(r"--[\w-]+", text)[0] for text in options if "(default:" not in text]
    missing = [name for name in names if not re.search(rf"{name}\b", README)]
    assert missing in ([], ["--help"])


@pytest.mark.parametrize("page", ["README.md", "tests/README.md"])
def test_links_and_files_exist(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if not target.startswith("https://"):
            assert (ROOT / page).parent.joinpath(target.partition("#")[0]).exists(), target
    for name in re.findall(r"`((?:tests/|\.ci/|\.github/)[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_functions_exist():
    """A section that names scripts speaks of their functions; others speak of both."""
    found = set()
    for section in re.split(r"^#+ ", README, flags=re.MULTILINE):
        scripts = re.findall(r"\]\((kafka_\w+\.py)\)", section) or ["kafka_producer.py", "kafka_consumer.py"]
        code = "".join((ROOT / script).read_text() for script in scripts)
        for name in re.findall(r"`(\w+)\(\)`", section):
            assert re.search(rf"(def |\.){name}\(", code), f"{name} in {scripts}"
            found.add(name)
    assert len(found) >= 10
