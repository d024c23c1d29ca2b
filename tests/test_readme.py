"""README.md word for word: every shell block is run, and prints what the README says that it prints.

The words behind ```sh say how: "until Ctrl-C" ends it by that once it has printed what is shown; "outage" is the same
with the cluster down for a while; "docker" is only looked at; "kcat" needs kcat; "tests" would run these tests, and is
compared with .ci/run.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXTERNAL, ROOT, wait_until
from local_cluster import class_path, free_port

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+) ?(.*)\n((?s:.*?))^```$", re.MULTILINE)
BLOCKS = [match.groups() for match in BLOCK.finditer(README)]
# Of Kafka's own tools, which are in the image, the options that the README may use (--help of Kafka 3.9's tools).
TOOLS = {
    "kafka-topics": {"--bootstrap-server", "--describe", "--topic"},
    "kafka-console-consumer": {"--bootstrap-server", "--topic", "--from-beginning", "--max-messages"},
    "kafka-consumer-groups": {"--bootstrap-server", "--describe", "--group"},
}


def masked(text):
    """Text without what is different in each run: registrations, keys and times."""
    text = re.sub(r"\{.*\}", "{...}", text)
    text = re.sub(r"time=\S+ key=\d+", "time key", text)
    text = re.sub(r"confirm \d+ events: .*|\(localhost.*\)", "reason", text)
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "date", text)


def missing(shown, printed):
    """Returns the first line of the README's sample that did not come, in this order; None if all did."""
    lines = iter(masked(printed).splitlines())  # `in` takes lines off it, up to the one that it finds.
    for line in masked(shown).splitlines():
        if line not in ("", "...") and line not in lines:
            return line
    return None


@pytest.mark.skipif(bool(EXTERNAL), reason="it starts its own cluster")
@pytest.mark.timeout(300)
def test_every_block(tmp_path):
    port = free_port()
    clone = tmp_path / "clone"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in names.stdout.decode().split():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        # So that it can run beside a cluster in use, its port is another one, in all files alike.
        (clone / name).write_text(re.sub(r"\b9092\b", str(port), (ROOT / name).read_text()))
    jars = Path(class_path()).parent  # Not downloaded once more.
    shutil.copytree(jars, clone / "tests/.local_cluster" / jars.name)
    environment = {**os.environ, "PATH": f"{clone}/.venv/bin:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    output = tmp_path / "output"

    def cluster(*words):
        subprocess.run([sys.executable, clone / "tests/local_cluster.py", *words], check=True, timeout=60)

    def run(command, until=None, outage=False):
        print(f"$ {command}")
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-ec", command], cwd=clone, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        try:
            if until is not None:
                turns = r"(?m)^(?=Waiting for|No answer|Delivering again|.* answers again)"
                stages = re.split(turns, until) if outage else [until]
                for number in range(len(stages)):
                    if number:
                        cluster("down" if number == 1 else "up")
                    lines = "".join(stages[: number + 1])
                    wait_until(lambda it=lines: missing(it, output.read_text()) is None, f"{lines!r} from {command}")
                os.killpg(process.pid, signal.SIGINT)
            process.wait(120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode

    ran = 0
    try:
        for position, (language, words, text) in enumerate(BLOCKS):
            command = text.replace("9092", str(port))
            following = BLOCKS[position + 1] if position + 1 < len(BLOCKS) else ("", "", "")
            shown = following[2].replace("9092", str(port)) if following[0] == "text" and not following[1] else ""
            if language != "sh":
                continue
            ran += 1
            subprocess.run(["bash", "-n", "-c", text], check=True)
            if words in ("until Ctrl-C", "outage"):
                end = "Printed 10 events."  # Comes after Ctrl-C.
                run(command, shown.replace(end, ""), words == "outage")
            elif words not in ("docker", "tests") and (words != "kcat" or shutil.which("kcat")):
                assert run(command) == 0, output.read_text()
                assert missing(shown, output.read_text()) is None, output.read_text()
    finally:
        cluster("down", "-v")
    assert ran == README.count("```sh")


def test_docker_commands_exist():
    """There is no Docker where the tests run, so its commands are only compared with those known to be right."""
    commands = re.findall(r"docker compose ((?:up|down|stop|start|ps|exec)\b[^`\n&#]*)", README)
    for command in map(str.strip, commands):
        if command.startswith("exec"):
            tool, *words = command.removeprefix("exec broker ").split()
            assert {word for word in words if word.startswith("-")} <= TOOLS[tool], command
            assert "localhost:9092" in words
        else:
            assert command in ("up -d --wait", "down", "down -v", "stop broker", "start broker", "ps")
    assert len(commands) >= 10


def test_the_test_command_is_that_of_ci():
    commands = [text.strip() for language, words, text in BLOCKS if (language, words) == ("sh", "tests")]
    assert sum(command.endswith("&& python -m pytest") for command in commands) == 1
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "python -m pytest"


@pytest.mark.parametrize("name", ["kafka_producer.py", "kafka_consumer.py"])
def test_the_reference_is_the_help(name):
    environment = {**os.environ, "COLUMNS": "110"}
    done = subprocess.run(
        [sys.executable, ROOT / name, "--help"], env=environment, capture_output=True, text=True, check=True
    )
    assert dict((words, text) for _, words, text in BLOCKS)[f"help {name}"] == done.stdout


def test_links_and_names_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target
    code = (ROOT / "kafka_producer.py").read_text() + (ROOT / "kafka_consumer.py").read_text()
    for name in ("registration", "main", "on_delivery", "serve", "finish", "handle"):
        assert f"`{name}`" in README
        assert f"def {name}(" in code
